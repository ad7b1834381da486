"""`stillroom compare`: many methods and students of one teacher, side by side."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom compare --teacher runs/teacher --dataset glue/mrpc --methods none,kd,lrc-bert "
    "--students 4x312,layers:2,4,6 --seeds 3 -o runs/mrpc",
    "stillroom compare --teacher runs/teacher --dataset glue/mrpc --methods none,lrc-bert:perturbation=off "
    "--set-for none:training.learning_rate=3e-4 --workers 2 -o runs/mrpc",
    "stillroom compare --teacher runs/teacher --dataset glue/mrpc --methods "
    "none,mate-kd:generator=runs/g,cilda:generator=runs/g -o runs/mrpc",
    "stillroom compare COMPARE.yaml -o runs/mrpc",
)
WHAT = "What to compare"


def compare(
    comparison: Annotated[
        Path | None,
        typer.Argument(
            metavar="COMPARE.yaml", help="A comparison; options given beside it take precedence."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Fine-tuned encoder: a folder or a hub id.", rich_help_panel=WHAT),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Of `stillroom methods`, each with options of its own as NAME:OPTION=VALUE:OPTION=VALUE; "
            "may be repeated. `none` is the control that the others are compared with.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    students: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S,...",
            help="Sizes such as 4x312 (the default), layers:2,4,6 of the teacher, or checkpoints; may be "
            "repeated.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="How students start: random, teacher (its layers, copied), pca (its layers, folded into "
            "fewer dimensions), or a checkpoint. Default: pca for a size that fits into the teacher, "
            "teacher for layers.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Seeds 0 to N - 1. Default: 3.", rich_help_panel=WHAT),
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    augmented: frame.Augmented = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="New or empty, or the same comparison: what is done is skipped.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    given: frame.Overrides = None,
    for_one: Annotated[
        list[str] | None,
        typer.Option(
            "--set-for",
            metavar="NAME:KEY=VALUE",
            help="Set a key for one method alone (named as in --methods), such as "
            "kd:training.learning_rate=3e-4 or kd:init=pca; may be repeated.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Processes of one thread each; 1 trains here with all threads, 0 compares what is done.",
            rich_help_panel=frame.RUN,
        ),
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database that hands out the runs to machines that share DIR. Default: a file in DIR.",
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    keep_students: Annotated[
        bool,
        typer.Option(
            "--keep-students/--no-keep-students",
            help="Keep each student and not only its figures and predictions.",
            rich_help_panel=frame.RUN,
        ),
    ] = False,
    as_json: frame.AsJson = False,
) -> None:
    """Distil by every method into every student from every seed, and compare them.

    A comparison that was stopped or killed goes on when the same command is run again. A difference is
    metric minus the control's, with a 95 % interval from a bootstrap over rows and seeds.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.run.compare import compare

        if output is None:
            raise WrongInput("Expected a folder for the comparison: give -o DIR.")
        return compare(
            read(
                comparison,
                frame.overrides(given, data_dir=data_dir, augmented=augmented),
                for_one or [],
                teacher=teacher,
                dataset=dataset,
                methods=split_methods(methods),
                students=split_students(students),
                init=init,
                seeds=seeds,
            ),
            output,
            workers=workers,
            storage=storage,
            keep_students=keep_students,
            console=console,
        )

    found = frame.execute(
        work, as_json=as_json, stopped=lambda: "Stopped. The same command goes on from here."
    )
    if not as_json:
        _show(found, output or Path())


def read(path: Path | None, overrides: list[str], for_one: list[str], **given: Any) -> Any:
    """Return the comparison of a file and options."""
    from stillroom.recipe import Comparison, read_yaml, set_value, validate

    values = read_yaml(path) if path is not None else {}
    values |= {key: value for key, value in given.items() if value is not None}
    for override in overrides:
        if isinstance(values.get("teacher"), str):
            values["teacher"] = {"name": values["teacher"]}
        set_value(values, override)
    if for_one:
        # Validated once for the long form of every method.
        values["methods"] = {
            name: method.model_dump(exclude_unset=True)
            for name, method in validate(Comparison, values).methods.items()
        }
    for text in for_one:
        match = re.fullmatch(r"(.+?):((?:(?:training|method)\.|init=).+)", text)
        if match is None:
            raise WrongInput(
                "Expected `--set-for NAME:KEY=VALUE`, such as kd:training.learning_rate=3e-4, found "
                f"{text!r}."
            )
        if match[1] not in values["methods"]:
            raise WrongInput(
                f"--set-for {text}: {match[1]} is not compared. There are: {', '.join(values['methods'])}."
            )
        set_value(values["methods"][match[1]], match[2])
    return validate(Comparison, values)


def split_methods(given: list[str] | None) -> list[str] | None:
    """Return the methods that `--methods` names; a comma inside brackets belongs to a value.

    Example:
        >>> split_methods(["none,codir:layers=[1,2]:k=4", "kd"])
        ['none', 'codir:layers=[1,2]:k=4', 'kd']
    """
    return None if not given else [part for text in given for part in re.split(r",(?![^\[]*\])", text)]


def split_students(given: list[str] | None) -> list[str] | None:
    """Return the students that `--students` names; a number alone belongs to `layers:`.

    Example:
        >>> split_students(["4x312,layers:2,4,6,2x128"])
        ['4x312', 'layers:2,4,6', '2x128']
    """
    return None if not given else [part for text in given for part in re.split(r",(?!\d+(?:,|$))", text)]


def _show(found: dict[str, Any], folder: Path) -> None:
    names = list(found["teacher"]["metrics"])
    for student, entry in found["students"].items():
        control = entry["control"]
        columns = {"method": "left"}
        for name in names:
            columns[name] = "right"
        if control is not None:
            columns[f"{names[0]} difference"] = "right"
        table = frame.table(
            {**columns, "kept": "right", "seeds": "right", "s": "right", "examples/s": "right"},
            title=f"{student} on {found['dataset']}: {entry['parameters'] / 1e6:.1f} M parameters, "
            f"{entry['ms_per_example']:.2f} ms/example",
        )
        teacher = [f"{value:.4f}" for value in found["teacher"]["metrics"].values()]
        table.add_row("teacher", *teacher, *([""] if control is not None else []), "100.0%", "", "", "")
        for method, one in entry["methods"].items():
            spread = one["standard_deviation"]
            cells = [
                f"{value:.4f}" + (f" ± {spread[name]:.4f}" if spread else "")
                for name, value in one["mean"].items()
            ]
            if control is not None:
                against = one.get("against_control")
                cells.append("control" if method == control else _difference(against, names[0]))
            kept = "-" if one["kept"] is None else f"{one['kept']:.1%}"
            count, speed = str(len(one["seeds"])), f"{one['examples_per_second']:.1f}"
            table.add_row(method, *cells, kept, count, f"{one['seconds']:.0f}", speed)
        frame.show(table)
        if found["teacher"]["out_of_domain"]:
            _show_out_of_domain(student, entry["methods"], found["teacher"]["out_of_domain"])
    frame.show(f"Numbers: {folder / 'compare.json'}")


def _show_out_of_domain(
    student: str, methods: dict[str, Any], teacher: dict[str, dict[str, float]]
) -> None:
    heads = [(name, metric) for name, metrics in teacher.items() for metric in metrics]
    columns = {"method": "left"} | {f"{name} {metric}": "right" for name, metric in heads}
    table = frame.table(columns, title=f"{student} out of domain")
    table.add_row("teacher", *(f"{teacher[name][metric]:.4f}" for name, metric in heads))
    for method, one in methods.items():
        cells = []
        for name, metric in heads:
            other = one["out_of_domain"][name]
            spread = other["standard_deviation"]
            cells.append(f"{other['mean'][metric]:.4f}" + (f" ± {spread[metric]:.4f}" if spread else ""))
        table.add_row(method, *cells)
    frame.show(table)


def _difference(against: dict[str, Any] | None, name: str) -> str:
    if against is None:
        return "-"
    found = against[name]
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
