"""The teacher as the model itself: frozen, in evaluation mode, computed anew for each batch."""

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Encoder, Needs, Outputs, attending, blocked, can_block, register_attention

_EVEN = "stillroom-even"
_LANES, _TILE = 16, 4
"""Numbers of float32 that a processor adds at once, and rows that its products take at once."""

_Key = TypeVar("_Key")


class LiveTeacher:
    """Calls the teacher on a batch. It is no `nn.Module`, so that nothing trains or saves it.

    In float32 on a CPU a row's outputs are the same bits whatever rows share its batch, so that a
    recording, whose batches are others, holds them exactly. Two things depend on a batch otherwise
    (docs/LOG.md, 2026-11-26): a softmax over fewer keys than a whole number of vectors adds them in
    another order, so that queries and keys are padded to a multiple of 16 inside the attention; and a
    product of fewer than 4 rows for each thread takes another path, so that smaller batches are filled up.
    That holds for models whose attention goes through transformers' sdpa.

    In bf16 the weights of linear layers are rounded once, at the first call, where autocast would round all
    of them in every batch, and on a CPU laid out for its products: the same bits, for two more bytes of
    memory a weight.
    """

    def __init__(self, encoder: Encoder, *, device: torch.device, bf16: bool):
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self._device = device
        self.bf16 = bf16

    @property
    def module(self) -> nn.Module:
        """The frozen model."""
        return self.encoder

    def served(self) -> dict[str, Any]:
        """Return that nothing was recorded, as `metrics.json` shows it."""
        return {"recorded": [], "bytes": 0, "recording_seconds": 0.0}

    def read(self, batch: Batch, needs: Needs) -> Outputs | None:
        """Return None: everything is computed."""
        return None

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Return what `needs` names for the batch's rows, detached, in float32.

        A stage that needs nothing of the teacher costs nothing.
        """
        rows = len(batch.teacher.input_ids)
        least = _TILE * torch.get_num_threads()
        # Words that a masked-LM head guesses are never recorded, and their logits are no rows.
        guesses = batch.teacher.positions is not None
        if not self._even or rows >= least or needs == Needs() or guesses:
            return self.of_words(batch.teacher, needs, None)
        return _first(rows, self.of_words(_filled(batch.teacher, least), needs, None))

    def of_words(self, inputs: Inputs, needs: Needs, words: Tensor | None) -> Outputs:
        """Return the same with a gradient to `words`, which stand for the rows' word embeddings."""
        if needs == Needs():
            return Outputs(torch.empty(0, device=self._device))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.bf16), self._even_attention():
            given: dict[str, Any] = {"words": words}
            if self.bf16 and not torch.is_grad_enabled() and can_block(self._device):
                blocked_outputs: Outputs = self._blocked(inputs, needs, **given)
                return blocked_outputs.float()
            # Not tied: an embedding that a decoder shares is not rounded.
            outputs: Outputs = functional_call(
                self.encoder, self._rounded, (inputs, needs), given, tie_weights=False
            )
        return outputs.float()

    @functools.cached_property
    def _blocked(self) -> Encoder:
        """The encoder for passes without a gradient on a CPU."""
        with torch.inference_mode(False), torch.no_grad():
            return blocked(self.encoder)

    @functools.cached_property
    def _rounded(self) -> dict[str, Tensor]:
        """The weights that autocast would round, by name, rounded; none in float32."""
        layers = [(n, m) for n, m in self.encoder.named_modules() if type(m) is nn.Linear and self.bf16]
        # They outlive the call: a gradient to words may pass through them later.
        with torch.inference_mode(False):
            return {
                f"{n}.{key}": p.detach().bfloat16() for n, m in layers for key, p in m.named_parameters()
            }

    @property
    def _even(self) -> bool:
        return self._device.type == "cpu" and not self.bf16

    def _even_attention(self) -> AbstractContextManager[None]:
        sdpa = self.encoder.config._attn_implementation == "sdpa"
        return attending(self.encoder.model, _EVEN) if self._even and sdpa else nullcontext()


def _even(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return what transformers' sdpa attention does, computed on a multiple of 16 tokens."""
    tokens = query.shape[2]
    more = -tokens % _LANES
    if not more or key.shape[2] != tokens:
        made: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return made
    if attention_mask is None:
        attention_mask = query.new_ones((1, 1, tokens, tokens), dtype=torch.bool)
    least = False if attention_mask.dtype == torch.bool else -math.inf
    mask = F.pad(attention_mask, (0, more, 0, 0), value=least)
    # Queries of padding look at what the last token looks at: of nothing there is no softmax.
    mask = torch.cat([mask, mask[:, :, -1:].expand(-1, -1, more, -1)], dim=2)
    query, key, value = (F.pad(states, (0, 0, 0, more)) for states in (query, key, value))
    mixed, weights = sdpa_attention_forward(module, query, key, value, mask, **others)
    return mixed[:, :tokens], weights


register_attention(_EVEN, _even)


def _filled(inputs: Inputs, count: int) -> Inputs:
    """Return `count` rows: those of the batch, then its first one as often as it takes."""

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values[:1].expand(count - len(values), -1)])

    types = inputs.token_type_ids
    return Inputs(
        filled(inputs.input_ids), filled(inputs.attention_mask), None if types is None else filled(types)
    )


def _first(count: int, outputs: Outputs) -> Outputs:
    """Return the outputs of the first rows."""

    def first(tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
        return {key: tensor[:count] for key, tensor in tensors.items()}

    return Outputs(
        outputs.logits[:count],
        first(outputs.hidden_states),
        None if outputs.embeddings is None else outputs.embeddings[:count],
        first(outputs.attention_scores),
        first(outputs.queries),
        first(outputs.keys),
        first(outputs.values),
        first(outputs.pooled_states),
    )
