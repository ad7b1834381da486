"""Labels, texts, lengths and batches: what is refused, and what only warned of."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checking import check, make_run, problem, with_rows, with_texts
from stillroom.data import sources
from stillroom.data.tasks import Dataset, Kind
from stillroom.recipe import DatasetSettings
from tiny import make_dataset, make_encoder

# Labels


def with_labels(split: str, labels: Sequence[Any], kind: Kind = "classification") -> Dataset:
    """Return the toy data with the first labels of a split replaced."""
    dataset = make_dataset(kind)
    changed = dataset.splits[split].labels.copy()
    changed[: len(labels)] = labels
    return with_rows(dataset, split, labels=changed)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("kind", "labels", "found"),
    [
        ("classification", [0, 2], "from 0 to 1, for [negative, positive], found 2 (row 2; 1 in all)"),
        ("classification", [-1] * 7, "found -1 (rows 1, 2, 3, 4, 5 and 2 more; 7 in all)"),
        ("regression", [np.nan], "a number for every row, found nan (row 1; 1 in all)"),
        ("regression", [0.5, np.inf], "a number for every row, found inf (row 2; 1 in all)"),
        ("multi-label", [[0, 1, 0.5]], "0 or 1 for each of [x, y, z], found 0.5 (row 1; 1 in all)"),
        ("multi-label", [[np.nan] * 3], "a number for every row, found nan (row 1; 1 in all)"),
    ],
)
def test_invalid_labels_are_refused(
    kind: Kind, labels: list[Any], found: str, split: str, tmp_path: Path
) -> None:
    text = problem(make_run(tmp_path, dataset=with_labels(split, labels, kind)))
    assert f"Labels of {split} (toy rows): expected" in text
    assert found in text


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("kind", "label", "shown"),
    [
        ("classification", 1, "positive"),
        ("regression", 0.5, "0.5"),
        ("multi-label", [1, 0, 0], "[1, 0, 0]"),
    ],
)
def test_labels_that_are_all_the_same_are_refused(
    kind: Kind, label: Any, shown: str, split: str, tmp_path: Path
) -> None:
    text = problem(
        make_run(tmp_path, dataset=with_labels(split, [label] * (48 if split == "train" else 24), kind))
    )
    assert f"labels of {split} (toy rows) are the same ({shown})" in text


def test_held_out_rows_that_are_all_the_same_say_how_they_were_chosen(tmp_path: Path) -> None:
    """A file whose labels alternate gives every tenth row the same one, though its column is right."""
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n" + "".join(f"{i % 2},a film {i}\n" for i in range(300)))
    text = problem(make_run(tmp_path, dataset=sources.load(DatasetSettings(name=str(path)))))
    assert f"All 30 labels of validation ({path} (every tenth row, held out)) are the same (1)" in text
    assert "shuffle the file" in text and "--set dataset.validation=dev.csv" in text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_single_row_is_refused(split: str, tmp_path: Path) -> None:
    dataset = make_dataset()
    splits = {**dataset.splits, split: dataset.splits[split].take(np.array([0]))}
    run = make_run(tmp_path, dataset=replace(dataset, splits=splits), method="kd")
    assert f"{split} (toy rows) has 1 row(s), expected at least 2" in problem(run)


def three_classes(train: Sequence[int], validation: Sequence[int]) -> Dataset:
    dataset = make_dataset()
    task = replace(dataset.task, labels=("negative", "positive", "mixed"))
    dataset = with_rows(dataset, "train", labels=np.resize(train, 48))
    return replace(with_rows(dataset, "validation", labels=np.resize(validation, 24)), task=task)


def test_a_class_without_training_rows_is_refused(tmp_path: Path) -> None:
    dataset = three_classes([0, 1], [0, 1, 0, 1, 2])
    teacher = make_encoder(task=dataset.task)
    assert "classes [mixed] are in validation but not in train" in problem(
        make_run(tmp_path, dataset=dataset, teacher=teacher, method="none")
    )


@pytest.mark.parametrize(
    ("train", "text"), [([0, 1], "No row has the classes [mixed]"), ([0, 1, 2], "no row of [mixed]")]
)
def test_a_class_without_validation_rows_is_a_warning(train: list[int], text: str, tmp_path: Path) -> None:
    dataset = three_classes(train, [0, 1])
    teacher = make_encoder(task=dataset.task)
    found = check(make_run(tmp_path, dataset=dataset, teacher=teacher, method="none"))
    assert any(text in warning for warning in found["warnings"])


def test_a_label_that_never_changes_is_a_warning(tmp_path: Path) -> None:
    dataset = make_dataset("multi-label")
    dataset.splits["train"].labels[:, 2] = 0
    assert (
        "In train, [z] are the same for every row."
        in check(make_run(tmp_path, dataset=dataset))["warnings"]
    )


# Texts


def test_many_empty_texts_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, dataset=with_texts("validation", ["", "\n", " \t"]), method="none"))
    assert "3 of the 24 rows of validation (toy rows) have an empty text (rows 1, 2, 3)" in text
    assert "'text'" in text and "dataset.text" in text


def test_an_empty_second_text_counts(tmp_path: Path) -> None:
    dataset = make_dataset(pair=True)
    dataset.splits["train"].texts[1][4] = " "
    (warning,) = check(make_run(tmp_path, dataset=dataset, pair=True))["warnings"]
    assert "1 of the 48 rows of train (toy rows) have an empty text (row 5)" in warning


def test_validation_rows_from_train_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset.splits["validation"].texts[0][:3] = dataset.splits["train"].texts[0][2:5]
    dataset.splits["validation"].labels[:3] = dataset.splits["train"].labels[2:5]
    text = problem(make_run(tmp_path, dataset=dataset))
    assert "3 of the 24 validation rows (12.5%) are also in train" in text


def test_half_of_a_pair_is_no_repeat(tmp_path: Path) -> None:
    dataset = make_dataset(pair=True)
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    validation.texts[0][:3] = train.texts[0][:3]
    found = check(make_run(tmp_path, dataset=dataset, pair=True))
    assert found["validation_rows_in_train"] == 0


def test_two_scores_for_one_text_are_no_conflict(tmp_path: Path) -> None:
    dataset = make_dataset("regression")
    texts = dataset.splits["train"].texts[0]
    texts[2] = texts[0]
    assert check(make_run(tmp_path, dataset=dataset))["warnings"] == []


# Lengths and batches


@pytest.mark.parametrize(
    ("max_length", "start"), [(13, ""), (12, "More than 20% of the rows do not fit: ")]
)
def test_truncated_rows_are_a_warning(max_length: int, start: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, max_length=max_length)
    # Rows have 2 to 12 words, [CLS] and [SEP].
    longer = [np.mean([len(t.split()) + 2 > max_length for t in rows.texts[0]]) for _, rows in run.splits()]
    (warning,) = check(run)["warnings"]
    assert warning.startswith(
        f"{start}{longer[0]:.1%} of train, {longer[1]:.1%} of validation are longer than"
    )
    assert "dataset.max_length" in warning and "up to 66 tokens" in warning


def test_rows_that_are_longer_than_the_model_reads_are_a_warning(tmp_path: Path) -> None:
    long = " ".join(["film"] * 70)
    # A single long row: below the share from which truncation itself is worth a word.
    dataset = make_dataset(pair=True, count=200)
    dataset.splits["train"].texts[0][7] = long
    (warning,) = check(make_run(tmp_path, dataset=dataset, pair=True, max_length=128))["warnings"]
    assert "0.5% of train" in warning and "reads at most 66 tokens" in warning


def test_a_batch_of_one_row_is_refused_where_two_are_needed(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, batch_size=1))
    assert "cos_nce needs at least 2 rows in every batch, found 1" in text
    assert "training.batch_size=1" in text
    assert check(make_run(tmp_path, batch_size=1, method="kd"))["warnings"] == []


def test_an_odd_row_left_over_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(count=49)
    assert "training.batch_size=2 leaves such batches of the 49 rows: set it to 3" in problem(
        make_run(tmp_path, dataset=dataset, batch_size=2)
    )


def test_rows_too_long_to_be_two_in_a_batch_are_refused(tmp_path: Path) -> None:
    dataset = with_texts("train", [" ".join(["film"] * 18)])
    text = problem(make_run(tmp_path, dataset=dataset, max_tokens=39))
    assert "(row 1 of train). 2 rows of 20 tokens do not fit training.max_tokens=39: raise it to 40" in text
    assert check(make_run(tmp_path, dataset=dataset, max_tokens=40))["warnings"] == []


def test_a_stage_without_a_step_is_a_warning(tmp_path: Path) -> None:
    (warning,) = check(make_run(tmp_path, epochs=0.2, options={"switch": 0.8}))["warnings"]
    assert "Stage 2 of 2 gets none of the 1 step(s)" in warning
