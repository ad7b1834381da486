"""GLUE's metrics and what goes with them, computed by scikit-learn and scipy."""

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from stillroom.data.tasks import Kind, Task
from stillroom.errors import WrongInput

Metric = Callable[[np.ndarray, np.ndarray], float]


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    if labels.ndim == 2:
        return float(sk.f1_score(labels, predicted, average="micro", zero_division=0))
    average = "binary" if labels.max(initial=0) <= 1 else "macro"
    return float(sk.f1_score(labels, predicted, average=average, zero_division=0))


def _correlation(function: Callable[..., tuple[float, float]]) -> Metric:
    def correlate(labels: np.ndarray, predicted: np.ndarray) -> float:
        with warnings.catch_warnings():
            # A constant prediction has no correlation; it tells nothing of the labels: 0.
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(function(labels, predicted)[0])
        return value if np.isfinite(value) else 0.0

    return correlate


METRICS: dict[str, Metric] = {
    "accuracy": lambda labels, predicted: float(sk.accuracy_score(labels, predicted)),
    "f1": _f1,
    "mcc": lambda labels, predicted: float(sk.matthews_corrcoef(labels, predicted)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
"""Metric by name; each takes labels and predictions. F1 is of class 1 for two classes, macro for
more, micro for multi-label; multi-label accuracy counts rows with every label right."""


def predictions(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the predicted class `(N,)`, value `(N,)` or labels `(N, C)` (logit above 0).

    Example:
        >>> logits = np.array([[0.5, 2.0], [-1.0, -3.0]])
        >>> predictions(logits, "classification").tolist(), predictions(logits, "multi-label").tolist()
        ([1, 0], [[1, 1], [0, 0]])
    """
    if kind == "classification":
        return np.asarray(logits.argmax(-1))
    return logits[:, 0] if kind == "regression" else (logits > 0).astype(np.int64)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the task's metrics of these logits, the one that selects first.

    Args:
        task: Names the metrics and the kind of the labels.
        logits: Shape `(N, C)`.
        labels: As in `Rows`.

    Raises:
        WrongInput: If a logit is not finite.

    Example:
        >>> from stillroom.data.tasks import GLUE
        >>> score(GLUE["glue/sst2"], np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
        {'accuracy': 0.5}
    """
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise WrongInput(
            f"The model's logits for row {row} of {task.name} are not finite: its weights are damaged "
            "or overflow. Evaluate it with --precision float32, or train it again."
        )
    predicted = predictions(logits, task.kind)
    return {name: METRICS[name](labels, predicted) for name in task.metrics}
