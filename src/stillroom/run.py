"""The whole path: recipe to data, teacher, method, loop, student, evaluation, `metrics.json`."""

import contextlib
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from stillroom import durable, encoder, generator, methods, preflight, provenance, student
from stillroom.data import sources
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, Tokens, fingerprint, tokenise
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.evaluation import cost
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predict import predict
from stillroom.generator import Generator
from stillroom.methods.base import Context, Plan
from stillroom.provenance import environment
from stillroom.recipe import FinetuneRecipe, MethodSettings, Recipe
from stillroom.teacher.live import LiveTeacher
from stillroom.training.loop import CHECKPOINTS, Job, Trained, train, use_bf16

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
STUDENT = "student"
CONTROL = "control"


def distill(
    recipe: Recipe | None,
    output: str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Distil the recipe's teacher into its student, and write the run folder.

    Args:
        recipe: What to do; None with `resume`, which reads the run's own recipe.
        output: The run folder: new or empty, or with `resume` the run to continue.
        resume: Go on from the newest sound checkpoint, to the same student bit for bit.
        dry_run: Only check everything that can be checked before the first step.
        console: Where progress goes; standard error by default.

    Returns:
        What `metrics.json` holds; with `dry_run` what the checks found.

    Raises:
        WrongInput: If anything about recipe, data, models or folder is not as expected.
        RunFailed: If training cannot go on.

    Example:
        >>> recipe = Recipe.load(teacher="my-teacher", dataset="glue/sst2", student="layers:2,4,6")
        >>> metrics = distill(recipe, "runs/sst2")  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    folder = Path(output)
    preflight.require_one_process()
    if resume:
        recipe = _recipe_of(folder)
    if recipe is None:
        raise ValueError("distill needs a recipe, or resume=True")
    recipe = methods.resolve(recipe)
    with contextlib.nullcontext() if dry_run else durable.locked(folder):
        if not dry_run:
            for place in (folder, folder / CONTROL):
                durable.remove_leftovers(place)
        if not resume:
            teacher = Path(recipe.teacher.name).absolute()
            durable.require_empty(
                folder,
                "Give another folder, or go on with --resume.",
                besides=teacher if teacher.parent == folder.absolute() else None,
            )
        parts = _Parts.load(recipe, console)
        checked = preflight.check(parts.to_check(recipe, folder), console)
        if dry_run:
            return checked
        inputs = provenance.inputs_of(
            parts.dataset, parts.teacher, parts.student, parts.tokens, parts.generator
        )
        machine = environment(bf16=parts.bf16)
        if resume:
            provenance.require_same(folder, inputs, machine, console)
        else:
            provenance.save(folder, inputs, machine)
            # Spelt out, so that it stays what it is on a machine without bf16.
            precision = {"precision": machine["precision"]}
            training = recipe.training.model_copy(update=precision)
            recipe = recipe.model_copy(update={"training": training})
            recipe.save(folder / RECIPE)
        trained = parts.train(recipe, folder, console)
        control = None
        if recipe.control:
            control = _train_control(recipe, parts, folder / CONTROL, console)
        metrics = _measure(recipe, parts, trained, control, folder)
        durable.write_json(folder / METRICS, metrics)
        return metrics


def finetune(
    recipe: FinetuneRecipe, output: str | Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune an encoder on a data set: make a teacher.

    Args:
        recipe: The model, the data and the loop's settings.
        output: Folder for the teacher: new or empty. Holds what `from_pretrained` loads, with
            `recipe.yaml`, `metrics.json` and `training/log.jsonl`.
        console: Where progress goes; standard error by default.

    Returns:
        What `metrics.json` holds.

    Raises:
        WrongInput: If model, data or folder are not as expected.
        RunFailed: If training cannot go on.
    """
    console = console or Console(stderr=True)
    folder = Path(output)
    preflight.require_one_process()
    with durable.locked(folder):
        durable.require_empty(folder, "Give another folder, or remove this one.")
        dataset = sources.load(recipe.dataset)
        torch.manual_seed(recipe.training.seed)
        model = encoder.load(recipe.model, dataset.task, fresh_head=True)
        tokens = _tokens(dataset, model, recipe.dataset.max_length, console)
        bf16 = use_bf16(recipe.training.precision)
        plan = methods.build(MethodSettings(name="none"), _context(dataset, model, model))
        to_check = preflight.Run(
            dataset,
            recipe.dataset.max_length,
            recipe.training,
            model,
            None,
            plan,
            Tokens(tokens, tokens),
            folder / "training",
            bf16,
        )
        preflight.check(to_check, console)
        recipe.save(folder / RECIPE)
        job = Job(
            "teacher",
            model,
            None,
            plan,
            dataset.splits["train"],
            tokens["train"],
            tokens["train"],
            recipe.training,
            bf16,
            _evaluator(dataset, tokens["validation"], bf16),
            folder / "training",
        )
        trained = train(job, console, recipe.model_dump(mode="json"))
        model.save(folder / "training" / "model")
        for path in (folder / "training" / "model").iterdir():
            path.replace(folder / path.name)
        (folder / "training" / "model").rmdir()
        shutil.rmtree(folder / "training" / CHECKPOINTS)
        ms = cost.milliseconds([(model, tokens["validation"])], bf16=False)
        found = _evaluator(dataset, tokens["validation"], bf16)(model)
        metrics = {
            "model": {"metrics": found, **cost.of(model, folder, ms[0])},
            "train": _training(trained),
            "environment": environment(bf16=bf16),
        }
        durable.write_json(folder / METRICS, metrics)
        return metrics


@dataclass(frozen=True)
class _Parts:
    """What a recipe names, loaded."""

    dataset: Dataset
    teacher: Encoder
    student: Encoder
    plan: Plan
    tokens: Tokens
    bf16: bool
    generator: Generator | None = None

    @classmethod
    def load(cls, recipe: Recipe, console: Console) -> "_Parts":
        dataset = sources.load(recipe.dataset)
        teacher = encoder.load(recipe.teacher.name)
        preflight.require_same_head(dataset.task, teacher)
        made = student.build(recipe.student, teacher, dataset.task, seed=recipe.training.seed)
        torch.manual_seed(recipe.training.seed)
        plan = methods.build(recipe.method, _context(dataset, made, teacher))
        most = recipe.dataset.max_length
        student_tokens = _tokens(dataset, made, most, console)
        alike = fingerprint(made.tokenizer) == fingerprint(teacher.tokenizer)
        same = alike and min(most, made.positions) == min(most, teacher.positions)
        teacher_tokens = student_tokens if same else _tokens(dataset, teacher, most, console)
        tokens = Tokens(student_tokens, teacher_tokens)
        writer = None if plan.augmentation is None else generator.load(plan.augmentation.generator)
        bf16 = use_bf16(recipe.training.precision)
        return cls(dataset, teacher, made, plan, tokens, bf16, writer)

    def to_check(self, recipe: Recipe, folder: Path) -> preflight.Run:
        """Return the run as the checks before the first step see it."""
        return preflight.Run(
            self.dataset,
            recipe.dataset.max_length,
            recipe.training,
            self.student,
            self.teacher,
            self.plan,
            self.tokens,
            folder,
            self.bf16,
            recipe.control,
            self.generator,
        )

    def train(self, recipe: Recipe, folder: Path, console: Console) -> Trained:
        """Train the student in `folder` and save it there."""
        live = LiveTeacher(self.teacher, device=Accelerator().device, bf16=self.bf16)
        name = f"{recipe.method.name} ({folder.name})"
        evaluate = _evaluator(self.dataset, self.tokens.student["validation"], self.bf16)
        job = Job(
            name,
            self.student,
            live,
            self.plan,
            self.dataset.splits["train"],
            self.tokens.student["train"],
            self.tokens.teacher["train"],
            recipe.training,
            self.bf16,
            evaluate,
            folder,
            self.generator,
            live,
        )
        trained = train(job, console, recipe.model_dump(mode="json"))
        self.student.save(folder / STUDENT)
        return trained


def _recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run to resume."""
    path = folder / RECIPE
    if not path.exists():
        raise WrongInput(
            f"{folder} is no run to resume: it has no {RECIPE}. A run writes it once its checks "
            "have passed; start it again without --resume."
        )
    return Recipe.load(path)


def _train_control(recipe: Recipe, parts: _Parts, folder: Path, console: Console) -> Encoder:
    """Train the same student from hard labels alone, everything else equal, and return it."""
    alone = recipe.model_copy(update={"method": MethodSettings(name="none"), "control": False})
    made = student.build(recipe.student, parts.teacher, parts.dataset.task, seed=recipe.training.seed)
    plan = methods.build(alone.method, _context(parts.dataset, made, parts.teacher))
    replace(parts, student=made, plan=plan, generator=None).train(alone, folder, console)
    return made


def _context(dataset: Dataset, made: Encoder, teacher: Encoder) -> Context:
    return Context(
        kind=dataset.task.kind,
        classes=dataset.task.outputs,
        rows=len(dataset.splits["train"]),
        student_depth=made.depth,
        student_width=made.width,
        teacher_depth=teacher.depth,
        teacher_width=teacher.width,
    )


def _tokens(
    dataset: Dataset, model: Encoder, max_length: int, console: Console
) -> dict[str, TokenisedRows]:
    most = min(max_length, model.positions)
    return {
        name: tokenise(rows, model.tokenizer, max_length=most, console=console)
        for name, rows in dataset.splits.items()
    }


def _evaluator(
    dataset: Dataset, tokens: TokenisedRows, bf16: bool
) -> Callable[[Encoder], dict[str, float]]:
    rows = dataset.splits["validation"]
    return lambda model: score(dataset.task, predict(model, tokens, bf16=bf16), rows.labels)


def _measure(
    recipe: Recipe, parts: _Parts, trained: Trained, control: Encoder | None, folder: Path
) -> dict[str, Any]:
    """Return `metrics.json`: what each model gets right and costs, and what training took."""
    student_tokens = parts.tokens.student["validation"]
    teacher_tokens = parts.tokens.teacher["validation"]
    models = {
        "teacher": (parts.teacher, teacher_tokens, encoder.locate(recipe.teacher.name)),
        "student": (parts.student, student_tokens, str(folder / STUDENT)),
    }
    if control is not None:
        models["control"] = (control, student_tokens, str(folder / CONTROL / STUDENT))
    timed = cost.milliseconds([(model, tokens) for model, tokens, _ in models.values()], bf16=False)
    metrics: dict[str, Any] = {}
    for (name, (model, tokens, place)), ms in zip(models.items(), timed, strict=True):
        found = _evaluator(parts.dataset, tokens, parts.bf16)(model)
        metrics[name] = {"metrics": found, **cost.of(model, place, ms)}
    first = parts.dataset.task.metrics[0]
    goal = metrics["teacher"]["metrics"][first]
    metrics["retained"] = metrics["student"]["metrics"][first] / goal if goal else None
    metrics["metric"] = first
    metrics["selected_step"] = trained.best_step or trained.steps
    metrics["train"] = _training(trained)
    metrics["environment"] = environment(bf16=parts.bf16)
    return metrics


def _training(trained: Trained) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": trained.seconds,
        "steps": trained.steps,
        "examples": trained.examples,
        "tokens": trained.tokens,
        "examples_per_second": trained.examples / trained.seconds,
        "tokens_per_second": trained.tokens / trained.seconds,
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": peak if sys.platform == "darwin" else 1024 * peak,
    }
