"""Distilling soft labels of a file: without a teacher, beside one, and what is refused."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app
from stillroom.evaluation.predictions import load
from tiny import make_generator, make_tokenizer


def call(*command: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == code, result.stderr
    return result


def write(folder: Path, workspace: Workspace, *, unlabelled: int = 0, swapped: bool = False) -> Path:
    """Write the toy data with probabilities as lists; the first rows lose their label."""
    folder.mkdir()
    shutil.copy(workspace.data / "validation.csv", folder)
    with (workspace.data / "train.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (folder / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "soft"])
        for i, row in enumerate(rows):
            good = (row["label"] == "positive") != swapped
            soft = [0.1, 0.9] if good else [0.8, 0.2]
            writer.writerow([row["text"], "" if i < unlabelled else row["label"], json.dumps(soft)])
    return folder


def distil(data: Path, output: Path, *options: Any, code: int = 0) -> Any:
    command = ("distill", "--dataset", data, "--set", "dataset.soft_labels=soft", "-o", output, *FAST)
    return call(*command, "--set", "training.learning_rate=0.005", *options, code=code)


def test_a_checkpoint_learns_from_a_file_alone(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path / "data", workspace, unlabelled=200)
    options = ("--student", workspace.encoder, "--method", "kd", "--set", "method.soft_weight=1")
    options += ("--set", "training.epochs=6")
    text = distil(data, tmp_path / "run", *options).stdout
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["student"]["metrics"]["accuracy"] > 0.9
    assert "teacher" not in found and found["kept"] is None
    assert found["train"]["teacher"]["given"] == ["logits"]
    assert set(load(tmp_path / "run" / "predictions.parquet").logits) == {"student"}
    # Soft labels of 0.9 and 0.8 are what the student comes to say, and not certainty.
    logits = load(tmp_path / "run" / "predictions.parquet").logits["student"]
    most = 1 / (1 + np.exp(-np.abs(logits[:, 1] - logits[:, 0])))
    assert 0.7 < np.median(most) < 0.97
    assert "student" in text and "report.html" in text
    assert "taught by soft labels of a file" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "from soft labels of a file, by the method kd" in card
    assert "; stillroom export " in text


def test_augmented_rows_of_a_run_without_a_teacher_show_the_student_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", workspace)
    options = ("--student", workspace.encoder, "--method", "kd", "--set", "training.epochs=1")
    distil(data, tmp_path / "run", *options)
    make_generator().save(tmp_path / "generator")
    command = ("augment", tmp_path / "run", "--generator", tmp_path / "generator", "--rows", 3)
    assert "teacher" not in call(*command).stdout
    rows = json.loads(call(*command, "--json").stdout)["rows"]
    assert len(rows) == 3 and all("student" in row and "teacher" not in row for row in rows)
    other = make_generator()
    other.tokenizer = make_tokenizer(types=True, extra_words=("zebra",))
    other.model.resize_token_embeddings(len(other.tokenizer))
    other.save(tmp_path / "other")
    said = " ".join(call(*command[:2], "--generator", tmp_path / "other", code=2).stderr.split())
    assert "'zebra'" in said and "trained with the student's tokenizer" in said and "teacher" not in said


def test_beside_a_teacher_they_stand_in_for_its_logits(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path / "data", workspace)
    options = (
        "--teacher",
        workspace.teacher,
        "--student",
        "layers:2,4",
        "--method",
        "pkd",
        "--set",
        "training.epochs=1",
    )
    checked = json.loads(distil(data, tmp_path / "run", *options, "--dry-run", "--json").stdout)
    assert checked["soft_labels"] == {"rows": 240, "unlabelled": 0, "agreement": 1.0}
    found = json.loads(distil(data, tmp_path / "run", *options, "--control", "--json").stdout)
    assert "teacher" in found and "control" in found
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "pkd"), "soft labels from a file have none"),
        (("--method", "none"), "control (none, --control) learns from labels alone"),
        (("--method", "kd", "--control"), "control (none, --control) learns from labels alone"),
        (("--method", "kd", "--student", "4x312"), "takes architecture and tokenizer from a teacher"),
    ],
)
def test_what_a_file_cannot_teach(
    workspace: Workspace, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    data = write(tmp_path / "data", workspace, unlabelled=100)
    student = () if "--student" in options else ("--student", workspace.encoder)
    said = distil(data, tmp_path / "run", *options, *student, "--dry-run", code=2).stderr
    assert message in " ".join(said.split())


def test_another_order_of_the_labels_is_found(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path / "data", workspace, swapped=True)
    options = ("--student", workspace.encoder, "--method", "kd", "--dry-run")
    said = " ".join(distil(data, tmp_path / "run", *options, code=2).stderr.split())
    assert "another order" in said and "[positive, negative]" in said


def test_something_has_to_teach(workspace: Workspace, tmp_path: Path) -> None:
    said = call("distill", "--dataset", workspace.data, "-o", tmp_path / "run", code=2).stderr
    assert "dataset.soft_labels" in said and "--teacher" in said
