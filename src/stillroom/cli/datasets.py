"""`stillroom datasets`: what there is to train on by name."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples("stillroom datasets", "stillroom datasets --data-dir data --json")


def datasets(data_dir: frame.DataDir = None, as_json: frame.AsJson = False) -> None:
    """List the data sets that have a name; files of your own are named by their path."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.data import sources

        return {"datasets": [asdict(known) for known in sources.describe(data_dir)]}

    found = frame.execute(work, as_json=as_json)
    if as_json:
        return
    columns = ("name", "labels", "columns", "metrics", "source", "here")
    table = frame.table(dict.fromkeys(columns, "left"))
    for known in found["datasets"]:
        table.add_row(
            known["name"],
            " ".join(known["labels"]) or known["kind"],
            " ".join(known["columns"]),
            " ".join(known["metrics"]),
            known["source"],
            "yes" if known["here"] else "no",
        )
    frame.show(
        table,
        "A CSV, TSV, JSONL or Parquet file of your own, or a folder with one for each split, is named by "
        "its path.",
    )
