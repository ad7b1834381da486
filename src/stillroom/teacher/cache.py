"""A teacher's outputs on disk: sealed Arrow shards, found again by what a row holds."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from rich.console import Console

from stillroom import durable
from stillroom.data.tokens import TokenisedRows, cache_folder, fingerprint
from stillroom.encoder import Encoder, weights_hash
from stillroom.errors import WrongInput

ORIGIN = "origin.json"
"""Name of the file that says what a cache was made of."""

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
        # A name or path in it says where the model came from, not what it computes.
        config = {k: v for k, v in encoder.config.to_dict().items() if not k.startswith("_")}
        text = weights_hash(encoder.model) + json.dumps(config, sort_keys=True, default=str)
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


class Cache:
    """The recorded outputs of one teacher: columns of rows, every row under the key of its content.

    float32 is stored as it is, bf16 as its bits in int16 (Arrow has no bf16), with the dtype in the
    column's metadata. Open it inside `writing`, which waits for another process that records.

    Args:
        folder: Where it is, or is to be.
        origin: What its outputs must have been computed with.
    """

    def __init__(self, folder: Path, origin: Origin):
        self.folder, self.origin = folder, origin
        self._shards: list[_Shard] = []
        self._numbers: dict[bytes, int] = {}
        self._places: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def writing(self, console: Console) -> Iterator[None]:
        """Hold the cache for this process, after any other that holds it; open it; name its origin.

        Raises:
            WrongInput: If the cache is of another teacher, tokenizer, length or precision.
        """
        with durable.explain_full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / durable.LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"Another process records in {self.folder}; waiting for it.", markup=False)
            lock.acquire()
        try:
            durable.remove_leftovers(self.folder)
            self._check_origin()
            self._open(console)
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

    def read(self, column: str, keys: Sequence[bytes]) -> list[np.ndarray]:
        """Return each row's flat values, float32 or the bits of bf16, without a copy.

        Raises:
            KeyError: If a row is not there.
        """
        places = self._places[column]
        found = []
        for key in keys:
            place = int(places[self._numbers[key]])
            if place < 0:
                raise KeyError(key)
            values, offsets = self._shards[place >> 32].columns[column]
            row = place & 0xFFFFFFFF
            found.append(values[offsets[row] : offsets[row + 1]])
        return found

    def write(self, keys: Sequence[bytes], columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Append a shard, whole or not at all. Its rows are seen after the next `writing`.

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

    def damage(self) -> dict[Path, str]:
        """Return what is wrong with each shard that is not sound."""
        found = {shard: durable.damage(shard) for shard in self.shards()}
        return {shard: wrong for shard, wrong in found.items() if wrong is not None}

    def shards(self) -> list[Path]:
        """Return the folders of the finished shards."""
        return sorted(self.folder.glob(f"{_SHARD}*"))

    @property
    def bytes(self) -> int:
        """What all shards take on the disk."""
        return sum((shard / _ROWS).stat().st_size for shard in self.shards())

    def reload(self) -> None:
        """See the shards that this process wrote since it opened the cache."""
        self._shards = [_read(shard / _ROWS) for shard in self.shards()]
        numbers: dict[bytes, int] = {}
        at = [[numbers.setdefault(key, len(numbers)) for key in shard.keys] for shard in self._shards]
        self._numbers, self._places = numbers, {}
        for number, (shard, rows) in enumerate(zip(self._shards, at, strict=True)):
            for column in shard.columns:
                places = self._places.setdefault(column, np.full(len(numbers), -1, dtype=np.int64))
                places[rows] = (number << 32) + np.arange(len(rows))

    def _open(self, console: Console) -> None:
        for shard, wrong in self.damage().items():
            console.print(
                f"Warning: the shard {shard} of the teacher's cache is damaged ({wrong}); recorded again.",
                style="yellow",
                markup=False,
            )
            shutil.rmtree(shard)
        self.reload()

    def _check_origin(self) -> None:
        if not (self.folder / ORIGIN).exists():
            durable.require_empty(self.folder, "It is no cache of a teacher: set another teacher.cache.")
            durable.write_json(self.folder / ORIGIN, asdict(self.origin))
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


def _read(path: Path) -> _Shard:
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).get_batch(0)
    columns = {
        name: (rows.column(name).values.to_numpy(), rows.column(name).offsets.to_numpy())
        for name in rows.schema.names
        if name != _KEY
    }
    return _Shard(rows.column(_KEY).to_pylist(), columns)
