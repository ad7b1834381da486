"""What a table's columns mean: which hold text, which the label, and what kind of label."""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from stillroom.data import soft_labels
from stillroom.data.tables import Table
from stillroom.data.tasks import Kind, Rows, Task, plain
from stillroom.data.trained import listed, was_trained_on
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings, nearest, setting

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("query", "passage"),
    ("query", "document"),
)
"""Usual names of two text columns, in the order in which they are looked for."""

TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "utterance", "document", "body")
"""Usual names of a single text column, looked for after the pairs."""

LABELS = ("label", "labels", "score", "target", "class", "category", "rating", "sentiment", "gold_label")
"""Usual names of the label column, in the order in which they are looked for."""

_MOST_CLASSES = 20
"""More whole numbers may be scores; more names than this, and than half the rows, are no classes."""

_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1"),
    "regression": ("pearson", "spearman"),
    "multi-label": ("f1", "accuracy"),
}

_NO_CLASS = "-1"
"""How sets on the hub mark a row without label."""

MISSING = ("NA", "N/A", "n/a", "#N/A", "<NA>", "None", "NULL", "null")
"""What spreadsheets and scripts write in place of a label: none of these is a class unless it is named."""

_LARGEST = float(np.finfo(np.float32).max)
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")


def task_of(table: Table, settings: DatasetSettings) -> tuple[Task, bool]:
    """Return the task that columns and settings make, and whether labels may be class numbers.

    They may where `settings.labels` names the classes by words; where it names them by numbers, a
    number is a name.

    Raises:
        WrongInput: If columns or labels are missing, or are not what the settings say.
    """
    text = text_columns(table, settings.text)
    label = _label_column(table, settings.label, text, optional=settings.soft_labels is not None)
    named = () if settings.soft_labels is None else soft_labels.labels_of(table, settings.soft_labels)
    kind = settings.kind
    values = _labels(
        table, label, kind, settings.labels or named, optional=settings.soft_labels is not None
    )
    if kind == "auto":
        kind = "classification" if named and all(value is None for value in values) else _kind(values)
    names = settings.labels or (named if kind != "regression" else ())
    if kind == "regression":
        if names:
            raise WrongInput("Regression has no label names: remove dataset.labels or dataset.kind.")
    elif names:
        if len(set(names)) < len(names):
            raise WrongInput(f"dataset.labels names one label twice: {', '.join(names)}.")
    else:
        names = _names(table, label, values, kind)
        if settings.kind == "auto":
            _require_few(table, label, names, kind)
    words = settings.labels is not None and all(_number(name) is None for name in names)
    return Task(settings.name, kind, text, label, names, _METRICS[kind]), words


def text_columns(
    table: Table,
    given: tuple[str, ...] | None,
    *,
    option: str = "dataset.text",
    trained: tuple[str, ...] | None = None,
) -> tuple[str, ...]:
    """Return the one or two text columns: those given, else those trained on, else those of a usual name.

    Args:
        table: A file's columns.
        given: Names, or None.
        option: How the caller's user names columns.
        trained: The columns that the model which is to read them was trained on, if that is known.

    Raises:
        WrongInput: If a column is missing, none has a usual name, or a model of one text would read two
            or the other way round.
    """
    if given is not None:
        if len(given) not in (1, 2) or len(set(given)) < len(given):
            raise WrongInput(f"{option} takes one or two columns, found {len(given)}: {list(given)}.")
        for column in given:
            _require_column(table, column, option)
        require_as_many(table.source, given, trained, option)
        return given
    if trained is not None and all(name in table.columns for name in trained):
        return trained
    by_name = {name.lower(): name for name in reversed(list(table.columns))}
    usual = [
        tuple(by_name[name] for name in names)
        for names in (*PAIRS, *((name,) for name in TEXTS))
        if all(name in by_name for name in names)
    ]
    if usual:
        fitting = [names for names in usual if trained is None or len(names) == len(trained)]
        found = (fitting or usual)[0]
        require_as_many(table.source, found, trained, option)
        return found
    first = next(iter(table.columns))
    how = f"--set {option}=[{first}]" if option == "dataset.text" else f"{option} {first}"
    raise WrongInput(
        f"{table.source} has no text column of a usual name: its columns are "
        f"{', '.join(table.columns)}. Name one or two of them, such as {how}."
    )


def require_as_many(
    source: str, found: tuple[str, ...], trained: tuple[str, ...] | None, option: str
) -> None:
    """Raise `WrongInput` if a model that was trained on one text is to read two, or the other way round."""
    if trained is not None and len(found) != len(trained):
        wanted = "one column" if len(trained) == 1 else "two columns"
        raise WrongInput(
            f"{was_trained_on(trained)}, and would read {listed(found)} of {source}. Name {wanted} with "
            f"{option}, or give another model."
        )


def _label_column(table: Table, given: str | None, text: tuple[str, ...], *, optional: bool) -> str:
    if given is not None:
        if not optional:
            _require_column(table, given, "dataset.label")
        if given in text:
            raise WrongInput(f"{table.source}: the column {given!r} cannot be both text and label.")
        return given
    by_name = {name.lower(): name for name in reversed(list(table.columns)) if name not in text}
    for name in LABELS:
        if name in by_name:
            return by_name[name]
    if optional:
        return LABELS[0]
    raise WrongInput(
        f"{table.source} has no label column of a usual name: its columns are "
        f"{', '.join(table.columns)}. Name it, such as --set dataset.label={list(table.columns)[-1]}."
    )


def _require_column(table: Table, column: str, key: str = "") -> None:
    if column not in table.columns:
        hint = f" Set {key} to one of these." if key else ""
        raise WrongInput(
            f"{table.source} has no column {column!r}.{nearest(column, list(table.columns))}{hint}"
        )


def _labels(table: Table, column: str, kind: str, names: Sequence[str], *, optional: bool) -> list[Any]:
    """Return the label column; a value that is missing is an error, or None where labels are optional.

    One of `MISSING` is always an error, as it may be a class, unless it is one of `names`. Text that is
    a list is the list, where labels may be lists.
    """
    if optional and column not in table.columns:
        return [None] * table.rows
    values, multi = list(table.columns[column]), kind == "multi-label"
    for row, value in enumerate(values):
        blank = isinstance(value, str) and value.strip().lower() in ("", "nan")
        if optional and (value is None or value != value or blank or str(value) == _NO_CLASS):
            values[row] = None
        elif value is None or value != value or (blank and not multi):
            raise WrongInput(
                f"{table.at(row)}: the label ({column!r}) is missing. Fill it in or remove the row."
            )
        elif isinstance(value, str) and value.strip() in MISSING and value.strip() not in names:
            empty = "leave the cell empty" if optional or multi else "remove the row"
            example = setting("dataset.labels", [value.strip(), "other class"])
            named = "" if kind == "regression" else f" If it is a class, name every class: {example}."
            raise WrongInput(
                f"{table.at(row)}: the label ({column!r}) is {value.strip()}, which is taken for a missing "
                f"one. Fill it in or {empty}.{named}"
            )
        elif isinstance(value, str) and kind in ("auto", "multi-label"):
            values[row] = found = _listed(value)
            if multi and found is value and _bracketed(value) and "|" not in value:
                raise WrongInput(
                    f"{table.at(row)}: expected a list of labels in {column!r}, found {value!r:.40}. Write "
                    'it as JSON (["a", "b"]), or put | between the names, without brackets.'
                )
    return values


def _require_few(table: Table, column: str, names: Sequence[str], kind: Kind) -> None:
    """Raise `WrongInput` where so many labels are more likely scores, or numbers of rows."""
    ways = (
        f"{setting('dataset.kind', 'classification')} or {setting('dataset.kind', 'regression')}; or name "
        "another column with dataset.label."
    )
    numbers = kind == "classification" and all(_number(name) is not None for name in names)
    if numbers and len(names) > _MOST_CLASSES:
        raise WrongInput(
            f"{table.source}: the column {column!r} has {len(names)} different whole numbers, expected at "
            f"most {_MOST_CLASSES} unless it is said whether they are classes or scores. Give {ways}"
        )
    if len(names) > max(_MOST_CLASSES, table.rows // 2):
        raise WrongInput(
            f"{table.source}: the column {column!r} has {len(names)} different labels in {table.rows} "
            f"rows, too many for classes. Say what they are: {ways}"
        )


def _kind(values: Sequence[Any]) -> Kind:
    if any(isinstance(value, list) for value in values):
        return "multi-label"
    numbers = [_number(value) for value in values if value is not None]
    scores = all(n is not None for n in numbers) and any(n is not None and n % 1 for n in numbers)
    return "regression" if scores else "classification"


def _names(table: Table, column: str, values: Sequence[Any], kind: Kind) -> tuple[str, ...]:
    """Return the sorted names of the classes that occur; numbers sort as numbers."""
    found: dict[str, int] = {}
    for row, value in enumerate(values):
        if value is None:
            continue
        for part in _parts(value) if kind == "multi-label" else (value,):
            name = _class(table, row, part)
            number = _number(name)
            if number is not None and (number < 0 or number % 1):
                raise WrongInput(
                    f"{table.at(row)}: expected a class number from 0 or a class name in {column!r}, "
                    f"found {name}. -1 often marks rows without label: remove them. For scores set "
                    "dataset.kind=regression."
                )
            found.setdefault(name, row)
    _require_one_spelling(table, column, found)
    if len(found) < (1 if kind == "multi-label" else 2):
        raise WrongInput(
            f"{table.source}: expected at least two classes in {column!r}, found only "
            f"{', '.join(found) or 'empty ones'}. Check dataset.label, or name all classes with "
            "dataset.labels."
        )
    if all(_number(name) is not None for name in found):
        return tuple(sorted(found, key=lambda name: (_number(name), name)))
    return tuple(sorted(found))


def _require_one_spelling(table: Table, column: str, found: Mapping[str, int]) -> None:
    """Raise `WrongInput` if two names, given with the rows they occur in first, are the same class."""
    spelt: dict[str | float, str] = {}
    for name, row in found.items():
        number = _number(name)
        key = _spelling(name) if number is None else number
        # What is 1 and 0 to one export is true and false to another.
        key = {"true": 1.0, "false": 0.0}.get(key, key) if isinstance(key, str) else key
        other = spelt.setdefault(key, name)
        if other != name:
            raise WrongInput(
                f"{table.at(row)}: the label ({column!r}) is {name!r}, and {other!r} in row "
                f"{table.first + found[other] + 1}: expected one spelling of a class. Write them alike; if "
                f"they are two classes, name every class: {setting('dataset.labels', [other, name])}."
            )


def _spelling(name: str) -> str:
    """Return what two spellings of a name have in common.

    Example:
        >>> _spelling("Caf\u00e9") == _spelling("CAFE\u0301")
        True
    """
    return unicodedata.normalize("NFC", plain(unicodedata.normalize("NFC", name)).removeprefix("+"))


def rows_of(
    table: Table, task: Task, numbered: bool, *, soft: str | None = None, optional: bool = False
) -> Rows:
    """Return the table's rows as the task reads them.

    Args:
        table: A file's columns.
        task: Names the columns and the meaning of the labels.
        numbered: Whether labels may be given as positions in `task.labels`.
        soft: Name of the soft labels, which are read where the table has them.
        optional: Whether rows may lack a label; their soft labels then say what it is.
    """
    for column in (*task.text, *(() if optional else (task.label,))):
        _require_column(table, column)
    texts = tuple(texts_of(table, column) for column in task.text)
    values = _labels(table, task.label, task.kind, task.labels, optional=optional)
    if soft is None or not (optional or soft_labels.has(table, soft, task.labels)):
        return Rows(table.source, texts, _numbers_of(table, values, task, numbered))
    soft_NC = soft_labels.read(table, task, soft)
    unlabelled = np.array([value is None for value in values])
    labels = _numbers_of(table, values, task, numbered)
    likeliest = soft_labels.labels_from(soft_NC, task.kind)
    labels[unlabelled] = likeliest[unlabelled].astype(labels.dtype)
    return Rows(table.source, texts, labels, soft_NC, unlabelled)


def _numbers_of(table: Table, values: Sequence[Any], task: Task, numbered: bool) -> np.ndarray:
    """Return labels as `Rows` has them; any number where a value is None."""
    if task.kind == "regression":
        return _scores(table, values)
    if task.kind == "classification":
        found = [
            0 if value is None else _index(table, row, value, task.labels, numbered)
            for row, value in enumerate(values)
        ]
        return np.array(found, dtype=np.int64)
    flags = np.zeros((table.rows, len(task.labels)), dtype=np.float32)
    for row, value in enumerate(values):
        if value is None:
            continue
        for part in _parts(value):
            index = _index(table, row, part, task.labels, numbered)
            if flags[row, index]:
                raise WrongInput(
                    f"{table.at(row)}: the label {task.labels[index]!r} is given twice. A row lists the "
                    "names of its labels, not a 0 or 1 for each."
                )
            flags[row, index] = 1
    if table.rows > 1 and flags.shape[1] == 2 and flags.all() and _are_flags(table, values):
        raise WrongInput(
            f"{table.source}: every row of {task.label!r} is 0 and 1, such as {values[0]!r}, so that each "
            f"has both labels ({', '.join(task.labels)}). A row lists the names of its labels, not a 0 "
            'or 1 for each: write ["b"] or [] instead of [0, 1] or [0, 0].'
        )
    return flags


def _are_flags(table: Table, values: Sequence[Any]) -> bool:
    return all(
        {_class(table, row, part) for part in _parts(value)} == {"0", "1"}
        for row, value in enumerate(values)
        if value is not None
    )


def texts_of(table: Table, column: str, *, option: str = "dataset.text") -> list[str]:
    """Return a text column, or raise `WrongInput` for the first row without valid text in it."""
    values = list(table.columns[column])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found = (
                "nothing" if value is None or value != value else f"{type(value).__name__} {value!r:.40}"
            )
            raise WrongInput(
                f"{table.at(row)}: expected text in {column!r}, found {found}. Fill it in or remove the "
                f"row; another column is named with {option}."
            )
        # JSON can spell half a surrogate pair, which no tokenizer can read.
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise WrongInput(f"{table.at(row)}: the text in {column!r} is not valid Unicode. Correct it.")
    return values


def _scores(table: Table, values: Sequence[Any]) -> np.ndarray:
    scores = np.zeros(len(values), dtype=np.float32)
    for row, value in enumerate(values):
        if value is None:
            continue
        number = _number(value)
        if number is None or not abs(number) <= _LARGEST:
            raise WrongInput(
                f"{table.at(row)}: expected a finite number as label, found {value!r:.40}. Correct it or "
                "remove the row; for classes set dataset.kind=classification."
            )
        scores[row] = number
    return scores


def _parts(value: Any) -> list[Any]:
    """Return the labels of one multi-label row: a list, or text with `|` or else commas."""
    if isinstance(value, str):
        return [part for part in value.split("|" if "|" in value else ",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _listed(text: str) -> Any:
    """Return the list that text is in JSON, or as Python writes it (and pandas with it), else the text.

    Example:
        >>> _listed('["x", "y"]'), _listed("['x', 'y']"), _listed("x, y")
        (['x', 'y'], ['x', 'y'], 'x, y')
    """
    if not _bracketed(text):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        # To Python, 'x' 'y' without a comma, as NumPy writes them, are one text.
        if read is json.loads or "".join(repr(found).split()) == "".join(text.split()):
            return found
    return text


def _bracketed(text: str) -> bool:
    return text.strip().startswith("[") and text.strip().endswith("]")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        return None if isinstance(value, str) and "_" in value else float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _class(table: Table, row: int, value: Any) -> str:
    """Return a class label as text: 1, 1.0 and "1.0" are the same class, and so on."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and value % 1 == 0:
        return str(int(value))
    if isinstance(value, str):
        if not value.strip():
            raise WrongInput(
                f"{table.at(row)}: expected names in the list of labels, found {value!r}. Remove it from "
                "the list: [] says that a row has none."
            )
        whole = _WHOLE.fullmatch(value.strip())
        return whole[1] if whole else value.strip()
    if isinstance(value, int | float | Decimal):
        return str(value)
    raise WrongInput(
        f"{table.at(row)}: expected a label as text or number, found {type(value).__name__} "
        f"{value!r:.40}. Name another column with dataset.label, or set dataset.kind=multi-label."
    )


def _index(table: Table, row: int, value: Any, names: Sequence[str], numbered: bool) -> int:
    name = _class(table, row, value)
    if name in names:
        return names.index(name)
    number = _number(name)
    if numbered and number is not None and 0 <= number < len(names) and not number % 1:
        return int(number)
    if numbered and number == -1:
        raise WrongInput(
            f"{table.at(row)} has no label (-1), as the test splits of GLUE on the hub. Use a split "
            "with labels, such as validation."
        )
    numbers = f" or a whole number from 0 to {len(names) - 1}" if numbered else ""
    raise WrongInput(
        f"{table.at(row)}: expected one of the labels {', '.join(names)}{numbers}, found {name!r}. "
        "Labels are those of the training file, or dataset.labels."
    )
