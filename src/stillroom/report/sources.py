"""What a finished run left in its folder, read back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.deploy.forms import DEPLOY, MANIFEST
from stillroom.durable import read_json
from stillroom.errors import WrongInput
from stillroom.evaluation import predictions
from stillroom.evaluation.predictions import PREDICTIONS, Predictions
from stillroom.provenance import CONTROL, METRICS, RECIPE
from stillroom.recipe import PretrainRecipe, Recipe, read_yaml
from stillroom.training.log import LOG

COMPARISON, RESULTS = "compare.yaml", "compare.json"
"""Names of files inside the folder of a comparison."""


@dataclass(frozen=True)
class Run:
    """A run folder's files. What is None or empty was not there."""

    folder: Path
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    log: list[dict[str, Any]]
    control_log: list[dict[str, Any]]
    kept: Predictions | None
    export: dict[str, Any] | None

    @property
    def models(self) -> list[str]:
        """Which of teacher, control and student there are, in this order."""
        return [name for name in ("teacher", "control", "student") if name in self.metrics]


def read_run(folder: Path) -> Run:
    """Return what a run left.

    Raises:
        WrongInput: If the folder is no finished run, or a file in it is damaged.
    """
    metrics = _metrics(folder, "distill")
    if not {"student", "metric"} <= metrics.keys():
        raise WrongInput(
            f"Expected the metrics of a distillation, with a student, found "
            f"{', '.join(metrics) or 'nothing'} in {folder / METRICS}. A teacher from stillroom finetune "
            "has no report: give the run that distilled it."
        )
    path, exported = folder / PREDICTIONS, folder / DEPLOY / MANIFEST
    return Run(
        folder,
        metrics,
        Recipe.load(folder / RECIPE).model_dump(mode="json"),
        lines_of(folder / LOG),
        lines_of(folder / CONTROL / LOG),
        predictions.load(path) if path.is_file() else None,
        read_json(exported) if exported.is_file() else None,
    )


@dataclass(frozen=True)
class Pretrained:
    """The files of a run of `stillroom pretrain`."""

    folder: Path
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    log: list[dict[str, Any]]


def is_pretraining(folder: Path) -> bool:
    """Return whether a folder's recipe is one of task-agnostic distillation."""
    return (folder / RECIPE).is_file() and "text" in read_yaml(folder / RECIPE)


def read_pretraining(folder: Path) -> Pretrained:
    """Return what a run of `stillroom pretrain` left.

    Raises:
        WrongInput: If it is not finished, or a file in it is damaged.
    """
    metrics = _metrics(folder, "pretrain")
    if not {"text", "held_out", "student", "train"} <= metrics.keys():
        raise WrongInput(
            f"Expected the metrics of stillroom pretrain in {folder / METRICS}, found "
            f"{', '.join(metrics) or 'nothing'}. Run it again in a new folder."
        )
    recipe = PretrainRecipe.load(folder / RECIPE).model_dump(mode="json")
    return Pretrained(folder, metrics, recipe, lines_of(folder / LOG))


@dataclass(frozen=True)
class Compared:
    """A comparison folder's files."""

    folder: Path
    found: dict[str, Any]
    """What is in `compare.json`."""
    settings: str | None
    """The text of `compare.yaml`, or None without it."""
    logs: dict[tuple[str, str], list[list[dict[str, Any]]]]
    """By student and method the logs of its seeds; what is not there is left out."""


def read_comparison(folder: Path) -> Compared:
    """Return what a comparison found.

    Raises:
        WrongInput: If it found nothing yet, or a file in it is damaged.
    """
    found = read_json(folder / RESULTS)
    students = found.get("students", {})
    # Of one that was stopped, some have nothing yet.
    found["students"] = {name: each for name, each in students.items() if each["methods"]}
    if not {"dataset", "rows", "metric", "teacher"} <= found.keys() or not found["students"]:
        raise WrongInput(f"Expected the results of stillroom compare in {folder / RESULTS}, found others.")
    logs = {}
    for student, costs in found["students"].items():
        for method, result in costs["methods"].items():
            runs = folder / result["folder"] if "folder" in result else None
            read = [lines_of(runs / seed / LOG) for seed in result["seeds"]] if runs else []
            if any(read):
                logs[student, method] = [log for log in read if log]
    path = folder / COMPARISON
    settings = path.read_text(encoding="utf-8") if path.is_file() else None
    return Compared(folder, found, settings, logs)


def _metrics(folder: Path, command: str) -> dict[str, Any]:
    """Return the metrics of a run that `stillroom COMMAND` finished."""
    if (folder / METRICS).is_file():
        return read_json(folder / METRICS)
    remedy = (
        f"Finish it first: stillroom {command} --resume {folder}."
        if (folder / RECIPE).is_file()
        else f"Give the folder that stillroom {command} -o wrote."
    )
    raise WrongInput(f"Expected a finished run, found no {METRICS} in {folder}. {remedy}")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise WrongInput(f"{path} cannot be read ({error}). Remove it to leave the curves out.") from None
