"""What is read of an encoder, and what it returns."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Key = TypeVar("_Key")

Pooling = Literal["mean", "cls", "unmasked_mean"]
"""How token states become one vector per row: see `pool`."""

_WHOLE = 16
"""Tokens are summed in a multiple of this: else their number decides the order in which they are added."""


@dataclass(frozen=True)
class Needs:
    """What is read of an encoder. Summed with `|`; nothing else is computed, kept or moved.

    `hidden_states` are indices: 0 is the embedding output, `i` the output of block `i`.
    `embeddings` asks for the sum that leaves the embedding norm, before its dropout.
    `attention_scores`, `queries`, `keys` and `values` are blocks, from 1.
    `pooled_states` are indices of hidden states, each with how it is pooled.
    `padding` says that states and scores are read where the padding is too: they then belong to a
    batch and not to its rows, and cannot be recorded.

    Example:
        >>> pooled = Needs(pooled_states=frozenset({("cls", 3)}))
        >>> both = Needs(logits=True, hidden_states=frozenset({2})) | pooled
        >>> both.logits, sorted(both.states)
        (True, [2, 3])
    """

    logits: bool = False
    hidden_states: frozenset[int] = frozenset()
    embeddings: bool = False
    attention_scores: frozenset[int] = frozenset()
    queries: frozenset[int] = frozenset()
    keys: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    pooled_states: frozenset[tuple[Pooling, int]] = frozenset()
    padding: bool = False

    @property
    def states(self) -> frozenset[int]:
        """Hidden states of which anything is read, whole or pooled."""
        return self.hidden_states | {index for _, index in self.pooled_states}

    @property
    def attention(self) -> frozenset[int]:
        """Blocks of whose attention anything is read."""
        return self.attention_scores | self.queries | self.keys | self.values

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.logits or other.logits,
            self.hidden_states | other.hidden_states,
            self.embeddings or other.embeddings,
            self.attention_scores | other.attention_scores,
            self.queries | other.queries,
            self.keys | other.keys,
            self.values | other.values,
            self.pooled_states | other.pooled_states,
            self.padding or other.padding,
        )


def sum_needs(needs: Iterable[Needs]) -> Needs:
    """Return what any of them names.

    Example:
        >>> sorted(sum_needs([Needs(hidden_states=frozenset({i})) for i in (1, 3)]).hidden_states)
        [1, 3]
    """
    return functools.reduce(Needs.__or__, needs, Needs())


@dataclass(frozen=True)
class Outputs:
    """What an encoder computed for a batch.

    `logits` is `(B, C)`; `hidden_states[i]` is `(B, S, D)`; `embeddings` is `(B, S, D)` or None.

    `attention_scores[i]` is `(B, H, S, S)`, queries in rows: what block i gives to its softmax,
    ``Q K^T * scaling + mask``, where the mask is 0 on the keys that a query may look at, and the
    dtype's least number on padding and beyond a local window. `queries[i]`, `keys[i]` and
    `values[i]` are `(B, H, S, D/H)`, as they enter that product: rotary positions are applied.

    `pooled_states[how, i]` is `(B, D)`, in float32: hidden state i pooled by `pool`.
    Gradients flow through all of them.
    """

    logits: Tensor
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    attention_scores: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)
    pooled_states: Mapping[tuple[Pooling, int], Tensor] = field(default_factory=dict)

    def joined(self, pooling: Pooling, layers: Iterable[int]) -> Tensor:
        """Return the pooled states of layers, end to end for each row, `(B, layers * D)`."""
        return torch.cat([self.pooled_states[pooling, layer] for layer in layers], dim=-1)

    def float(self) -> "Outputs":
        """Return the same in float32, in which all terms compute."""
        return Outputs(
            self.logits.float(),
            _float(self.hidden_states),
            self.embeddings,
            _float(self.attention_scores),
            _float(self.queries),
            _float(self.keys),
            _float(self.values),
            _float(self.pooled_states),
        )

    def on(self, device: torch.device) -> "Outputs":
        """Return all of it on `device`, in float32 (without waiting for the transfer)."""

        def moved(tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
            return {key: tensor.to(device, non_blocking=True).float() for key, tensor in tensors.items()}

        embeddings = self.embeddings
        return Outputs(
            self.logits.to(device, non_blocking=True).float(),
            moved(self.hidden_states),
            None if embeddings is None else embeddings.to(device, non_blocking=True).float(),
            moved(self.attention_scores),
            moved(self.queries),
            moved(self.keys),
            moved(self.values),
            moved(self.pooled_states),
        )


def _float(tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
    return {key: tensor.float() for key, tensor in tensors.items()}


def pool(states_BSD: Tensor, mask_BS: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per row, in float32 (float64 stays): gradients flow through it.

    Of a right-padded row, `mean` and `cls` are the same bits on a CPU however wide its batch is.

    Args:
        states_BSD: Token states; axes before B are kept.
        mask_BS: 1 on real tokens.
        pooling: `mean` over real tokens, `cls` for the first token, or `unmasked_mean`, which
            counts padding as well: it depends on the rows that share the batch, so it cannot be
            recorded.

    Returns:
        Shape ``(B, D)``.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pool(states, torch.tensor([[1, 1, 0]]), "mean").tolist()
        [[2.0]]
    """
    wide = torch.promote_types(states_BSD.dtype, torch.float32)
    if pooling == "cls":
        return states_BSD[..., 0, :].to(wide)
    states = states_BSD.to(wide)
    if pooling == "unmasked_mean":
        return states.mean(-2)
    weight_BS1 = mask_BS.to(wide)[..., None]
    masked = F.pad(states * weight_BS1, (0, 0, 0, -states.shape[-2] % _WHOLE))
    return masked.sum(-2) / weight_BS1.sum(-2)
