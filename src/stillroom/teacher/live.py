"""The teacher as the model itself: frozen, in evaluation mode, computed anew for each batch."""

from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Encoder, Needs, Outputs


class LiveTeacher:
    """Calls the teacher on a batch. It is no `nn.Module`, so that nothing trains or saves it."""

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

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Return what `needs` names for the batch's rows, detached, in float32.

        A stage that needs nothing of the teacher costs nothing.
        """
        return self.of_words(batch.teacher, needs, None)

    def of_words(self, inputs: Inputs, needs: Needs, words: Tensor | None) -> Outputs:
        """Return the same with a gradient to `words`, which stand for the rows' word embeddings."""
        if needs == Needs():
            return Outputs(torch.empty(0, device=self._device))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.bf16):
            outputs: Outputs = self.encoder(inputs, needs, words=words)
        return outputs.float()
