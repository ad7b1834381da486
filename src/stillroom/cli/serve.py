"""`stillroom serve`: a model as an HTTP server."""

from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom serve runs/student",
    "stillroom serve runs/student/deploy --form onnx-int8 --threads 2 --port 9000",
    "stillroom serve runs/student --max-batch 64 --max-wait-ms 5 --max-text-chars 5000",
)

LIMITS = "Limits"


def _limit(help_text: str) -> Any:
    return typer.Option(metavar="N", min=1, help=help_text, rich_help_panel=LIMITS)


def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run (its export), an export, a model folder or hub id."),
    ],
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; others than this machine are warned of.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 finds a free one.")] = 8000,
    form: Annotated[
        str | None,
        typer.Option(metavar="F", help="Of the export: onnx, onnx-int8, ... Default: the fastest."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads that the model computes with.")
    ] = None,
    max_batch: Annotated[int, _limit("Texts that are computed at once.")] = 32,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            min=0,
            max=10_000,
            help="How long a text waits for others to share its batch.",
            rich_help_panel=LIMITS,
        ),
    ] = 2.0,
    max_queue: Annotated[int, _limit("Texts that may wait; beyond them the answer is 503.")] = 1024,
    max_texts: Annotated[int, _limit("Texts, or pairs, in one request.")] = 256,
    max_text_chars: Annotated[int, _limit("Characters in one text.")] = 100_000,
    max_body_bytes: Annotated[int, _limit("Bytes in one body, counted before it is parsed.")] = 4_000_000,
) -> None:
    """Serve a model over HTTP: POST /predict takes {"texts": [...]} or {"pairs": [[..., ...]]}.

    Requests that come at the same time are computed together. GET /health, /metrics (Prometheus) and
    /docs (OpenAPI) tell the rest. Needs the extra serve. There is no password, so it listens to this
    machine alone.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.deploy.serve import Limits, serve

        limits = Limits(max_batch, max_wait_ms, max_queue, max_texts, max_text_chars, max_body_bytes)
        serve(model, host=host, port=port, form=form, threads=threads, limits=limits, console=console)
        return {}

    frame.execute(work, as_json=False, stopped=lambda: "The server has stopped.")
