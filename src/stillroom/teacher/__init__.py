"""One call, Batch to Outputs, whatever gives the teacher's answers."""

from typing import Any, Protocol

from torch import nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs


class Teacher(Protocol):
    """What the loop asks for outputs: the model itself, or what is recorded of it."""

    @property
    def module(self) -> nn.Module:
        """The frozen model."""

    def served(self) -> dict[str, Any]:
        """Return which outputs were recorded, with bytes and seconds, as `metrics.json` shows it."""

    def read(self, batch: Batch, needs: Needs) -> Outputs | None:
        """Return what `needs` names if no model has to be run for it, on the CPU and as it is stored.

        May be called from any thread, beside a step that computes.
        """

    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Return what `needs` names for the batch's rows, detached, in float32."""
