"""Augmented rows read from a file: of these training rows, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workspace import write_data

from stillroom.data import sources
from stillroom.data.augmented import ABOUT, fingerprint
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows") / "data")


def _write(path: Path, source: list[Any], *, of: str | None = None, **columns: list[Any]) -> Path:
    columns = columns or {"text": [f"made of {i}" for i in source]}
    table = pa.table({**columns, "source_row": source})
    if of is not None:
        table = table.replace_schema_metadata({ABOUT: json.dumps({"fingerprint": of})})
    pq.write_table(table, path)
    return path


def _load(data: Path, path: Path, **settings: Any) -> Any:
    return sources.load(DatasetSettings(name=str(data), augmented=path, **settings))


def test_they_stand_behind_the_rows_with_the_labels_of_their_sources(data: Path, tmp_path: Path) -> None:
    plain = sources.load(DatasetSettings(name=str(data)))
    train = plain.splits["train"]
    path = _write(tmp_path / "a.parquet", [3, 200, 3], of=fingerprint(train))
    found = _load(data, path)
    assert (found.augmented, len(found.splits["train"])) == (3, 243)
    assert found.splits["train"].texts[0] == [*train.texts[0], "made of 3", "made of 200", "made of 3"]
    assert found.splits["train"].labels.tolist() == [*train.labels.tolist(), *train.labels[[3, 200, 3]]]
    assert found.splits["validation"].texts == plain.splits["validation"].texts
    only = sources.load(DatasetSettings(name=str(data), augmented=path), splits=("validation",))
    assert (only.augmented, list(only.splits)) == (0, ["validation"])


def test_of_rows_that_are_drawn_only_theirs_are_kept(data: Path, tmp_path: Path) -> None:
    drawn = sources.drawn_rows(240, 10)
    assert drawn is not None and len(drawn) == 10
    assert sources.drawn_rows(240, 240) is None
    others = np.setdiff1d(np.arange(240), drawn)
    wanted = [int(drawn[4]), int(others[0]), int(drawn[0])]
    path = _write(tmp_path / "a.parquet", wanted)
    found = _load(data, path, train_rows=10)
    assert found.splits["train"].texts[0][10:] == [f"made of {drawn[4]}", f"made of {drawn[0]}"]
    assert found.source_rows.tolist() == [4, 0]


def test_a_csv_file_without_fingerprint_is_read(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,source_row\nanother film,239\n")
    assert _load(data, tmp_path / "a.csv").splits["train"].texts[0][-1] == "another film"


@pytest.mark.parametrize("source", [[240], [-1], [None], [0.5]])
def test_numbers_of_no_training_row_are_refused(data: Path, tmp_path: Path, source: list[Any]) -> None:
    with pytest.raises(WrongInput, match="0 to 239"):
        _load(data, _write(tmp_path / "a.parquet", source))


def test_other_rows_and_missing_columns_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="made of other training rows"):
        _load(data, _write(tmp_path / "a.parquet", [0], of="0" * 64))
    with pytest.raises(WrongInput, match="no column 'text'"):
        _load(data, _write(tmp_path / "b.parquet", [0], sentence=["x"]))
    with pytest.raises(WrongInput, match="row 2: expected text"):
        _load(data, _write(tmp_path / "c.parquet", [0, 1], text=["x", None]))
    with pytest.raises(WrongInput, match="cannot be read"):
        _load(data, tmp_path / "nothing.parquet")
