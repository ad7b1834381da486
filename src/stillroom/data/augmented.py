"""Augmented rows in a file: training rows with other words in them, each with the row it comes from."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stillroom.data import tables
from stillroom.data.columns import texts_of
from stillroom.data.tasks import Rows, Task
from stillroom.errors import WrongInput

SOURCE_ROW = "source_row"
"""Column with the number, from 0, of the row of the training split that a row was made of."""

ABOUT = b"stillroom"
"""Key of the metadata, JSON, of a Parquet file that `stillroom augment` wrote."""


def fingerprint(rows: Rows) -> str:
    """Return the SHA-256 of the rows' texts in their order: what numbers of rows refer to.

    Example:
        >>> one, other = (Rows("", (texts,), np.zeros(2)) for texts in (["ab", "c"], ["a", "bc"]))
        >>> fingerprint(one) == fingerprint(other)
        False
    """
    digest = hashlib.sha256(f"{len(rows.texts)} {len(rows)}".encode())
    rows.hash_texts(digest)
    return digest.hexdigest()


def read(path: Path, task: Task, train: Rows) -> tuple[Rows, np.ndarray]:
    """Return the augmented rows of a file, labelled as their source rows, and the numbers of these.

    Args:
        path: Parquet, JSONL, CSV or TSV with the task's text columns and `source_row`.
        task: Names the text columns.
        train: All rows of the training split.

    Raises:
        WrongInput: If the file or a column is missing or damaged, it was made of other rows, or a
            number is none of a training row.
    """
    table = tables.read(path.expanduser())
    missing = [name for name in (*task.text, SOURCE_ROW) if name not in table.columns]
    if missing:
        raise WrongInput(
            f"{path} has no column {missing[0]!r}: expected {', '.join((*task.text, SOURCE_ROW))}, found "
            f"{', '.join(table.columns)}. Write it with `stillroom augment` from this data set."
        )
    made_of = _about(path).get("fingerprint")
    if made_of is not None and made_of != fingerprint(train):
        raise WrongInput(
            f"{path} was made of other training rows than those of {task.name}: fingerprint "
            f"{made_of[:12]} there, {fingerprint(train)[:12]} here. Write it again with `stillroom "
            "augment` from this data set."
        )
    texts = tuple(texts_of(table, name) for name in task.text)
    source = np.empty(table.rows, dtype=np.int64)
    for row, value in enumerate(table.columns[SOURCE_ROW]):
        number = _number(value)
        if number is None or not 0 <= number < len(train):
            raise WrongInput(
                f"{table.at(row)}: expected in {SOURCE_ROW!r} the number of a training row, 0 to "
                f"{len(train) - 1}, found {value!r:.40}. The file belongs to other data: write it again "
                "with `stillroom augment`."
            )
        source[row] = number
    return Rows(str(path), texts, train.labels[source]), source


def join(train: Rows, augmented: Rows) -> Rows:
    """Return the training rows with the augmented ones behind them."""
    texts = tuple(old + new for old, new in zip(train.texts, augmented.texts, strict=True))
    labels = np.concatenate([train.labels, augmented.labels])
    return replace(
        train,
        source=f"{train.source} with {len(augmented)} augmented rows",
        texts=texts,
        labels=labels,
    )


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _about(path: Path) -> dict[str, Any]:
    """Return what `stillroom augment` noted in a Parquet file, nothing of any other file."""
    if path.suffix.lower() != ".parquet":
        return {}
    noted = (pq.read_schema(path.expanduser()).metadata or {}).get(ABOUT)
    if noted is None:
        return {}
    try:
        about = dict(json.loads(noted))
        if not isinstance(about.get("fingerprint", ""), str):
            raise ValueError("its fingerprint is no text")
        return about
    except (ValueError, TypeError) as error:
        raise WrongInput(
            f"{path}: what `stillroom augment` noted in it cannot be read: {error}. Write it again."
        ) from None
