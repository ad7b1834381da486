"""The schedule as functions of the step."""

import math
from typing import Any

import numpy as np
import pytest

from stillroom.methods.base import Plan, Stage
from stillroom.methods.prediction import HardLabels
from stillroom.recipe import TrainingSettings
from stillroom.training.schedule import Schedule

LENGTHS = np.random.default_rng(0).integers(3, 40, size=101)


def schedule(*starts: float, lengths: np.ndarray = LENGTHS, **settings: Any) -> Schedule:
    terms = {"hard": HardLabels("classification")}
    stages = tuple(Stage(start, {"hard": 1.0 + i}) for i, start in enumerate(starts or (0.0,)))
    return Schedule(lengths, Plan(terms, stages), TrainingSettings(**{"batch_size": 8, **settings}))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_comes_once_an_epoch(accumulation: int) -> None:
    found = schedule(epochs=3, accumulation=accumulation)
    groups = list(found.from_step(0))
    assert len(groups) == found.steps
    assert all(len(group) == accumulation for group in groups[:-1])
    rows = np.concatenate([rows for group in groups for rows in group])
    epochs = rows.reshape(3, len(LENGTHS))
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(LENGTHS)))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("epochs", [0.3, 2, 2.5])
def test_rows_of_a_step_do_not_depend_on_where_a_run_started(accumulation: int, epochs: float) -> None:
    found = schedule(epochs=epochs, accumulation=accumulation, seed=3)
    whole = list(found.from_step(0))
    for step in range(found.steps + 1):
        again = schedule(epochs=epochs, accumulation=accumulation, seed=3)
        tail = list(again.from_step(step))
        assert len(tail) == found.steps - step
        for group, want in zip(tail, whole[step:], strict=True):
            assert [rows.tolist() for rows in group] == [rows.tolist() for rows in want]


def test_order_depends_on_the_seed() -> None:
    first, second = (next(schedule(seed=seed).from_step(0))[0].tolist() for seed in (0, 1))
    assert first != second


def test_a_fraction_of_an_epoch_is_a_fraction_of_its_batches() -> None:
    whole = schedule(epochs=1)
    assert schedule(epochs=0.5).steps == round(0.5 * whole.steps)
    assert schedule(epochs=0.001).steps == 1
    part = schedule(epochs=1.5)
    second = len(list(schedule(epochs=2).from_step(whole.steps)))
    assert part.steps == whole.steps + round(0.5 * second)
    rows = np.concatenate([g[0] for g in part.from_step(whole.steps)])
    assert len(set(rows)) == len(rows)


def test_accumulation_divides_the_steps_and_keeps_the_last_group() -> None:
    batches = schedule(epochs=2).steps
    found = schedule(epochs=2, accumulation=4)
    assert found.steps == math.ceil(batches / 4)
    assert len(list(found.from_step(0))[-1]) == batches - 4 * (found.steps - 1)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.0), (10, 0.1), (10, 0.5), (3, 1.0)])
def test_learning_rate_rises_and_falls_linearly(epochs: int, warmup: float) -> None:
    found = schedule(epochs=epochs, warmup=warmup, learning_rate=2.0)
    rates = np.array([found.learning_rate(step) for step in range(found.steps)])
    peak = round(warmup * found.steps)
    assert (rates > 0).all() and (rates <= 2.0).all()
    if peak < found.steps:
        assert rates[peak] == 2.0
    assert np.diff(rates[: peak + 1], 2) == pytest.approx(0)
    assert np.diff(rates[peak:], 2) == pytest.approx(0)
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    if warmup < 1:
        # One more step would have the rate zero.
        assert found.learning_rate(found.steps) == 0


def test_a_constant_learning_rate_stays_after_its_rise() -> None:
    # Ten steps, of which two warm up.
    found = schedule(lengths=np.full(80, 5), epochs=1, warmup=0.2, learning_rate=3.0, schedule="constant")
    assert [found.learning_rate(step) for step in range(10)] == pytest.approx([1.0, 2.0] + [3.0] * 8)


@pytest.mark.parametrize("epochs", [1, 3, 18, 75])
def test_evaluation_comes_at_the_end_of_every_epoch(epochs: int) -> None:
    found = schedule(lengths=np.full(56, 5), epochs=epochs, evaluate_every=1)
    assert sorted(found.evaluation_steps) == [7 * (i + 1) for i in range(epochs)]


def test_evaluation_comes_within_epochs_and_always_at_the_end() -> None:
    # Ten batches an epoch.
    lengths = np.full(80, 5)
    found = schedule(lengths=lengths, epochs=2, evaluate_every=0.25)
    assert sorted(found.evaluation_steps) == [3, 5, 8, 10, 13, 15, 18, 20]
    assert schedule(lengths=lengths, epochs=2, evaluate_every=50).evaluation_steps == {20}
    assert schedule(lengths=lengths, epochs=2.5, evaluate_every=1).evaluation_steps == {10, 20, 25}
    every = schedule(lengths=lengths, epochs=1, evaluate_every=0.001).evaluation_steps
    # One by one, they would fill the memory.
    assert schedule(lengths=lengths, epochs=1, evaluate_every=1e-12).evaluation_steps == every
    assert every == set(range(1, 11))


def test_evaluation_can_count_steps() -> None:
    lengths = np.full(80, 5)
    found = schedule(lengths=lengths, epochs=2.5, evaluate_every_steps=6)
    assert found.evaluation_steps == {6, 12, 18, 24, 25}
    assert schedule(lengths=lengths, epochs=1, evaluate_every_steps=5).evaluation_steps == {5, 10}
    assert schedule(lengths=lengths, epochs=1, evaluate_every_steps=99).evaluation_steps == {10}


def test_epochs_done_are_counted_in_batches() -> None:
    found = schedule(lengths=np.full(80, 5), epochs=2.5)
    assert [found.epoch(step) for step in (0, 5, 10, 15, 20, 25)] == [0, 0.5, 1, 1.5, 2, 2.5]
    found = schedule(lengths=np.full(80, 5), epochs=1, accumulation=4)
    assert [found.epoch(step) for step in range(4)] == [0, 0.4, 0.8, 1]


def test_stages_follow_each_other_at_their_steps() -> None:
    found = schedule(0.0, 0.3, 0.8, lengths=np.full(80, 5), epochs=1)
    stages = [found.stage(step) for step in range(10)]
    assert [number for number, _ in stages] == [1] * 3 + [2] * 5 + [3] * 2
    assert [stage.weights["hard"] for _, stage in stages] == [1.0] * 3 + [2.0] * 5 + [3.0] * 2


@pytest.mark.parametrize(
    ("starts", "steps", "numbers"),
    [
        ((0.0, 0.8), 2, [1, 2]),
        ((0.0, 0.1), 3, [1, 2, 2]),
        ((0.0, 0.95), 3, [1, 1, 2]),
        ((0.0, 0.1, 0.2), 3, [1, 2, 3]),
        ((0.0, 0.8, 0.9), 4, [1, 1, 2, 3]),
        ((0.0, 0.5, 0.6), 2, [1, 2]),
        ((0.0, 1.0), 3, [1, 1, 1]),
    ],
)
def test_no_stage_of_a_short_training_is_skipped(
    starts: tuple[float, ...], steps: int, numbers: list[int]
) -> None:
    found = schedule(*starts, lengths=np.full(8 * steps, 5), epochs=1)
    assert [found.stage(step)[0] for step in range(steps)] == numbers
