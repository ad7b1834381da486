"""GLUE's metrics and what goes with them, computed by scikit-learn and scipy."""

import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from stillroom.data.tasks import Kind, Task
from stillroom.errors import WrongInput

Metric = Callable[[np.ndarray, np.ndarray], float]

_Function = TypeVar("_Function", bound=Callable[..., object])


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    average = "micro" if labels.ndim == 2 else "binary"
    return float(sk.f1_score(labels, predicted, average=average, zero_division=0))


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(sk.f1_score(labels, predicted, average="macro", zero_division=0))


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
    "macro f1": _macro_f1,
    "mcc": lambda labels, predicted: float(sk.matthews_corrcoef(labels, predicted)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
"""Metric by name; each takes labels and predictions. F1 is of class 1 of two, and micro for multi-label;
macro F1 is the mean of the F1 of each class that labels or predictions have. Multi-label accuracy
counts rows with every label right."""


def functions_of(task: Task, functions: Mapping[str, _Function]) -> dict[str, _Function]:
    """Return the task's metrics by their names in it, the one that selects first.

    The F1 of a task of more than two classes is macro F1, whichever of them the scored rows have.

    Args:
        task: Names the metrics, and has the classes: those that a `LabelMap` makes, where there is one.
        functions: `METRICS`, or `significance.RESAMPLED`.

    Example:
        >>> from stillroom.data.tasks import GLUE
        >>> functions_of(GLUE["glue/mrpc"], {"f1": "of class 1", "macro f1": "macro", "accuracy": "share"})
        {'f1': 'of class 1', 'accuracy': 'share'}
    """
    macro = task.kind == "classification" and task.outputs > 2
    return {name: functions["macro f1" if macro and name == "f1" else name] for name in task.metrics}


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
    return {name: metric(labels, predicted) for name, metric in functions_of(task, METRICS).items()}
