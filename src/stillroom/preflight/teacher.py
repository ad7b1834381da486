"""Check that the teacher really solves the task, with its labels in the order that the data has."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from accelerate import Accelerator
from scipy import stats
from scipy.optimize import linear_sum_assignment

from stillroom.data.tasks import Task
from stillroom.evaluation.metrics import predictions, score
from stillroom.evaluation.predict import predict
from stillroom.preflight.base import Report, Run, listed, named
from stillroom.preflight.models import reorder

SAMPLE = 512
"""Most validation rows that the teacher is scored on."""

SIGNIFICANCE = 0.01
"""A teacher that guesses passes with this probability."""

WEAK = 0.2
"""Below this kappa or correlation the teacher knows something, but little: a warning."""

MOST_CLASSES = 8
"""Other orders are tried up to this many labels: with more there are too many to tell luck from order."""

_OFF_SCALE, _FEWEST_VALUES = 3.0, 5

_UNSOLVED = "The teacher does not solve this task: expected it to be better than chance."
_TOO_FEW = "Too few or too equal validation rows to tell whether the teacher is sound"
_REMEDY = (
    "Check that it was fine-tuned on this task, that dataset.text names its text columns in its order, "
    "and that dataset.label is right; or fine-tune one with `stillroom finetune`."
)

_Complain = Callable[[str], None]


def solves_the_task(run: Run, report: Report) -> None:
    """The teacher is better than chance on validation rows, and no other label order is better.

    Where no term reads the teacher, its faults are warnings.
    """
    if run.teacher is None:
        return
    task, tokens = run.dataset.task, run.tokens.teacher["validation"]
    index = np.unique(np.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).round().astype(int))
    labels = run.dataset.splits["validation"].labels[index]
    if run.teacher_logits is not None:
        logits = run.teacher_logits[index]
    else:
        sample = replace(tokens, offsets=tokens.offsets[index], lengths=tokens.lengths[index])
        with named("teacher", run.teacher, bf16=run.bf16):
            logits = predict(run.teacher.to(Accelerator().device), sample, bf16=run.bf16)
    complain = report.error if run.learns_from_teacher() else report.warn
    wrong = np.flatnonzero(~np.isfinite(logits).all(1))
    if len(wrong):
        complain(
            f"The teacher's logits are not finite for {len(wrong)} of {len(index)} validation rows "
            f"(first: row {index[wrong[0]] + 1}): its weights are damaged or overflow. Copy it again, or "
            "set training.precision=float32."
        )
        return
    metrics = score(task, logits, labels)
    report.found["teacher"] = {"rows": len(index), "metrics": metrics}
    scored = f"{', '.join(f'{n} {v:.3f}' for n, v in metrics.items())} on {len(index)} validation rows"
    if task.kind == "regression":
        _check_values(logits[:, 0], labels, scored, report, complain)
    else:
        _check_labels(logits, labels, task, scored, report, complain)


def _check_labels(
    logits: np.ndarray, labels: np.ndarray, task: Task, scored: str, report: Report, complain: _Complain
) -> None:
    predicted, true = predictions(logits, task.kind), labels
    if task.kind == "classification":
        predicted, true = (column[:, None] == np.arange(task.outputs) for column in (predicted, true))
    predicted, true = predicted.astype(np.int64), true.astype(np.int64)
    share, chance, p = agreement(predicted, true)
    guess = f"{share:.0%} of its predictions are right, {chance:.0%} would be by chance"
    order = better_order(predicted, true)
    if order is not None:
        names = tuple(task.labels[i] for i in order)
        other = agreement(predicted, true[:, order])[0]
        complain(
            "The teacher's labels stand in another order than the data's: of its predictions "
            f"{share:.0%} are right as given, {listed(task.labels)}, and {other:.0%} if its labels are "
            f"read as {listed(names)} ({scored}). To go on, {reorder(names)}, or give a teacher that "
            "has the data's order."
        )
    elif agreement(true, true)[2] >= SIGNIFICANCE:
        report.warn(f"{_TOO_FEW} ({scored}).")
    elif p >= SIGNIFICANCE:
        complain(f"{_UNSOLVED} It has {scored}; {guess}. {_REMEDY}")
    elif share - chance < WEAK * (1 - chance):
        report.warn(f"The teacher is little better than chance: {scored}; {guess}.")


def agreement(predicted_NC: np.ndarray, true_NC: np.ndarray) -> tuple[float, float, float]:
    """Return the share of right predictions, the share expected by chance, and its p-value.

    By chance means: as many predictions of each label, on rows that are drawn blindly. So
    always naming the most frequent class is no better than chance, and finding a few rows of a rare
    class is, though its accuracy may be lower.
    """
    count = int(predicted_NC.sum())
    if not count:
        return 0.0, 0.0, 1.0
    right = int((predicted_NC * true_NC).sum())
    chance = float(predicted_NC.sum(0) @ true_NC.mean(0)) / count
    return right / count, chance, float(stats.binomtest(right, count, min(1.0, chance), "greater").pvalue)


def better_order(predicted_NC: np.ndarray, true_NC: np.ndarray) -> list[int] | None:
    """Return the label that each logit should be read as, or None if the given order is the best.

    The best of all orders must be right where the given one is wrong far more often than the other
    way round (a sign test, corrected for the number of orders), and be better than chance itself.

    Args:
        predicted_NC: 1 where a label is predicted.
        true_NC: 1 where it is true.

    Example:
        >>> true = np.eye(2, dtype=int)[[0, 1] * 10]
        >>> better_order(1 - true, true)
        [1, 0]
    """
    classes = predicted_NC.shape[1]
    if not 2 <= classes <= MOST_CLASSES:
        return None
    right_CC = predicted_NC.T @ true_NC
    order = linear_sum_assignment(right_CC, maximize=True)[1]
    moved = np.flatnonzero(order != np.arange(classes))
    gained, lost = int(right_CC[moved, order[moved]].sum()), int(right_CC[moved, moved].sum())
    if gained <= lost:
        return None
    p = stats.binomtest(gained, gained + lost, 0.5, "greater").pvalue * math.factorial(classes)
    if p >= SIGNIFICANCE or agreement(predicted_NC, true_NC[:, order])[2] >= SIGNIFICANCE:
        return None
    return [int(i) for i in order]


def _check_values(
    values: np.ndarray, labels: np.ndarray, scored: str, report: Report, complain: _Complain
) -> None:
    values, labels = values.astype(np.float64), labels.astype(np.float64)
    if len(values) < _FEWEST_VALUES or np.ptp(labels) == 0:
        report.warn(f"{_TOO_FEW} ({scored}).")
        return
    if np.ptp(values) == 0:
        complain(f"{_UNSOLVED} It gives {values[0]:.3g} for every row. {_REMEDY}")
        return
    with warnings.catch_warnings():
        # Values that hardly differ are judged by their scale, below.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        found = stats.pearsonr(values, labels)
    r = found.statistic
    if found.pvalue >= SIGNIFICANCE:
        complain(f"{_UNSOLVED} It has {scored}. {_REMEDY}")
        return
    if r < 0:
        complain(
            f"The teacher's values fall where the labels rise: {scored}. Turn the label column round, or "
            "give a teacher that was fine-tuned on these labels."
        )
        return
    if r < WEAK:
        report.warn(f"The teacher is little better than chance: {scored}.")
    ratio = values.std() / labels.std()
    offset = abs(values.mean() - labels.mean()) / labels.std()
    # A weak teacher stays near the mean: its values spread r times as far as the labels.
    if not r / _OFF_SCALE < ratio < _OFF_SCALE or offset > 1:
        complain(
            "The teacher's values are on another scale than the labels: they lie in "
            f"{values.min():.3g} to {values.max():.3g} (mean {values.mean():.3g}), the labels in "
            f"{labels.min():.3g} to {labels.max():.3g} (mean {labels.mean():.3g}). Rescale the label "
            "column to the teacher's scale, or give a teacher that was fine-tuned on these labels."
        )
