"""`stillroom sweep`: try values of recipe keys, and keep the best."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom sweep --teacher runs/teacher --dataset glue/mrpc --method kd "
    "--try training.learning_rate=1e-5:1e-3:log --try method.temperature=1,2,4 --trials 20 -o runs/sweep",
    "stillroom sweep recipe.yaml --try student=2x128,4x312,layers:2,4,6 --try training.epochs=1:4 "
    "--objectives quality,latency --workers 2 -o runs/sweep",
    "stillroom sweep SWEEP.yaml -o runs/sweep",
)
WHAT = "What to try"
SHOWN = 10
"""Most runs that the table shows."""


def sweep(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE.yaml]",
            help="A recipe, or a sweep.yaml; options given beside it take precedence.",
        ),
    ] = None,
    tries: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="KEY=VALUES",
            help="A key of the recipe with LOW:HIGH, LOW:HIGH:log, or values with commas between; may be "
            "repeated.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Runs. Default: every combination where all keys have lists, else 20.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="quality (the default; the first metric), latency (ms per example), size (bytes).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: Annotated[
        Literal["held-out", "validation"] | None,
        typer.Option(
            help="What is scored. held-out (the default): a tenth of the training rows, so that nothing is "
            "tuned on the split that is reported.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    prune: Annotated[
        bool | None,
        typer.Option(
            "--prune/--no-prune",
            help="Stop runs below the median of earlier ones at the same evaluation (one objective only).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="DIR", help="Fine-tuned encoder: a folder or a hub id.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="S", help="A size such as 4x312, layers:2,4,6 of the teacher, or a checkpoint."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="One of `stillroom methods`.")] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    augmented: frame.Augmented = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="New or empty, or the same sweep: what is done is skipped.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    given: frame.Overrides = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes of one thread each; 1 trains here with all threads.",
            rich_help_panel=frame.RUN,
        ),
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna storage for machines that share DIR. Default: a file in DIR.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    as_json: frame.AsJson = False,
) -> None:
    """Distil by one recipe with many values of some of its keys, and write the best as a recipe.

    A sweep that was stopped or killed goes on when the same command is run again, also with more trials.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.recipe import Sweep
        from stillroom.run.sweep import sweep

        if output is None:
            raise WrongInput("Expected a folder for the sweep: give -o DIR.")
        chosen = Sweep.load(
            recipe,
            frame.overrides(given, data_dir=data_dir, augmented=augmented),
            teacher=teacher,
            student=student,
            method=method,
            dataset=dataset,
            tries=split_tries(tries),
            trials=trials,
            objectives=None if objectives is None else [name.strip() for name in objectives.split(",")],
            split=split,
            prune=prune,
        )
        return sweep(chosen, output, workers=workers, storage=storage, console=console)

    found = frame.execute(
        work, as_json=as_json, stopped=lambda: "Stopped. The same command goes on from here."
    )
    if not as_json:
        _show(found, output or Path())


def split_tries(given: list[str] | None) -> dict[str, str] | None:
    """Return what `--try` names, by key.

    Example:
        >>> split_tries(["training.epochs=1:4", "method.alpha=0,1"])
        {'training.epochs': '1:4', 'method.alpha': '0,1'}
    """
    if not given:
        return None
    found = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise WrongInput(f"Expected `--try KEY=VALUES`, such as training.epochs=1:4, found {text!r}.")
        if key.strip() in found:
            raise WrongInput(f"--try {key.strip()} is given twice: give all of its values at once.")
        found[key.strip()] = values.strip()
    return found


def _show(found: dict[str, Any], folder: Path) -> None:
    trials = {one["run"]: one for one in found["trials"]}
    done = [one for one in trials.values() if one["state"] == "done"]
    rest = [one for one in done if one["run"] not in found["best"]]
    rest.sort(key=lambda one: -one.get("quality", 0.0))
    keys = list(done[0]["values"])
    rows = f"{found['rows']} {'held-out training' if found['split'] == 'held-out' else 'validation'} rows"
    table = frame.table(
        {
            "run": "left",
            **dict.fromkeys((escape(key) for key in keys), "right"),
            **dict.fromkeys(found["objectives"], "right"),
            "s": "right",
            "": "left",
        },
        title=f"{found['dataset']}: {found['metric']} on {rows}",
    )
    for one in [*(trials[name] for name in found["best"]), *rest][:SHOWN]:
        table.add_row(
            one["run"],
            *(_text(one["values"][key]) for key in keys),
            *(f"{one[name]:.4g}" for name in found["objectives"]),
            f"{one['seconds']:.0f}",
            "best" if one["run"] in found["best"] else "",
        )
    states = [one["state"] for one in trials.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "pruned", "failed"))
    frame.show(
        table,
        f"Runs: {counts}. Numbers: {folder / 'sweep.json'}",
        f"Next: stillroom distill {shlex.quote(str(folder / 'best.yaml'))} -o RUN",
    )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
