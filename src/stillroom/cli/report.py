"""`stillroom report`: write the page of a run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom report runs/student",
    "stillroom report runs/comparison",
    "stillroom report runs/student -o report.html --json",
)


def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|COMPARE", help="The folder of a finished run, or of a comparison."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: report.html in the run folder."),
    ] = None,
    as_json: frame.AsJson = False,
) -> None:
    """Write a run's page: one HTML file that needs no network. Exports made since are on it too.

    The model card in the run's student folder is written again as well.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.report.page import write

        with console.status("Writing the page"):
            path = write(run, output)
        return {"report": str(path), "bytes": path.stat().st_size}

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        frame.show(f"Report: {found['report']} ({found['bytes'] / 1e6:.2f} MB)")
