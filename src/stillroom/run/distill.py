"""The whole path: recipe to data, teacher, method, loop, student, evaluation, `metrics.json`."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stillroom import durable, encoder, methods, preflight, processes
from stillroom.data.soft_labels import logits_of
from stillroom.encoder import Encoder
from stillroom.evaluation import cost, predictions, robustness
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predict import predict, predict_rows
from stillroom.evaluation.predictions import PREDICTIONS, Predictions
from stillroom.provenance import CONTROL, METRICS, STUDENT, environment
from stillroom.recipe import Recipe
from stillroom.report import page
from stillroom.run import opening
from stillroom.run.parts import Common, Parts, training_figures
from stillroom.training.loop import Trained


def distill(
    recipe: Recipe | None,
    output: str | Path | None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Distil the recipe's teacher into its student, and write the run folder.

    Processes that were launched together (`accelerate launch`, `torchrun`) make one run; the folder is one
    that all of them see.

    Args:
        recipe: What to do; None with `resume`, which reads the run's own recipe.
        output: The run folder: new or empty, or with `resume` the run to continue; None for a dry run.
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
    processes.start()
    console, folder = processes.console(console), Path(output or "")
    asked = opening.asked(recipe, Recipe, folder, methods.resolve, resume=resume)
    place = Path("" if asked.teacher is None else asked.teacher.name).absolute()
    inside = place if place.parent == folder.absolute() else None
    kept_in = None if output is None else folder
    with opening.held(kept_in, resume=resume, dry_run=dry_run, besides=inside):
        common = processes.main_first(lambda: Common.load(asked, console))
        unlabelled = processes.main_first(lambda: Parts.of(asked, common, console))
        checked = processes.on_main(lambda: preflight.check(unlabelled.to_check(asked, kept_in), console))
        if dry_run:
            return checked
        parts = processes.main_first(lambda: unlabelled.labelled(asked, common, console))
        recipe = processes.on_main(lambda: parts.start(asked, folder, console, resume=resume))
        trained = parts.train(recipe, folder, console)
        control = None
        if recipe.control:
            alone, other = unlabelled.control(recipe)
            other.train(alone, folder / CONTROL, console)
            control = other.student

        def finish() -> dict[str, Any]:
            metrics = _measure(recipe, parts, trained, control, folder, console)
            durable.write_json(folder / METRICS, metrics)
            page.write(folder)
            return metrics

        return processes.on_main(finish)


def _measure(
    recipe: Recipe,
    parts: Parts,
    trained: Trained,
    control: Encoder | None,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Return `metrics.json`: what each model gets right and costs, and what training took.

    What each model said of the validation split is kept beside it.
    """
    student_tokens = parts.tokens.student["validation"]
    teacher_tokens = parts.tokens.teacher["validation"]
    models = {}
    if recipe.teacher is not None:
        models["teacher"] = (parts.teacher, teacher_tokens, encoder.locate(recipe.teacher.name))
    models["student"] = (parts.student, student_tokens, str(folder / STUDENT))
    if control is not None:
        models["control"] = (control, student_tokens, str(folder / CONTROL / STUDENT))
    timed = cost.milliseconds([(model, tokens) for model, tokens, _ in models.values()], bf16=False)
    task, rows = parts.dataset.task, parts.dataset.splits["validation"]
    metrics: dict[str, Any] = {}
    logits = {}
    for (name, (model, tokens, place)), ms in zip(models.items(), timed, strict=True):
        logits[name] = predict(model, tokens, bf16=parts.bf16)
        metrics[name] = {"metrics": score(task, logits[name], rows.labels), **cost.of(model, place, ms)}
    predictions.save(folder / PREDICTIONS, Predictions(task, rows, logits))
    if rows.soft_labels is not None:
        given = logits_of(rows.soft_labels, task.kind)
        metrics["soft_labels"] = {"metrics": score(task, given, rows.labels)}
    first = task.metrics[0]
    # What taught the logits is what the student is measured by.
    taught = metrics.get("soft_labels") or metrics.get("teacher")
    goal = taught["metrics"][first] if taught else None
    metrics["kept"] = metrics["student"]["metrics"][first] / goal if goal else None
    metrics["metric"] = first
    metrics["text"] = list(task.text)
    metrics["selected_step"] = trained.best_step or trained.steps
    encoders = {name: model for name, (model, _, _) in models.items()}
    metrics["robustness"] = _robustness(recipe, parts, encoders, logits, console)
    metrics["train"] = training_figures(trained)
    metrics["environment"] = environment(bf16=parts.bf16)
    return metrics


def _robustness(
    recipe: Recipe,
    parts: Parts,
    models: Mapping[str, Encoder],
    logits: Mapping[str, np.ndarray],
    console: Console,
) -> dict[str, Any]:
    """Return each model's first metric on validation texts as given, and on perturbed ones."""
    most, bf16 = recipe.dataset.max_length, parts.bf16
    says = {
        name: functools.partial(predict_rows, model, max_length=most, bf16=bf16, console=console)
        for name, model in models.items()
    }
    return robustness.measure(parts.dataset.task, parts.dataset.splits["validation"], logits, says)
