"""Soft labels of a file: every way to write them, and every way to get them wrong."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.data import sources
from stillroom.data.soft_labels import logits_of
from stillroom.data.tasks import Rows
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings

SOFT = [[0.9, 0.1], [0.2, 0.8], [0.5004, 0.5]]
FULL = ("text,label\ngood,pos\nbad,neg\n", "validation.csv")


def _load(folder: Path, name: str, content: Any, soft: str = "p", **settings: Any) -> Rows:
    folder.mkdir(exist_ok=True)
    if isinstance(content, dict):
        pq.write_table(pa.table(content), folder / name)
    else:
        (folder / name).write_text(content)
    if not (folder / FULL[1]).exists():
        (folder / FULL[1]).write_text(FULL[0])
    return sources.load(DatasetSettings(name=str(folder), soft_labels=soft, **settings)).splits["train"]


def _columns(values: list[Any], labels: list[Any] | None = None) -> dict[str, Any]:
    return {"text": ["a", "b", "c"], "label": labels or ["neg", "pos", "neg"], "p": values}


LINES = [
    '{"text": "a", "label": "neg", "p": [0.9, 0.1]}',
    '{"text": "b", "label": "pos", "p": [0.2, 0.8]}',
    '{"text": "c", "label": "neg", "p": [0.5004, 0.5]}',
]
OBJECTS = [
    "text\tlabel\tp",
    'a\tneg\t{"pos": 0.1, "neg": 0.9}',
    'b\tpos\t{"neg": 0.2, "pos": 0.8}',
    'c\tneg\t{"neg": 0.5004, "pos": 0.5}',
]


@pytest.mark.parametrize(
    "content",
    [
        ("train.parquet", _columns(SOFT)),
        ("train.jsonl", "\n".join(LINES)),
        ("train.tsv", "text\tlabel\tp\na\tneg\t[0.9, 0.1]\nb\tpos\t[0.2, 0.8]\nc\tneg\t[0.5004, 0.5]\n"),
        ("train.tsv", "\n".join(OBJECTS)),
        ("train.csv", "text,label,ppos,pneg\na,neg,0.1,0.9\nb,pos,0.8,0.2\nc,neg,0.5,0.5004\n"),
    ],
    ids=["list", "jsonl", "text", "object", "columns"],
)
def test_every_way_to_write_them(tmp_path: Path, content: tuple[str, Any]) -> None:
    rows = _load(tmp_path / "data", *content)
    dataset = sources.load(DatasetSettings(name=str(tmp_path / "data"), soft_labels="p"))
    order = [dataset.task.labels.index(name) for name in ("neg", "pos")]
    assert rows.soft_labels is not None and rows.unlabelled is not None
    np.testing.assert_allclose(rows.soft_labels[:, order], SOFT, rtol=1e-6)
    assert not rows.unlabelled.any()
    assert [dataset.task.labels[i] for i in rows.labels] == ["neg", "pos", "neg"]
    assert dataset.splits["validation"].soft_labels is None


def test_rows_without_label_have_what_their_soft_labels_say(tmp_path: Path) -> None:
    rows = _load(
        tmp_path / "data", "train.parquet", _columns(SOFT, ["neg", None, ""]), labels=("neg", "pos")
    )
    assert rows.unlabelled is not None and rows.unlabelled.tolist() == [False, True, True]
    assert rows.labels.tolist() == [0, 1, 0]
    kept = rows.take(np.array([2, 1]))
    assert kept.soft_labels is not None and kept.unlabelled is not None
    np.testing.assert_allclose(kept.soft_labels, [SOFT[2], SOFT[1]], rtol=1e-6)
    assert kept.unlabelled.tolist() == [True, True]


def test_a_file_without_labels_takes_their_names_from_the_columns(tmp_path: Path) -> None:
    rows = _load(
        tmp_path / "data",
        "train.csv",
        "text,probability_neg,probability_pos\na,0.9,0.1\nb,0,1\n",
        "probability_",
    )
    assert rows.labels.tolist() == [0, 1] and rows.unlabelled is not None and rows.unlabelled.all()


def test_of_a_single_file_labelled_rows_are_held_out(tmp_path: Path) -> None:
    lines = [f"t{i},{'neg' if i % 2 else 'pos' if i < 30 else ''},0.5,0.5" for i in range(40)]
    (tmp_path / "all.csv").write_text("\n".join(["text,label,pneg,ppos", *lines]))
    found = sources.load(DatasetSettings(name=str(tmp_path / "all.csv"), soft_labels="p")).splits
    assert len(found["validation"]) == 3 and found["validation"].unlabelled is not None
    assert not found["validation"].unlabelled.any()
    assert found["train"].unlabelled is not None and found["train"].unlabelled.sum() == 5


def test_scores_and_several_labels(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.csv").write_text("text,label\na,1.5\nb,2\n")
    rows = _load(tmp_path / "data", "train.csv", "text,label,p\na,1.5,1.25\nb,,2.5\n", kind="regression")
    assert rows.soft_labels is not None
    assert rows.soft_labels.tolist() == [[1.25], [2.5]] and rows.labels.tolist() == [1.5, 2.5]
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "validation.csv").write_text("text,label\na,x|y\nb,y\n")
    text = "text,label,px,py\na,x,0.9,0.7\nb,,0.1,0.8\n"
    rows = _load(tmp_path / "many", "train.csv", text, kind="multi-label")
    assert rows.labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5, 0.4], "sum to 1"),
        ([0.5, 0.502], "sum to 1"),
        ([0.2, 0.3, 0.5], "expected 2 soft labels"),
        ([1.2, -0.2], "from 0 to 1"),
        ([float("nan"), 1.0], "finite"),
        (None, "Every row needs them"),
        ([], "expected 2 soft labels"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message) as error:
        _load(tmp_path / "data", "train.parquet", _columns([SOFT[0], value, SOFT[2]]))
    assert "row 2" in str(error.value)


def test_missing_columns_and_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="no soft labels"):
        _load(tmp_path / "a", "train.csv", "text,label\na,neg\nb,pos\n")
    with pytest.raises(WrongInput, match="pneutral is missing|no soft labels"):
        _load(tmp_path / "b", "train.csv", "text,label,pneg\na,neg,1\nb,pos,0\n", labels=("neg", "pos"))
    with pytest.raises(WrongInput, match="found of neg, other"):
        _load(
            tmp_path / "c",
            "train.jsonl",
            '{"text": "a", "label": "neg", "p": {"neg": 1, "pos": 0}}\n'
            '{"text": "b", "label": "pos", "p": {"neg": 1, "other": 0}}',
        )
    with pytest.raises(WrongInput, match=r"remove dataset\.soft_labels"):
        sources.load(DatasetSettings(name="builtin/verdicts", soft_labels="p"))
    with pytest.raises(WrongInput, match="Augmented rows have no soft labels"):
        _load(tmp_path / "d", "train.parquet", _columns(SOFT), augmented=Path("a.parquet"))


def test_logits_give_the_soft_labels_back() -> None:
    soft = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    logits = logits_of(soft, "classification").astype(np.float64)
    again = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(again, soft, atol=1e-6)
    assert np.isfinite(logits).all()
    several = logits_of(np.array([[0.25, 1.0]]), "multi-label")
    assert several[0, 0] == pytest.approx(math.log(0.25 / 0.75), rel=1e-6) and math.isfinite(several[0, 1])
    np.testing.assert_array_equal(logits_of(np.array([[2.5]]), "regression"), [[2.5]])
