"""`stillroom bench`: how fast and how large models are, side by side."""

from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom bench runs/teacher runs/student runs/student/deploy",
    "stillroom bench runs/teacher runs/student/deploy --threads 2 --batch 1 --length 128 --json",
    "stillroom bench runs/teacher runs/student/deploy --dataset builtin/verdicts",
)


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Model folders, hub ids, run folders (their student), exports."
        ),
    ],
    threads: Annotated[
        str, typer.Option(metavar="N,N", help="Threads that each model computes with.")
    ] = "1,2",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Rows that are computed at once.")] = "1,8,32",
    length: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Tokens in a row, drawn at random. Default: 16,32,128, or what the models read.",
        ),
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    given: frame.DataOverrides = None,
    as_json: frame.AsJson = False,
) -> None:
    """Measure milliseconds, rows per second, memory and size of models, as ratios to the first.

    Each model runs in a process of its own, in every number of threads, batch size and length. The models
    take turns. Loading and tokenising are not timed. --dataset measures on rows of a validation split,
    cut to dataset.max_length (128), instead of random tokens.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.deploy.latency import bench

        data = frame.dataset_settings(dataset, data_dir, given)
        if data is not None and length is not None:
            raise WrongInput(
                "Rows of a data set have their own lengths: give --length or --dataset, not both."
            )
        return bench(
            models,
            threads=frame.numbers("--threads", threads),
            batches=frame.numbers("--batch", batch),
            lengths=None if length is None else frame.numbers("--length", length),
            dataset=data,
            console=console,
        )

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    sizes = frame.table(
        {
            "model": "left",
            "form": "left",
            "MB on disk": "right",
            "smaller": "right",
            "peak MB in use": "right",
        }
    )
    for model in found["models"]:
        sizes.add_row(
            model["model"],
            model["form"],
            f"{model['bytes'] / 1e6:.1f}",
            f"{model['smaller']:.2f}x",
            f"{max(model['peak_bytes'].values()) / 1e6:.0f}",
        )
    columns = ("threads", "batch", "length", "model", "form", "median ms", "p95 ms", "rows/s", "faster")
    times = frame.table({name: "left" if name in ("model", "form") else "right" for name in columns})
    for row in found["times"]:
        times.add_row(
            str(row["threads"]),
            str(row["batch"]),
            "data" if row["length"] is None else str(row["length"]),
            row["model"],
            row["form"],
            f"{row['median_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            f"{row['rows_per_second']:.1f}",
            f"{row['faster']:.2f}x",
        )
    frame.show(sizes, times)
