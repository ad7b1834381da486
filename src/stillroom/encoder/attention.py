"""Scores, queries, keys and values of one pass, read through transformers' attention interface."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from stillroom.encoder.noise import quiet
from stillroom.encoder.outputs import Needs
from stillroom.errors import WrongInput


def register_attention(name: str, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Let transformers know `attend` under a name. It gets the masks that sdpa attention gets."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Let the attention of this name be a model's while this lasts."""
    before = model.config._attn_implementation
    with quiet():
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)


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
