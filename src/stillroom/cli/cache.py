"""`stillroom cache`: what is recorded of teachers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom cache build --teacher runs/teacher --dataset builtin/verdicts --method kd",
    "stillroom cache list",
    "stillroom cache verify",
    "stillroom cache prune --older-than 30",
)

app = typer.Typer(
    help="Record teachers ahead of runs, and look after what is recorded.",
    rich_markup_mode="rich",
    no_args_is_help=True,
)

Caches = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[DIR]...",
        help="Caches in folders of your own (teacher.cache: DIR). Default: those in Stillroom's folder.",
    ),
]


@app.command(
    epilog=frame.examples(
        "stillroom cache build --teacher runs/teacher --dataset builtin/verdicts --method kd",
        "stillroom cache build recipe.yaml --set teacher.cache=recorded",
    )
)
def build(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.yaml", help="A recipe; options given beside it take precedence."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="DIR", help="Fine-tuned encoder: a folder or a hub id.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(metavar="S", help="As for `stillroom distill`: its layers say which are read."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose terms are recorded: of `stillroom methods`.")
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    given: frame.Overrides = None,
    as_json: frame.AsJson = False,
) -> None:
    """Record what a run reads of its teacher, so that the run finds it there."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.recipe import Recipe
        from stillroom.run.cache import build

        loaded = Recipe.load(
            recipe,
            frame.overrides(given, data_dir=data_dir),
            teacher=teacher,
            student=student,
            method=method,
            dataset=dataset,
        )
        return build(loaded, console=console)

    stopped = "Stopped. What is finished stays; the same command goes on."
    found = frame.execute(work, as_json=as_json, stopped=lambda: stopped)
    if not as_json:
        names = ", ".join(found["recorded"]) or "nothing"
        frame.show(f"Recorded: {names} ({_mb(found['bytes'])} MB, {found['recording_seconds']:.1f} s)")


@app.command("list", epilog=frame.examples("stillroom cache list", "stillroom cache list recorded --json"))
def list_(caches: Caches = None, as_json: frame.AsJson = False) -> None:
    """List what is recorded."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.teacher import upkeep

        return {"caches": [upkeep.describe(folder) for folder in upkeep.find(caches)]}

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found["caches"])


@app.command(epilog=frame.examples("stillroom cache verify", "stillroom cache verify recorded"))
def verify(caches: Caches = None, as_json: frame.AsJson = False) -> None:
    """Make every checksum anew; exit code 1 if a shard is damaged."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.teacher import upkeep

        return upkeep.verify(upkeep.find(caches), console)

    found = frame.execute(work, as_json=as_json)
    damaged = found["damaged"]
    if not as_json:
        frame.show(*(f"Damaged: {shard} ({wrong})" for shard, wrong in damaged.items()))
        frame.show(f"{found['shards'] - len(damaged)} of {found['shards']} shards are sound.")
    if damaged:
        raise typer.Exit(1)


@app.command(
    epilog=frame.examples(
        "stillroom cache prune --older-than 30", "stillroom cache prune --teacher 3f2a9c --yes"
    )
)
def prune(
    caches: Caches = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Those of one teacher: the start of its hash in the list."),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Those that no run has used for so long.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: frame.AsJson = False,
) -> None:
    """Remove what is recorded. A run that reads it goes on; later ones record again."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.teacher import upkeep

        chosen = upkeep.choose(
            upkeep.find(caches), teacher=teacher, older_than=older_than, everything=everything
        )
        size = sum(found["bytes"] for found in chosen)
        if chosen and not yes:
            for found in chosen:
                console.print(_line(found), markup=False, highlight=False)
            try:
                sure = typer.confirm(f"Remove {len(chosen)} cache(s), {_mb(size)} MB?", err=True)
            except typer.Abort:
                raise WrongInput("Expected an answer, found none. Give --yes to remove them.") from None
            if not sure:
                chosen = []
        return upkeep.prune(chosen, console)

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        frame.show(f"Removed {len(found['removed'])} cache(s): {_mb(found['bytes'])} MB freed.")
    if found["kept"]:
        raise typer.Exit(1)


def _show(caches: list[dict[str, Any]]) -> None:
    if not caches:
        frame.show("Nothing is recorded.")
        return
    columns = {
        "teacher": "left",
        "name": "left",
        "tokenizer": "left",
        "length": "right",
        "precision": "left",
        "rows": "right",
        "columns": "left",
        "MB": "right",
        "unused for": "right",
    }
    table = frame.table(columns)
    for found in caches:
        table.add_row(
            found["teacher"][:12],
            found["name"],
            found["tokenizer"][:12],
            str(found["max_length"]),
            found["precision"],
            f"{found['rows']:,}",
            " ".join(found["columns"]),
            _mb(found["bytes"]),
            f"{found['unused_days']:.0f} days",
        )
    frame.show(table)


def _line(found: dict[str, Any]) -> str:
    days = f"unused for {found['unused_days']:.0f} days"
    return f"{found['folder']}: {found['name']}, {found['rows']:,} rows, {_mb(found['bytes'])} MB, {days}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"
