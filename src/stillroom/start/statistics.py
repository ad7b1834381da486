"""What is seen of a teacher on text: moments of its states, and of what its blocks compute.

Shapes: n tokens, G groups, d size of a group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.batching import Inputs
from stillroom.encoder import Encoder, Needs
from stillroom.start.families import Names, embedding_norm, has


class Moments:
    """Mean and second moment of vectors in groups, ``(n, G, d)``, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._outer: Any = 0.0

    def add(self, vectors_nGd: Tensor) -> None:
        """Count some more vectors in."""
        vectors = vectors_nGd.double()
        self.count += len(vectors)
        self._sum = self._sum + vectors.sum(0)
        by_group = vectors.transpose(0, 1)
        outer = by_group.mT @ by_group if by_group.shape[2] > 1 else vectors.square().sum(0)[..., None]
        self._outer = self._outer + outer

    @property
    def mean(self) -> Tensor:
        """``(G, d)``."""
        mean: Tensor = self._sum / self.count
        return mean

    @property
    def second(self) -> Tensor:
        """``E[v v^T]``, ``(G, d, d)``."""
        second: Tensor = self._outer / self.count
        return second

    @property
    def covariance(self) -> Tensor:
        """``(G, d, d)``."""
        return self.second - self.mean[:, :, None] * self.mean[:, None]


@dataclass(frozen=True)
class Block:
    """What was seen of a block: by head queries, keys and what is summed up, units, and two states."""

    query: Moments
    key: Moments
    context: Moments
    units: Moments
    middle: Moments
    state: Moments


@dataclass(frozen=True)
class Seen:
    """What was seen of a teacher."""

    embeddings: Moments
    blocks: tuple[Block, ...]
    head: Moments
    masked_lm: Moments

    def covariance(self) -> Tensor:
        """Return the covariance of hidden states, in which those of each place count alike."""
        states = [self.embeddings, *(m for block in self.blocks for m in (block.middle, block.state))]
        each = torch.stack([moments.covariance[0] for moments in states])
        return (each / each.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-30)).mean(0)


def statistics(teacher: Encoder, names: Names, layers: Sequence[int], batches: Sequence[Inputs]) -> Seen:
    """Run the teacher and note what is needed of real tokens."""
    H = teacher.heads
    each = tuple(Block(*(Moments() for _ in range(6))) for _ in layers)
    seen = Seen(Moments(), each, Moments(), Moments())
    mask = torch.empty(0, dtype=torch.bool)

    def note(moments: Moments, groups: int, *, output: bool) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            vectors = (found if output else given[0])[mask]
            moments.add(vectors.view(len(vectors), groups or vectors.shape[-1], -1))

        return hook

    blocks = teacher.blocks()[1]
    wanted: list[tuple[nn.Module, Callable[..., None]]] = []
    for layer, block in zip(layers, seen.blocks, strict=True):
        for name, moments, groups, output in (
            (names.query, block.query, H, True),
            (names.key, block.key, H, True),
            (names.attention_out, block.context, H, False),
            (names.ffn_out, block.units, 0, False),
            (names.attention_norm, block.middle, 1, True),
            (names.ffn_norm, block.state, 1, True),
        ):
            wanted.append((blocks[layer - 1].get_submodule(name), note(moments, groups, output=output)))
    wanted.append((embedding_norm(teacher), note(seen.embeddings, 1, output=True)))
    if has(teacher, names.masked_lm):
        norm = teacher.model.get_submodule(names.masked_lm[1])
        wanted.append((norm, note(seen.masked_lm, 1, output=True)))
    if has(teacher, names.head):

        def note_head(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.head.add(given[0][..., None])

        out = teacher.model.get_submodule(names.head[1])
        handle = out.register_forward_pre_hook(note_head)
    else:
        handle = None
    device = teacher.words.device
    with hooks(wanted), torch.no_grad():
        for inputs in batches:
            mask = inputs.attention_mask.to(device).bool()
            teacher(inputs.to(device), Needs())
    if handle is not None:
        handle.remove()
    return seen


@contextmanager
def hooks(wanted: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Have each module call its hook after it has run, while this lasts."""
    handles = [module.register_forward_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
