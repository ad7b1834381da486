"""The command line: one file per command."""

import os
from typing import Annotated

import typer

from stillroom.cli import (
    augment,
    bench,
    cache,
    compare,
    datasets,
    distill,
    evaluate,
    export,
    finetune,
    frame,
    generator,
    methods,
    predict,
    pretrain,
    report,
    serve,
    sweep,
)

app = typer.Typer(
    name="stillroom",
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=frame.examples(
        "stillroom finetune --model minilm-l6 --dataset builtin/verdicts -o runs/teacher",
        "stillroom distill --teacher runs/teacher --dataset builtin/verdicts -o runs/student",
        "stillroom evaluate runs/teacher runs/student --dataset builtin/verdicts",
        "stillroom export runs/student",
    ),
)
app.command(epilog=finetune.EXAMPLES)(finetune.finetune)
app.command(epilog=distill.EXAMPLES)(distill.distill)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=predict.EXAMPLES)(predict.predict)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.command(epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.command(epilog=generator.EXAMPLES)(generator.generator)
app.command(epilog=augment.EXAMPLES)(augment.augment)
app.command(epilog=report.EXAMPLES)(report.report)
app.add_typer(cache.app, name="cache", epilog=cache.EXAMPLES)
app.command(epilog=methods.EXAMPLES)(methods.methods)
app.command(epilog=datasets.EXAMPLES)(datasets.datasets)


def _version(wanted: bool) -> None:
    if wanted:
        from stillroom import __version__

        typer.echo(f"stillroom {__version__}")
        raise typer.Exit


@app.callback()
def _stillroom(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help=f"Show the traceback of errors, as {frame.DEBUG}=1 does."),
    ] = False,
) -> None:
    """Distil a fine-tuned encoder into a small, fast one, and prove what was kept.

    Results go to standard output, all else to standard error. Exit codes: 0 done, 1 failed, 2 wrong
    input, 130 stopped from the keyboard.
    """
    if debug:
        os.environ[frame.DEBUG] = "1"


def main() -> None:
    """Run the command line; the entry point `stillroom`."""
    with frame.standard_streams():
        app(prog_name="stillroom")
