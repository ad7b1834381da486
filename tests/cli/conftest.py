"""A tiny encoder, tiny CSV files, and a teacher that was fine-tuned by the command line itself."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cli import app
from tiny import make_rows, make_task, save_encoder

FAST = ("--set", "training.batch_size=16", "--set", "training.precision=float32")


@dataclass(frozen=True)
class Workspace:
    """What the commands are tried on."""

    data: Path
    encoder: Path
    teacher: Path
    finetuned: dict[str, Any]
    """What `finetune --json` printed."""


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])


def write_data(folder: Path) -> Path:
    """Write train.csv and validation.csv, which share no text."""
    folder.mkdir()
    task = make_task()
    rows = make_rows(task, 600)
    named = {text: task.labels[label] for text, label in zip(rows.texts[0], rows.labels, strict=True)}
    lines = list(named.items())
    write_csv(folder / "train.csv", lines[:240])
    write_csv(folder / "validation.csv", lines[240:340])
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("cli")
    data = write_data(root / "data")
    encoder = save_encoder(root / "encoder", layers=4, width=24)
    teacher = root / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        command = ["finetune", "--model", str(encoder), "--dataset", str(data), "-o", str(teacher), *FAST]
        rates = ("--set", "training.learning_rate=0.005", "--set", "training.epochs=4")
        result = CliRunner().invoke(app, [*command, *rates, "--json"])
    assert result.exit_code == 0, result.stderr
    return Workspace(data, encoder, teacher, json.loads(result.stdout))
