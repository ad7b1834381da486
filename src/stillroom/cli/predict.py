"""`stillroom predict`: what a model says of texts."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import RunFailed, WrongInput

EXAMPLES = frame.examples(
    "stillroom predict runs/student reviews.csv -o predicted.csv",
    "stillroom predict runs/student pairs.parquet -o predicted.parquet --text question --text answer",
    "stillroom predict runs/student/deploy lines.txt --form onnx-int8",
)


def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run (its export), an export, a model folder or hub id."),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="txt, CSV, TSV, JSONL or Parquet. Default: lines of standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="jsonl, csv, tsv or parquet by its name. Default: JSONL on standard output.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(metavar="F", help="Of the export: onnx, onnx-int8, ... Default: the fastest."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads that the model computes with.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most texts that are computed at once.")
    ] = 32,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COL",
            help="The text column; twice for pairs. Default: those trained on, else those of a usual name.",
        ),
    ] = None,
    input_format: Annotated[
        Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None,
        typer.Option("--format", help="Of the input, where its name does not say it."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With -o: print the summary as one JSON object.")
    ] = False,
) -> None:
    """Predict texts, or pairs of texts: every row with its label and probabilities, or its score.

    Rows keep their order and their columns, and get predicted and probability_LABEL. Files of any size
    are read in pieces. Empty lines of txt are empty texts. Texts longer than the model reads are cut.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom import durable
        from stillroom.deploy.predict import predict

        if as_json and output is None:
            raise WrongInput("--json prints a summary, but the rows go to standard output: give -o OUT.")
        if file is None and input_format == "parquet":
            raise WrongInput("Parquet is read from its end: give a FILE instead of standard input.")
        try:
            return predict(
                model,
                file or sys.stdin.buffer,
                output or rows,
                form=form,
                threads=threads,
                batch_size=batch_size,
                text=text,
                input_format=input_format,
                console=console,
            )
        except OSError as error:
            closed = isinstance(error, BrokenPipeError)
            if output is not None or not (closed or durable.is_full(error)):
                raise
            # What is still in the buffer goes nowhere, without a second error at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), rows.fileno())
            how = "was closed" if closed else f"could not be written ({error.strerror})"
            raise RunFailed(f"Standard output {how} before all rows were written.") from None

    # Standard output is turned away from what the work prints; the rows still go there.
    with os.fdopen(os.dup(1), "wb") as rows:
        found = frame.execute(work, as_json=as_json)
    cut = f"; {found['cut']:,} of them cut to {found['max_length']} tokens" if found["cut"] else ""
    read = f"{found['rows']:,} rows ({' and '.join(found['text'])})"
    said = f"{read} with {found['form']}, {found['rows_per_second']:.0f} rows/s{cut}"
    if output is None:
        typer.echo(said, err=True)
    elif not as_json:
        frame.show(f"{output}: {said}")
