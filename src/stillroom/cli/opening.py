"""How `distill` and `pretrain` begin and end: the options that both have, and what they say of a run."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom.cli import frame
from stillroom.errors import WrongInput

WHAT = "What to distil"

RecipeFile = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE.yaml", help="A recipe; options given beside it take precedence."),
]
Student = Annotated[
    str | None,
    typer.Option(
        metavar="S",
        help="A size such as 4x312 (the default), layers:2,4,6 of the teacher, or a checkpoint.",
        rich_help_panel=WHAT,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="How the student starts: random, teacher (its layers, copied), pca (its layers, folded "
        "into fewer dimensions), or a checkpoint. Default: pca for a size that fits into the teacher, "
        "teacher for layers.",
        rich_help_panel=WHAT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="RUN", help="The run folder, new or empty.", rich_help_panel=frame.RUN
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Go on with a run that was stopped or killed; it needs no other option.",
        rich_help_panel=frame.RUN,
    ),
]


def require_alone(beside: Mapping[str, Any]) -> None:
    """Refuse options that are given beside `--resume`; None is not given."""
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise WrongInput(
            "A run goes on with its own recipe: expected --resume alone, found "
            f"{', '.join(given)} beside it. Leave that out, or start a new run with -o."
        )


def require_folder(output: Path | None, *, dry_run: bool) -> None:
    """Refuse a run that would be written, and has no folder."""
    if output is None and not dry_run:
        raise WrongInput("Expected a folder for the run: give -o RUN, or --resume RUN to go on with one.")


def how_to_go_on(command: str, folder: Path) -> str:
    """Return what a run says that was stopped."""
    if (folder / "recipe.yaml").exists():
        return f"Stopped. Go on with: stillroom {command} --resume {shlex.quote(str(folder))}"
    return "Stopped before the first step; there is nothing to go on with."


def show_checks(found: dict[str, Any]) -> None:
    """Print what the checks of a dry run found."""
    table = frame.table({"check": "left", "found": "left"}, title="Nothing stands in the way of this run.")
    for name, value in found.items():
        if name != "warnings":
            table.add_row(name.replace("_", " "), _text(value))
    frame.show(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
