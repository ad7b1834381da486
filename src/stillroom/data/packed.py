"""Text of any size as sequences of one length: tokenised once, in pieces, kept as Arrow, memory-mapped."""

import codecs
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from stillroom import durable
from stillroom.data import columns, streams
from stillroom.data.streams import Stream
from stillroom.data.tokens import TokenisedRows, entry, fingerprint
from stillroom.errors import WrongInput
from stillroom.recipe import TextSettings

PIECE = 1 << 20
"""Most characters that are tokenised together; a longer text is cut, at a space where there is one."""

_TOGETHER = 2048
"""Most pieces in one call of the tokenizer."""

_ROWS = 4096
"""Sequences in a record batch of the file."""

_LEAST = 4
"""Fewest sequences to train on and hold out."""

_IDS, _FACTS = "ids.arrow", "facts.json"
_VERSION = b"1"
"""Counts changes of what is kept: older entries are then not found, so they are made anew."""

Piece = tuple[str, bool]
"""A part of a document, and whether it is the last one."""


@dataclass(frozen=True)
class Packed:
    """Sequences to train on, sequences that are held out, and what they were made of.

    Their ids are memory-mapped: a sequence is read when a batch needs it.
    """

    train: TokenisedRows
    held_out: TokenisedRows
    documents: int
    tokens: int
    key: str
    """SHA-256 of the text, the tokenizer and the length."""


def files_of(settings: TextSettings) -> list[Path]:
    """Return the files of text, a folder as those in it, in order of name.

    Raises:
        WrongInput: If one is missing or empty, a folder has none, or a format is not known.
    """
    found: list[Path] = []
    for given in settings.files:
        path = given.expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and streams.is_readable(p))
            if not inside:
                raise WrongInput(
                    f"{path} holds no text: expected files that end in {', '.join(streams.ENDINGS)}."
                )
            found += inside
        else:
            streams.format_of(path)
            found.append(path)
    for path in found:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise WrongInput(
                f"Expected a file or folder of text, found nothing at {path}: {error.strerror}."
            ) from None
        if not size:
            raise WrongInput(f"{path} is empty: expected text. Leave it out.")
    if len({path.resolve() for path in found}) < len(found):
        raise WrongInput(f"A file of text is given twice: {', '.join(map(str, found))}.")
    return found


def pack(settings: TextSettings, tokenizer: Any, console: Console) -> Packed:
    """Return the text as sequences, from the cache where the same was packed before.

    Documents follow one another, the separator between them, and are cut into full sequences, each
    between the tokenizer's first and last token; what is left at the end is dropped. Memory stays flat:
    text is read and written in pieces.

    Args:
        settings: Files, column, length, and how much is held out.
        tokenizer: A fast tokenizer with a first and a last token ([CLS] and [SEP], or the like).
        console: Where progress and warnings go.

    Raises:
        WrongInput: If a file is missing, empty, damaged or not UTF-8, or there is too little text.
        RunFailed: If the disk is full.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise WrongInput("Expected a tokenizer with a first and a last token ([CLS], [SEP]), found none.")
    files = files_of(settings)
    key = _key(settings, tokenizer, files)
    folder = entry("packed", key, lambda made: _make(settings, tokenizer, files, made, console), console)
    return _open(folder, settings, tokenizer, key)


def pieces(path: Path, column: str | None) -> Iterator[tuple[Piece, float]]:
    """Yield the parts of a file's documents, each with the share of the file that is read.

    In a text file an empty line ends a document. In a table each text is one, of the columns that are
    named or have a usual name; blank texts are left out.

    Raises:
        WrongInput: If the file is damaged or not UTF-8, or has no text column.
    """
    form = streams.format_of(path)
    try:
        with path.open("rb") as stream:
            if form == "txt":
                size = max(1, path.stat().st_size)
                yield from ((piece, stream.tell() / size) for piece in _lines(stream, path))
                return
            opened = Stream(stream, str(path), form)
            given = None if column is None else (column,)
            for table in opened.tables():
                names = columns.text_columns(table, given, option="text.column")
                texts = (columns.texts_of(table, name, option="text.column") for name in names)
                for text in itertools.chain.from_iterable(zip(*texts, strict=True)):
                    yield from ((piece, opened.done or 0.0) for piece in _cut(text))
    except OSError as error:
        raise _unreadable(path, error) from error


def _lines(stream: Any, path: Path) -> Iterator[Piece]:
    """Yield the documents of plain text, whatever the length of its lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read, rest, inside, data = 0, "", False, b" "
    while data:
        data = stream.read(PIECE)
        pending = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = read - pending + error.start
            raise WrongInput(
                f"{path}, at byte {place:,}: expected UTF-8 text, found the byte "
                f"0x{error.object[error.start]:02x} ({error.reason}). Save the file as UTF-8."
            ) from None
        read += len(data)
        *whole, rest = rest.replace("\r\n", "\n").split("\n")
        if not data:
            whole, rest = [*whole, rest], ""
        for line in whole:
            if line.strip():
                yield line, False
            elif inside:
                yield "", True
            inside = bool(line.strip())
        if len(rest) > PIECE:
            # A line that does not end: what is there of it goes on its way.
            head, rest = _split(rest)
            if head.strip():
                yield head, False
                inside = True
    if inside:
        yield "", True


def _cut(text: str) -> Iterator[Piece]:
    """Yield the pieces of one document; nothing of a blank one."""
    if not text.strip():
        return
    while len(text) > PIECE:
        head, text = _split(text)
        yield head, False
    yield text, True


def _split(text: str) -> tuple[str, str]:
    """Return the first `PIECE` characters, up to the last space in them, and the rest."""
    cut = text.rfind(" ", 1, PIECE)
    cut = PIECE if cut < 0 else cut
    return text[:cut], text[cut:]


def _make(
    settings: TextSettings, tokenizer: Any, files: Sequence[Path], folder: Path, console: Console
) -> None:
    """Tokenise and pack all files into a new folder."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    body = settings.sequence_length - 2
    first, last = (np.full((_ROWS, 1), i, dtype) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    documents = tokens = rows = 0
    left = np.empty(0, dtype)
    schema = pa.schema([pa.field("ids", pa.from_numpy_dtype(dtype))])
    with (
        durable.explain_writing(folder.parent),
        durable.new_folder(folder) as aside,
        pa.OSFile(str(aside / _IDS), "wb") as sink,
        _progress(console) as bar,
    ):
        shown = bar.add_task("Packing text", total=len(files))

        def write(writer: Any, ids: np.ndarray) -> None:
            whole = np.hstack([first[: len(ids)], ids, last[: len(ids)]])
            writer.write_batch(pa.record_batch([pa.array(whole.reshape(-1))], schema=schema))

        with pa.ipc.new_file(sink, schema) as writer:
            for number, path in enumerate(files):
                for ids, ended, share in _tokenised(path, settings.column, tokenizer, dtype):
                    documents += ended
                    tokens += len(ids)
                    left = np.concatenate([left, ids])
                    while len(left) >= _ROWS * body:
                        write(writer, left[: _ROWS * body].reshape(_ROWS, body))
                        left, rows = left[_ROWS * body :], rows + _ROWS
                    bar.update(shown, completed=number + share)
                bar.update(shown, completed=number + 1)
            more = len(left) // body
            if more:
                write(writer, left[: more * body].reshape(more, body))
                rows += more
        if rows < _LEAST:
            raise WrongInput(
                f"{', '.join(map(str, files))}: expected text for at least {_LEAST} sequences of "
                f"{settings.sequence_length} tokens, found {tokens} tokens in {documents} documents. Give "
                "more text, or lower text.sequence_length."
            )
        facts = {"documents": documents, "tokens": tokens, "rows": rows}
        (aside / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _tokenised(
    path: Path, column: str | None, tokenizer: Any, dtype: np.dtype[Any]
) -> Iterator[tuple[np.ndarray, int, float]]:
    """Yield ids, a separator after each document, with how many ended and which share is read."""
    separator = np.array([tokenizer.sep_token_id], dtype)
    found = pieces(path, column)
    while True:
        together: list[Piece] = []
        characters, share = 0, 0.0
        for piece, read in found:
            together.append(piece)
            share = read
            characters += len(piece[0])
            if len(together) == _TOGETHER or characters >= PIECE:
                break
        if not together:
            return
        texts = [text for text, _ in together if text]
        with _in_parallel():
            encoded = iter(
                tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
                if texts
                else []
            )
        parts = []
        for text, ended in together:
            if text:
                parts.append(np.array(next(encoded), dtype))
            if ended:
                parts.append(separator)
        yield np.concatenate(parts), sum(ended for _, ended in together), share


@contextlib.contextmanager
def _in_parallel() -> Iterator[None]:
    """Let the tokenizer use all cores; no process is forked meanwhile."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Ids:
    """Ids in chunks of one size, as one array of which a part inside a chunk can be taken."""

    def __init__(self, chunks: list[np.ndarray]):
        self._chunks, self._size = chunks, len(chunks[0])

    def __getitem__(self, part: slice) -> np.ndarray:
        number, start = divmod(part.start, self._size)
        ids: np.ndarray = self._chunks[number][start : start + part.stop - part.start]
        return ids


@dataclass(frozen=True)
class _Offsets:
    """Where sequence i starts: every `every`-th one is held out, and the others are trained on."""

    length: int
    every: int
    held_out: bool

    def __getitem__(self, row: int) -> int:
        row = int(row)
        place = row * self.every if self.held_out else row + row // (self.every - 1) + 1
        return place * self.length


def _open(folder: Path, settings: TextSettings, tokenizer: Any, key: str) -> Packed:
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    table = pa.ipc.open_file(pa.memory_map(str(folder / _IDS))).read_all()
    ids: Any = _Ids([chunk.to_numpy() for chunk in table.column("ids").chunks])
    rows, S = int(facts["rows"]), settings.sequence_length
    # At most a tenth, and at least one.
    every = -(-rows // max(1, min(settings.held_out, rows // 10)))
    held = -(-rows // every)

    def part(count: int, *, held_out: bool) -> TokenisedRows:
        offsets: Any = _Offsets(S, every, held_out)
        # One number, however many sequences: no memory is taken for them.
        lengths = np.broadcast_to(np.int64(S), (count,))
        return TokenisedRows(ids, None, offsets, lengths, tokenizer.pad_token_id, 0)

    train, apart = part(rows - held, held_out=False), part(held, held_out=True)
    return Packed(train, apart, facts["documents"], facts["tokens"], key)


def _key(settings: TextSettings, tokenizer: Any, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(_VERSION)
    digest.update(f"{fingerprint(tokenizer)} {settings.sequence_length} {settings.column}".encode())
    for path in files:
        try:
            digest.update(f"{path.suffix.lower()} {durable.sha256_of_file(path)}".encode())
        except OSError as error:
            raise WrongInput(
                f"{path} cannot be read: {error.strerror or error}. Check the path."
            ) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> WrongInput:
    return WrongInput(f"{path} cannot be read: {error.strerror or error}. Check the path.")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
