"""Dropout that costs little on a CPU: in the student's states, and in its attention."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stillroom.encoder import Encoder, attending, register_attention

_NAME = "stillroom-dropout"
_STEPS = 2**16
"""Into how many steps chance is cut: four draws to a random number of 64 bits."""

_LANES = 16
"""Numbers of float32 in a vector of AVX-512. Torch's softmax over 9 to 15 is up to ten times slower."""


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
    """Return what transformers' sdpa attention does, with `drop` where it drops on a CPU.

    Products in the dtype that is given, softmax in float32. Torch's own kernels for this have no fast path
    with dropout. What is not plain attention is left to transformers.
    """
    plain = key.shape == query.shape and not any(others.get(n) for n in ("is_causal", "softcap"))
    if not dropout or query.device.type != "cpu" or not plain or others.get("position_bias") is not None:
        made: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return made
    B, H, S, D = query.shape
    q, k, v = (states.reshape(B * H, S, D) for states in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (q @ k.mT).view(B, H, S, S).float() * (D**-0.5 if scaling is None else scaling)
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.where(attention_mask, 0.0, -math.inf)
            scores = scores + attention_mask
        weights = drop(_softmax(scores), dropout).to(v.dtype)
        mixed = (weights.view(B * H, S, S) @ v).view(B, H, S, D)
    return mixed.transpose(1, 2).contiguous(), None


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension, of few numbers by way of a whole vector of them."""
    count = scores.shape[-1]
    if not _LANES // 2 < count < _LANES:
        return scores.softmax(-1)
    return F.pad(scores, (0, _LANES - count), value=-math.inf).softmax(-1)[..., :count]


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
