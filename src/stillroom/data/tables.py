"""Read a CSV, TSV, JSONL or Parquet file into columns, or say what is wrong with it and where."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.errors import WrongInput


@dataclass(frozen=True)
class Table:
    """A file's columns as Python values, and where each of its rows stands."""

    source: str
    columns: Mapping[str, Sequence[Any]]
    rows: int
    lines: Sequence[int] | None = None
    """The line of each row, in files that have lines."""
    first: int = 0
    """How many rows stand before these, where this is a piece of a file."""

    def at(self, row: int) -> str:
        """Return how messages name a row (given from 0): the file, the row from 1, its line."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"{self.source}, row {self.first + row + 1}{line}"


def read(path: Path) -> Table:
    """Return the file's table; it has at least one row.

    CSV and TSV start with the names of their columns and are text throughout; TSV has no quoting,
    as GLUE's files. JSONL holds one object per line; a JSON file may hold a list of objects instead.

    Raises:
        WrongInput: If the file is missing, empty or damaged, of an unknown format, or not UTF-8.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise WrongInput(f"Cannot tell the format of {path}: expected {', '.join(_READERS)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WrongInput(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    if not data.strip():
        raise WrongInput(f"{path} is empty: expected rows of text with their labels.")
    table = reader(path, data)
    if not table.columns or not table.rows:
        raise WrongInput(f"{path} has no rows: expected rows of text with their labels.")
    return table


def is_readable(path: Path) -> bool:
    """Return whether the file's ending is one of a format that `read` knows."""
    return path.suffix.lower() in _READERS


def _decode(path: Path, data: bytes) -> str:
    try:
        # One of each program that wrote it; as text it cannot be seen.
        return data.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise WrongInput(
            f"{path}, line {line}: expected UTF-8 text, found the byte 0x{data[error.start]:02x} "
            f"({error.reason}). Save the file as UTF-8."
        ) from None


def _csv(path: Path, data: bytes) -> Table:
    return _delimited(path, data, delimiter=",", strict=True)


def _tsv(path: Path, data: bytes) -> Table:
    return _delimited(path, data, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(path: Path, data: bytes, delimiter: str, **dialect: Any) -> Table:
    text = _decode(path, data)
    # The limit would cut long documents; a quote that never closes is found without it.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    given = separator(text.partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=given or delimiter, **dialect)
    if given:
        next(reader)
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    start = reader.line_num + 1
    try:
        for values in reader:
            line, start = start, reader.line_num + 1
            if header is None:
                header = [name.strip() for name in values]
                require_distinct(path, header)
            elif values:
                require_width(f"{path}, row {len(rows) + 1} (line {line})", header, values)
                rows.append(values)
                lines.append(line)
    except csv.Error as error:
        raise wrong_quotes(f"{path}, row {len(rows) + 1} (line {start})", error) from None
    columns = zip(*rows, strict=True) if rows else ((),) * len(header or ())
    return Table(str(path), dict(zip(header or (), columns, strict=True)), len(rows), lines)


def _json(path: Path, data: bytes) -> Table:
    text = _decode(path, data)
    objects: list[Any] = []
    lines: list[int] | None = None
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        objects = parse(text, f"{path}")
    else:
        lines = []
        for line, part in enumerate(text.split("\n"), start=1):
            if part.strip():
                objects.append(parse(part, f"{path}, row {len(objects) + 1} (line {line})"))
                lines.append(line)
    names: dict[str, None] = {}
    for row, found in enumerate(objects):
        if not isinstance(found, dict):
            where = Table(str(path), {}, len(objects), lines).at(row)
            raise WrongInput(f"{where}: expected an object with a text and a label, found {found!r:.60}.")
        names.update(dict.fromkeys(found))
    columns = {name: [found.get(name) for found in objects] for name in names}
    return Table(str(path), columns, len(objects), lines)


def separator(line: str) -> str | None:
    """Return what a file's first line says of its separator, as Excel reads it; mostly it says nothing.

    Example:
        >>> separator("sep=;"), separator("text,label")
        (';', None)
    """
    found = re.fullmatch(r'"?sep=([^\w"\r\n])"?\s*', line, re.IGNORECASE)
    return None if found is None else found[1]


def require_width(where: str, header: Sequence[str], values: Sequence[str]) -> None:
    """Raise `WrongInput` unless a delimited row has a value for each column."""
    if len(values) != len(header):
        raise WrongInput(
            f"{where}: expected {len(header)} columns ({', '.join(header)}), found {len(values)}. Correct "
            "the line; in CSV a text with a comma in it needs double quotes."
        )


def wrong_quotes(where: str, error: csv.Error) -> WrongInput:
    """Return the error of a CSV row that cannot be read."""
    return WrongInput(
        f"{where}: {error}. Correct the quotes: a text in double quotes ends at the next one, and a quote "
        'inside it is written twice ("").'
    )


def parse(text: str, where: str) -> Any:
    """Return the value that JSON means, or raise `WrongInput` naming the place."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require_distinct(where, [name for name, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise WrongInput(f"{where}: expected JSON, found {text.strip()!r:.60}: {error}.") from None


def _parquet(path: Path, data: bytes) -> Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        require_distinct(path, file.schema_arrow.names)
        # After an error in one of Arrow's reading threads the process may abort when it ends.
        table = file.read(use_threads=False)
        table.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WrongInput(
            f"{path} is truncated or damaged, or no Parquet file: {reason} Copy or write it again."
        ) from error
    return Table(str(path), ArrowColumns(path, table), table.num_rows)


class ArrowColumns(Mapping[str, Sequence[Any]]):
    """An Arrow table's columns; only those that are looked at become Python values."""

    def __init__(self, path: Path, table: Any):
        self._path, self._table = path, table

    def __getitem__(self, name: str) -> list[Any]:
        values: list[Any] = []
        try:
            for value in self._table.column(name):
                values.append(value.as_py())
        except (ValueError, OverflowError) as error:
            raise WrongInput(
                f"{self._path}, row {len(values) + 1}: the value of {name!r} cannot be read: {error}. "
                "Write the file again, with text as UTF-8."
            ) from None
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table.column_names)


def require_distinct(where: object, names: Sequence[str]) -> None:
    """Raise `WrongInput` if a column's name occurs twice."""
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise WrongInput(f"{where}: the column {twice!r} occurs twice. Rename or drop one of them.")


_READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".parquet": _parquet,
}
