"""A teacher's outputs on disk: sealed Arrow shards, found again by what a row holds."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from rich.console import Console

from stillroom import durable
from stillroom.data.tokens import TokenisedRows, cache_folder, fingerprint
from stillroom.encoder import Encoder, settings_that_compute, weights_hash
from stillroom.errors import RunFailed, WrongInput

ORIGIN = "origin.json"
"""Name of the file that says what a cache was made of."""

_CHECKED = "checked.json"
"""Which shards were found sound, with size and times of the file then."""

_SHARD, _ROWS, _KEY = "shard-", "rows.arrow", "row"
_VERSION = 1
"""Counts changes of what is kept: caches of another number are refused."""


@dataclass(frozen=True)
class Origin:
    """What outputs are computed with. Two that differ in anything share no cache."""

    teacher: str
    """SHA-256 of the weights and of the configuration."""
    tokenizer: str
    """Its fingerprint."""
    max_length: int
    precision: str
    """`float32` or `bf16`."""
    version: int = _VERSION

    @classmethod
    def of(cls, encoder: Encoder, *, max_length: int, bf16: bool) -> "Origin":
        """Return what this teacher's outputs are computed with."""
        config = json.dumps(settings_that_compute(encoder.model), sort_keys=True, default=str)
        text = weights_hash(encoder.model) + config
        return cls(
            hashlib.sha256(text.encode()).hexdigest(),
            fingerprint(encoder.tokenizer),
            min(max_length, encoder.positions),
            "bf16" if bf16 else "float32",
        )

    @property
    def folder(self) -> Path:
        """Where `teacher.cache: auto` keeps it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return caches_folder() / hashlib.sha256(text.encode()).hexdigest()[:32]


def caches_folder() -> Path:
    """Return the folder of the caches that `teacher.cache: auto` makes."""
    return cache_folder() / "teacher"


def read_origin(folder: Path) -> Origin:
    """Return what a cache was made of, or raise `WrongInput` if `folder` is no cache."""
    try:
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return Origin(**{field.name: found[field.name] for field in fields(Origin)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(
            f"{folder} is no cache of a teacher: {ORIGIN} cannot be read ({type(error).__name__}). Give "
            "a folder that is new or empty, or remove this one."
        ) from None


def key_of(ids: np.ndarray, types: np.ndarray | None) -> bytes:
    """Return the 16 bytes that stand for a row: a hash of its token ids and token types."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=16)
    if types is not None:
        digest.update(np.ascontiguousarray(types, dtype=np.int8).tobytes())
    return digest.digest()


def keys_of(tokens: TokenisedRows) -> list[bytes]:
    """Return the key of every row of a split."""
    ids, types = tokens.ids, tokens.types
    spans = zip(tokens.offsets.tolist(), tokens.lengths.tolist(), strict=True)
    return [
        key_of(ids[start : start + n], None if types is None else types[start : start + n])
        for start, n in spans
    ]


@dataclass(frozen=True)
class _Shard:
    """One file of rows, memory-mapped. Row i of a column is `values[offsets[i] : offsets[i + 1]]`."""

    keys: list[bytes]
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Located:
    """Where a column holds some rows: row i is `values[shard[i]][start[i] : stop[i]]`."""

    values: list[np.ndarray]
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, index: np.ndarray) -> list[np.ndarray]:
        """Return the flat values of the rows at `index`, float32 or the bits of bf16, without a copy."""
        places = zip(
            self.shard[index].tolist(), self.start[index].tolist(), self.stop[index].tolist(), strict=True
        )
        return [self.values[shard][start:stop] for shard, start, stop in places]


class Cache:
    """The recorded outputs of one teacher: columns of rows, every row under the key of its content.

    float32 is stored as it is, bf16 as its bits in int16 (Arrow has no bf16), with the dtype in the
    column's metadata. `open` it to read, which waits for nobody; what is written needs `writing`.

    Args:
        folder: Where it is, or is to be.
        origin: What its outputs must have been computed with.
        name: What people call the teacher, for `stillroom cache list`.
    """

    def __init__(self, folder: Path, origin: Origin, *, name: str = ""):
        self.folder, self.origin = folder, origin
        self._name, self._lock = name, FileLock(folder / durable.LOCK)
        self._shards: list[_Shard] = []
        self._numbers: dict[bytes, int] = {}
        self._places: dict[str, np.ndarray] = {}

    def open(self, *, check: bool = True) -> dict[Path, str]:
        """See the finished shards. A shard's sum is made once, and again when its file has changed.

        Args:
            check: Make the sums that are missing, and note that the cache was used.

        Returns:
            What is wrong with each shard that is damaged; its rows count as not recorded.

        Raises:
            WrongInput: If the cache is of another teacher, tokenizer, length or precision.
        """
        if (self.folder / ORIGIN).exists():
            self._require_origin()
        shards, wrong, sound = [], {}, {}
        known = self._checked()
        for shard in self.shards():
            try:
                stamp = _stamp(shard)
                error = durable.damage(shard) if check and known.get(shard.name) != stamp else None
                if error is None:
                    shards.append(_read(shard / _ROWS))
                    sound[shard.name] = stamp
            except (OSError, pa.ArrowInvalid) as problem:
                # Another process may have removed it meanwhile.
                error = f"{type(problem).__name__}: {problem}"
            if error is not None:
                wrong[shard] = error
        if check and (self.folder / ORIGIN).exists():
            self._remember(known, sound)
        self._index(shards)
        return wrong

    @contextlib.contextmanager
    def writing(self, console: Console) -> Iterator[None]:
        """Hold the cache for this process, after any other that holds it; open it; name its origin.

        Raises:
            WrongInput: If the cache is of another teacher, tokenizer, length or precision.
        """
        with durable.explain_writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"Another process records in {self.folder}; waiting for it.", markup=False)
            lock.acquire()
        try:
            durable.remove_leftovers(self.folder)
            if not (self.folder / ORIGIN).exists():
                durable.require_empty(
                    self.folder, "It is no cache of a teacher: set another teacher.cache."
                )
                durable.write_json(self.folder / ORIGIN, {**asdict(self.origin), "name": self._name})
            for shard, wrong in self.open().items():
                console.print(
                    f"Warning: the shard {shard} of the cache is damaged ({wrong}); recorded again.",
                    style="yellow",
                    markup=False,
                )
                shutil.rmtree(shard)
            yield
        finally:
            lock.release()

    def missing(self, column: str, keys: Sequence[bytes]) -> list[bytes]:
        """Return those of `keys` whose rows the column does not hold."""
        places = self._places.get(column)
        if places is None:
            return list(keys)
        numbers = (self._numbers.get(key) for key in keys)
        return [k for k, n in zip(keys, numbers, strict=True) if n is None or places[n] < 0]

    def locate(self, column: str, keys: Sequence[bytes]) -> Located:
        """Return where the column holds the rows, to be read without their keys.

        Raises:
            KeyError: If a row is not there.
        """
        places = self._places[column][[self._numbers[key] for key in keys]]
        if (places < 0).any():
            raise KeyError(keys[int(np.argmin(places))])
        shard, row = places >> 32, places & 0xFFFFFFFF
        start, stop = np.empty_like(row), np.empty_like(row)
        held = [found.columns.get(column) for found in self._shards]
        for number in np.unique(shard):
            _, offsets = self._shards[number].columns[column]
            here = shard == number
            start[here], stop[here] = offsets[row[here]], offsets[row[here] + 1]
        nothing = np.empty(0)
        return Located([nothing if pair is None else pair[0] for pair in held], shard, start, stop)

    @property
    def columns(self) -> dict[str, int]:
        """How many rows each column holds."""
        return {name: int((places >= 0).sum()) for name, places in sorted(self._places.items())}

    @property
    def rows(self) -> int:
        """How many rows it holds anything of."""
        return len(self._numbers)

    def write(self, keys: Sequence[bytes], columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Append a shard, whole or not at all. Its rows are seen after the next `open`.

        Args:
            keys: The rows.
            columns: By name, each row's flat values: float32, or the bits of bf16 in int16.

        Raises:
            RunFailed: If the disk is full; the shards that are finished stay.
        """
        arrays, kinds = [pa.array(keys, pa.binary(16))], [pa.field(_KEY, pa.binary(16))]
        for name, rows in columns.items():
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
            values = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))
            dtype = "bfloat16" if rows[0].dtype == np.int16 else "float32"
            arrays.append(values)
            kinds.append(pa.field(name, values.type, metadata={"dtype": dtype}))
        schema = pa.schema(kinds)
        digest = hashlib.sha256(b"".join([*keys, *(name.encode() for name in columns)]))
        target = self.folder / f"{_SHARD}{digest.hexdigest()[:32]}"
        with (
            durable.new_folder(target) as aside,
            (aside / _ROWS).open("wb") as stream,
            pa.ipc.new_file(stream, schema) as writer,
        ):
            writer.write_batch(pa.record_batch(arrays, schema=schema))

    def shards(self) -> list[Path]:
        """Return the folders of the finished shards."""
        return sorted(self.folder.glob(f"{_SHARD}*"))

    @property
    def bytes(self) -> int:
        """What all shards take on the disk."""
        return sum((shard / _ROWS).stat().st_size for shard in self.shards())

    def _index(self, shards: list[_Shard]) -> None:
        numbers: dict[bytes, int] = {}
        at = [[numbers.setdefault(key, len(numbers)) for key in shard.keys] for shard in shards]
        self._shards, self._numbers, self._places = shards, numbers, {}
        for number, (shard, rows) in enumerate(zip(shards, at, strict=True)):
            for column in shard.columns:
                places = self._places.setdefault(column, np.full(len(numbers), -1, dtype=np.int64))
                places[rows] = (number << 32) + np.arange(len(rows))

    def _remember(self, known: dict[str, Any], sound: dict[str, Any]) -> None:
        """Note which shards are sound and that the cache was used, if that can be done at once.

        Else (another process records, or the folder is not ours to write) the next one does it.
        """
        with contextlib.suppress(OSError, RunFailed, Timeout), self._lock.acquire(timeout=0):
            if (self.folder / ORIGIN).exists():
                if sound != known:
                    durable.write_json(self.folder / _CHECKED, sound)
                os.utime(self.folder / ORIGIN)

    def _checked(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / _CHECKED).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _require_origin(self) -> None:
        found, wanted = asdict(read_origin(self.folder)), asdict(self.origin)
        other = [name for name in wanted if found[name] != wanted[name]]
        if other:
            told = "; ".join(
                f"{name.replace('_', ' ')} {found[name]}, not {wanted[name]}" for name in other
            )
            raise WrongInput(
                f"The cache {self.folder} is of another teacher than this run's: it has {told}. Set "
                "teacher.cache to another folder, or to auto, which keeps them apart."
            )


def _stamp(shard: Path) -> list[int]:
    """Return what changes when a shard's file does. Only the change time is new in a copy."""
    found = (shard / _ROWS).stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(path: Path) -> _Shard:
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).get_batch(0)
    columns = {
        name: (rows.column(name).values.to_numpy(), rows.column(name).offsets.to_numpy())
        for name in rows.schema.names
        if name != _KEY
    }
    return _Shard(rows.column(_KEY).to_pylist(), columns)
