"""Checks of soft labels from a file: what they can teach, and that their order is that of the labels."""

from dataclasses import replace

import numpy as np

from stillroom.data.soft_labels import labels_from
from stillroom.data.tasks import Rows, Task
from stillroom.encoder import Needs
from stillroom.preflight.base import Report, Run, listed
from stillroom.preflight.teacher import SIGNIFICANCE, agreement, better_order
from stillroom.recipe import setting

_FEWEST = 20
"""Fewest labelled rows from which the order is judged."""


def soft_labels(run: Run, report: Report) -> None:
    """Soft labels can teach the method's terms, and agree with the labels that are there."""
    train, task = run.dataset.splits["train"], run.dataset.task
    if train.soft_labels is None:
        return
    unlabelled = int(np.sum(train.unlabelled)) if train.unlabelled is not None else 0
    report.found["soft_labels"] = {"rows": len(train), "unlabelled": unlabelled}
    if run.teacher is None:
        _need_no_model(run, report)
    elif run.plan.augmentation is not None:
        report.warn(
            "The method rewrites rows in every step, and a file has no soft labels of such rows: they are "
            "labelled by the teacher, the rows as they are by the file. Where the two disagree, so do the "
            "losses."
        )
    if unlabelled and (run.control or not run.learns_from_teacher()):
        report.error(
            f"{unlabelled} of the {len(train)} training rows have no label, and a control "
            "(none, --control) learns from labels alone: expected a label for every row. Leave out "
            "--control, choose a method that learns from soft labels, or remove these rows."
        )
    if unlabelled and run.learns_from_teacher():
        report.warn(
            f"{unlabelled} of the {len(train)} training rows have no label; where hard labels are read, "
            "they are what the soft labels of these rows say."
        )
    if task.kind != "regression":
        _agree(train, task, report)


def _need_no_model(run: Run, report: Report) -> None:
    for name, term in run.terms().items():
        if replace(term.teacher_needs, logits=False) != Needs():
            report.error(
                f"{name} reads states or attention of the teacher, and soft labels from a file have none: "
                "expected a model. Give --teacher as well (its logits are then those of the file), or a "
                "method that reads logits alone, such as kd."
            )
    if run.plan.augmentation is not None:
        report.error(
            "The method rewrites rows in every step, and a file has no soft labels of such rows: expected "
            "a model. Give --teacher as well, or another method, such as kd."
        )


def _agree(rows: Rows, task: Task, report: Report) -> None:
    """The soft labels are better than chance on labelled rows, and no other order is better."""
    assert rows.soft_labels is not None
    kept = np.arange(len(rows)) if rows.unlabelled is None else np.flatnonzero(~rows.unlabelled)
    predicted, true = labels_from(rows.soft_labels[kept], task.kind), rows.labels[kept]
    if task.kind == "classification":
        predicted, true = (column[:, None] == np.arange(task.outputs) for column in (predicted, true))
    predicted, true = predicted.astype(np.int64), true.astype(np.int64)
    if len(kept) < _FEWEST or agreement(true, true)[2] >= SIGNIFICANCE:
        report.warn(
            f"Only {len(kept)} training rows have a label, too few or too equal to tell whether the soft "
            f"labels stand in the order {listed(task.labels)}."
        )
        return
    share, chance, p = agreement(predicted, true)
    report.found["soft_labels"]["agreement"] = share
    order = better_order(predicted, true)
    if order is not None:
        names = tuple(task.labels[i] for i in order)
        other = agreement(predicted, true[:, order])[0]
        report.error(
            f"The soft labels stand in another order than the data's labels: {share:.0%} of what they say "
            f"is right as given, {listed(task.labels)}, and {other:.0%} if they are read as "
            f"{listed(names)}. Reorder the lists, name the labels in the file (label: probability, or a "
            f"column for each), or give {setting('dataset.labels', list(names))}."
        )
    elif p >= SIGNIFICANCE:
        report.error(
            f"The soft labels know nothing of the labels: {share:.0%} of what they say is right on "
            f"{len(kept)} labelled rows, {chance:.0%} would be by chance. Check dataset.soft_labels, and "
            "that the rows stand in the same order."
        )
