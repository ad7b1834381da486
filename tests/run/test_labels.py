"""Labels of augmented rows: the teacher's, and nothing of the rows as they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stillroom.data import augmented
from stillroom.data.tasks import Dataset, Kind
from stillroom.evaluation.metrics import predictions
from stillroom.evaluation.predict import predict
from stillroom.recipe import Recipe
from stillroom.run.labels import label_augmented
from stillroom.run.parts import Common
from tiny import make_dataset, make_encoder, make_rows, make_task, make_tokens

QUIET = Console(quiet=True)


def _dataset(kind: Kind) -> Dataset:
    plain = make_dataset(kind)
    more = make_rows(make_task(kind), 30, seed=5)
    more = replace(more, labels=np.zeros_like(more.labels))
    train = augmented.join(plain.splits["train"], more)
    return Dataset(plain.task, {**plain.splits, "train": train}, source_rows=np.arange(30))


def _recipe(cache: str, method: str = "kd", labels: str = "teacher") -> Recipe:
    chosen = {"name": "toy", "augmented": "a.parquet", "augmented_labels": labels}
    return Recipe.load(teacher={"name": "t", "cache": cache}, dataset=chosen, method=method)


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_they_are_the_teachers_predictions(kind: Kind, tmp_path: Path) -> None:
    dataset = _dataset(kind)
    teacher = make_encoder(task=make_task(kind), layers=4, width=24, seed=5)
    train = dataset.splits["train"]
    tokens = make_tokens(train, teacher)
    expected = predictions(predict(teacher, tokens, bf16=False), kind)[-30:]
    assert expected.any()
    for cache in ("off", str(tmp_path / "teacher")):
        made = label_augmented(dataset, _recipe(cache), teacher, tokens, bf16=False, console=QUIET)
        labels = made.splits["train"].labels
        assert labels.dtype == train.labels.dtype
        np.testing.assert_array_equal(labels[:-30], train.labels[:-30])
        np.testing.assert_allclose(labels[-30:], expected, rtol=1e-5)
    assert (tmp_path / "teacher").is_dir()


@pytest.mark.parametrize(("method", "labels"), [("none", "teacher"), ("kd", "source")])
def test_without_a_teacher_they_are_those_of_the_source(method: str, labels: str) -> None:
    """The control would otherwise learn from the teacher after all."""
    dataset, teacher = _dataset("classification"), make_encoder(layers=4, width=24, seed=5)
    tokens = {name: make_tokens(rows, teacher) for name, rows in dataset.splits.items()}
    common = Common(dataset, 32, teacher, tokens, False)
    assert common.labelled(_recipe("off", method, labels), QUIET) is common
    other = common.labelled(_recipe("off"), QUIET)
    assert other.dataset.splits["train"].labels[-30:].any()
    assert common.labelled(_recipe("off"), QUIET).dataset is other.dataset
