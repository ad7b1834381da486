"""Checks of the place a run is written to, and of the processes that run it."""

import os
import shutil

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from stillroom.errors import WrongInput
from stillroom.preflight.base import Report, Run
from stillroom.training.loop import CHECKPOINTS


def require_one_process() -> None:
    """Raise `WrongInput` where several processes were launched to train together."""
    # Without a GPU accelerate does not look at what torchrun says.
    processes = max(Accelerator().num_processes, int(os.environ.get("WORLD_SIZE", 1)))
    if processes > 1:
        raise WrongInput(
            f"Expected one process, found {processes}: this version trains in one. Start it without "
            "`accelerate launch` or `torchrun`, or let them start one process."
        )


def trackers(run: Run, report: Report) -> None:
    """Every tracker that is to be logged to is known and installed."""
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in run.training.log_with:
        if name not in installed:
            # accelerate leaves out what is not installed, and says nothing.
            report.error(
                f"training.log_with: {name} is not installed or not known to accelerate. Installed: "
                f"{', '.join(installed) or 'none'}. Install it with pip, or leave it out."
            )


def disk(run: Run, report: Report) -> None:
    """The checkpoints and the student fit on the disk."""
    need = _need(run)
    place = run.folder.absolute()
    while not place.exists():
        place = place.parent
    # A run that is resumed has part of this on the disk already.
    old = run.folder.glob(f"**/{CHECKPOINTS}/*/*.safetensors")
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in old)
    report.found["disk"] = {"need_mb": round(need / 1e6, 1), "free_mb": round(free / 1e6, 1)}
    if need > free:
        report.error(
            f"The run needs about {need / 1e6:,.0f} MB for checkpoints and student, found "
            f"{free / 1e6:,.0f} MB free at {place}. Free some space, give another output folder, or "
            f"lower training.keep_checkpoints (now {run.training.keep_checkpoints})."
        )


def _need(run: Run) -> int:
    """Return the bytes a run writes at most at one time."""
    weights = _bytes(run.student)
    # Weights, two moments of AdamW, and the best student so far.
    copies = 4 if run.training.select == "best" else 3
    # One more is written aside before the oldest goes.
    checkpoints = run.training.keep_checkpoints + 1
    trained = checkpoints * copies * weights + weights
    terms = sum(_bytes(term) for term in run.terms().values())
    generator = 0 if run.generator is None else _bytes(run.generator)
    return trained * (2 if run.control else 1) + checkpoints * 3 * (terms + generator)


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
