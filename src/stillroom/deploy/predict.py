"""Predict a file of any size: rows in, the same rows with what the model says of them out."""

import contextlib
import csv
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stillroom import durable
from stillroom.data import columns
from stillroom.data.streams import Stream, format_of
from stillroom.data.tables import Table
from stillroom.deploy.answers import Answer, answer, is_score
from stillroom.deploy.predictor import Predictor
from stillroom.errors import WrongInput

OUTPUTS = ("jsonl", "csv", "tsv", "parquet")

PREDICTED = "predicted"
PROBABILITY = "probability_"
"""What is put before a label's name to name the column of its probability."""

_PAIRS = "Warning: nothing says whether {model} was trained on pairs; {names} are read as pairs (--text)."


def predict(
    model: str | Path,
    source: Path | BinaryIO,
    output: Path | BinaryIO,
    *,
    form: str | None = None,
    threads: int | None = None,
    batch_size: int = 32,
    text: Sequence[str] | None = None,
    input_format: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the rows of `source` to `output` in their order, with what the model says of each.

    Beside its own columns a row gets `predicted` (a label; several labels, joined by `|` in CSV and
    TSV; or a score), and for labels a column `probability_LABEL` each. Rows are read, computed and
    written in pieces of 1,024, sorted by length inside a piece, so that memory does not grow with the
    file. An empty text is predicted as one. Texts of more tokens than the model reads are cut, and counted.

    Args:
        model: An export, a run, a folder or a hub id, as `Predictor.load` takes it.
        source: A txt file (a text in each line), CSV, TSV, JSONL or Parquet; or an open stream.
        output: A file whose name says its format, which appears when it is whole; or an open stream,
            which gets JSONL.
        form: One of the export's. Default: the fastest.
        threads: How many the model computes with. Default: the library's own choice.
        batch_size: Most texts that are computed at once.
        text: One text column, or two for pairs. Default: those that the model was trained on, where the
            file has them, else those of a usual name.
        input_format: txt, csv, tsv, jsonl or parquet. Default: what the name says; for a stream, txt.
        console: For progress and warnings.

    Returns:
        `model`, `form`, `output`, `text` (the columns that were read), `rows`, `cut` (texts), `seconds` and
        `rows_per_second`.

    Raises:
        WrongInput: If the model, a row or a column is not what was expected. No output is written.
        RunFailed: If the disk is full, or the model computes something that is no number.
    """
    if batch_size < 1:
        raise WrongInput(f"Expected a batch size of at least 1, found {batch_size}.")
    kind = _output_format(output) if isinstance(output, Path) else "jsonl"
    if isinstance(output, Path) and not output.parent.is_dir():
        raise WrongInput(f"There is no folder {output.parent} to write {output.name} into. Make it first.")
    with contextlib.ExitStack() as stack:
        stream = _open(source, input_format, stack)
        predictor = Predictor.load(model, form, threads=threads)
        started = time.perf_counter()
        rows, cut = 0, 0
        target = stack.enter_context(durable.new_file(output)) if isinstance(output, Path) else output
        writer = _WRITERS[kind](target, stream.schema)
        stack.callback(writer.close)
        names: tuple[str, ...] = ()
        with _bar(console) as bar:
            task = bar.add_task("Predicting", total=1.0 if stream.done is not None else None, rows=0)
            for table in stream.tables():
                if not names:
                    names = columns.text_columns(
                        table, tuple(text) if text else None, option="--text", trained=predictor.text
                    )
                    if len(names) == 2 and not text and predictor.text is None and console is not None:
                        said = _PAIRS.format(model=model, names=" and ".join(names))
                        console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
                _require_columns(table, names)
                given = [columns.texts_of(table, name, option="--text") for name in names]
                texts = given[0] if len(given) == 1 else list(zip(*given, strict=True))
                answers = answer(predictor, texts, batch_size=batch_size)
                writer.write(table, _columns(predictor, table, answers))
                rows, cut = rows + table.rows, cut + sum(a.cut for a in answers)
                bar.update(task, completed=stream.done, rows=rows)
        if not rows:
            raise WrongInput(f"{stream.source} has no rows: expected texts.")
    seconds = time.perf_counter() - started
    return {
        "model": str(model),
        "form": predictor.form,
        "output": str(output) if isinstance(output, Path) else None,
        "text": list(names),
        "rows": rows,
        "cut": cut,
        "max_length": predictor.max_length,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
    }


def _open(source: Path | BinaryIO, form: str | None, stack: contextlib.ExitStack) -> Stream:
    if not isinstance(source, Path):
        return Stream(source, "standard input", form or "txt")
    form = form or format_of(source)
    try:
        return Stream(stack.enter_context(source.open("rb")), str(source), form)
    except OSError as error:
        raise WrongInput(f"{source} cannot be read: {error.strerror or error}. Check the path.") from error


def _output_format(path: Path) -> str:
    form = path.suffix.lower().removeprefix(".").replace("ndjson", "jsonl")
    if form not in OUTPUTS:
        raise WrongInput(
            f"Cannot tell the format of {path}: expected {', '.join('.' + name for name in OUTPUTS)}."
        )
    return form


def _require_columns(table: Table, names: Sequence[str]) -> None:
    """Raise `WrongInput` if a piece behind the first one lacks a text column altogether."""
    for name in names:
        if name not in table.columns:
            raise WrongInput(f"{table.at(0)}: expected text in {name!r}, found no such column.")


def _columns(predictor: Predictor, table: Table, answers: Sequence[Answer]) -> dict[str, list[Any]]:
    labels = () if is_score(predictor) else predictor.labels
    made: dict[str, list[Any]] = {PREDICTED: [a.predicted for a in answers]}
    for label in labels:
        made[f"{PROBABILITY}{label}"] = [a.probabilities[label] for a in answers]
    for name in made:
        if name in table.columns:
            raise WrongInput(
                f"{table.source} has a column {name!r} already, which is what this command writes. "
                "Rename or drop it."
            )
    return made


def _bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
        transient=True,
    )


# Writers


class _Writer(Protocol):
    def write(self, table: Table, made: Mapping[str, list[Any]]) -> None: ...

    def close(self) -> None: ...


class _Jsonl:
    def __init__(self, stream: BinaryIO, schema: Any):
        self._stream = stream

    def write(self, table: Table, made: Mapping[str, list[Any]]) -> None:
        for row, values in _rows({**table.columns, **made}):
            # JSON knows no NaN and no infinity.
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}
            try:
                line = json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str) + "\n"
                self._stream.write(line.encode("utf-8"))
            except ValueError as error:
                raise WrongInput(f"{table.at(row)} cannot be written as JSON: {error}.") from None
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class _Delimited:
    dialect: Mapping[str, Any] = {"delimiter": ","}

    def __init__(self, stream: BinaryIO, schema: Any):
        self._text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        self._writer = csv.writer(self._text, lineterminator="\n", **self.dialect)
        self._names: list[str] | None = None

    def write(self, table: Table, made: Mapping[str, list[Any]]) -> None:
        found = {**table.columns, **made}
        if self._names is None:
            self._names = list(found)
            self._line(table, 0, self._names)
        _require_known(table, self._names, found)
        for row, values in _rows({name: found.get(name, [None] * table.rows) for name in self._names}):
            self._line(table, row, [_cell(value) for _, value in values])

    def _line(self, table: Table, row: int, cells: Sequence[str]) -> None:
        try:
            self._writer.writerow(cells)
        except UnicodeEncodeError:
            raise WrongInput(f"{table.at(row)}: a column is not valid Unicode. Correct it.") from None

    def close(self) -> None:
        self._text.detach()


class _Tsv(_Delimited):
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}

    def _line(self, table: Table, row: int, cells: Sequence[str]) -> None:
        for cell in cells:
            if any(mark in cell for mark in "\t\n\r"):
                raise WrongInput(
                    f"{table.at(row)}: TSV has no quotes, so it cannot hold the tab or line break in "
                    f"{cell!r:.60}. Write CSV, JSONL or Parquet."
                )
        super()._line(table, row, cells)


class _Parquet:
    def __init__(self, stream: BinaryIO, schema: Any):
        self._stream, self._given = stream, schema
        self._writer: Any = None
        self._schema: Any = None

    def write(self, table: Table, made: Mapping[str, list[Any]]) -> None:
        found = {**table.columns, **made}
        if self._writer is None:
            self._schema = self._decide(table, made)
            self._writer = pq.ParquetWriter(self._stream, self._schema)
        names = self._schema.names
        _require_known(table, names, found)
        whole = {name: found.get(name, [None] * table.rows) for name in names}
        try:
            self._writer.write_table(pa.Table.from_pydict(whole, schema=self._schema))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise WrongInput(
                f"{table.at(0)} and those that follow do not fit the types of the first rows: {error}. "
                "Write JSONL."
            ) from None

    def _decide(self, table: Table, made: Mapping[str, list[Any]]) -> Any:
        fields = list(self._given) if self._given is not None else []
        try:
            for name, values in table.columns.items() if self._given is None else ():
                fields.append(pa.field(name, pa.array(values).type))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise WrongInput(
                f"{table.source}: the column {name!r} has no type of Parquet: {error}. Write JSONL."
            ) from None
        for name, values in made.items():
            several = isinstance(values[0], list)
            number = pa.float64() if isinstance(values[0], float) else pa.string()
            fields.append(pa.field(name, pa.list_(pa.string()) if several else number))
        return pa.schema(fields)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


_WRITERS: dict[str, type[_Jsonl] | type[_Delimited] | type[_Parquet]] = {
    "jsonl": _Jsonl,
    "csv": _Delimited,
    "tsv": _Tsv,
    "parquet": _Parquet,
}


def _rows(found: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    for row, values in enumerate(zip(*found.values(), strict=True)):
        yield row, list(zip(found, values, strict=True))


def _require_known(table: Table, names: Sequence[str], found: Mapping[str, Any]) -> None:
    for name in found:
        if name not in names:
            raise WrongInput(
                f"{table.at(0)} or one that follows has a key {name!r} that the first rows lack. Write "
                "JSONL, in which rows may differ."
            )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "|".join(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
