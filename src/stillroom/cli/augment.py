"""`stillroom augment`: look at the text that a generator writes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom augment runs/cilda --rows 5",
    "stillroom augment runs/kd --generator runs/generator --split validation --json",
    "stillroom augment --teacher runs/teacher --student runs/a --generator runs/g --dataset glue/sst2",
)
WITHOUT = "Without a run"


def augment(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A finished run; it names everything else.")
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A masked language model, in place of the run's own."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="How many rows to show.")] = 8,
    split: Annotated[str, typer.Option(metavar="NAME", help="Where they come from.")] = "train",
    draw: Annotated[
        int, typer.Option(min=0, metavar="N", help="Another number masks and draws other words.")
    ] = 0,
    teacher: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder or a hub id.", rich_help_panel=WITHOUT)
    ] = None,
    student: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder or a hub id.", rich_help_panel=WITHOUT)
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    given: frame.Overrides = None,
    as_json: frame.AsJson = False,
) -> None:
    """Show rows as a generator rewrites them: text, mask, new words, and what both models say.

    A run's generator is that of its newest checkpoint: where it learnt to make student and teacher
    differ, the rows show how.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.run.augment import augment, recipe_of

        named = {"--teacher": teacher, "--student": student, "--dataset": dataset}
        if run is not None and any(named.values()):
            beside = ", ".join(name for name, value in named.items() if value)
            raise WrongInput(f"RUN names its models and data: leave out {beside}, or leave out RUN.")
        missing = [name for name, value in {**named, "--generator": generator}.items() if value is None]
        if run is None and missing:
            raise WrongInput(f"Expected a run, or all of its parts: {', '.join(missing)} not given.")
        recipe = recipe_of(
            run,
            frame.overrides(given, data_dir=data_dir),
            generator_name=generator,
            teacher=teacher,
            student=student,
            dataset=dataset,
        )
        own = None if generator else run
        return augment(recipe, folder=own, split=split, rows=rows, draw=draw, console=console)

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    writer = found["generator"]
    table = frame.table(
        {"row": "right", **dict.fromkeys(("masked", "words", "teacher", "student"), "left")},
        title=f"{found['dataset']} {found['split']}, {writer['name']} after {writer['step']} steps",
    )
    for row in found["rows"]:
        words = ", ".join(f"{word['old']} -> {word['new']}" for word in row["words"]) or "-"
        said = (_said(row[who], found["kind"]) for who in ("teacher", "student"))
        table.add_row(str(row["row"]), escape(row["masked"]), escape(words), *said)
    frame.show(table)


def _said(model: dict[str, dict[str, float]], kind: str) -> str:
    return " -> ".join(_short(model[text], kind) for text in ("original", "augmented"))


def _short(values: dict[str, float], kind: str) -> str:
    if kind == "classification":
        label = max(values, key=lambda name: values[name])
        values = {label: values[label]}
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())
