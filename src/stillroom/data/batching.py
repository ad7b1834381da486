"""Batches of similar length under a token budget, in an order that only seed and epoch decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows
from stillroom.processes import Share

_POOL = 50
"""Batches' worth of rows that are sorted by length together: little padding, much chance left."""


@dataclass(frozen=True)
class Layout:
    """Where a batch's real tokens are, so that they can stand in one row without padding.

    `places` `(T,)` int64 are those in the flattened `(B, S)`, row after row; `starts` `(B + 1,)` int32 say
    where each row starts among them, and where the last one ends; no row is longer than `longest`, and the
    padded batch has the `shape` `(B, S)`.
    """

    places: Tensor
    starts: Tensor
    longest: int
    shape: torch.Size

    @classmethod
    def of(cls, mask_BS: Tensor) -> "Layout | None":
        """Return the layout of a mask, or None where nothing is padding.

        Args:
            mask_BS: 1 on real tokens, int64; its values are read: on the CPU.

        Example:
            >>> layout = Layout.of(torch.tensor([[1, 1, 0], [1, 1, 1]]))
            >>> layout.places.tolist(), layout.starts.tolist(), layout.longest
            ([0, 1, 3, 4, 5], [0, 2, 5], 3)
        """
        lengths = mask_BS.sum(1)
        if bool((lengths == mask_BS.shape[1]).all()):
            return None
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(mask_BS.flatten().nonzero()[:, 0], starts, int(lengths.max()), mask_BS.shape)

    def to(self, device: torch.device) -> "Layout":
        """Return a copy on `device` (without waiting for the transfer)."""
        places, starts = (x.to(device, non_blocking=True) for x in (self.places, self.starts))
        return replace(self, places=places, starts=starts)

    def pack(self, states_BSD: Tensor) -> Tensor:
        """Return the real tokens' states, in one row; gradients flow through them.

        Args:
            states_BSD: Shape `(B, S, D)`.

        Returns:
            Shape `(1, T, D)`.

        Example:
            >>> layout = Layout.of(torch.tensor([[1, 0], [1, 1]]))
            >>> layout.pack(torch.tensor([[[1.0], [9.0]], [[2.0], [3.0]]])).tolist()
            [[[1.0], [2.0], [3.0]]]
        """
        return states_BSD.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, states_1TD: Tensor) -> Tensor:
        """Return the states where they were, and 0 on padding; gradients flow through them.

        Args:
            states_1TD: Shape `(1, T, D)`.

        Returns:
            Shape `(B, S, D)`.

        Example:
            >>> layout = Layout.of(torch.tensor([[1, 0], [1, 1]]))
            >>> layout.unpack(torch.tensor([[[1.0], [2.0], [3.0]]])).tolist()
            [[[1.0], [0.0]], [[2.0], [3.0]]]
        """
        B, S = self.shape
        flat = states_1TD.new_zeros(B * S, states_1TD.shape[-1])
        return flat.index_copy_(0, self.places, states_1TD[0]).view(B, S, -1)


@dataclass(frozen=True)
class Inputs:
    """What an encoder reads. All int64, shape `(B, S)`; `attention_mask` is 1 on real tokens.

    `positions` `(n,)`, in the flattened `(B, S)`, are words that a masked-LM head guesses; else None.
    With a `layout` an encoder may leave the padding out; what it returns is padded as ever.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    positions: Tensor | None = None
    layout: Layout | None = None

    def to(self, device: torch.device) -> "Inputs":
        """Return a copy on `device` (without waiting for the transfer); one for a GPU gets its layout."""
        types, positions, layout = self.token_type_ids, self.positions, self.layout
        if device.type == "cuda" and self.attention_mask.device.type == "cpu":
            layout = Layout.of(self.attention_mask)
        return Inputs(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            None if types is None else types.to(device, non_blocking=True),
            None if positions is None else positions.to(device, non_blocking=True),
            None if layout is None else layout.to(device),
        )

    def take(self, rows: slice | Tensor) -> "Inputs":
        """Return some of the rows, as wide as they are, and no words to guess.

        Args:
            rows: A slice, or row numbers, shape `(n,)`.

        Example:
            >>> inputs = Inputs(torch.tensor([[2, 7], [2, 8], [2, 9]]), torch.ones(3, 2), None)
            >>> inputs.take(torch.tensor([2, 0])).input_ids.tolist()
            [[2, 9], [2, 7]]
        """
        types = self.token_type_ids
        return Inputs(
            self.input_ids[rows], self.attention_mask[rows], None if types is None else types[rows]
        )


@dataclass(frozen=True)
class Batch:
    """The same rows as the student reads them and as the teacher reads them.

    `teacher` is `student` itself where the two tokenise alike. `labels` is `(B,)` int64 for
    classification, `(B,)` float32 for regression, `(B, C)` float32 for multi-label. `row_ids`
    `(B,)` int64 are positions in the training split.
    """

    student: Inputs
    teacher: Inputs
    labels: Tensor
    row_ids: Tensor
    share: Share = field(default_factory=Share)
    """Which part this is of a batch that several processes share."""
    augmented: bool = False
    """Whether words were replaced in the step: terms keep nothing of such rows."""

    @property
    def rows(self) -> int:
        """How many rows the batch has in all processes."""
        return sum(self.share.sizes) or len(self.row_ids)

    def part(self, rank: int, count: int, draw: tuple[int, ...] = ()) -> "Batch":
        """Return the rows of one of `count` processes, padded as the whole batch is.

        Args:
            rank: Of the process.
            count: How many processes share this batch; with one it is returned as it is.
            draw: For `Share`.

        Example:
            >>> inputs = Inputs(torch.zeros(3, 2), torch.ones(3, 2), None)
            >>> batch = Batch(inputs, inputs, torch.arange(3), torch.arange(3))
            >>> [batch.part(rank, 2).row_ids.tolist() for rank in (0, 1)]
            [[0, 1], [2]]
        """
        if count == 1:
            return self
        each, more = divmod(len(self.row_ids), count)
        sizes = tuple(each + (i < more) for i in range(count))
        start = sum(sizes[:rank])
        own = slice(start, start + sizes[rank])
        lengths = self.student.attention_mask.sum(1, dtype=torch.float64)
        tokens, pairs = (float(x[own].sum() / x.sum()) for x in (lengths, lengths.square()))
        rows = own if sizes[rank] else slice(0, 1)
        student = self.student.take(rows)
        teacher = student if self.teacher is self.student else self.teacher.take(rows)
        labels, guessed = self.labels[rows], sizes[rank] / len(self.row_ids)
        if self.student.positions is not None:
            width = self.student.input_ids.shape[1]
            here = self.student.positions // width
            at = torch.nonzero((here >= rows.start) & (here < rows.stop)).flatten()
            guessed = len(at) / len(here) if sizes[rank] else 0.0
            # Where no word is guessed the batch's first guess is taken for one of these rows' first token.
            positions = self.student.positions[at] - rows.start * width
            positions, at = (
                (positions, at) if len(at) else (torch.zeros(1, dtype=torch.int64), here[:1] * 0)
            )
            student = teacher = replace(student, positions=positions)
            labels = self.labels[at]
        return Batch(
            student, teacher, labels, self.row_ids[rows], Share(sizes, rank, guessed, tokens, pairs, draw)
        )

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`."""
        student = self.student.to(device)
        teacher = student if self.teacher is self.student else self.teacher.to(device)
        labels = self.labels.to(device, non_blocking=True)
        row_ids = self.row_ids.to(device, non_blocking=True)
        return replace(self, student=student, teacher=teacher, labels=labels, row_ids=row_ids)


def epoch_batches(
    lengths: np.ndarray, *, seed: int, epoch: int, batch_size: int, max_tokens: int
) -> Sequence[np.ndarray]:
    """Return the row numbers of each batch of one epoch, every row exactly once.

    Rows are shuffled, cut into pools, sorted by length inside each pool, cut into batches of at
    most `batch_size` rows and `max_tokens` padded tokens, and the batches shuffled. The result is
    a pure function of the arguments, so a resumed run sees the rows it would have seen. No batch
    holds a single row (contrastive terms need two), unless the limits leave no other way: an odd
    number of rows where two fill a batch, or rows so long that two do not fit `max_tokens`.

    Args:
        lengths: Tokens of each row, shape `(N,)`. One number for all rows (`np.broadcast_to`), as of packed
            text, makes `EvenBatches`, which take no memory.
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
        batch_size: Most rows in a batch.
        max_tokens: Most tokens in a batch, padding included. A longer row makes its own batch.

    Returns:
        For each batch its rows' numbers, int64, shape `(B,)`.

    Example:
        >>> batches = epoch_batches(
        ...     np.array([3, 9, 3, 9]), seed=0, epoch=0, batch_size=2, max_tokens=64
        ... )
        >>> sorted(sorted(rows.tolist()) for rows in batches)
        [[0, 2], [1, 3]]
    """
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    if lengths.strides == (0,):
        return EvenBatches(len(lengths), min(batch_size, max(1, max_tokens // int(lengths[0]))), chance)
    order = chance.permutation(len(lengths))
    batches: list[np.ndarray] = []
    # Pools of one size, give or take a row: a small last pool would make small batches.
    for pool in np.array_split(order, max(1, -(-len(order) // (batch_size * _POOL)))):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches.extend(_cut(pool, lengths[pool], batch_size, max_tokens))
    return [batches[i] for i in chance.permutation(len(batches))]


class EvenBatches(Sequence[np.ndarray]):
    """The batches of one epoch of rows of one length, in random order, each computed when it is asked for.

    Row numbers are permuted by a Feistel network, which needs no memory: the four rounds of a block cipher
    permute `[0, 4^k)`, and a number that falls outside `[0, N)` is permuted again until it falls inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Sizes differ by one at most.

    Args:
        rows: N.
        batch_size: Most rows in a batch.
        chance: Draws the rounds' keys.

    Example:
        >>> batches = EvenBatches(5, 2, np.random.default_rng(0))
        >>> sorted(np.concatenate(batches).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, rows: int, batch_size: int, chance: np.random.Generator):
        self._rows, self._batches = rows, -(-rows // batch_size)
        self._half = max(1, -(-(rows - 1).bit_length() // 2))
        self._keys = chance.integers(2**64, size=4, dtype=np.uint64)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: Any) -> Any:
        """Return a batch, or for a slice a sequence of them, none of which is computed yet."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return _Part(self, range(start, stop, step))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        bounds = [i * self._rows // self._batches for i in (index, index + 1)]
        numbers = np.arange(*bounds, dtype=np.uint64)
        return self._permuted(numbers).astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        numbers = self._rounds(numbers)
        while (outside := numbers >= self._rows).any():
            numbers[outside] = self._rounds(numbers[outside])
        return numbers

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = numbers >> half, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        permuted: np.ndarray = (left << half) | right
        return permuted


class _Part(Sequence[np.ndarray]):
    """Some of the batches of an epoch."""

    def __init__(self, batches: Sequence[np.ndarray], numbers: range):
        self._batches, self._numbers = batches, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Part(self._batches, self._numbers[index])
        return self._batches[self._numbers[index]]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers scrambled, by the finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    scrambled: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return scrambled


def _cut(rows: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int) -> list[np.ndarray]:
    """Cut rows that are sorted by length (ascending) into batches."""
    starts = [0]
    for i in range(1, len(rows)):
        full = i - starts[-1] >= batch_size
        # The newest row is the longest, so it sets the padded length.
        if full or (i - starts[-1] + 1) * lengths[i] > max_tokens:
            starts.append(i)
    if len(rows) - starts[-1] == 1 and 2 * lengths[-1] <= max_tokens:
        # The last row is alone: each batch from the last one of three or more hands a row on.
        spare = np.flatnonzero(np.diff(starts) > 2)
        if len(spare):
            starts = [start - (i > spare[-1]) for i, start in enumerate(starts)]
    return np.split(rows, starts[1:])


def make_batch(
    index: np.ndarray, rows: Rows, student: TokenisedRows, teacher: TokenisedRows | None = None
) -> Batch:
    """Return the padded batch of the rows at `index`.

    Args:
        index: Row numbers, shape `(B,)`.
        rows: The split, for its labels.
        student: The split's tokens as the student reads them.
        teacher: The same as the teacher reads them, or None where that is the same.

    Returns:
        The batch, on the CPU.

    Example:
        >>> ids, lengths = np.array([2, 7, 3, 2, 3], dtype=np.int32), np.array([3, 2])
        >>> tokens = TokenisedRows(ids, None, np.array([0, 3]), lengths, pad_id=0, truncated=0)
        >>> rows = Rows("made", (["a film", ""],), np.array([1, 0]))
        >>> batch = make_batch(np.array([1, 0]), rows, tokens)
        >>> batch.labels.tolist(), batch.student.input_ids.tolist()
        ([0, 1], [[2, 3, 0], [2, 7, 3]])
    """
    inputs = pad(student, index)
    other = inputs if teacher is None or teacher is student else pad(teacher, index)
    labels = torch.from_numpy(rows.labels[index])
    return Batch(inputs, other, labels, torch.from_numpy(index.astype(np.int64)))


def pad(tokens: TokenisedRows, index: np.ndarray) -> Inputs:
    """Return some rows, padded on the right to the longest of them.

    Args:
        tokens: A split.
        index: Row numbers, shape `(B,)`.

    Returns:
        The inputs, int64, on the CPU; token types are 0 on padding.

    Example:
        >>> ids, lengths = np.array([2, 7, 3, 2, 3], dtype=np.int32), np.array([3, 2])
        >>> tokens = TokenisedRows(ids, None, np.array([0, 3]), lengths, pad_id=0, truncated=0)
        >>> inputs = pad(tokens, np.array([0, 1]))
        >>> inputs.input_ids.tolist(), inputs.attention_mask.tolist()
        ([[2, 7, 3], [2, 3, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    lengths = tokens.lengths[index]
    width = int(lengths.max())
    ids = np.full((len(index), width), tokens.pad_id, dtype=np.int64)
    types = None if tokens.types is None else np.zeros((len(index), width), dtype=np.int64)
    for i, (row, length) in enumerate(zip(index, lengths, strict=True)):
        start = tokens.offsets[row]
        ids[i, :length] = tokens.ids[start : start + length]
        if types is not None and tokens.types is not None:
            types[i, :length] = tokens.types[start : start + length]
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return Inputs(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        None if types is None else torch.from_numpy(types),
    )


def sequential_batches(
    lengths: np.ndarray, *, batch_size: int = 64, max_tokens: int = 16384
) -> Iterator[np.ndarray]:
    """Yield row numbers by falling length, every row once: for evaluation, where order is free.

    Args:
        lengths: Tokens of each row, shape `(N,)`.
        batch_size: Most rows in a batch.
        max_tokens: Most tokens in a batch, padding included. A longer row makes its own batch.

    Yields:
        A batch's rows, int64, shape `(B,)`, by rising length.

    Example:
        >>> [rows.tolist() for rows in sequential_batches(np.array([3, 9, 4, 8]), batch_size=2)]
        [[3, 1], [0, 2]]
    """
    order = np.argsort(lengths, kind="stable")
    yield from reversed(_cut(order, lengths[order], batch_size, max_tokens))


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Return the share of padded tokens among all tokens of `batches`, in [0, 1).

    Args:
        lengths: Tokens of each row, shape `(N,)`.
        batches: For each batch its rows' numbers, shape `(B,)`.

    Example:
        >>> padding_share(np.array([3, 1, 2]), [np.array([0, 1]), np.array([2])])
        0.25
    """
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    real = sum(int(lengths[rows].sum()) for rows in batches)
    return 1.0 - real / padded
