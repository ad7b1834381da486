"""`stillroom report`: write the page of a run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom report runs/student",
    "stillroom report runs/pretrained",
    "stillroom report runs/comparison",
    "stillroom report runs/student -o report.html --json",
    "stillroom report runs/bert-emd --flow flow.svg",
)


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|COMPARE",
            help="The folder of a finished run of distill or pretrain, or of a comparison.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: report.html in the run folder."),
    ] = None,
    flow: Annotated[
        Path | None,
        typer.Option(
            "--flow",
            metavar="FILE",
            help="Write the layer flow of a bert-emd run as an SVG file, and no page.",
        ),
    ] = None,
    as_json: frame.AsJson = False,
) -> None:
    """Write a run's page: one HTML file that needs no network. Exports made since are on it too.

    The model card in the run's student folder is written again as well.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.report import flow as layer_flow
        from stillroom.report.page import write

        if flow is not None:
            layer_flow.write([run], flow)
            return {"flow": str(flow), "bytes": flow.stat().st_size}
        with console.status("Writing the page"):
            path = write(run, output)
        return {"report": str(path), "bytes": path.stat().st_size}

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        what, where = next(iter(found.items()))
        frame.show(f"{what.capitalize()}: {where} ({found['bytes'] / 1e6:.2f} MB)")
