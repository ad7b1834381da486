"""An encoder's blocks without padding: real tokens stand in one row, and each looks at its own row only.

Embeddings, pooler and head see the padded batch. Between the first block and the last all tokens of a batch
are one row, `(1, T, D)`; transformers hands down where each row starts, under its own names for that.
Shapes: B rows, S tokens of the longest, T real tokens, D width, H heads, d width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from stillroom.data.batching import Layout

varlen_attn: Any = None
with suppress(ImportError):
    # torch >= 2.10.
    from torch.nn.attention.varlen import varlen_attn

FAMILIES = frozenset({"bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"})
"""Whose blocks work token by token but for plain attention, which goes through transformers' interface."""

_NAME = "stillroom-unpadded"


def drops_attention(config: Any) -> bool:
    """Return whether attention weights are dropped in training: the kernel cannot."""
    return any(getattr(config, name, 0) for name in ("attention_probs_dropout_prob", "attention_dropout"))


def has_kernel(device: torch.device, head_width: int) -> bool:
    """Return whether a pass on `device` can leave the padding out, in the autocast that is on now.

    A GPU needs the flash kernel of torch >= 2.10, for 16 bits and heads of a multiple of 8. A CPU goes row
    by row, in any precision; no batch has a layout there unless it is given one.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    return (
        varlen_attn is not None
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda").itemsize == 2
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and head_width % 8 == 0
        and head_width <= 256
    )


@contextmanager
def unpadded(config: Any, blocks: nn.ModuleList, layout: Layout) -> Iterator[dict[str, Any]]:
    """Let a model's blocks see real tokens only while this lasts; yield what the model must be given.

    Hidden states that transformers collects meanwhile are `(1, T, D)`, the last one is `(B, S, D)`.
    """
    first = blocks[0].register_forward_pre_hook(lambda _, given: (layout.pack(given[0]), *given[1:]))
    last = blocks[-1].register_forward_hook(lambda _, __, made: layout.unpack(made))
    # Not `set_attn_implementation`, which looks at every module: that takes as long as a block.
    before, config._attn_implementation = config._attn_implementation, _NAME
    given: dict[str, Any] = {"cu_seq_lens_q": layout.starts, "max_length_q": layout.longest}
    if config.model_type == "modernbert":
        # They turn queries and keys, and do nothing to its embeddings.
        given["position_ids"] = (layout.places % layout.shape[1])[None]
    try:
        yield given
    finally:
        config._attn_implementation = before
        first.remove()
        last.remove()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return `(1, T, H, d)`: attention of `(1, H, T, d)` in which no row sees another.

    `sliding_window` counts the token itself, as in transformers: its neighbours on one side are one less.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    window = -1 if sliding_window is None else sliding_window - 1
    if q.device.type != "cuda" or varlen_attn is None:
        return _row_by_row(q, k, v, cu_seq_lens_q, scaling, window)[None], None
    ends, most = cu_seq_lens_q, max_length_q
    made = varlen_attn(q, k, v, ends, ends, most, most, scale=scaling, window_size=(window, window))
    return made[None], None


def _row_by_row(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float | None, window: int
) -> Tensor:
    """Return what the kernel computes on `(T, H, d)`, where there is none."""
    made = []
    for start, end in pairwise(starts.tolist()):
        query, key, value = (states[start:end].transpose(0, 1) for states in (q, k, v))
        places = torch.arange(end - start)
        near = None if window < 0 else (places[:, None] - places).abs() <= window
        made.append(F.scaled_dot_product_attention(query, key, value, near, scale=scaling).transpose(0, 1))
    return torch.cat(made)


# Without a function for masks: transformers then makes none, and does not look at the padding.
AttentionInterface.register(_NAME, _attend)
