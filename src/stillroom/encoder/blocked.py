"""An encoder that only computes, in bf16 on a CPU: weights rounded and laid out for its products once."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.encoder.model import Encoder


def can_block(device: torch.device) -> bool:
    """Return whether products of blocked weights are there: on a CPU that computes bf16, by oneDNN."""
    products = torch.ops.mkldnn
    there = device.type == "cpu" and hasattr(products, "_linear_pointwise")
    return there and bool(products._is_mkldnn_bf16_supported())


class BlockedLinear(nn.Module):
    """``x W^T + b`` in bf16, as under autocast and to the bit, with W in the blocks that oneDNN multiplies.

    A plain product rounds and copies its weights into these blocks at each call, which for a few hundred
    rows takes a fifth of its time. Without gradients.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self._bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, states: Tensor) -> Tensor:
        """Return shape `(..., out)`, bf16."""
        product: Any = torch.ops.mkldnn._linear_pointwise
        made: Tensor = product(states.bfloat16(), self._weight, self._bias, "none", [], "")
        return made


def blocked(encoder: Encoder) -> Encoder:
    """Return an encoder of the same model whose linear layers are blocked; all else is shared.

    It takes two bytes a weight, and gives the bits of a pass under bf16 autocast, without gradients.
    """
    shared = chain(encoder.parameters(), encoder.buffers(), [encoder.tokenizer])
    twin = copy.deepcopy(encoder, {id(each): each for each in shared})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, BlockedLinear(child))
    return twin
