"""Tokenise a split once and keep the result, keyed by the content that went in."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as ArrowDataset
from datasets import Features, List, Value, concatenate_datasets
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console
from rich.progress import track

from stillroom import durable
from stillroom.data.tasks import Rows
from stillroom.errors import WrongInput

_CHUNK = 1000
_FEATURES = Features(
    {"ids": List(Value("int32")), "types": List(Value("int8")), "truncated": Value("bool")}
)
_VERSION = b"1"
"""Counts changes of what is kept: older entries are then not found, so they are made anew."""


@dataclass(frozen=True)
class TokenisedRows:
    """The token ids of a split, rows end to end.

    Row `i` is `ids[offsets[i] : offsets[i] + lengths[i]]`. `types` is None where the tokenizer
    makes no token type ids. `truncated` counts the rows that were cut to the maximal length.
    """

    ids: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    lengths: np.ndarray
    pad_id: int
    truncated: int

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Tokens:
    """The splits as the student tokenises them and as the teacher does, by split name.

    Where the two tokenise alike, `teacher` is `student` itself.
    """

    student: dict[str, TokenisedRows]
    teacher: dict[str, TokenisedRows]

    @property
    def alike(self) -> bool:
        """Whether student and teacher see the same tokens."""
        return self.teacher is self.student


def cache_folder() -> Path:
    """Return $STILLROOM_CACHE, or `stillroom` in the user's cache folder."""
    given = os.environ.get("STILLROOM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom"


def fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of all that decides a fast tokenizer's output (vocabulary and rules)."""
    backend = tokenizer.backend_tokenizer
    # The last call's padding and truncation are state, not identity.
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        digest = hashlib.sha256(backend.to_str().encode())
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
    rest = (tokenizer.pad_token_id, sorted(tokenizer.model_input_names), tokenizer.truncation_side)
    digest.update(repr(rest).encode())
    return digest.hexdigest()


def tokenise(rows: Rows, tokenizer: Any, *, max_length: int, console: Console) -> TokenisedRows:
    """Return the split's tokens, from the cache where this content was tokenised before.

    A cached entry that is damaged is thrown away and made again, with a warning.

    Args:
        rows: The split.
        tokenizer: A fast Hugging Face tokenizer.
        max_length: Rows are cut to this many tokens; of a pair the longer text is cut first.
        console: Where progress and warnings go.
    """

    def make(folder: Path) -> None:
        made = _make(rows, tokenizer, max_length, console)
        with durable.new_folder(folder) as aside, _without_bars():
            made.save_to_disk(str(aside))

    return _read(entry("tokens", _key(rows, tokenizer, max_length), make, console), tokenizer)


def entry(kind: str, key: str, make: Callable[[Path], None], console: Console) -> Path:
    """Return an entry of the cache, made where it is missing or damaged: by one process, the others wait.

    Args:
        kind: The folder for entries of this kind.
        key: The entry's name in it.
        make: Writes the entry by `durable.new_folder`.
        console: Where warnings go.
    """
    folder = cache_folder() / kind / key
    # What is whole is read without a lock, also from a disk that cannot be written.
    if folder.is_dir() and durable.damage(folder) is None:
        return folder

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(durable.locked(folder.parent, wait=True, say=say))
        except WrongInput as error:
            raise WrongInput(f"{error} $STILLROOM_CACHE names another place for the cache.") from error
        durable.remove_leftovers(folder.parent)
        wrong = durable.damage(folder)
        if wrong is not None:
            if folder.is_dir():
                say(f"Warning: {folder} in the cache is damaged ({wrong}); made again.", "yellow")
                shutil.rmtree(folder)
            make(folder)
    return folder


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Silence the bars of datasets: writing takes a moment, and tokenising has a bar of its own."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _make(rows: Rows, tokenizer: Any, max_length: int, console: Console) -> ArrowDataset:
    # As Arrow chunk by chunk: Python's lists of all rows would take ten times as much.
    made = [ArrowDataset.from_dict({"ids": [], "types": [], "truncated": []}, features=_FEATURES)]
    chunks: Any = range(0, len(rows), _CHUNK)
    if len(rows) > 20 * _CHUNK:
        chunks = track(chunks, "Tokenising", console=console, transient=True)
    for start in chunks:
        texts = [column[start : start + _CHUNK] for column in rows.texts]
        encoded = tokenizer(*texts, truncation=False, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        long = [i for i, length in enumerate(lengths) if length > max_length]
        if long:
            cut = tokenizer(
                *([column[i] for i in long] for column in texts),
                truncation="longest_first",
                max_length=max_length,
            )
            for key in encoded:
                for i, value in zip(long, cut[key], strict=True):
                    encoded[key][i] = value
        columns = {
            "ids": encoded["input_ids"],
            "types": encoded.get("token_type_ids", [[] for _ in lengths]),
            "truncated": [length > max_length for length in lengths],
        }
        made.append(ArrowDataset.from_dict(columns, features=_FEATURES))
    return concatenate_datasets(made)


def _read(folder: Path, tokenizer: Any) -> TokenisedRows:
    table = ArrowDataset.load_from_disk(str(folder)).data
    ids = table.column("ids").combine_chunks()
    types = table.column("types").combine_chunks()
    offsets = ids.offsets.to_numpy()
    flat_types = types.values.to_numpy()
    return TokenisedRows(
        ids=ids.values.to_numpy(),
        types=flat_types if len(flat_types) else None,
        offsets=offsets[:-1],
        lengths=np.diff(offsets),
        pad_id=tokenizer.pad_token_id,
        truncated=int(np.sum(table.column("truncated").to_numpy())),
    )


def _key(rows: Rows, tokenizer: Any, max_length: int) -> str:
    digest = hashlib.sha256(_VERSION)
    digest.update(f"{fingerprint(tokenizer)} {max_length} {len(rows.texts)} {len(rows)}".encode())
    rows.hash_texts(digest)
    return digest.hexdigest()
