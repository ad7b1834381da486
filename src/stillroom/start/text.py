"""Batches of the training text that a start is fitted on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.data.batching import Inputs, pad
from stillroom.data.tokens import TokenisedRows

TOKENS, NORM_TOKENS = 8_192, 4_096
"""About how many tokens of the training text the statistics see, and the LayerNorms are fitted on."""

_ROWS = 32
"""Rows in a batch of the statistics."""


def sample(tokens: TokenisedRows, budget: int) -> list[Inputs]:
    """Return batches of about `budget` tokens, of rows spread evenly over the text.

    Args:
        tokens: The rows.
        budget: Tokens in all, padding not counted.

    Returns:
        Padded batches of at most 32 rows, in the order of the text, on the CPU.

    Example:
        >>> ids, lengths = np.arange(12, dtype=np.int32), np.full(4, 3)
        >>> tokens = TokenisedRows(ids, None, 3 * np.arange(4), lengths, pad_id=0, truncated=0)
        >>> [batch.input_ids.tolist() for batch in sample(tokens, 6)]
        [[[0, 1, 2], [9, 10, 11]]]
    """
    rows = max(1, min(len(tokens), round(budget / float(tokens.lengths.mean()))))
    index = np.linspace(0, len(tokens) - 1, rows).astype(np.int64)
    return [pad(tokens, part) for part in np.array_split(index, -(-rows // _ROWS))]


def joined(batches: Sequence[Inputs]) -> Inputs:
    """Return all rows in one batch, padded on the right."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def all_of(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is None:
            return None
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    ids, mask = all_of("input_ids"), all_of("attention_mask")
    assert ids is not None and mask is not None
    return Inputs(ids, mask, all_of("token_type_ids"))
