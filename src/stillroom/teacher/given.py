"""The teacher as a file: its logits are soft labels that someone else gave, the rest a model computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.teacher import Teacher


class GivenTeacher:
    """Gives the logits of a file by the numbers of the rows.

    Args:
        logits_NC: Of the training rows (`data.soft_labels.logits_of`).
        other: Gives whatever else terms read; None where there is no model.
    """

    def __init__(self, logits_NC: np.ndarray, other: Teacher | None = None):
        self._logits_NC: Tensor = torch.from_numpy(logits_NC)
        self._other = other

    @property
    def module(self) -> nn.Module:
        """The frozen model behind it, or an empty one."""
        return nn.Module() if self._other is None else self._other.module

    def served(self) -> dict[str, Any]:
        """Return what was recorded of the model, and that logits are given."""
        recorded = {"recorded": [], "bytes": 0, "recording_seconds": 0.0}
        return {**(recorded if self._other is None else self._other.served()), "given": ["logits"]}

    def read(self, batch: Batch, needs: Needs) -> Outputs | None:
        """Return what `needs` names if no model has to be run for it, on the CPU."""
        rest = replace(needs, logits=False)
        if rest == Needs():
            return self(batch, needs)
        read = None if self._other is None else self._other.read(batch, rest)
        if read is None or not needs.logits:
            return read
        return replace(read, logits=self._logits_NC[batch.row_ids.cpu()])

    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Return what `needs` names for the batch's rows, detached, in float32.

        Raises:
            ValueError: If more than logits is needed and there is no model; checked before the first
                step.
        """
        rest, device = replace(needs, logits=False), batch.labels.device
        if rest == Needs():
            outputs = Outputs(torch.empty(0, device=device))
        elif self._other is not None:
            outputs = self._other(batch, rest)
        else:
            raise ValueError(f"soft labels of a file have no states, found the need of {rest}")
        if not needs.logits:
            return outputs
        logits = self._logits_NC[batch.row_ids.cpu()].to(device, non_blocking=True)
        return replace(outputs, logits=logits)
