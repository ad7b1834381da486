"""Whether a model is as often right as its probabilities say."""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Per bin of confidence that holds rows: mean confidence, share that is right, and rows."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    rows: tuple[int, ...]
    error: float
    """Expected calibration error."""


def calibration(logits_NC: np.ndarray, labels_N: np.ndarray, *, bins: int = BINS) -> Calibration:
    """Return the reliability of a classifier's most probable class, and its expected calibration error.

    ``ECE = sum_b n_b / N * |acc_b - conf_b|`` over bins of equal width of the highest probability,
    ``((b - 1) / bins, b / bins]``: Guo et al. (2017), eq. 3.

    Args:
        logits_NC: Shape ``(N, C)``, N of at least 1 row and C of at least 2 classes.
        labels_N: Class numbers, shape ``(N,)``.
        bins: How many, over 0 to 1.

    Raises:
        ValueError: If the shapes do not fit, or there are no bins.

    Example:
        >>> found = calibration(np.array([[0.0, 9.0], [0.0, 9.0]]), np.array([1, 0]))
        >>> f"{found.error:.3f}"
        '0.500'
    """
    rows, classes = logits_NC.shape
    if labels_N.shape != (rows,) or rows == 0 or classes < 2 or bins < 1:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,) with N >= 1, C >= 2 and at least one bin, found "
            f"{logits_NC.shape}, {labels_N.shape} and {bins}."
        )
    probabilities = softmax(logits_NC.astype(np.float64), axis=1)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels_N
    # Closed on the right; rounding may lift a probability of 1 above it.
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    filled = [place == b for b in range(bins) if (place == b).any()]
    found = [(float(confidence[b].mean()), float(right[b].mean()), int(b.sum())) for b in filled]
    error = sum(n / rows * abs(share - mean) for mean, share, n in found)
    means, shares, counts = zip(*found, strict=True)
    return Calibration(means, shares, counts, float(error))
