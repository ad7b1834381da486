"""Whether the teacher solves the task, and in which order of its labels."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checking import check, make_run, problem
from stillroom.data.tasks import Kind
from stillroom.encoder import Encoder
from stillroom.preflight import teacher as teacher_checks
from stillroom.preflight.teacher import better_order
from tiny import make_dataset, make_encoder, make_rows, make_task, make_teacher


class Rescaled(nn.Module):
    """A head whose logits are those of another, times a factor and with an offset."""

    def __init__(self, head: nn.Module, factor: float, offset: float | Tensor):
        super().__init__()
        self.head, self.factor, self.offset = head, factor, offset

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.head(hidden) + self.offset
        return logits


def rescaled(factor: float, offset: float | Tensor = 0.0, kind: Kind = "regression") -> Encoder:
    """Return the teacher with its logits rescaled."""
    teacher = make_teacher(kind)
    model: Any = teacher.model
    model.classifier = Rescaled(model.classifier, factor, offset)
    return teacher


def untrained(kind: Kind, seed: int = 0) -> Encoder:
    """Return a random encoder that solves nothing."""
    return make_encoder(task=make_task(kind), layers=4, width=24, seed=seed)


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_a_teacher_that_does_not_solve_the_task_is_refused(kind: Kind, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=kind, teacher=untrained(kind))
    assert "The teacher does not solve this task: expected it to be better than chance" in problem(run)


def test_without_a_teacher_in_the_loss_its_faults_are_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path, teacher=untrained("classification"), method="none")
    (warning,) = check(run)["warnings"]
    assert "does not solve this task" in warning


def test_a_teacher_with_turned_labels_is_refused_and_the_order_named(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, teacher=make_teacher(order=(1, 0))))
    assert "0% are right as given, [negative, positive]" in text
    assert (
        "100% if its labels are read as [positive, negative] (accuracy 0.000 on 24 validation rows)" in text
    )
    assert "number the data's labels in the order [positive, negative]" in text
    assert """--set 'dataset.labels=["positive","negative"]'""" in text


def test_multi_label_names_can_be_turned_too(tmp_path: Path) -> None:
    dataset = make_dataset("multi-label")
    for rows in dataset.splits.values():
        rows.labels[:] = rows.labels[:, [1, 0, 2]]
    text = problem(make_run(tmp_path, dataset=dataset))
    assert "if its labels are read as [y, x, z]" in text


def test_a_constant_teacher_is_no_better_than_chance(tmp_path: Path) -> None:
    """Always naming the larger class is right for most rows, and knows nothing."""
    dataset = make_dataset()
    for rows in dataset.splits.values():
        rows.labels[:] = np.arange(len(rows)) % 8 != 0
    teacher = rescaled(0.0, torch.tensor([0.0, 1.0]), kind="classification")
    text = problem(make_run(tmp_path, dataset=dataset, teacher=teacher))
    assert "accuracy 0.875" in text and "88% of its predictions are right, 88% would be by chance" in text


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, teacher=rescaled(float("inf"), kind="classification")))
    assert "logits are not finite for 24 of 24 validation rows (first: row 1)" in text


def test_values_that_fall_where_labels_rise_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(-1.0)))
    assert "fall where the labels rise: pearson -0.9" in text


@pytest.mark.parametrize(("factor", "offset"), [(5.0, 0.0), (0.1, 0.0), (1.0, 2.0)])
def test_values_on_another_scale_are_refused(factor: float, offset: float, tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(factor, offset)))
    assert "values are on another scale than the labels" in text


def test_a_constant_value_is_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(0.0, 0.5)))
    assert "It gives 0.5 for every row" in text


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_teacher_that_knows_little_is_a_warning(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in 58 of 100 rows where 50 are chance, or correlated by 0.15: surely more than luck."""
    dataset = make_dataset(kind, pair=True)
    rows = make_rows(dataset.task, 500, seed=1)
    run = make_run(
        tmp_path, dataset=replace(dataset, splits={**dataset.splits, "validation": rows}), pair=True
    )
    if kind == "classification":
        right = np.arange(500) // 2 % 50 < 29
        logits = one_hot(np.where(right, rows.labels, 1 - rows.labels), 2).astype(np.float32)
    else:
        z = (rows.labels - rows.labels.mean()) / rows.labels.std()
        noise = np.random.default_rng(0).standard_normal(500)
        noise -= noise.mean() + z * (noise @ z) / 500
        values = 0.15 * z + (1 - 0.15**2) ** 0.5 * noise / noise.std()
        logits = (rows.labels.mean() + rows.labels.std() * values)[:, None]
    monkeypatch.setattr(teacher_checks, "predict", lambda *_, **__: logits)
    warnings = [text for text in check(run)["warnings"] if "also in train" not in text]
    assert len(warnings) == 1
    assert "The teacher is little better than chance" in warnings[0]


def test_three_validation_rows_cannot_tell(tmp_path: Path) -> None:
    dataset = make_dataset()
    splits = {**dataset.splits, "validation": dataset.splits["validation"].take(np.arange(3))}
    (warning,) = check(make_run(tmp_path, dataset=replace(dataset, splits=splits)))["warnings"]
    assert "Too few or too equal validation rows" in warning


def test_the_sample_is_spread_over_the_split(tmp_path: Path) -> None:
    """A split that is sorted by label must not be judged by its first class."""
    rows = make_rows(make_task(), 1200, seed=1)
    rows = rows.take(np.argsort(rows.labels, kind="stable"))
    dataset = make_dataset()
    dataset = replace(dataset, splits={**dataset.splits, "validation": rows})
    found = check(make_run(tmp_path, dataset=dataset))
    assert found["teacher"] == {"rows": 512, "metrics": {"accuracy": 1.0}}
    assert not any("too equal" in warning for warning in found["warnings"])


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count, dtype=np.int64)[classes]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_three_classes_is_found(order: tuple[int, ...]) -> None:
    """The teacher is right in nine of ten rows, and calls class `order[i]` by the number i."""
    chance = np.random.default_rng(0)
    meant = chance.integers(0, 3, size=200)
    true = np.where(chance.random(200) < 0.9, meant, chance.integers(0, 3, size=200))
    predicted = np.argsort(order)[meant]
    found = better_order(one_hot(predicted, 3), one_hot(true, 3))
    assert found == (None if order == (0, 1, 2) else list(order))


def test_guesses_have_no_better_order() -> None:
    """With 24 orders to choose from, some order of pure guesses always looks better than the given."""
    found = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        guesses, true = chance.integers(0, 4, size=(2, 100))
        found += better_order(one_hot(guesses, 4), one_hot(true, 4)) is not None
    assert found <= 2


def test_a_constant_guess_of_the_rare_class_has_no_better_order() -> None:
    """Read the other way round it is right more often, and still knows nothing."""
    true = one_hot((np.arange(100) % 5 == 0).astype(int), 2)
    assert better_order(one_hot(np.ones(100, dtype=int), 2), true) is None
