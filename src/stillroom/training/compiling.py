"""Compile the student's blocks with `torch.compile`, where that is asked for."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stillroom.encoder import Encoder, Needs
from stillroom.errors import WrongInput

BACKEND = "inductor"
"""What torch makes of the blocks' graphs."""

_COMPILERS = ("c++", "g++", "clang++")


def require_compilable(student: Encoder, needs: Needs, device: torch.device) -> None:
    """Raise `WrongInput` where `training.compile` cannot work: said before the first step.

    Args:
        student: What is to be compiled.
        needs: What the terms of all stages read of it.
        device: Where it trains.
    """
    off = "Set training.compile=false."
    if needs.attention:
        raise WrongInput(
            "training.compile makes one kernel of a block's attention, and a term of this method reads "
            f"scores, queries, keys or values out of it. {off}"
        )
    if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise WrongInput(
            f"training.compile needs a C++ compiler, found none of {', '.join(_COMPILERS)}. Install one. "
            f"Or: {off}"
        )
    try:
        student.blocks()
    except WrongInput as error:
        raise WrongInput(
            f"training.compile wants a list of blocks, and {type(student.model).__name__} has none. {off}"
        ) from error


@contextmanager
def compiled_blocks(student: Encoder) -> Iterator[None]:
    """Let the student's blocks be compiled in training while this lasts; evaluation stays as it is.

    Each block alone: all of them share one graph, and what reads hidden states stands between them. Sizes
    are dynamic, so that a batch of another length compiles nothing anew.
    """
    _, blocks = student.blocks()
    # Compiled blocks keep their padding: whether they could leave it out was not tried.
    packed, student.packed = student.packed, False
    for block in blocks:
        block.forward = _choosing(block)
    try:
        yield
    finally:
        student.packed = packed
        for block in blocks:
            del block.forward


def _choosing(block: nn.Module) -> Any:
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True, backend=BACKEND)

    def forward(*given: Any, **named: Any) -> Any:
        if not block.training:
            return plain(*given, **named)
        with warnings.catch_warnings():
            # Of torch's own: it looks at .grad of what enters a block, which is no leaf.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            return compiled(*given, **named)

    return forward
