"""`stillroom distill`: make a student."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame, opening

EXAMPLES = frame.examples(
    "stillroom distill --teacher runs/teacher --dataset builtin/verdicts --student layers:2,4,6 -o runs/a",
    "stillroom distill recipe.yaml -o runs/b --control --set training.epochs=3 --set method.temperature=2",
    "stillroom distill --teacher runs/teacher --dataset glue/mrpc --student 4x312 --init random -o runs/c",
    "stillroom distill recipe.yaml --dry-run",
    "stillroom distill recipe.yaml -o runs/c --augmented sst2.augmented.parquet",
    "stillroom distill --dataset rows.csv --set dataset.soft_labels=probability_ --student minilm-l6 "
    "--method kd -o runs/d",
    "stillroom distill --resume runs/b",
)


def distill(
    recipe: opening.RecipeFile = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Fine-tuned encoder: a folder or a hub id.", rich_help_panel=opening.WHAT
        ),
    ] = None,
    student: opening.Student = None,
    init: opening.Init = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of `stillroom methods`; lrc-bert is the default.",
            rich_help_panel=opening.WHAT,
        ),
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    augmented: frame.Augmented = None,
    output: opening.Output = None,
    given: frame.Overrides = None,
    seed: frame.Seed = None,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="Train the same student without a teacher as well, to show what distillation added.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, train and write nothing; needs no -o.",
            rich_help_panel=frame.RUN,
        ),
    ] = False,
    resume: opening.Resume = None,
    as_json: frame.AsJson = False,
) -> None:
    """Distil a teacher into a small student, and say what it kept."""
    folder = resume or output or Path()
    fixed = {
        "RECIPE.yaml": recipe,
        "--teacher": teacher,
        "--student": student,
        "--init": init,
        "--method": method,
        "--dataset": dataset,
        "--data-dir": data_dir,
        "--augmented": augmented,
        "--output": output,
        "--set": given or None,
        "--seed": seed,
        "--control": control,
        "--dry-run": dry_run or None,
    }

    def work(console: Console) -> dict[str, Any]:
        from stillroom.recipe import Recipe
        from stillroom.run.distill import distill

        if resume is not None:
            opening.require_alone(fixed)
            return distill(None, folder, resume=True, console=console)
        opening.require_folder(output, dry_run=dry_run)
        loaded = Recipe.load(
            recipe,
            frame.overrides(given, data_dir=data_dir, augmented=augmented, seed=seed),
            teacher=teacher,
            student=student,
            init=init,
            method=method,
            dataset=dataset,
            control=control,
        )
        return distill(loaded, output, dry_run=dry_run, console=console)

    found = frame.execute(
        work, as_json=as_json, stopped=lambda: opening.how_to_go_on("distill", folder), together=True
    )
    if as_json:
        return
    if dry_run:
        opening.show_checks(found)
    else:
        _show(found, folder)


def _show(found: dict[str, Any], folder: Path) -> None:
    metric = found["metric"]
    taught = found.get("soft_labels") or found.get("teacher")
    goal = taught["metrics"][metric] if taught else None
    columns = {
        "": "left",
        **dict.fromkeys(found["student"]["metrics"], "right"),
        f"{metric} kept": "right",
        **frame.COST_COLUMNS,
    }
    table = frame.table(columns)
    for name in ("soft_labels", "teacher", "control", "student"):
        if name in found:
            model = found[name]
            kept = f"{model['metrics'][metric] / goal:.1%}" if goal else "-"
            table.add_row(
                name.replace("_", " "),
                *(f"{value:.4f}" for value in model["metrics"].values()),
                kept,
                *(frame.cost_cells(model) if "bytes" in model else ("", "", "")),
            )
    page, again = (shlex.quote(str(place)) for place in (folder / "report.html", folder))
    frame.show(
        table,
        f"Student: {folder / 'student'}",
        f"Numbers: {folder / 'metrics.json'}",
        f"Next: open {page}; stillroom export {again}",
    )
