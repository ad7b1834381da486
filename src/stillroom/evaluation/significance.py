"""Whether two models differ by more than chance: paired bootstrap and McNemar's test.

Shapes: R resamples, S seeds, N rows, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

Resampled = Callable[[np.ndarray, np.ndarray], np.ndarray]

_CHUNK = 2_000_000
"""Most labels that are drawn at once, to bound memory."""


@dataclass(frozen=True)
class Difference:
    """Metric of b minus metric of a, with a percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Rows that only a or only b gets right, and the exact two-sided p of so uneven a split."""

    only_a: int
    only_b: int
    p: float


def paired_bootstrap(
    metric: Resampled,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    labels: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Return how much better b is than a on the same rows, with a percentile interval.

    Rows are drawn with replacement, each with its label and both predictions, so that what makes
    a row hard for both models cancels out (Efron and Tibshirani, 1993, ch. 13).

    Args:
        metric: One of `RESAMPLED`, or any function of labels and predictions, each `(R, N)` or
            `(R, N, C)`, to `(R,)`.
        predictions_a: What `metrics.predictions` returns for the first model.
        predictions_b: The same for the second.
        labels: As in `Rows`.
        resamples: How often the rows are drawn; at least 1.
        seed: The same seed draws the same rows.
        level: Share of the resampled differences inside the interval, in (0, 1).

    Raises:
        ValueError: If shapes differ, there are no rows, or `resamples` or `level` are out of range.

    Example:
        >>> labels, a = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
        >>> paired_bootstrap(RESAMPLED["accuracy"], a, a, labels)
        Difference(value=0.0, low=0.0, high=0.0)
    """
    if not predictions_a.shape == predictions_b.shape == labels.shape:
        raise ValueError(
            f"expected predictions and labels of one shape, found {predictions_a.shape}, "
            f"{predictions_b.shape} and {labels.shape}"
        )
    if len(labels) == 0 or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected rows, resamples >= 1 and 0 < level < 1, found {len(labels)} rows, "
            f"{resamples} resamples, level {level}"
        )

    def difference(index_RN: np.ndarray) -> np.ndarray:
        drawn = labels[index_RN]
        return metric(drawn, predictions_b[index_RN]) - metric(drawn, predictions_a[index_RN])

    chance = np.random.default_rng(seed)
    rows = len(labels)
    found = []
    for start in range(0, resamples, step := max(1, _CHUNK // labels.size)):
        count = min(step, resamples - start)
        found.append(difference(chance.integers(rows, size=(count, rows))))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    value = difference(np.arange(rows)[None])[0]
    return Difference(float(value), float(low), float(high))


def bootstrap_over_seeds(
    metric: Resampled,
    predictions_a_SN: np.ndarray,
    predictions_b_SN: np.ndarray,
    labels: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Return how much better b is than a, averaged over seeds, with a percentile interval.

    ``mean_s metric(b_s) - mean_s metric(a_s)``, S seeds. Each resample draws rows with replacement,
    the same for all students, and seeds with replacement, in pairs: the student of b and that of a
    that started from the same seed. So the interval covers both other rows and other seeds (a
    two-level bootstrap, Davison and Hinkley, 1997, sec. 3.8). With few seeds it is too narrow: S
    seeds show only ``(S - 1) / S`` of their variance. With one seed it covers rows alone.

    Args:
        metric: As in `paired_bootstrap`.
        predictions_a_SN: What `metrics.predictions` returns, of one student for each seed.
        predictions_b_SN: The same for b, seeds in the same order.
        labels: As in `Rows`.
        resamples: How often rows and seeds are drawn; at least 1.
        seed: The same seed draws the same.
        level: Share of the resampled differences inside the interval, in (0, 1).

    Raises:
        ValueError: If shapes differ, there are no rows, or `resamples` or `level` are out of range.

    Example:
        >>> labels, a = np.array([0, 1, 1, 0]), np.array([[0, 1, 0, 0], [0, 0, 0, 0]])
        >>> bootstrap_over_seeds(RESAMPLED["accuracy"], a, a, labels)
        Difference(value=0.0, low=0.0, high=0.0)
    """
    S, N = len(predictions_a_SN), len(labels)
    if not predictions_a_SN.shape == predictions_b_SN.shape == (S, *labels.shape) or S < 1:
        raise ValueError(
            f"expected predictions of one shape, seeds first, for labels {labels.shape}; found "
            f"{predictions_a_SN.shape} and {predictions_b_SN.shape}"
        )
    if N == 0 or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected rows, resamples >= 1 and 0 < level < 1, found {N} rows, "
            f"{resamples} resamples, level {level}"
        )

    def differences(index_RN: np.ndarray) -> np.ndarray:
        drawn = labels[index_RN]
        pairs = zip(predictions_a_SN, predictions_b_SN, strict=True)
        return np.stack([metric(drawn, b[index_RN]) - metric(drawn, a[index_RN]) for a, b in pairs])

    chance = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, step := max(1, _CHUNK // labels.size)):
        count = min(step, resamples - start)
        each_SR = differences(chance.integers(N, size=(count, N)))
        seeds_SR = chance.integers(S, size=(S, count))
        found.append(np.take_along_axis(each_SR, seeds_SR, axis=0).mean(0))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    value = differences(np.arange(N)[None]).mean()
    return Difference(float(value), float(low), float(high))


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """Return McNemar's exact test of two models on the same rows.

    Rows that both get right or both get wrong say nothing; of the others, either model should
    win about half if they were equally good: ``only_b ~ Binomial(only_a + only_b, 1/2)``.

    Args:
        correct_a: bool `(N,)`, whether the first model is right.
        correct_b: The same for the second.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> mcnemar(np.array([True, True, True, False]), np.array([False, False, False, False]))
        McNemar(only_a=3, only_b=0, p=0.25)
    """
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"expected the same rows, found {correct_a.shape} and {correct_b.shape}")
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    n = only_a + only_b
    return McNemar(only_a, only_b, float(stats.binomtest(only_b, n).pvalue) if n else 1.0)


def _accuracy(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    right = labels == predicted
    return np.asarray((right.all(-1) if right.ndim == 3 else right).mean(1))


def _f1(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _f1_of(labels == 1, predicted == 1, empty=0.0)


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    classes = range(max(labels.max(), predicted.max()) + 1)
    each = [_f1_of(labels == c, predicted == c, empty=np.nan) for c in classes]
    # A class that a resample lacks is no part of its mean.
    return np.asarray(np.nanmean(each, axis=0))


def _f1_of(labels: np.ndarray, predicted: np.ndarray, empty: float) -> np.ndarray:
    """Return ``2 TP / (2 TP + FP + FN)`` of one class, or of all labels together."""
    axes = tuple(range(1, labels.ndim))
    both = (labels & predicted).sum(axes)
    total = labels.sum(axes) + predicted.sum(axes)
    return np.where(total > 0, 2 * both / np.maximum(total, 1), empty)


def _mcc(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Gorodkin's R_K: the correlation of one-hot labels and predictions."""
    N = labels.shape[1]
    classes = range(max(labels.max(), predicted.max()) + 1)
    true_CR = np.stack([(labels == c).mean(1) for c in classes])
    said_CR = np.stack([(predicted == c).mean(1) for c in classes])
    covariance = (labels == predicted).sum(1) / N - (true_CR * said_CR).sum(0)
    return _ratio(covariance, 1 - (true_CR**2).sum(0), 1 - (said_CR**2).sum(0))


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    x, y = _centred(labels), _centred(predicted)
    return _ratio((x * y).sum(1), (x * x).sum(1), (y * y).sum(1))


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _pearson(stats.rankdata(labels, axis=1), stats.rankdata(predicted, axis=1))


def _centred(values: np.ndarray) -> np.ndarray:
    # The mean of equal values is rounded: without the factor they would keep a rest of variance.
    varies = np.ptp(values, axis=1, keepdims=True) > 0
    return np.asarray(varies * (values - values.mean(1, keepdims=True, dtype=np.float64)))


def _ratio(covariance: np.ndarray, variance_a: np.ndarray, variance_b: np.ndarray) -> np.ndarray:
    """Return correlations; a constant side has none and counts as 0."""
    norm = np.sqrt(variance_a * variance_b)
    return np.asarray(np.divide(covariance, norm, out=np.zeros_like(norm), where=norm > 0))


RESAMPLED: dict[str, Resampled] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro f1": _macro_f1,
    "mcc": _mcc,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""The functions of `metrics.METRICS` over many resamples at once: those take a millisecond each.
`metrics.functions_of` says which are a task's."""
