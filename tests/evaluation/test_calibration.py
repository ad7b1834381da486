"""Expected calibration error against values computed by hand and by plain loops."""

import math

import numpy as np
import pytest

from stillroom.evaluation.calibration import calibration


def logits_of(probabilities: list[float]) -> np.ndarray:
    """Return two-class logits whose class 1 has these probabilities."""
    return np.array([[0.0, math.log(p / (1 - p))] for p in probabilities])


def test_by_hand() -> None:
    """Confidences .62 .68 (one of two right) and .95 (right): |.5 - .65| * 2/3 + |1 - .95| / 3."""
    found = calibration(logits_of([0.62, 0.68, 0.95]), np.array([1, 0, 1]))
    assert found.rows == (2, 1)
    assert found.confidence == pytest.approx((0.65, 0.95))
    assert found.accuracy == (0.5, 1.0)
    assert found.error == pytest.approx(0.1 + 0.05 / 3)


def test_class_0_counts_as_well() -> None:
    """A probability of .1 for class 1 is one of .9 for class 0."""
    found = calibration(logits_of([0.1]), np.array([0]))
    assert found.confidence == pytest.approx((0.9,)) and found.error == pytest.approx(0.1)


def test_bins_are_closed_on_the_right() -> None:
    """Two equal logits are a confidence of exactly .5: the fifth bin, as in Guo et al."""
    found = calibration(np.array([[0.0, 0.0], [0.0, math.log(0.55 / 0.45)]]), np.array([0, 0]))
    assert found.rows == (1, 1)


def test_certain_and_right_is_0_and_certain_and_wrong_is_1() -> None:
    logits = np.array([[1000.0, -1000.0]] * 5)
    assert calibration(logits, np.zeros(5, int)).error == 0.0
    assert calibration(logits, np.ones(5, int)).error == 1.0


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_plain_loops_agree(bins: int) -> None:
    chance = np.random.default_rng(bins)
    logits, labels = chance.standard_normal((200, 4)) * 2, chance.integers(0, 4, 200)
    want = 0.0
    for b in range(bins):
        held = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            total = sum(math.exp(x) for x in row)
            top = max(range(4), key=lambda c: row[c])
            confidence = math.exp(row[top]) / total
            if b / bins < confidence <= (b + 1) / bins:
                held.append((confidence, top == label))
        if held:
            confidence = sum(c for c, _ in held) / len(held)
            accuracy = sum(r for _, r in held) / len(held)
            want += len(held) / 200 * abs(accuracy - confidence)
    assert calibration(logits, labels, bins=bins).error == pytest.approx(want, rel=1e-12)


def test_the_order_of_rows_and_a_constant_on_all_logits_change_nothing() -> None:
    chance = np.random.default_rng(0)
    logits, labels = chance.standard_normal((50, 3)), chance.integers(0, 3, 50)
    order = chance.permutation(50)
    want = calibration(logits, labels).error
    assert calibration(logits[order] + 7.0, labels[order]).error == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "bins"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), 10),
        (np.zeros((3, 1)), np.zeros(3, int), 10),
        (np.zeros((3, 2)), np.zeros((3, 1), int), 10),
        (np.zeros((3, 2)), np.zeros(3, int), 0),
    ],
)
def test_what_has_no_calibration_is_refused(logits: np.ndarray, labels: np.ndarray, bins: int) -> None:
    with pytest.raises(ValueError, match="at least one bin"):
        calibration(logits, labels, bins=bins)
