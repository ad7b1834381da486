"""Processes that train together: who is who, what each has of a batch, and how they meet.

`accelerate launch` or `torchrun` starts them; each computes its own rows of every batch, and what a loss
compares across rows is gathered. One process alone passes through all of this untouched.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn

from stillroom.errors import RunFailed, StillroomError, WrongInput

Unit = Literal["rows", "labels", "tokens", "token pairs", "nothing"]
"""What a term is a mean over; `nothing` where it is a sum over rows, or weighs its parts itself.

`labels` are as many as rows, but where words are guessed: then one for each guess.
"""

_PATIENCE = timedelta(days=7)
"""How long processes wait for each other: while one records the teacher, the others do nothing else."""

T = TypeVar("T")


def start() -> None:
    """Meet the processes that were launched with this one, if any. Call it before anything else here."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    # What computes in bf16 is the recipe's to say, not the launcher's.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if launched:
        # Without a GPU accelerate does not look at what torchrun says, unless it is told to.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the one that evaluates, writes and talks."""
    return rank() == 0


def console(given: Console | None) -> Console:
    """Return where this process may talk: `given` or standard error, and nowhere but in the main one."""
    return (given or Console(stderr=True)) if is_main() else Console(quiet=True)


@contextmanager
def together() -> Iterator[None]:
    """Leave the block when all processes have done it, or raise in all what was raised in one.

    What stands in the block must not wait for other processes.

    Raises:
        StillroomError: What the first of them raised, marked as `shared`; `RunFailed` for anything else.
    """
    if count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = None if own is None else (type(own).__name__, str(own))
    everyone: list[tuple[str, str] | None] = [None] * count()
    dist.all_gather_object(everyone, told)
    if isinstance(own, StillroomError):
        own.shared = True
    if own is not None:
        raise own
    for number, found in enumerate(everyone):
        if found is not None:
            raise _retold(number, *found)


def _retold(number: int, name: str, text: str) -> StillroomError:
    kinds: dict[str, type[StillroomError]] = {"WrongInput": WrongInput, "RunFailed": RunFailed}
    error = kinds[name](text) if name in kinds else RunFailed(f"Process {number} ended by {name}: {text}")
    error.shared = True
    return error


def on_main(work: Callable[[], T]) -> T:
    """Return in all processes what `work` returns in the main one, which alone does it."""
    found: list[T | None] = [None]
    with together():
        if is_main():
            found[0] = work()
    if count() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def main_first(work: Callable[[], T]) -> T:
    """Return what `work` returns here, done in the main process first, then once on each machine.

    So that the others find in a cache what takes long, and no two of them write it.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    turn = 0 if is_main() else 1 if local == 0 else 2
    found: list[T] = []
    for now in range(3 if count() > 1 else 1):
        with together():
            if now == turn:
                found.append(work())
    return found[0]


def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes, without gradient and the same bits in each."""
    if count() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts).sum(0)


class _Gather(torch.autograd.Function):
    """A tensor of every process. Its gradient is the sum of what all have for this process's one."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(own) for _ in range(count())]
        dist.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = torch.stack(gradients)
        dist.all_reduce(summed)
        return summed[rank()]


@torch.no_grad()
def same_start(module: nn.Module) -> None:
    """Give a module in all processes the weights that it has in the main one."""
    if count() > 1:
        for value in (*module.parameters(), *module.buffers()):
            dist.broadcast(value, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, the same bits in each, in one exchange.

    Not torch's DistributedDataParallel: stages leave parameters without gradient, for which it would
    search the graph in every step and wait for the device, and steps of a generator pass it by.
    """
    gradients = [p.grad for p in parameters if p.grad is not None] if count() > 1 else []
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sums = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, found in zip(gradients, sums, strict=True):
        gradient.copy_(found.view_as(gradient))


@dataclass(frozen=True)
class Share:
    """What this process has of a batch that several share. By default it has all of it.

    The rows stand in their order: the first process has the first ones. A process that is left without a
    row computes the first one all the same, so that all do the same steps; it counts for nothing.

    Example:
        >>> share = Share(sizes=(3, 2), rank=1)
        >>> share.start, share.of("rows"), Share().of("rows")
        (3, 0.4, 1.0)
    """

    sizes: tuple[int, ...] = ()
    """Rows of each process; empty where this one has all."""
    rank: int = 0
    """Of this process."""
    labels: float = 1.0
    """This process's part of the batch's labels."""
    tokens: float = 1.0
    """Its part of the batch's real tokens."""
    token_pairs: float = 1.0
    """Its part of the pairs of real tokens of one row."""
    draw: tuple[int, ...] = ()
    """Numbers from which this process's own random numbers follow: of run, step and batch."""

    @property
    def whole(self) -> bool:
        """Whether this process has all rows."""
        return len(self.sizes) < 2

    @property
    def start(self) -> int:
        """Place of this process's first row in the batch."""
        return 0 if self.whole or not self.sizes[self.rank] else sum(self.sizes[: self.rank])

    def of(self, unit: Unit) -> float:
        """Return which part of the batch these rows are, by rows, labels, tokens or pairs of tokens.

        The mean over the batch is the sum over processes of this times the mean over their own rows.
        """
        if self.whole or unit == "nothing":
            return 0.0 if not self.whole and not self.sizes[self.rank] else 1.0
        if unit == "rows":
            return self.sizes[self.rank] / sum(self.sizes)
        return {"labels": self.labels, "tokens": self.tokens, "token pairs": self.token_pairs}[unit]

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the rows of all processes in the batch's order, with gradient to each one's own.

        Args:
            x: One entry along `dim` for each of this process's rows; the same shape in all but that.
            dim: Where the rows are.
        """
        if self.whole:
            return x
        own, most = self.sizes[self.rank], max(self.sizes)
        # Processes exchange tensors of one shape.
        padded = x.transpose(0, dim)[:own]
        if own < most:
            padded = torch.cat([padded, padded.new_zeros(most - own, *padded.shape[1:])])
        parts: tuple[Tensor, ...] = _Gather.apply(padded.contiguous())  # type: ignore[no-untyped-call]
        rows = torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])
        return rows.transpose(0, dim)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the processes, without gradient and the same bits in each."""
        return x if self.whole else total(x)

    def own_part(self, drawn: Callable[[int], Tensor], number: int) -> Tensor:
        """Return the first `number` of this process's places in what is drawn for all of the batch.

        All processes draw the same numbers, as many as one alone would, and each takes its own.

        Args:
            drawn: Draws so many, from torch's random state.
            number: How many this process needs.
        """
        if self.whole:
            return drawn(number)
        counts = [0] * len(self.sizes)
        counts[self.rank] = number if self.sizes[self.rank] else 0
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        before = total(torch.tensor(counts, device=device)).tolist()
        return drawn(sum(before)).narrow(0, sum(before[: self.rank]) if counts[self.rank] else 0, number)

    @contextmanager
    def own_random(self, number: int) -> Iterator[None]:
        """Draw from this process's own random numbers meanwhile: its dropout is not that of the others.

        They follow from `draw`, the rank and `number`, so a resumed run draws them again; torch's random
        state, which is the same in all processes, is left as it was.
        """
        if self.whole:
            yield
            return
        seed = np.random.SeedSequence((*self.draw, self.rank, number)).generate_state(1)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(seed[0]))
            yield
