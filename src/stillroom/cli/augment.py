"""`stillroom augment`: rows with words replaced, to look at or to train on."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom augment runs/cilda --rows 5",
    "stillroom augment runs/kd --generator runs/generator --split validation --json",
    "stillroom augment --teacher runs/teacher --student runs/a --generator runs/g --dataset glue/sst2",
    "stillroom augment --method tinybert --generator runs/generator --dataset glue/sst2 --rows 5",
    "stillroom augment --method tinybert --generator bert-base-uncased --vectors glove.6B.300d.txt "
    "--dataset glue/sst2 -o sst2.augmented.parquet",
)
WITHOUT = "Method generator without a run"
TINYBERT = "Method tinybert"
_ROWS = 8


def augment(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Method generator: a finished run; it names everything else."),
    ] = None,
    method: Annotated[
        Literal["generator", "tinybert"],
        typer.Option(
            help="generator: a model that learns beside the student rewrites rows in each step of a run; "
            "this shows them. tinybert: words are replaced ahead of training; -o writes for --augmented."
        ),
    ] = "generator",
    generator: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A masked language model, in place of the run's own."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many rows to show. Default: 8.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Where they come from.")] = "train",
    draw: Annotated[int, typer.Option(min=0, metavar="N", help="Another number draws other words.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Augment every training row into this Parquet file. A call that was killed goes on when "
            "it is made again.",
            rich_help_panel=TINYBERT,
        ),
    ] = None,
    copies: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Draws for each text of a row. Default: 10 to 30 by GLUE task as TinyBERT, else 20; 3 to "
            "show.",
            rich_help_panel=TINYBERT,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Words that one is drawn from for each word. Default: 15.",
            show_default=False,
            rich_help_panel=TINYBERT,
        ),
    ] = None,
    probability: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Of replacing each word. Default: 0.4.",
            show_default=False,
            rich_help_panel=TINYBERT,
        ),
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Word vectors in GloVe's text format, for words that are several tokens to the generator.",
            rich_help_panel=TINYBERT,
        ),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table with lemma and synonyms (lists), such as WordNet's, for words that neither knows.",
            rich_help_panel=TINYBERT,
        ),
    ] = None,
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
    """Replace words of rows: show it, or write augmented rows to a file to train on.

    Method generator shows rows as a generator rewrites them: text, mask, new words, and what teacher and
    student say; without a teacher, the student alone. A run's generator is that of its newest checkpoint:
    where it learnt to make student and teacher differ, the rows show how. Method tinybert draws words from
    a masked language model, word vectors or synonyms.
    """
    of_tinybert = {
        "copies": copies,
        "candidates": candidates,
        "probability": probability,
        "vectors": vectors,
        "synonyms": synonyms,
    }
    replacement = {name: value for name, value in of_tinybert.items() if value is not None}

    def by_generator(console: Console) -> dict[str, Any]:
        from stillroom.run.augment import augment, recipe_of

        wrong = [*([] if output is None else ["--output"]), *(f"--{name}" for name in replacement)]
        if wrong:
            raise WrongInput(
                f"Method generator reads no {', '.join(wrong)}: add --method tinybert, or leave that out."
            )
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
        return augment(recipe, folder=own, split=split, rows=rows or _ROWS, draw=draw, console=console)

    def by_words(console: Console) -> dict[str, Any]:
        from stillroom.recipe import validate
        from stillroom.run.replace_words import Replacement, show, write

        beside = {"RUN": run, "--teacher": teacher, "--student": student}
        wrong = [name for name, value in beside.items() if value is not None]
        if wrong:
            raise WrongInput(
                f"Method tinybert reads rows and no student: leave out {', '.join(wrong)}, and name the "
                "rows with --dataset."
            )
        data = frame.dataset_settings(dataset, data_dir, given)
        if dataset is None:
            raise WrongInput("Expected rows to augment: give --dataset.")
        how = validate(Replacement, {"generator": generator, "draw": draw, **replacement})
        if output is None:
            return show(data, how, split=split, rows=rows or _ROWS, console=console)
        if split != "train":
            raise WrongInput(f"Training rows are augmented: leave out --split {split}.")
        if rows is not None:
            raise WrongInput(
                f"Every training row is augmented: leave out --rows {rows}, or --output to look."
            )
        return write(data, how, output, console=console)

    found = frame.execute(
        by_words if method == "tinybert" else by_generator,
        as_json=as_json,
        stopped=lambda: "Stopped." if output is None else "Stopped. The same command goes on from here.",
    )
    if as_json:
        return
    if output is not None:
        words = ", ".join(f"{count:,} by {who}" for who, count in found["words"].items())
        frame.show(
            f"{output}: {found['augmented']:,} augmented rows of {found['rows']:,}. "
            f"Words: {words or 'none'}.",
            f"Next: stillroom distill --augmented {shlex.quote(str(output))} ...",
        )
    elif method == "tinybert":
        _show_copies(found)
    else:
        _show(found)


def _show_copies(found: dict[str, Any]) -> None:
    columns = {"row": "right", "text": "left"}
    table = frame.table(
        columns, title=f"{found['dataset']} {found['split']}: rows, and augmented rows of each"
    )
    for row in found["rows"]:
        table.add_row(str(row["row"]), escape(row["original"]))
        for text in row["augmented"]:
            table.add_row("", escape(text))
    frame.show(table)


def _show(found: dict[str, Any]) -> None:
    writer = found["generator"]
    models = [who for who in ("teacher", "student") if who in found["rows"][0]]
    table = frame.table(
        {"row": "right", **dict.fromkeys(("masked", "words", *models), "left")},
        title=f"{found['dataset']} {found['split']}, {writer['name']} after {writer['step']} steps",
    )
    for row in found["rows"]:
        words = ", ".join(f"{word['old']} -> {word['new']}" for word in row["words"]) or "-"
        said = (_said(row[who], found["kind"]) for who in models)
        table.add_row(str(row["row"]), escape(row["masked"]), escape(words), *said)
    frame.show(table)


def _said(model: dict[str, dict[str, float]], kind: str) -> str:
    return " -> ".join(_short(model[text], kind) for text in ("original", "augmented"))


def _short(values: dict[str, float], kind: str) -> str:
    if kind == "classification":
        label = max(values, key=lambda name: values[name])
        values = {label: values[label]}
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())
