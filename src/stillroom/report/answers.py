"""What a run's page says of single rows: who is right where, classes, and how sure the models are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from stillroom.data.tasks import Task
from stillroom.evaluation.calibration import calibration
from stillroom.evaluation.metrics import predictions
from stillroom.evaluation.predictions import Predictions
from stillroom.report import pictures
from stillroom.report.facts import Cell, Table
from stillroom.report.pictures import Picture

DISAGREEMENTS = 200
"""Most rows that the page shows."""

LONGEST_TEXT = 600
"""Most characters of a text that the page shows."""

CLASSES = 20
"""Most classes whose confusion is shown as a table."""


def agreement(kept: Predictions) -> tuple[Table, Table | None, str] | None:
    """Return who is right where, the rows on which teacher and student disagree, and what is shown."""
    if not {"teacher", "student"} <= kept.logits.keys():
        return None
    task, labels = kept.task, kept.rows.labels
    others = [name for name in ("teacher", "student", "control") if name in kept.logits]
    if task.kind == "regression":
        return _differences(kept, others)
    said = {name: predictions(kept.logits[name], task.kind) for name in others}
    if task.kind == "classification":
        sure = {name: softmax(kept.logits[name].astype(float), axis=1) for name in others}
        right = {name: said[name] == labels for name in others}
        differ = said["teacher"] != said["student"]
    else:
        sure = {name: expit(kept.logits[name].astype(float)) for name in others}
        right = {name: (said[name] == labels).all(1) for name in others}
        differ = (said["teacher"] != said["student"]).any(1)
    total = len(labels)

    def share(rows: np.ndarray) -> list[Cell]:
        count = int(rows.sum())
        return [Cell(f"{count:,}", count), Cell(f"{100 * count / total:.1f} %", count)]

    teacher, student = right["teacher"], right["student"]
    summary = Table(
        "Who is right where",
        [("rows on which", False), ("rows", True), ("share", True)],
        [
            [Cell("teacher and student are right", number=False), *share(teacher & student)],
            [Cell("only the teacher is right", number=False), *share(teacher & ~student)],
            [Cell("only the student is right", number=False), *share(~teacher & student)],
            [Cell("neither is right", number=False), *share(~teacher & ~student)],
        ],
    )
    where = np.flatnonzero(differ)
    if not len(where):
        return summary, None, "Teacher and student give every row the same label."
    certain = {name: _certainty(sure[name], said[name]) for name in others}
    order = np.argsort(-(certain["teacher"] * certain["student"])[where], kind="stable")
    shown = where[order[:DISAGREEMENTS]]
    columns = [
        ("row", True),
        *((name, False) for name in task.text),
        ("label", False),
        *((name, False) for name in others),
        *((f"P {name}", True) for name in others),
    ]
    rows = []
    for i in shown:
        row = [Cell(str(i), int(i))]
        row += [Cell(_short(column[i]), number=False) for column in kept.rows.texts]
        row.append(Cell(_label(task, labels[i]), number=False))
        row += [Cell(_label(task, said[name][i]), number=False) for name in others]
        row += [Cell(f"{certain[name][i]:.2f}", float(certain[name][i])) for name in others]
        rows.append(row)
    all_of_them = f"{len(where):,} of {total:,} rows ({100 * len(where) / total:.1f} %)"
    note = f"Teacher and student disagree on {all_of_them}"
    note += (
        f"; the {DISAGREEMENTS} on which both are most certain are shown."
        if len(where) > DISAGREEMENTS
        else ", most certain first."
    )
    note += " P is the probability that a model gives to its own answer; row counts from 0."
    return summary, Table("Where teacher and student disagree", columns, rows, sortable=True), note


def _differences(kept: Predictions, names: Sequence[str]) -> tuple[Table, Table | None, str]:
    values = {name: kept.logits[name][:, 0].astype(float) for name in names}
    labels = kept.rows.labels.astype(float)
    summary = Table(
        "How far from the label",
        [("model", False), ("mean absolute error", True), ("largest error", True)],
        [
            [
                Cell(name, number=False),
                Cell(f"{np.abs(values[name] - labels).mean():.3f}"),
                Cell(f"{np.abs(values[name] - labels).max():.3f}"),
            ]
            for name in names
        ],
    )
    apart = np.abs(values["teacher"] - values["student"])
    shown = np.argsort(-apart, kind="stable")[: min(DISAGREEMENTS, 50)]
    columns = [("row", True), *((name, False) for name in kept.task.text), ("label", True)]
    columns += [*((name, True) for name in names), ("apart", True)]
    rows = [
        [
            Cell(str(i), int(i)),
            *(Cell(_short(column[i]), number=False) for column in kept.rows.texts),
            Cell(f"{labels[i]:.2f}", float(labels[i])),
            *(Cell(f"{values[name][i]:.2f}", float(values[name][i])) for name in names),
            Cell(f"{apart[i]:.2f}", float(apart[i])),
        ]
        for i in shown
    ]
    note = (
        f"Of {len(labels):,} rows, the {len(rows)} on which teacher and student are furthest apart; "
        "row counts from 0."
    )
    return summary, Table("Where teacher and student disagree", columns, rows, sortable=True), note


def _certainty(probabilities: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Return the probability of a model's own answer; of several labels, that of the least certain."""
    if said.ndim == 1:
        return np.asarray(np.take_along_axis(probabilities, said[:, None], axis=1)[:, 0])
    return np.asarray(np.where(said > 0, probabilities, 1 - probabilities).min(1))


def _label(task: Task, value: Any) -> str:
    if task.kind == "classification":
        return task.labels[int(value)]
    return ", ".join(name for name, y in zip(task.labels, value, strict=True) if y) or "none"


def per_class(kept: Predictions) -> Table | None:
    """Return precision, recall and F1 of every class or label for each model; None for a score."""
    task, labels = kept.task, kept.rows.labels
    if task.kind == "regression":
        return None
    columns = [("class", False), ("rows", True)]
    cells: list[list[Cell]] = [[Cell(name, number=False)] for name in task.labels]
    names = [name for name in ("teacher", "control", "student") if name in kept.logits]
    for n, name in enumerate(names):
        said = predictions(kept.logits[name], task.kind)
        found = precision_recall_fscore_support(labels, said, labels=range(task.outputs), zero_division=0)
        columns += [(f"{name} {what}", True) for what in ("precision", "recall", "F1")]
        for i, row in enumerate(cells):
            if n == 0:
                row.append(Cell(f"{int(found[3][i]):,}", int(found[3][i])))
            row += [Cell(f"{100 * values[i]:.1f}", float(values[i])) for values in found[:3]]
    return Table("Precision, recall and F1 of each class, in per cent", columns, cells, sortable=True)


@dataclass(frozen=True)
class Confusion:
    """Counts by label (rows) and answer (columns), with each cell's share of its row."""

    model: str
    labels: tuple[str, ...]
    counts: list[list[int]]
    shares: list[list[float]]


def confusions(kept: Predictions) -> list[Confusion]:
    """Return the confusion of each model; empty unless there are classes, and few enough to show."""
    task = kept.task
    if task.kind != "classification" or task.outputs > CLASSES:
        return []
    found = []
    for name in ("teacher", "control", "student"):
        if name in kept.logits:
            said = predictions(kept.logits[name], task.kind)
            counts = confusion_matrix(kept.rows.labels, said, labels=range(task.outputs))
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            found.append(Confusion(name, task.labels, counts.tolist(), shares.tolist()))
    return found


def calibrations(kept: Predictions) -> tuple[list[Picture], Table] | None:
    """Return the reliability of each model: pictures and a table. None unless there are classes."""
    if kept.task.kind != "classification":
        return None
    columns = [("model", False), ("ECE", True), ("mean confidence", True), ("accuracy", True)]
    drawn, rows = [], []
    bins = {
        name: calibration(kept.logits[name], kept.rows.labels)
        for name in ("teacher", "control", "student")
        if name in kept.logits
    }
    lowest = min(0.5, *(value for found in bins.values() for value in (*found.confidence, *found.accuracy)))
    for name, found in bins.items():
        total = sum(found.rows)
        mean = sum(c * n for c, n in zip(found.confidence, found.rows, strict=True)) / total
        share = sum(a * n for a, n in zip(found.accuracy, found.rows, strict=True)) / total
        one = (found.confidence, found.accuracy, found.rows, found.error)
        drawn.append(pictures.reliability(name, *one, lowest=lowest))
        values = [Cell(f"{100 * value:.1f} %") for value in (found.error, mean, share)]
        rows.append([Cell(name, number=False), *values])
    return drawn, Table("Expected calibration error over ten bins of confidence", columns, rows)


def _short(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"
