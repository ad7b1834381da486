"""Dropout that costs little on a CPU: in the student's states, and in its attention."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.encoder import (
    Encoder,
    attending,
    computes_plainly,
    plain_attention,
    quick_attention,
    register_attention,
)

_NAME = "stillroom-dropout"
_STEPS = 2**16
"""Into how many steps chance is cut: four draws to a random number of 64 bits."""


def drop(states: Tensor, p: float) -> Tensor:
    """Return `states` with each value set to 0 with chance p, and the others divided by 1 - p.

    What `torch.nn.functional.dropout` does, from the same generator but with other numbers: it draws one
    number of 64 bits for each value, and on a CPU that takes longer than the product before it. Here one
    number serves four values, so that p is rounded to a multiple of 2**-16 (0.1 becomes 0.1000061);
    what is left is divided by the chance that it was left with, so that the mean stays exact.

    Args:
        states: Any shape and floating dtype; the gradient flows to what is not dropped.
        p: Chance, in [0, 1].

    Returns:
        Same shape and dtype.

    Example:
        >>> drop(torch.ones(2), 0.0).tolist(), drop(torch.ones(2), 1.0).tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    dropped = round(p * _STEPS)
    if dropped == 0:
        return states
    return states * _kept(states, dropped)


def _kept(like: Tensor, dropped: int) -> Tensor:
    """Return what values are multiplied by: 0 with chance `dropped` / 2**16, else what keeps the mean."""
    kept = torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
    if dropped >= _STEPS:
        return kept.zero_()
    count = kept.numel()
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = numbers.view(torch.int16)[:count].view(kept.shape)
    # Written as numbers and not as booleans, which a product would have to convert.
    torch.ge(draws, dropped - _STEPS // 2, out=kept)
    return kept.mul_(_STEPS / (_STEPS - dropped))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `drop` on a CPU; elsewhere as it is."""

    def forward(self, states: Tensor) -> Tensor:
        """Return the states, dropped in training."""
        if not self.training or states.device.type != "cpu":
            return super().forward(states)
        return drop(states, self.p)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return what transformers' sdpa attention does, with `drop` where it drops on a CPU."""
    if not dropout or not computes_plainly(module, query, key, others):
        return quick_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    keep = functools.partial(drop, p=dropout)
    return plain_attention(query, key, value, attention_mask, scaling, keep), None


register_attention(_NAME, attention)


@contextmanager
def quick_dropout(student: Encoder) -> Iterator[None]:
    """Let the student drop in this way while this lasts. Evaluation gives the same bits as ever."""
    model: Any = student.model
    swapped: list[tuple[nn.Module, str, nn.Dropout]] = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                swapped.append((parent, name, child))
    sdpa = student.config._attn_implementation == "sdpa"
    for parent, name, child in swapped:
        setattr(parent, name, Dropout(child.p).train(child.training))
    try:
        with attending(model, _NAME) if sdpa else nullcontext():
            yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child.train(getattr(parent, name).training))
