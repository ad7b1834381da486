"""A model's logits for a whole split."""

import numpy as np
import torch
from rich.console import Console

from stillroom.data.batching import pad, sequential_batches
from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows, tokenise
from stillroom.encoder import Encoder, Needs


def predict(encoder: Encoder, tokens: TokenisedRows, *, bf16: bool) -> np.ndarray:
    """Return the logits of every row, in the rows' order.

    Args:
        encoder: Set to evaluation mode; computes where its weights lie.
        tokens: The split as this encoder tokenises it.
        bf16: Whether to compute in bf16 autocast.

    Returns:
        float32, shape `(N, C)`.
    """
    device = next(encoder.parameters()).device
    logits = np.empty((len(tokens), encoder.config.num_labels), dtype=np.float32)
    encoder.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for rows in sequential_batches(tokens.lengths):
            found = encoder(pad(tokens, rows).to(device), Needs(logits=True))
            logits[rows] = found.logits.float().cpu().numpy()
    return logits


def predict_rows(
    encoder: Encoder, rows: Rows, *, max_length: int, bf16: bool, console: Console
) -> np.ndarray:
    """Tokenise a split for this encoder and return its logits: see `predict`."""
    max_length = min(max_length, encoder.positions)
    tokens = tokenise(rows, encoder.tokenizer, max_length=max_length, console=console)
    return predict(encoder, tokens, bf16=bf16)
