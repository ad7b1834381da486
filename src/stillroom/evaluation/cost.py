"""What a model costs: parameters, bytes, and milliseconds per example at batch size 1."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import nn

from stillroom.data.batching import pad
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs

_WARMUP = 5
_TIMED = 50
"""Most rows that are timed."""


def parameters(encoder: Encoder) -> tuple[int, int]:
    """Return the number of parameters, and of those outside embedding tables.

    Example:
        >>> parameters(Encoder(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), tokenizer=None))
        (50, 10)
    """
    total = sum(p.numel() for p in encoder.parameters())
    tables = {id(m.weight): m.weight for m in encoder.modules() if isinstance(m, nn.Embedding)}
    return total, total - sum(weight.numel() for weight in tables.values())


def bytes_in_memory(module: nn.Module) -> int:
    """Return the size in bytes of a module's parameters and buffers; shared ones count once for each name.

    Example:
        >>> bytes_in_memory(nn.Linear(3, 2))
        32
    """
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def bytes_of_weights(place: str | Path) -> int:
    """Return the size in bytes of the weight files in a folder, or of a hub id that was loaded."""
    folder = Path(place)
    if not folder.is_dir():
        found = snapshot_download(str(place), allow_patterns="*.safetensors", local_files_only=True)
        folder = Path(found)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def of(encoder: Encoder, place: str | Path, ms: float) -> dict[str, Any]:
    """Return the costs as reports show them.

    Args:
        encoder: The model.
        place: Where its weights lie: a folder or a hub id.
        ms: What `milliseconds` found.
    """
    total, outside = parameters(encoder)
    return {
        "parameters": total,
        "non_embedding_parameters": outside,
        "bytes": bytes_of_weights(place),
        "ms_per_example": ms,
    }


def milliseconds(models: Sequence[tuple[Encoder, TokenisedRows]], *, bf16: bool) -> list[float]:
    """Return each model's median milliseconds per example, one example at a time.

    The models take turns on the same rows, evenly spread over the split, so that a machine whose speed
    drifts is fair to all.

    Args:
        models: Encoders with a split as each tokenises it.
        bf16: Whether to compute in bf16 autocast.
    """
    times: list[list[float]] = [[] for _ in models]
    count = len(models[0][1])
    chosen = np.linspace(0, count - 1, min(_TIMED, count)).astype(int)
    turns = [*chosen[:_WARMUP], *chosen]
    for turn, row in enumerate(turns):
        for (encoder, tokens), kept in zip(models, times, strict=True):
            device = next(encoder.parameters()).device
            inputs = pad(tokens, np.array([row])).to(device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                start = time.perf_counter()
                # Reading the value back waits for the device.
                encoder(inputs, Needs(logits=True)).logits.float().cpu()
                seconds = time.perf_counter() - start
            if turn >= min(_WARMUP, len(chosen)):
                kept.append(1000 * seconds)
    return [statistics.median(kept) for kept in times]
