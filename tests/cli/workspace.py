"""What the commands are tried on: tiny CSV files and a teacher."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import make_rows, make_task

FAST = ("--set", "training.batch_size=16", "--set", "training.precision=float32")


@dataclass(frozen=True)
class Workspace:
    """Folders, and what `finetune --json` printed when it made the teacher."""

    data: Path
    encoder: Path
    teacher: Path
    finetuned: dict[str, Any]


def write_data(folder: Path) -> Path:
    """Write train.csv (240 rows) and validation.csv (100), which share no text."""
    folder.mkdir(parents=True)
    task = make_task()
    rows = make_rows(task, 600)
    named = dict(zip(rows.texts[0], (task.labels[label] for label in rows.labels), strict=True))
    lines = list(named.items())
    for name, part in (("train", lines[:240]), ("validation", lines[240:340])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *part])
    return folder
