"""Checks of the place a run is written to, and of the processes that run it."""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from stillroom import durable
from stillroom.errors import WrongInput
from stillroom.evaluation import cost
from stillroom.preflight.base import Report, Run
from stillroom.teacher.cache import keys_of
from stillroom.teacher.choose import cache_of
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.recorded import planned
from stillroom.training.loop import CHECKPOINTS


def require_one_process() -> None:
    """Raise `WrongInput` where several processes were launched to do what one does."""
    # Without a GPU accelerate does not look at what torchrun says.
    processes = max(Accelerator().num_processes, int(os.environ.get("WORLD_SIZE", 1)))
    if processes > 1:
        error = WrongInput(
            f"Expected one process, found {processes}: only `stillroom distill`, `finetune` and `pretrain` "
            "train in several that are launched together. Start it without `accelerate launch` or "
            "`torchrun`; `stillroom compare --workers N` starts its processes itself."
        )
        error.shared = True
        raise error


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
    """The checkpoints, the student and what is recorded of the teacher fit on the disk."""
    need, place = _need(run), durable.existing(run.folder or Path())
    cache = None if report.errors else _recording(run, report)
    if cache is not None:
        folder, more = durable.existing(cache[0]), cache[1]
        if folder.stat().st_dev == place.stat().st_dev:
            need += more
        elif more > (free := shutil.disk_usage(folder).free):
            report.error(
                f"The recorded teacher needs about {more / 1e6:,.0f} MB, found {free / 1e6:,.0f} MB free "
                f"at {folder}. Free some space, set teacher.cache to another folder, or lower "
                "teacher.max_bytes."
            )
    # A run that is resumed has part of this on the disk already.
    old = run.folder.glob(f"**/{CHECKPOINTS}/*/*.safetensors") if run.folder else ()
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in old)
    report.found["disk"] = {"need_mb": round(need / 1e6, 1), "free_mb": round(free / 1e6, 1)}
    if need > free:
        recorded = "" if cache is None else ", recorded teacher"
        report.error(
            f"The run needs about {need / 1e6:,.0f} MB for checkpoints{recorded} and student, found "
            f"{free / 1e6:,.0f} MB free at {place}. Free some space, give another output folder, or "
            f"lower training.keep_checkpoints (now {run.training.keep_checkpoints})"
            + (" or teacher.max_bytes." if cache else ".")
        )


def _recording(run: Run, report: Report) -> tuple[Path, int] | None:
    """Return the cache's folder and the bytes that the run adds to it; None where it records nothing."""
    if run.teacher is None or run.recording is None:
        return None
    live = LiveTeacher(run.teacher, device=Accelerator().device, bf16=run.bf16)
    stages = run.plan.teacher_needs_of_stages()
    cache = cache_of(run.recording, live, stages, max_length=run.max_length, repeated=run.repeated)
    if cache is None:
        return None
    # What is damaged is found when the run opens the cache; nothing is written here.
    cache.open(check=False)
    tokens = run.tokens.teacher["train"]
    plan = planned(live, cache, tokens, keys_of(tokens), stages, max_bytes=run.recording.max_bytes)
    report.found["recorded_teacher"] = {
        "recorded": [column.name for column in plan.kept],
        "live": sorted(column.name for column in {*plan.padded, *plan.too_large}),
        "new_mb": round(plan.more / 1e6, 1),
        "total_mb": round(plan.total / 1e6, 1),
        "folder": str(cache.folder),
    }
    return cache.folder, plan.more


def _need(run: Run) -> int:
    """Return the bytes a run writes at most at one time."""
    weights = cost.bytes_in_memory(run.student)
    # Weights, two moments of AdamW, and the best student so far.
    copies = 4 if run.training.select == "best" else 3
    # One more is written aside before the oldest goes.
    checkpoints = run.training.keep_checkpoints + 1
    trained = checkpoints * copies * weights + weights
    terms = sum(cost.bytes_in_memory(term) for term in run.terms().values())
    generator = 0 if run.generator is None else cost.bytes_in_memory(run.generator)
    return trained * (2 if run.control else 1) + checkpoints * 3 * (terms + generator)
