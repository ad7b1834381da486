"""The teacher as a recording: each row computed once, and read back in every later epoch and run."""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from stillroom import durable
from stillroom.data.batching import Batch, Inputs, pad, sequential_batches
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Needs, Outputs, sum_needs
from stillroom.errors import WrongInput
from stillroom.teacher.cache import Cache, keys_of
from stillroom.teacher.live import LiveTeacher

MAX_BYTES = 20 * 10**9
"""Most bytes of a cache, where the recipe names no other number and the disk has ten times as many free."""

_SHARD_BYTES = 64 * 2**20

_ORDER = (
    "logits",
    "pooled_states",
    "hidden_states",
    "embeddings",
    "queries",
    "keys",
    "values",
    "attention_scores",
)
"""Fields of `Needs`, cheap ones first: what is kept where not everything fits."""

_HEADS = ("queries", "keys", "values")


@dataclass(frozen=True)
class Column:
    """One tensor of `Outputs`: a field, and the index where the field holds several."""

    field: str
    index: Any = None

    @property
    def name(self) -> str:
        """What the cache calls it, such as `hidden_states.4`."""
        index = self.index if isinstance(self.index, tuple) else (self.index,)
        return ".".join([self.field, *(str(part) for part in index if part is not None)])

    def of(self, outputs: Outputs) -> Tensor:
        """Return the tensor."""
        found = getattr(outputs, self.field)
        tensor: Tensor = found if self.index is None else found[self.index]
        return tensor


def columns_of(needs: Needs) -> list[Column]:
    """Return the tensors that `needs` names, cheap ones first.

    Example:
        >>> [column.name for column in columns_of(Needs(logits=True, hidden_states=frozenset({2, 0})))]
        ['logits', 'hidden_states.0', 'hidden_states.2']
    """
    found = []
    for name in _ORDER:
        wanted = getattr(needs, name, False)
        if isinstance(wanted, bool):
            found += [Column(name)] if wanted else []
        else:
            found += [Column(name, index) for index in sorted(wanted)]
    return found


def _recordable(needs: Needs) -> Needs:
    """Return what of it belongs to rows alone. States where the padding counts belong to a batch."""
    return Needs(logits=needs.logits) if needs.padding else needs


def needs_of(columns: Iterable[Column]) -> Needs:
    """Return the needs that name these tensors."""
    given: dict[str, Any] = {}
    for column in columns:
        if column.index is None:
            given[column.field] = True
        else:
            given[column.field] = given.get(column.field, frozenset()) | {column.index}
    return Needs(**given)


class RecordedTeacher:
    """Gives a teacher's outputs from its cache, and computes live what the cache does not hold.

    Same call as `LiveTeacher`. What is read is what the recording pass computed, bit for bit in
    float32, rounded to bf16 (logits are not) where bf16 autocast computes the teacher. The pass has
    other batches than training; in float32 on a CPU `LiveTeacher` gives a row the same bits in all of
    them, elsewhere the two teachers agree to rounding. Positions of padding are 0, in attention scores
    the least number.

    Rows are found by their tokens, once for the whole split: a step looks them up by `row_ids`, and
    compares the tokens, so that a batch of other rows is refused.

    Args:
        live: The teacher.
        cache: Its opened cache.
        tokens: The split that batches are made of, as the teacher tokenises it.
        keys: The keys of its rows.
        kept: What the cache holds of every row.
        seconds: What recording took.
    """

    def __init__(
        self,
        live: LiveTeacher,
        cache: Cache,
        tokens: TokenisedRows,
        keys: Sequence[bytes],
        kept: Sequence[Column],
        seconds: float = 0.0,
    ):
        self._live, self._cache, self._tokens = live, cache, tokens
        self._located = {column: cache.locate(column.name, keys) for column in kept}
        self.kept = frozenset(kept)
        self.seconds = seconds

    @property
    def module(self) -> nn.Module:
        """The frozen model."""
        return self._live.module

    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Return what `needs` names for the batch's rows, detached, in float32.

        Where nothing is left to compute the model is not run. A batch on a GPU costs one copy of its row
        and token ids to the host: the loop has `read` it before, on the host.

        Raises:
            WrongInput: If a row is not of the split that was recorded.
        """
        recorded = self._recorded(needs)
        lacking = [column for column in columns_of(needs) if column not in recorded]
        # On a GPU the model would leave the padding out, were it not told that it counts.
        padding = needs.padding and bool(lacking)
        outputs = self._live(batch, replace(needs_of(lacking), padding=padding))
        if not recorded:
            return outputs
        read = self._read(batch, recorded, outputs)
        return read.on(batch.teacher.input_ids.device)

    def read(self, batch: Batch, needs: Needs) -> Outputs | None:
        """Return what `needs` names as it is stored, on the CPU, or None if the model has to be run for it.

        May be called from any thread. Raises `WrongInput` if a row is not of the split that was recorded.
        """
        recorded = self._recorded(needs)
        if not recorded or recorded != columns_of(needs):
            return None
        return self._read(batch, recorded, Outputs(torch.empty(0)))

    def _recorded(self, needs: Needs) -> list[Column]:
        """Return which of the tensors that `needs` names are read back."""
        return [column for column in columns_of(_recordable(needs)) if column in self.kept]

    def _read(self, batch: Batch, columns: Sequence[Column], outputs: Outputs) -> Outputs:
        """Return `outputs` with the recorded columns beside them."""
        inputs, rows = batch.teacher, batch.row_ids.cpu().numpy()
        self._require_recorded(inputs, rows)
        lengths = self._tokens.lengths[rows].tolist()
        width = inputs.input_ids.shape[1]
        found: dict[str, Any] = {
            name: getattr(outputs, name) for name in _ORDER if getattr(outputs, name, None) is not None
        }
        for column in columns:
            values = self._located[column].take(rows)
            tensor = _padded(column, values, lengths, width, self._live.encoder.heads)
            if column.index is None:
                found[column.field] = tensor
            else:
                found[column.field] = {**found[column.field], column.index: tensor}
        return Outputs(**found)

    def _require_recorded(self, inputs: Inputs, rows: np.ndarray) -> None:
        """Raise `WrongInput` unless the batch's tokens are those of its row ids."""
        tokens, ids = self._tokens, inputs.input_ids.cpu().numpy()
        if rows.max(initial=0) < len(tokens):
            lengths = tokens.lengths[rows]
            at = np.arange(ids.shape[1])
            real = at < lengths[:, None]
            expected = tokens.ids[(tokens.offsets[rows][:, None] + at)[real]]
            # The sum, as a row may be longer than the one that it is taken for.
            same = lengths.sum() == int(inputs.attention_mask.sum()) and lengths.max() <= ids.shape[1]
            if same and np.array_equal(ids[real], expected):
                return
        raise WrongInput(
            f"A row of the batch is not in the cache {self._cache.folder} under its number: "
            f"that holds rows of the teacher {self._cache.origin.teacher[:12]} as the tokenizer "
            f"{self._cache.origin.tokenizer[:12]} cuts them. Record the batch's split first."
        )

    def served(self) -> dict[str, Any]:
        """Return what was read, as `metrics.json` shows it."""
        return {
            "recorded": sorted(column.name for column in self.kept),
            "bytes": self._cache.bytes,
            "recording_seconds": self.seconds,
        }


def record(
    live: LiveTeacher,
    cache: Cache,
    tokens: TokenisedRows,
    stages: Sequence[Needs],
    *,
    max_bytes: int | None,
    console: Console,
    shard_bytes: int = _SHARD_BYTES,
) -> RecordedTeacher:
    """Record what `stages` name for every row, as far as it fits, and return the teacher that reads it.

    Of a stage that reads padding only logits are recorded: states there depend on the batch.

    Rows are computed in batches of one length, or nearly. A batch depends on the rows' content only,
    so a recording that was stopped goes on to the same bits.

    Args:
        live: The teacher.
        cache: Where to keep it. Another process that records there is waited for.
        tokens: The rows, as the teacher tokenises them.
        stages: What the terms of each stage read.
        max_bytes: Most bytes that the cache may take; None: 20 GB, or a tenth of the free disk if less.
        console: Where progress goes, and the line that says what is kept.
        shard_bytes: A shard is finished when it has as many.

    Raises:
        WrongInput: If the cache is of another teacher.
        RunFailed: If the disk is full. What is finished is kept.
    """
    started = time.perf_counter()
    keys = keys_of(tokens)
    cache.open()
    plan = planned(live, cache, tokens, keys, stages, max_bytes=max_bytes)
    if plan.lacking:
        with cache.writing(console):
            # Another process may have recorded it meanwhile.
            plan = planned(live, cache, tokens, keys, stages, max_bytes=max_bytes)
            _announce(plan, cache, console)
            _record(live, cache, tokens, plan, shard_bytes, console)
            cache.open()
    else:
        _announce(plan, cache, console)
    return RecordedTeacher(live, cache, tokens, keys, plan.kept, time.perf_counter() - started)


@dataclass(frozen=True)
class Recording:
    """What a cache will hold of rows, and what of that is still to be recorded."""

    rows: dict[bytes, int]
    """A position of each row, by key and in the order of keys."""
    kept: list[Column]
    padded: list[Column]
    """What is computed live in a stage in which padding counts."""
    too_large: list[Column]
    """What is computed live because there is no room for it."""
    lacking: dict[Column, set[bytes]]
    """Which rows of which columns are not recorded yet."""
    more: int
    """Bytes that are to be written."""
    total: int
    """Bytes of the cache after that."""


def planned(
    live: LiveTeacher,
    cache: Cache,
    tokens: TokenisedRows,
    keys: Sequence[bytes],
    stages: Sequence[Needs],
    *,
    max_bytes: int | None,
) -> Recording:
    """Return what `record` will do with an opened cache. Nothing is written.

    Args:
        live: The teacher. It is run on one row, for the shapes.
        cache: Opened.
        tokens: The rows, as the teacher tokenises them.
        keys: Their keys.
        stages: What the terms of each stage read.
        max_bytes: As for `record`.
    """
    position = {key: i for i, key in reversed(list(enumerate(keys)))}
    # By content, not by position: shuffled rows are recorded in the same batches.
    rows = {key: position[key] for key in sorted(position)}
    index = np.asarray(list(rows.values()))
    most = max_bytes if max_bytes is not None else default_budget(cache.folder)
    kept: list[Column] = []
    lacking: dict[Column, set[bytes]] = {}
    before = total = cache.bytes
    columns = columns_of(sum_needs(map(_recordable, stages)))
    for column, size in _sizes(live, tokens, index, columns).items():
        missing = set(cache.missing(column.name, list(rows)))
        more = int(sum(size[i] for i, key in enumerate(rows) if key in missing)) if missing else 0
        if total + more <= most:
            total += more
            kept.append(column)
            if missing:
                lacking[column] = missing
    padded = columns_of(replace(sum_needs(stage for stage in stages if stage.padding), logits=False))
    too_large = [column for column in columns if column not in kept]
    return Recording(rows, kept, padded, too_large, lacking, total - before, total)


def default_budget(folder: Path) -> int:
    """Return 20 GB, or a tenth of what is free on the disk of `folder` if that is less."""
    return min(MAX_BYTES, shutil.disk_usage(durable.existing(folder)).free // 10)


def _record(
    live: LiveTeacher,
    cache: Cache,
    tokens: TokenisedRows,
    plan: Recording,
    shard_bytes: int,
    console: Console,
) -> None:
    lacking, keys = plan.lacking, list(plan.rows)
    index = np.asarray(list(plan.rows.values()))
    bf16 = cache.origin.precision == "bf16"
    needs = needs_of(lacking)
    parts: dict[tuple[Column, ...], _Part] = {}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("Recording the teacher", total=len(index))
        for batch in sequential_batches(tokens.lengths[index]):
            bar.advance(task, len(batch))
            wanted = [tuple(c for c in lacking if keys[i] in lacking[c]) for i in batch]
            if not any(wanted):
                continue
            inputs = pad(tokens, index[batch])
            on_device = inputs.to(next(live.module.parameters()).device)
            labels = torch.empty(0)
            # What a live step reads may be kept for a gradient; this is only written.
            with torch.inference_mode():
                outputs = live(Batch(on_device, on_device, labels, labels), needs)
            tensors = {column: _stored(column, column.of(outputs), bf16) for column in lacking}
            for row, columns in enumerate(wanted):
                if columns:
                    length = int(tokens.lengths[index[batch[row]]])
                    part = parts.setdefault(columns, _Part({column: [] for column in columns}, []))
                    part.add(keys[batch[row]], {c: _cut(c, tensors[c][row], length) for c in columns})
                    if part.size >= shard_bytes:
                        part.write(cache)
    for part in parts.values():
        part.write(cache)


@dataclass
class _Part:
    """Rows that are not yet a shard."""

    values: dict[Column, list[np.ndarray]]
    keys: list[bytes]
    size: int = 0

    def add(self, key: bytes, values: dict[Column, np.ndarray]) -> None:
        self.keys.append(key)
        for column, value in values.items():
            self.values[column].append(value)
            self.size += value.nbytes

    def write(self, cache: Cache) -> None:
        if self.keys:
            cache.write(self.keys, {column.name: rows for column, rows in self.values.items()})
        self.keys, self.size = [], 0
        self.values = {column: [] for column in self.values}


def _stored(column: Column, tensor: Tensor, bf16: bool) -> np.ndarray:
    """Return a batch's tensor as it is stored: tokens before heads, float32 or the bits of bf16."""
    if column.field in _HEADS:
        tensor = tensor.transpose(1, 2)
    tensor = tensor.detach().cpu().contiguous()
    if bf16 and column.field != "logits":
        return tensor.bfloat16().view(torch.int16).numpy()
    return tensor.float().numpy()


def _cut(column: Column, row: np.ndarray, length: int) -> np.ndarray:
    """Return a row's flat values without padding."""
    if column.field == "attention_scores":
        row = row[:, :length, :length]
    elif column.field not in ("logits", "pooled_states"):
        row = row[:length]
    # A copy: a view would keep the whole batch in memory.
    return row.reshape(-1).copy()


def _padded(
    column: Column, rows: Sequence[np.ndarray], lengths: Sequence[int], width: int, heads: int
) -> Tensor:
    """Return the rows as one tensor of the shape that `Outputs` says."""
    count, stored = len(rows), rows[0].dtype
    dtype = torch.bfloat16 if stored == np.int16 else torch.float32
    if column.field in ("logits", "pooled_states"):
        return torch.from_numpy(np.stack(rows)).view(dtype)
    if column.field == "attention_scores":
        scores = torch.full((count, heads, width, width), torch.finfo(dtype).min, dtype=dtype)
        flat = scores.view(torch.int16).numpy() if stored == np.int16 else scores.numpy()
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            flat[i, :, :length, :length] = row.reshape(heads, length, length)
        return scores
    size = len(rows[0]) // lengths[0]
    # Row by row, each one copy of memory: a gather by token was slower (docs/LOG.md, 2026-11-25).
    tensor = torch.empty((count, width * size), dtype=dtype)
    states = (tensor.view(torch.int16) if stored == np.int16 else tensor).numpy()
    for i, row in enumerate(rows):
        states[i, : len(row)] = row
        states[i, len(row) :] = 0
    tensor = tensor.view(count, width, size)
    if column.field in _HEADS:
        return tensor.view(count, width, heads, size // heads).transpose(1, 2)
    return tensor


def _sizes(
    live: LiveTeacher, tokens: TokenisedRows, index: np.ndarray, columns: Sequence[Column]
) -> dict[Column, np.ndarray]:
    """Return the bytes of each row in each column, from the shapes of one row's outputs."""
    if not columns:
        return {}
    lengths = tokens.lengths[index].astype(np.int64)
    first = int(np.argmin(lengths))
    inputs = pad(tokens, index[[first]]).to(next(live.module.parameters()).device)
    labels = torch.empty(0)
    outputs = live(Batch(inputs, inputs, labels, labels), needs_of(columns))
    width = 2 if live.bf16 else 4
    found = {}
    for column in columns:
        count, length = column.of(outputs)[0].numel(), int(lengths[first])
        if column.field == "logits":
            found[column] = np.full(len(index), 4 * count)
        elif column.field == "pooled_states":
            found[column] = np.full(len(index), width * count)
        elif column.field == "attention_scores":
            found[column] = width * (count // length**2) * lengths**2
        else:
            found[column] = width * (count // length) * lengths
    return found


def _announce(plan: Recording, cache: Cache, console: Console) -> None:
    said = f"{_named(plan.kept) or 'nothing'} recorded ({plan.total / 1e6:,.1f} MB in {cache.folder})"
    if plan.padded:
        said += f"; {_named(plan.padded)} computed live where padding counts in them"
    if plan.too_large:
        said += f"; {_named(plan.too_large)} computed live: teacher.max_bytes allows no more"
    console.print(f"Teacher: {said}.", markup=False, highlight=False, soft_wrap=True)


def _named(columns: Sequence[Column]) -> str:
    return ", ".join(column.name for column in columns)
