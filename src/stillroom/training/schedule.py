"""Which rows, stage and learning rate each step has."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from stillroom.data.batching import epoch_batches
from stillroom.methods.base import Plan, Stage
from stillroom.recipe import TrainingSettings


class Schedule:
    """Rows, stage and learning rate as functions of the step, so that a resumed run sees the same."""

    def __init__(self, lengths: np.ndarray, plan: Plan, settings: TrainingSettings):
        self._lengths, self._settings = lengths, settings
        counts = [len(self._epoch(epoch)) for epoch in range(math.ceil(settings.epochs))]
        last = settings.epochs - (len(counts) - 1)
        counts[-1] = max(1, round(counts[-1] * last))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        whole = math.ceil(int(self._starts[-1]) / settings.accumulation)
        self.steps = min(whole, settings.max_steps or whole)
        self._plan = plan
        evaluations = math.ceil(settings.epochs / settings.evaluate_every)
        steps = settings.evaluate_every_steps
        self.evaluation_steps = (
            set(range(steps, self.steps, steps))
            if steps
            else set(range(1, self.steps))
            if evaluations > self.steps
            else {
                # Multiplied before it is divided: whole epochs come out exact.
                min(self.steps, math.ceil(self.steps * (i + 1) * settings.evaluate_every / settings.epochs))
                for i in range(evaluations)
            }
        )
        self.evaluation_steps.add(self.steps)

    def stage(self, step: int) -> tuple[int, Stage]:
        """Return the number (from 1) and the stage of a step (from 0)."""
        return self._plan.stage_at(step, self.steps)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step (from 0): a linear rise, then a linear fall to zero, or none."""
        warmup = round(self._settings.warmup * self.steps)
        rise = (step + 1) / (warmup + 1)
        if self._settings.schedule == "constant":
            return self._settings.learning_rate * min(rise, 1.0)
        fall = (self.steps - step) / max(1, self.steps - warmup)
        return self._settings.learning_rate * min(rise, fall, 1.0)

    def epoch(self, step: int) -> float:
        """Return how many epochs are done after `step` steps."""
        batches = min(step * self._settings.accumulation, int(self._starts[-1]))
        epoch = int(np.searchsorted(self._starts, batches, side="right")) - 1
        if epoch + 1 == len(self._starts):
            return float(self._settings.epochs)
        size = self._starts[epoch + 1] - self._starts[epoch]
        return epoch + float((batches - self._starts[epoch]) / size)

    def from_step(self, step: int) -> Iterator[list[np.ndarray]]:
        """Yield, for each step from `step` on, the row numbers of its batches."""
        first, total = step * self._settings.accumulation, int(self._starts[-1])
        group: list[np.ndarray] = []
        for epoch in range(len(self._starts) - 1):
            start, end = int(self._starts[epoch]), int(self._starts[epoch + 1])
            if end <= first:
                continue
            batches = self._epoch(epoch)[: end - start]
            for position in range(max(first, start), end):
                group.append(batches[position - start])
                if len(group) == self._settings.accumulation or position + 1 == total:
                    yield group
                    group = []

    def _epoch(self, epoch: int) -> Sequence[np.ndarray]:
        s = self._settings
        return epoch_batches(
            self._lengths,
            seed=s.seed,
            epoch=epoch,
            batch_size=s.batch_size,
            max_tokens=s.max_tokens,
        )
