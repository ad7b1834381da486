"""Soft labels from a file: probabilities that an ensemble, a language model or people gave to rows."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from stillroom.data.tables import Table
from stillroom.data.tasks import Kind, Task
from stillroom.errors import WrongInput

MOST_OFF = 1e-3
"""How far the probabilities of a row may sum from one: what rounding to a few digits leaves."""

_LEAST = 1e-7
"""Least probability that a logit is made of: 0 would be minus infinity."""


def has(table: Table, name: str, labels: Sequence[str]) -> bool:
    """Return whether a table has soft labels of this name."""
    return name in table.columns or any(f"{name}{label}" in table.columns for label in labels)


def labels_of(table: Table, name: str) -> tuple[str, ...]:
    """Return the labels that the soft labels themselves name, in their order; nothing where they name none.

    Columns `NAME` + label name them, and so do objects `{label: probability}`.
    """
    if name not in table.columns:
        return tuple(column.removeprefix(name) for column in table.columns if column.startswith(name))
    first = _value(table.columns[name][0])
    return tuple(first) if isinstance(first, dict) else ()


def read(table: Table, task: Task, name: str) -> np.ndarray:
    """Return the soft labels of every row, in the order of the task's labels.

    A column of this name holds for each row a list in the order of the labels, an object
    `{label: probability}`, either of them as JSON text in CSV and TSV, or, for regression, a number.
    Otherwise there is a column `NAME` + label for each label, as `stillroom predict` writes them with
    the name `probability_`.

    Args:
        table: A file's columns.
        task: Names the labels.
        name: Of the column or columns.

    Returns:
        float32, shape `(N, C)`: probabilities, each in 0 to 1, of classes summing to one; scores for
        regression.

    Raises:
        WrongInput: If a column or a label is missing, or a row has no such numbers.

    Example:
        >>> task = Task("made", "classification", ("text",), "label", ("no", "yes"), ("accuracy",))
        >>> table = Table("made", {"p_yes": [0.75], "p_no": [0.25]}, 1, None)
        >>> read(table, task, "p_").tolist()
        [[0.25, 0.75]]
    """
    if name in table.columns:
        rows: list[Any] = [_value(value) for value in table.columns[name]]
    else:
        missing = [label for label in task.labels if f"{name}{label}" not in table.columns]
        if missing or not task.labels:
            wanted = f"{name!r}" + (f", or {name}LABEL for each label" if task.labels else "")
            lacks = f" ({name}{missing[0]} is missing)" if len(missing) < len(task.labels) else ""
            raise WrongInput(
                f"{table.source} has no soft labels: expected a column {wanted}, found "
                f"{', '.join(table.columns)}{lacks}. Correct dataset.soft_labels or the file."
            )
        columns = [table.columns[f"{name}{label}"] for label in task.labels]
        rows = [list(row) for row in zip(*columns, strict=True)]
    found = np.empty((table.rows, task.outputs), dtype=np.float32)
    for row, value in enumerate(rows):
        found[row] = _numbers(table, row, value, task)
    return found


def logits_of(soft_NC: np.ndarray, kind: Kind) -> np.ndarray:
    """Return logits whose softmax (multi-label: sigmoid) the soft labels are; scores are their own.

    ``log p``, and ``log p - log(1 - p)`` of several labels, with p from 1e-7 on (and to 1 - 1e-7).

    Args:
        soft_NC: Probabilities, or scores, shape `(N, C)`.
        kind: Of the labels.

    Returns:
        float32, shape `(N, C)`.

    Example:
        >>> logits_of(np.array([[0.5, 0.5]]), "multi-label").tolist()
        [[0.0, 0.0]]
    """
    if kind == "regression":
        return soft_NC.astype(np.float32)
    if kind == "classification":
        return np.log(np.maximum(soft_NC.astype(np.float64), _LEAST)).astype(np.float32)
    inside = np.clip(soft_NC.astype(np.float64), _LEAST, 1 - _LEAST)
    return (np.log(inside) - np.log1p(-inside)).astype(np.float32)


def labels_from(soft_NC: np.ndarray, kind: Kind) -> np.ndarray:
    """Return what soft labels say as hard labels: likeliest class, labels from 0.5 on, or score.

    Args:
        soft_NC: Probabilities, or scores, shape `(N, C)`.
        kind: Of the labels.

    Returns:
        As `Rows.labels`: classes int64 `(N,)`, scores `(N,)`, several labels float32 `(N, C)`.

    Example:
        >>> labels_from(np.array([[0.2, 0.8], [0.6, 0.4]]), "classification").tolist()
        [1, 0]
    """
    if kind == "classification":
        return np.asarray(soft_NC.argmax(1))
    return soft_NC[:, 0] if kind == "regression" else (soft_NC >= 0.5).astype(np.float32)


def _value(value: Any) -> Any:
    """Return what JSON text means, and anything else as it is."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _numbers(table: Table, row: int, value: Any, task: Task) -> list[float]:
    """Return a row's numbers in the order of the labels."""
    if task.kind == "regression":
        value = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        if set(value) != set(task.labels):
            raise WrongInput(
                f"{table.at(row)}: expected soft labels of {', '.join(task.labels)}, found of "
                f"{', '.join(map(str, value))}. Name all of them, or set dataset.labels."
            )
        value = [value[label] for label in task.labels]
    if not isinstance(value, list):
        raise WrongInput(
            f"{table.at(row)}: expected soft labels as a list of {task.outputs} numbers, or as "
            f"{{label: probability}}, found {value!r:.60}. Every row needs them."
        )
    values = [_number(one) for one in value]
    if len(values) != task.outputs:
        order = f" ({', '.join(task.labels)})" if task.labels else ""
        raise WrongInput(
            f"{table.at(row)}: expected {task.outputs} soft labels{order}, found {len(values)}. Correct "
            "the row, or set dataset.labels."
        )
    if any(one is None or not np.isfinite(one) for one in values):
        raise WrongInput(
            f"{table.at(row)}: expected finite numbers as soft labels, found {value!r:.60}. Correct the "
            "row, or remove it."
        )
    numbers = [float(one) for one in values if one is not None]
    if task.kind == "regression":
        return numbers
    if min(numbers) < 0 or max(numbers) > 1 + MOST_OFF:
        raise WrongInput(
            f"{table.at(row)}: expected probabilities from 0 to 1, found {value!r:.60}. Logits are turned "
            "into them by softmax (several labels: sigmoid)."
        )
    if task.kind == "classification" and abs(sum(numbers) - 1) > MOST_OFF:
        raise WrongInput(
            f"{table.at(row)}: expected probabilities that sum to 1 (within {MOST_OFF:g}), found a sum of "
            f"{sum(numbers):.4g}. Divide the row by its sum, or say dataset.kind=multi-label."
        )
    return numbers


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
