"""Read text, CSV, TSV, JSONL or Parquet of any size in pieces that fit into memory.

The same formats, checks and messages as `tables`, but a row at a time.
"""

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.data import tables
from stillroom.data.tables import Table
from stillroom.errors import WrongInput

ROWS = 1024
"""Most rows in a piece."""

CHARACTERS = 4_000_000
"""A piece of this many bytes ends, however few its rows are."""

_LINE = 64 << 20
"""Most bytes in a line or a quoted text: longer ones would not fit into memory for long."""

Row = tuple[int, dict[str, Any]]
"""A row's first line, and its values by column."""


class Stream:
    """A file, or standard input, as tables of at most `ROWS` rows.

    Attributes:
        source: How messages name it.
        format: txt, csv, tsv, jsonl or parquet.
        schema: Of a Parquet file, else None.
    """

    def __init__(self, stream: BinaryIO, source: str, form: str):
        self.source, self.format = source, form
        self.schema: Any = None
        self._stream = stream
        self._parquet = self._open_parquet() if form == "parquet" else None
        self._read = 0
        try:
            self._size = os.fstat(stream.fileno()).st_size if stream.seekable() else 0
        except OSError:
            self._size = 0

    @property
    def done(self) -> float | None:
        """The share that was read, 0 to 1; None where the end is not known."""
        if self._parquet is not None:
            return self._read / max(1, int(self._parquet.metadata.num_rows))
        return self._read / self._size if self._size else None

    def tables(self) -> Iterator[Table]:
        """Yield the rows in order, in tables of at least one row.

        Raises:
            WrongInput: If it is not UTF-8, a row does not fit its format, or it is damaged.
        """
        if self._parquet is not None:
            yield from self._record_batches()
            return
        rows = _READERS[self.format](self)
        first = 0
        while True:
            piece: list[Row] = []
            end = self._read + CHARACTERS
            for row in rows:
                piece.append(row)
                if len(piece) == ROWS or self._read >= end:
                    break
            if not piece:
                return
            names = dict.fromkeys(itertools.chain.from_iterable(values for _, values in piece))
            columns = {name: [values.get(name) for _, values in piece] for name in names}
            yield Table(self.source, columns, len(piece), [line for line, _ in piece], first)
            first += len(piece)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield each line's number from 1, and the line with its end."""
        for number in itertools.count(1):
            data = self._stream.readline(_LINE + 1)
            if not data:
                return
            self._read += len(data)
            if len(data) > _LINE:
                raise WrongInput(
                    f"{self.source}, line {number}: expected at most {_LINE >> 20} MiB in a line, found "
                    "more. Check the format, or split the text."
                )
            try:
                line = data.decode("utf-8")
                yield number, line.lstrip("\ufeff") if number == 1 else line
            except UnicodeDecodeError as error:
                raise WrongInput(
                    f"{self.source}, line {number}: expected UTF-8 text, found the byte "
                    f"0x{error.object[error.start]:02x} ({error.reason}). Save the file as UTF-8."
                ) from None

    def _open_parquet(self) -> Any:
        try:
            file = pq.ParquetFile(self._stream, pre_buffer=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error
        self.schema = file.schema_arrow
        tables.require_distinct(self.source, self.schema.names)
        return file

    def _record_batches(self) -> Iterator[Table]:
        assert self._parquet is not None
        # After an error in one of Arrow's reading threads the process may abort when it ends.
        batches = self._parquet.iter_batches(batch_size=ROWS, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._damaged(error) from error
            if batch.num_rows:
                whole = pa.Table.from_batches([batch])
                columns = tables.ArrowColumns(Path(self.source), whole)
                yield Table(self.source, columns, batch.num_rows, None, self._read)
                self._read += batch.num_rows

    def _damaged(self, error: Exception) -> WrongInput:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return WrongInput(
            f"{self.source} is truncated or damaged, or no Parquet file: {reason} Copy or write it again."
        )


def format_of(path: Path) -> str:
    """Return the format that a file's name says, or raise `WrongInput`."""
    form = ENDINGS.get(path.suffix.lower())
    if form is None:
        raise WrongInput(f"Cannot tell the format of {path}: expected {', '.join(ENDINGS)}.")
    return form


def is_readable(path: Path) -> bool:
    """Return whether a file's name says a format that can be read in pieces."""
    return path.suffix.lower() in ENDINGS


def _text(stream: Stream) -> Iterator[Row]:
    for number, line in stream.lines():
        yield number, {"text": line.rstrip("\r\n")}


def _csv(stream: Stream) -> Iterator[Row]:
    return _delimited(stream, delimiter=",", strict=True)


def _tsv(stream: Stream) -> Iterator[Row]:
    return _delimited(stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(stream: Stream, delimiter: str, **dialect: Any) -> Iterator[Row]:
    # Where a quote never closes, the limit ends what would read all the rest.
    csv.field_size_limit(_LINE)
    lines = _csv_lines(stream)
    first = next(lines, "")
    given = tables.separator(first)
    reader = csv.reader(
        lines if given else itertools.chain([first], lines), delimiter=given or delimiter, **dialect
    )
    header: list[str] | None = None
    skipped = 1 if given else 0
    count, start = 0, 1 + skipped
    try:
        for values in reader:
            line, start = start, skipped + reader.line_num + 1
            if header is None:
                header = [name.strip() for name in values]
                tables.require_distinct(stream.source, header)
            elif values:
                count += 1
                tables.require_width(f"{stream.source}, row {count} (line {line})", header, values)
                yield line, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise tables.wrong_quotes(f"{stream.source}, row {count + 1} (line {start})", error) from None


def _csv_lines(stream: Stream) -> Iterator[str]:
    """Yield lines that end at a carriage return as well, as old spreadsheets write them.

    Where a quoted text has one, `csv` puts the parts together again.
    """
    for _, line in stream.lines():
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _jsonl(stream: Stream) -> Iterator[Row]:
    count = 0
    for number, line in stream.lines():
        if line.strip():
            count += 1
            where = f"{stream.source}, row {count} (line {number})"
            found = tables.parse(line, where)
            if not isinstance(found, dict):
                raise WrongInput(f"{where}: expected an object with a text, found {found!r:.60}.")
            yield number, found


_READERS: dict[str, Callable[[Stream], Iterator[Row]]] = {
    "txt": _text,
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
}

ENDINGS = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
