"""Paired bootstrap and McNemar's test: by hand, against the metrics, and what must not matter."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from stillroom.data.tasks import Task
from stillroom.evaluation.metrics import METRICS, functions_of
from stillroom.evaluation.significance import (
    RESAMPLED,
    bootstrap_over_seeds,
    mcnemar,
    paired_bootstrap,
)

ACCURACY = RESAMPLED["accuracy"]
THREE = Task("made", "classification", ("text",), "label", ("a", "b", "c"), ("f1",))


def _classes(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    labels = chance.integers(classes, size=count)
    return labels, np.where(chance.random(count) < 0.6, labels, chance.integers(classes, size=count))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "classes"),
    [("accuracy", 2), ("accuracy", 4), ("f1", 2), ("macro f1", 4), ("mcc", 2), ("mcc", 4)],
)
def test_resampled_metrics_of_classes_are_the_metrics(name: str, classes: int, seed: int) -> None:
    """Each resample's value is what scikit-learn gives for those rows."""
    labels, predicted = _classes(60, classes, seed)
    index_RN = np.random.default_rng(seed).integers(60, size=(7, 60))
    found = RESAMPLED[name](labels[index_RN], predicted[index_RN])
    expected = [METRICS[name](labels[index], predicted[index]) for index in index_RN]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_resampled_correlations_are_the_metrics(name: str) -> None:
    chance = np.random.default_rng(0)
    labels = chance.integers(6, size=80).astype(np.float32)  # ties, as ratings have
    predicted = (labels + chance.standard_normal(80)).astype(np.float32)
    index_RN = chance.integers(80, size=(7, 80))
    found = RESAMPLED[name](labels[index_RN], predicted[index_RN])
    expected = [METRICS[name](labels[index], predicted[index]) for index in index_RN]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_resampled_metrics_of_several_labels_are_the_metrics(name: str) -> None:
    chance = np.random.default_rng(1)
    labels = (chance.random((50, 3)) < 0.4).astype(np.float32)
    predicted = np.where(chance.random((50, 3)) < 0.8, labels, 1 - labels).astype(np.int64)
    index_RN = chance.integers(50, size=(7, 50))
    found = RESAMPLED[name](labels[index_RN], predicted[index_RN])
    expected = [METRICS[name](labels[index], predicted[index]) for index in index_RN]
    assert found == pytest.approx(expected, rel=1e-12)


def test_every_metric_can_be_resampled() -> None:
    assert RESAMPLED.keys() == METRICS.keys()


@pytest.mark.parametrize("name", list(METRICS))
def test_a_constant_model_gives_a_number(name: str) -> None:
    """A resample of one class, or a model that says one thing, must not make the interval NaN."""
    labels = np.array([0, 0, 0, 1])
    constant = np.zeros(4, dtype=np.int64)
    kind = np.float32 if name in ("pearson", "spearman") else np.int64
    found = paired_bootstrap(
        RESAMPLED[name], (constant + 0.1).astype(kind), labels.astype(kind), labels.astype(kind)
    )
    assert all(map(math.isfinite, (found.value, found.low, found.high)))


def test_equal_values_have_no_correlation() -> None:
    """Their mean is rounded for some counts; two such rests would correlate perfectly."""
    for count in range(2, 60):
        labels, constant = np.full((1, count), 0.3), np.full((1, count), 0.1)
        assert RESAMPLED["pearson"](labels, constant).item() == 0.0


def test_bootstrap_by_hand() -> None:
    """Two rows, b right on both and a on one: the difference of a resample is its share of row 2.

    The four resamples (1,1), (1,2), (2,1), (2,2) give 0, 1/2, 1/2, 1: both ends have a mass of 1/4.
    So the quantiles 0.2 and 0.8 (60 %) are 0 and 1, and 0.3 and 0.7 (40 %) are both 1/2.
    """
    labels, a, b = np.array([0, 1]), np.array([0, 0]), np.array([0, 1])
    wide = paired_bootstrap(ACCURACY, a, b, labels, resamples=4000, level=0.6)
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)
    narrow = paired_bootstrap(ACCURACY, a, b, labels, resamples=4000, level=0.4)
    assert (narrow.value, narrow.low, narrow.high) == (0.5, 0.5, 0.5)


def test_interval_is_that_of_the_normal_law() -> None:
    """For many rows the interval of a mean difference d is d +- 1.96 sd / sqrt(N)."""
    chance = np.random.default_rng(3)
    labels = np.zeros(4000, dtype=np.int64)
    a, b = (chance.random(4000) < 0.3).astype(np.int64), (chance.random(4000) < 0.2).astype(np.int64)
    each = (b == 0).astype(float) - (a == 0)
    half = 1.96 * each.std() / math.sqrt(4000)
    found = paired_bootstrap(ACCURACY, a, b, labels, resamples=20_000)
    assert found.value == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - half, abs=0.04 * half)
    assert found.high == pytest.approx(each.mean() + half, abs=0.04 * half)


def test_pairing_removes_what_is_hard_for_both() -> None:
    """Models that differ in one row of 400 differ by 0 or little, however hard the rows are."""
    labels, a = _classes(400, 2, 0)
    b = a.copy()
    b[0] = 1 - b[0]
    found = paired_bootstrap(ACCURACY, a, b, labels)
    assert abs(found.value) == pytest.approx(1 / 400)
    assert found.high - found.low <= 4 / 400


@pytest.mark.parametrize("name", list(METRICS))
def test_a_model_does_not_differ_from_itself(name: str) -> None:
    labels, predicted = _classes(50, 2, 0)
    found = paired_bootstrap(RESAMPLED[name], predicted, predicted, labels)
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("name", list(METRICS))
def test_swapping_the_models_swaps_the_sign(name: str) -> None:
    labels, a = _classes(50, 2, 0)
    _, b = _classes(50, 2, 1)
    one = paired_bootstrap(RESAMPLED[name], a, b, labels)
    two = paired_bootstrap(RESAMPLED[name], b, a, labels)
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low))


def test_order_of_rows_moves_only_the_draw() -> None:
    labels, a = _classes(300, 2, 0)
    b = np.where(np.random.default_rng(2).random(300) < 0.5, a, labels)
    order = np.random.default_rng(4).permutation(300)
    one = paired_bootstrap(ACCURACY, a, b, labels)
    two = paired_bootstrap(ACCURACY, a[order], b[order], labels[order])
    assert two.value == pytest.approx(one.value)
    # 2000 resamples know an end of the interval to about a tenth of its width.
    width = one.high - one.low
    assert (two.low, two.high) == pytest.approx((one.low, one.high), abs=width / 10)


def test_seed_decides_the_draw_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, a = _classes(64, 2, 0)
    _, b = _classes(64, 2, 1)
    one = paired_bootstrap(ACCURACY, a, b, labels, resamples=500)
    assert paired_bootstrap(ACCURACY, a, b, labels, resamples=500) == one
    assert paired_bootstrap(ACCURACY, a, b, labels, resamples=500, seed=1) != one
    monkeypatch.setattr("stillroom.evaluation.significance._CHUNK", 64 * 7)
    assert paired_bootstrap(ACCURACY, a, b, labels, resamples=500) == one


@pytest.mark.parametrize("models", [paired_bootstrap, bootstrap_over_seeds])
def test_resamples_without_a_class_have_the_same_metric(
    monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    """A third of them lacks the one row of the third class: what else is drawn at once must not matter."""
    chance = np.random.default_rng(7)
    labels = np.array([0, 1] * 10 + [2])
    a, b = (np.where(chance.random(21) < 0.7, labels, labels % 2 ^ 1) for _ in range(2))
    if models is bootstrap_over_seeds:
        a, b = a[None], b[None]
    (macro,) = functions_of(THREE, RESAMPLED).values()
    one = models(macro, a, b, labels, resamples=200)
    monkeypatch.setattr("stillroom.evaluation.significance._CHUNK", 1)
    two = models(macro, a, b, labels, resamples=200)
    assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high), rel=1e-12)


def test_a_higher_level_is_wider() -> None:
    labels, a = _classes(64, 2, 0)
    _, b = _classes(64, 2, 1)
    ends = [paired_bootstrap(ACCURACY, a, b, labels, level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    for inner, outer in itertools.pairwise(ends):
        assert outer.low <= inner.low <= inner.high <= outer.high
    assert ends[0].low > ends[-1].low


@pytest.mark.parametrize(
    ("a", "b", "labels", "options"),
    [
        (np.zeros(3), np.zeros(3), np.zeros(4), {}),
        (np.zeros((4, 1)), np.zeros(4), np.zeros(4), {}),
        (np.zeros(0), np.zeros(0), np.zeros(0), {}),
        (np.zeros(4), np.zeros(4), np.zeros(4), {"resamples": 0}),
        (np.zeros(4), np.zeros(4), np.zeros(4), {"level": 1.0}),
        (np.zeros(4), np.zeros(4), np.zeros(4), {"level": 0.0}),
    ],
)
def test_bootstrap_refuses(a: np.ndarray, b: np.ndarray, labels: np.ndarray, options: dict) -> None:
    """Shapes that would broadcast to a plausible number; no rows; an empty interval."""
    with pytest.raises(ValueError, match="expected"):
        paired_bootstrap(ACCURACY, a, b, labels, **options)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * (1/2)
        (0, 5, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),  # two-sided: 0 or 1 of 6, and 5 or 6 of 6
        (3, 3, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    """Rows that both get right or both get wrong change nothing."""
    a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 4)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 4)
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(p, rel=1e-12)
    assert mcnemar(b, a).p == found.p


def test_mcnemar_is_right_as_often_as_it_says() -> None:
    """Of equal models, at most 5 % get p <= 0.05; the exact test stays below, but not at 0."""
    chance = np.random.default_rng(0)
    hits = [mcnemar(*(chance.random((2, 300)) < 0.8)).p <= 0.05 for _ in range(1000)]
    assert 0.01 <= np.mean(hits) <= 0.05


def test_mcnemar_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match="same rows"):
        mcnemar(np.array([True]), np.array([True, False]))


def test_bootstrap_over_seeds_is_the_naive_one() -> None:
    """Rows and seeds are drawn as the docstring says; the rest in plain loops over one resample."""
    chance = np.random.default_rng(5)
    labels = chance.integers(2, size=37)
    a, b = chance.integers(2, size=(2, 3, 37))
    found = bootstrap_over_seeds(RESAMPLED["accuracy"], a, b, labels, resamples=300, seed=9)
    draw = np.random.default_rng(9)
    rows, seeds = draw.integers(37, size=(300, 37)), draw.integers(3, size=(3, 300))
    values = []
    for r in range(300):
        total = 0.0
        for s in seeds[:, r]:
            total += sum(float(b[s, n] == labels[n]) - float(a[s, n] == labels[n]) for n in rows[r]) / 37
        values.append(total / 3)
    assert found.low == pytest.approx(np.quantile(values, 0.025), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(values, 0.975), abs=1e-12)
    assert found.value == pytest.approx((b == labels).mean() - (a == labels).mean(), abs=1e-12)


def test_bootstrap_over_one_seed_is_the_paired_one() -> None:
    chance = np.random.default_rng(6)
    labels, a, b = chance.integers(2, size=(3, 50))
    one = bootstrap_over_seeds(RESAMPLED["f1"], a[None], b[None], labels, resamples=500)
    assert one == paired_bootstrap(RESAMPLED["f1"], a, b, labels, resamples=500)


def test_seeds_that_differ_widen_the_interval() -> None:
    """Equal rows, one seed that learnt all and one that learnt nothing: the seeds are the doubt."""
    labels = np.arange(400) % 2
    b = np.stack([labels, 1 - labels])
    found = bootstrap_over_seeds(RESAMPLED["accuracy"], np.stack([labels] * 2), b, labels)
    assert (found.low, found.value, found.high) == (-1.0, -0.5, 0.0)


@pytest.mark.parametrize("shape", [(2, 4), (0, 3), (3,)])
def test_bootstrap_over_seeds_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="seeds first"):
        bootstrap_over_seeds(RESAMPLED["accuracy"], np.zeros(shape), np.zeros(shape), np.zeros(3))
