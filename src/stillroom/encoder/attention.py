"""How a pass computes attention, and what it reads of it, through transformers' attention interface."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stillroom.encoder.outputs import Needs
from stillroom.errors import WrongInput


def register_attention(name: str, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Let transformers know `attend` under a name. It gets the masks that sdpa attention gets."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Let the attention of this name be a model's while this lasts."""
    # Not `set_attn_implementation`, which looks at every module: that takes as long as a block.
    config = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


_QUICK = "stillroom-quick"
_MOST = 2**24
"""Scores of a batch beyond which torch's kernel, which never holds all of them, is left to compute."""

_LANES = 16
"""Numbers of float32 in a vector of AVX-512. Torch's softmax over 9 to 15 is up to ten times slower."""


def computes_plainly(module: nn.Module, query: Tensor, key: Tensor, others: dict[str, Any]) -> bool:
    """Return whether this is attention of a row to itself on a CPU, with nothing added but a mask."""
    causal = others.get("is_causal")
    special = (getattr(module, "is_causal", False) if causal is None else causal) or others.get("softcap")
    plain = query.device.type == "cpu" and key.shape == query.shape
    return plain and not special and others.get("position_bias") is None


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d) + mask) v`` by plain products, on a CPU quicker than torch's kernel.

    Products in the dtype that is given, softmax in at least float32. In bf16 it takes a half to a third of
    the kernel's time, with its backward pass a third to a tenth (docs/LOG.md, 2026-11-27).

    Args:
        query: Shape `(B, H, S, d)`; gradients flow to it, `key` and `value`.
        key: The same.
        value: The same.
        mask: None, true to look at, or added; of a shape that broadcasts to `(B, H, S, S)`.
        scaling: Of the products; None: ``d ** -0.5``.
        drop: What the weights `(B, H, S, S)` pass through.

    Returns:
        Shape `(B, S, H, d)`, dtype of the values.

    Example:
        >>> states = torch.tensor([[[[1.0], [3.0]]]])
        >>> plain_attention(0 * states, states, states, None).flatten().tolist()
        [2.0, 2.0]
    """
    B, H, S, d = query.shape
    q, k, v = (states.reshape(B * H, S, d) for states in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (q @ k.mT).view(B, H, S, S)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores * (d**-0.5 if scaling is None else scaling)
        if mask is not None and mask.dtype == torch.bool:
            # Finite: padding that looks nowhere, in a window of padding, must not become NaN.
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(
                ~mask, torch.finfo(scores.dtype).min
            )
        scores = scores if mask is None else scores + mask
        weights = _softmax(scores)
        weights = (weights if drop is None else drop(weights)).to(v.dtype)
        mixed = (weights.view(B * H, S, S) @ v).view(B, H, S, d)
    return mixed.transpose(1, 2).contiguous()


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension, of few numbers by way of a whole vector of them."""
    count = scores.shape[-1]
    if not _LANES // 2 < count < _LANES:
        return scores.softmax(-1)
    return F.pad(scores, (0, _LANES - count), value=-math.inf).softmax(-1)[..., :count]


def quick_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return what sdpa attention of transformers does, plainly where that is quicker: bf16, or a gradient.

    In float32 without a gradient it is torch's: `LiveTeacher` and evaluation count on its bits.
    """
    B, H, S, _ = query.shape
    pays = query.dtype == torch.bfloat16 or query.requires_grad
    if dropout or not pays or B * H * S * S > _MOST or not computes_plainly(module, query, key, others):
        made: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return made
    return plain_attention(query, key, value, attention_mask, scaling), None


register_attention(_QUICK, quick_attention)


def quick(model: Any, device: torch.device) -> AbstractContextManager[None]:
    """Let one pass compute by `quick_attention`, where it would have been transformers' sdpa, on a CPU."""
    sdpa = device.type == "cpu" and model.config._attn_implementation == "sdpa"
    return attending(model, _QUICK) if sdpa else nullcontext()


@dataclass
class Attention:
    """What one forward pass computes in its attention, of the blocks that are asked for."""

    needs: Needs
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    """What computes the attention where nothing is read."""
    blocks: int = 0
    """How many have called so far."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


_CAPTURE = "stillroom-capture"
_capturing: ContextVar[Attention | None] = ContextVar("_capturing", default=None)


@contextmanager
def reading(model: Any, needs: Needs) -> Iterator[Attention]:
    """Yield what collects that which `needs` names of the attention of one forward pass.

    transformers' own attention is put aside for this pass only; without need it stays.

    Raises:
        WrongInput: Afterwards, if a block computed its attention by itself.
    """
    usual = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation, sdpa_attention_forward)
    seen = Attention(needs, usual)
    if not needs.attention:
        yield seen
        return
    token = _capturing.set(seen)
    try:
        with attending(model, _CAPTURE):
            yield seen
    finally:
        _capturing.reset(token)
    if seen.blocks != model.config.num_hidden_layers:
        raise WrongInput(
            f"{type(model).__name__} computes its attention by itself and not through transformers' "
            "attention interface, so its attention scores, queries, keys and values cannot be read. "
            "Use a model of another family (BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT), or a "
            "method that does not read them, such as kd or lrc-bert."
        )


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Note what the running pass asks for, and return what the attention does that was put aside.

    Blocks call in their order. The output is not computed from the scores, so that the model's
    logits are the same bits whether attention is read or not.
    """
    seen, attend = _capturing.get(), sdpa_attention_forward
    if seen is not None:
        attend = seen.attend
        seen.blocks += 1
        block, needs = seen.blocks, seen.needs
        if block in needs.queries:
            seen.queries[block] = query
        if block in needs.keys:
            seen.keys[block] = key
        if block in needs.values:
            seen.values[block] = value
        if block in needs.attention_scores:
            seen.scores[block] = _scores(query, key, attention_mask, scaling)
    made: tuple[Tensor, Tensor | None] = attend(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return made


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return ``(B, H, S, S)`` scores before the softmax; `mask` is None, true to look at, or added."""
    tokens = query.shape[2]
    if query.dtype == torch.float32 and query.device.type == "cpu" and not query.requires_grad:
        # On a multiple of 16 tokens each score is the same bits whatever shares the batch: see LiveTeacher.
        query, key = (F.pad(states, (0, 0, 0, -tokens % 16)) for states in (query, key))
    scores = (query @ key.mT)[:, :, :tokens, :tokens]
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        nothing, least = scores.new_zeros(()), scores.new_full((), torch.finfo(scores.dtype).min)
        mask = torch.where(mask, nothing, least)
    return scores + mask


register_attention(_CAPTURE, _capture)
