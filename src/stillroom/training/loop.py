"""One readable loop: staged terms, the optimiser's steps, evaluation, checkpoints."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from stillroom import processes
from stillroom.data.batching import Batch, make_batch
from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Outputs
from stillroom.generator import Generator
from stillroom.methods.base import Plan
from stillroom.recipe import TrainingSettings
from stillroom.teacher import Teacher
from stillroom.teacher.live import LiveTeacher
from stillroom.training import checkpoint
from stillroom.training.ahead import ahead
from stillroom.training.augmentation import Augmenter
from stillroom.training.compiling import compiled_blocks, require_compilable
from stillroom.training.distiller import Distiller, Loss
from stillroom.training.dropout import quick_dropout
from stillroom.training.log import LOG, Log
from stillroom.training.memory import keep_freed_memory
from stillroom.training.schedule import Schedule
from stillroom.training.vocabulary import Vocabulary, trained_words, whole_table

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where it is kept."""

    name: str
    """Shown beside the progress bar."""
    student: Encoder
    teacher: Teacher | None
    plan: Plan
    rows: Rows
    student_tokens: TokenisedRows
    teacher_tokens: TokenisedRows
    settings: TrainingSettings
    bf16: bool
    evaluate: Callable[[Encoder], dict[str, float]]
    """Metrics on the validation split, the one that selects first."""
    folder: Path
    """Gets log.jsonl and checkpoints/."""
    generator: Generator | None = None
    """Where the plan augments rows. It is trained, and checkpointed with the run."""
    live_teacher: LiveTeacher | None = None
    """The teacher on augmented rows, which no recording can hold."""
    hide: Callable[[Batch, int], Batch] | None = None
    """Hides words of a step's batch, to be guessed: a pure function of both. None hides nothing."""
    any_word: bool = False
    """Whether a step may read words that are not looked for in the rows beforehand."""

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        """Return the batch of some rows as a step (from 0) sees it."""
        made = make_batch(rows, self.rows, self.student_tokens, self.teacher_tokens)
        return made if self.hide is None else self.hide(made, step)


@dataclass(frozen=True)
class Trained:
    """What the loop did. `seconds` leaves out evaluation, checkpoints, and what a kill undid."""

    steps: int
    examples: int
    tokens: int
    seconds: float
    best_step: int | None
    teacher: dict[str, Any] | None = None
    """What was recorded of the teacher, and what that took; None where nothing teaches."""


def train(job: Job, console: Console, tracker_config: dict[str, Any] | None = None) -> Trained:
    """Train the job's student in place, from its newest sound checkpoint if it has one.

    Processes that were launched together train one student: each computes its part of every batch and
    of its loss, their gradients are added up, and the main process evaluates and writes.

    Args:
        job: What is trained. Its student holds the selected weights afterwards.
        console: Where progress and warnings go.
        tracker_config: What accelerate's trackers are told of the run.

    Returns:
        Steps, examples, tokens and seconds, and which step was selected.

    Raises:
        RunFailed: If a loss or gradient is not finite, naming step, term and last good checkpoint,
            or if the disk is full.
    """
    keep_freed_memory()
    job.student.packed = job.settings.packed == "auto"
    # A generator may write any word.
    ids = None if job.plan.augmentation or job.any_word else job.student_tokens.ids
    with trained_words(job.student, ids) as words, _quicker(job):
        return _train(job, words, console, tracker_config)


def _train(
    job: Job, words: Vocabulary | None, console: Console, tracker_config: dict[str, Any] | None
) -> Trained:
    settings = job.settings
    accelerator = Accelerator(log_with=list(settings.log_with) or None, project_dir=str(job.folder))
    if settings.log_with:
        accelerator.init_trackers("stillroom", config=tracker_config)
    schedule = Schedule(job.student_tokens.lengths, job.plan, settings)
    set_seed(settings.seed)
    distiller = Distiller(job.student, job.plan, bf16=job.bf16)
    optimizer = _optimizer(distiller, settings)
    distiller.to(accelerator.device)
    processes.same_start(distiller)
    optimizer = accelerator.prepare(optimizer)
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    augmenter = _augmenter(job, distiller)

    folder = job.folder / CHECKPOINTS
    progress, best = checkpoint.Progress(), None
    found = processes.on_main(lambda: checkpoint.newest_sound(folder, console))
    with processes.together():
        if found is not None:
            progress, best = checkpoint.restore(found, distiller, optimizer, augmenter)
        log = Log(job.folder / LOG, progress, folder, accelerator)

    with _bar(console) as bar:
        task = bar.add_task(job.name, total=schedule.steps, completed=progress.step, rate="")
        steps = schedule.from_step(progress.step) if not _stopped(progress, settings) else iter(())
        numbered = enumerate(steps, start=progress.step)
        started = time.perf_counter()
        distiller.train()
        for step, group in ahead(lambda given: _prepare(job, schedule, augmenter, *given), numbered):
            number, stage = schedule.stage(step)
            ascent = augmenter if augmenter and augmenter.moves_generator(step) else None
            losses: list[Loss] = []
            for rows, made, read in group:
                batch = made.to(accelerator.device)
                if ascent:
                    loss = ascent.objective(batch, ascent.draw(made, step))
                else:
                    if read is not None:
                        teacher: Any = read.on(accelerator.device)
                    else:
                        teacher = job.teacher and job.teacher(batch, job.plan.teacher_needs(stage))
                    augmented = augmenter and augmenter.augment(batch, augmenter.draw(made, step), stage)
                    loss = distiller(batch, teacher, stage, augmented)
                accelerator.backward(loss.total / len(group))
                losses.append(Loss(loss.total.detach(), loss.terms))
                progress.examples += len(rows)
                progress.tokens += int(job.student_tokens.lengths[rows].sum())
            rate = schedule.learning_rate(step)
            if ascent:
                share = rate / settings.learning_rate
                norm = ascent.step(rate, share, max_norm=settings.max_grad_norm)
            else:
                norm = _update(optimizer, trainable, rate, max_norm=settings.max_grad_norm)
                if words is not None:
                    words.after_step(rate * settings.weight_decay)
                optimizer.zero_grad()
                distiller.after_step(stage)
            progress.step = step + 1
            log.note(progress.step, number, losses, norm, total="objective" if ascent else "loss")

            if progress.step % settings.log_every == 0 or progress.step == schedule.steps:
                progress.seconds += time.perf_counter() - started
                line = log.check()
                with processes.together():
                    speed = log.write(
                        line,
                        progress,
                        epoch=schedule.epoch(progress.step),
                        rate=rate,
                        record=distiller.record(stage),
                    )
                bar.update(task, completed=progress.step, rate=f"{speed:,.0f} examples/s")
                started = time.perf_counter()
            if progress.step in schedule.evaluation_steps:
                progress.seconds += time.perf_counter() - started
                log.check()
                with whole_table(distiller.student, words):
                    metrics = processes.on_main(lambda: job.evaluate(distiller.student))
                distiller.train()
                with processes.together():
                    log.write_metrics(progress.step, schedule.epoch(progress.step), metrics)
                if settings.select == "best" and job.plan.head_is_taught(number):
                    best = _select(progress, metrics, distiller, best)
                started = time.perf_counter()
            done = progress.step == schedule.steps or _stopped(progress, settings)
            if progress.step % settings.checkpoint_every == 0 or done:
                progress.seconds += time.perf_counter() - started
                log.check()
                keep = settings.keep_checkpoints
                with processes.together():
                    if processes.is_main():
                        checkpoint.save(folder, distiller, optimizer, progress, best, augmenter, keep=keep)
                started = time.perf_counter()
            if done:
                break
        bar.update(task, completed=schedule.steps)
    log.check()
    if best is not None:
        distiller.student.model.load_state_dict(best)
    distiller.eval()
    # Not end_training, which would also part the processes.
    for tracker in accelerator.trackers:
        tracker.finish()
    return Trained(progress.step, progress.examples, progress.tokens, progress.seconds, progress.best_step)


def _quicker(job: Job) -> AbstractContextManager[None]:
    """Return what makes the student's steps quicker while it lasts."""
    if not job.settings.compile:
        return quick_dropout(job.student)
    needs = [job.plan.student_needs(stage) for stage in job.plan.stages]
    needs += [job.plan.augmented_needs(stage.augmented)[0] for stage in job.plan.stages]
    for need in needs:
        require_compilable(job.student, need, Accelerator().device)
    return compiled_blocks(job.student)


def _prepare(
    job: Job, schedule: Schedule, augmenter: Augmenter | None, step: int, group: Sequence[np.ndarray]
) -> tuple[int, list[tuple[np.ndarray, Batch, Outputs | None]]]:
    """Return a step's row numbers, batches, and what is recorded of the teacher, all on the CPU.

    Runs in a thread beside an earlier step. Nothing here draws from a generator that the step uses.
    """
    ascent = augmenter is not None and augmenter.moves_generator(step)
    needs = job.plan.teacher_needs(schedule.stage(step)[1])
    prepared = []
    for place, rows in enumerate(group, start=1):
        share = (processes.rank(), processes.count(), (job.settings.seed, step, place))
        made = job.batch(rows, step).part(*share)
        read = None if ascent or job.teacher is None else job.teacher.read(made, needs)
        prepared.append((rows, made, read))
    return step, prepared


def use_bf16(precision: str) -> bool:
    """Return whether to compute in bf16: as told, or for `auto` where the device does so fast."""
    if precision != "auto":
        return precision == "bf16"
    device = Accelerator().device
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without these instructions bf16 on a CPU is emulated, and slower than float32.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _optimizer(distiller: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW without decay on vectors (biases and norms), fused where the device has it."""
    matrices = [p for p in distiller.parameters() if p.ndim >= 2]
    vectors = [p for p in distiller.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-8, fused=True)


def _update(optimizer: Any, trainable: Sequence[nn.Parameter], rate: float, *, max_norm: float) -> Tensor:
    """Move what is trained along its gradient, clipped to this 2-norm; return the gradient's norm."""
    processes.sum_gradients(trainable)
    norm = get_total_norm([p.grad for p in trainable if p.grad is not None])
    # The fused optimiser divides by it on its way, where clipping would be a pass of its own.
    optimizer.optimizer.grad_scale = (norm / max_norm).clamp(min=1)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.step()
    return norm


def _augmenter(job: Job, distiller: Distiller) -> Augmenter | None:
    if job.plan.augmentation is None:
        return None
    if job.generator is None or job.live_teacher is None:
        raise ValueError("a plan that augments rows needs a generator and a live teacher")
    seed, bf16 = job.settings.seed, job.bf16
    return Augmenter(job.plan, job.generator, job.live_teacher, distiller, seed=seed, bf16=bf16)


def _select(
    progress: checkpoint.Progress,
    metrics: dict[str, float],
    distiller: Distiller,
    best: checkpoint.Weights | None,
) -> checkpoint.Weights | None:
    """Return the best student so far, and note in `progress` when that was."""
    value = next(iter(metrics.values()))
    if progress.best_value is not None and value <= progress.best_value:
        progress.without_better += 1
        return best
    progress.best_step, progress.best_value, progress.without_better = progress.step, value, 0
    return checkpoint.student_weights(distiller)


def _stopped(progress: checkpoint.Progress, settings: TrainingSettings) -> bool:
    return settings.patience is not None and progress.without_better >= settings.patience


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
