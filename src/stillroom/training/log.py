"""The log of a run: one line of log.jsonl for each logged step and each evaluation."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stillroom import durable, processes
from stillroom.errors import RunFailed
from stillroom.training import checkpoint
from stillroom.training.checkpoint import Progress
from stillroom.training.distiller import Loss

LOG = "log.jsonl"


class Log:
    """log.jsonl and the trackers, written by the main process; the only place that waits for the device."""

    def __init__(self, path: Path, progress: Progress, checkpoints: Path, accelerator: Accelerator):
        self._path, self._checkpoints, self._accelerator = path, checkpoints, accelerator
        self._pending: list[tuple[int, int, dict[str, Tensor]]] = []
        self._last = (progress.examples, progress.tokens, progress.seconds)
        if not processes.is_main():
            return
        kept = [line for line in _lines(path) if line["step"] <= progress.step]
        durable.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def note(self, step: int, stage: int, losses: Sequence[Loss], norm: Tensor, *, total: str) -> None:
        """Keep a step's values, averaged over its batches, on the device until they are read.

        Losses are this process's parts, which `check` adds up; the norm is the same in all processes.
        `total` is `loss`, or `objective` for what a generator step raises.
        """
        values = {total: torch.stack([loss.total for loss in losses]).mean()}
        for name in losses[0].terms:
            values[name] = torch.stack([loss.terms[name] for loss in losses]).mean()
        norm = norm.detach() / processes.count()
        self._pending.append((step, stage, values | {"gradient_norm": norm}))

    def check(self) -> dict[str, Any]:
        """Read what is pending; raise `RunFailed` at the first value that is not finite."""
        line: dict[str, Any] = {}
        if not self._pending:
            return line
        read = [torch.stack(list(values.values())) for _, _, values in self._pending]
        found = iter(processes.total(torch.cat(read)).tolist())
        for step, stage, values in self._pending:
            numbers = {name: next(found) for name in values}
            wrong = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
            if wrong:
                saved = checkpoint.newest_first(self._checkpoints)
                good = f"The last good checkpoint is {saved[0]}." if saved else "None was saved yet."
                error = RunFailed(
                    f"Training stopped at step {step} (stage {stage}): {', '.join(wrong)}, expected "
                    f"finite numbers. {good} Lower training.learning_rate or set "
                    "training.precision=float32 and start a new run."
                )
                error.shared = True
                raise error
            line = {"step": step, "stage": stage, **numbers}
        self._pending.clear()
        return line

    def write(
        self,
        line: dict[str, Any],
        progress: Progress,
        *,
        epoch: float,
        rate: float,
        record: dict[str, Any],
    ) -> float:
        """Append what `check` returned of the newest step; return examples per second since the last."""
        seconds = max(progress.seconds - self._last[2], 1e-9)
        speed = (progress.examples - self._last[0]) / seconds
        line |= {
            "epoch": round(epoch, 4),
            "learning_rate": rate,
            "examples_per_second": round(speed, 1),
            "tokens_per_second": round((progress.tokens - self._last[1]) / seconds, 1),
        }
        if record:
            line["record"] = record
        self._last = (progress.examples, progress.tokens, progress.seconds)
        self._append(line)
        return speed

    def write_metrics(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Append an evaluation."""
        self._append({"step": step, "epoch": round(epoch, 4), "validation": metrics})

    def _append(self, line: dict[str, Any]) -> None:
        if not processes.is_main():
            return
        with (
            durable.explain_writing(self._path),
            self._path.open("a", encoding="utf-8") as stream,
        ):
            stream.write(json.dumps(line) + "\n")
        flat = {key: value for key, value in line.items() if isinstance(value, int | float)}
        flat |= {f"validation/{key}": value for key, value in line.get("validation", {}).items()}
        self._accelerator.log(flat, step=line["step"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a log; a killed run may have left half of one at the end."""
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                return
