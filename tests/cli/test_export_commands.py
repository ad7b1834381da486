"""`stillroom export` and `stillroom bench`: what they print, write and refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from workspace import Workspace

from stillroom.cli import app, frame
from stillroom.deploy import latency


def run(*arguments: str | Path, code: int = 0) -> Any:
    """Return a command's outcome, which has to end with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_a_run_is_exported_into_its_folder_and_measured(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run as far as an export sees it: the student, and the recipe that names the data.
    folder = tmp_path / "run"
    shutil.copytree(workspace.teacher, folder / "student")
    shutil.copy(workspace.teacher / "recipe.yaml", folder)
    result = run("export", folder, "--max-drop", "100")
    text = result.stdout
    assert "onnx-int8" in text and "model as it came" in text and str(folder / "deploy") in text
    manifest = json.loads((folder / "deploy" / "manifest.json").read_text())
    # The data is that of the run's recipe.
    assert manifest["dataset"]["name"] == str(workspace.data)
    monkeypatch.setattr(latency, "TURNS", 2)
    cells = ("--threads", "1", "--batch", "2", "--length", "8")
    text = run("bench", workspace.teacher, folder, folder / "deploy", *cells).stdout
    assert text.count("onnx-int8") == 2 and "1.00x" in text and "rows/s" in text
    found = json.loads(run("bench", folder / "deploy", *cells, "--json").stdout)
    assert [model["form"] for model in found["models"]] == ["onnx", "onnx-int8"]
    again = run("export", folder, code=2)
    assert "new or empty" in again.stderr


def test_options_change_the_data_of_the_run(workspace: Workspace, tmp_path: Path) -> None:
    """They asked for the name of the data, which the run's recipe says."""
    folder = tmp_path / "run"
    shutil.copytree(workspace.teacher, folder / "student")
    shutil.copy(workspace.teacher / "recipe.yaml", folder)
    changed = frame.dataset_settings(None, None, ["dataset.max_length=16"], run=folder)
    assert (changed.name, changed.max_length) == (str(workspace.data), 16)
    named = frame.dataset_settings("builtin/verdicts", None, ["dataset.max_length=16"], run=folder)
    assert (named.name, named.max_length) == ("builtin/verdicts", 16)
    assert frame.dataset_settings(None, None, None, run=folder) is None
    run("export", folder, "--format", "onnx", "--set", "dataset.max_length=16")
    manifest = json.loads((folder / "deploy" / "manifest.json").read_text())
    assert manifest["max_length"] == 16 and manifest["text"] == ["text"]
    other = run("export", workspace.encoder, "-o", tmp_path / "o", "--set", "dataset.max_length=16", code=2)
    assert "dataset.name" in other.stderr


def test_wrong_input_ends_with_code_2(workspace: Workspace, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert (
        "Did you mean openvino"
        in run("export", workspace.teacher, *out, "--format", "openvin", code=2).stderr
    )
    assert (
        "whole numbers" in run("export", workspace.teacher, *out, "--fixed-lengths", "8;16", code=2).stderr
    )
    assert "no run folder" in run("export", workspace.teacher, code=2).stderr
    assert (
        "Only keys of dataset"
        in run("export", workspace.teacher, *out, "--set", "training.seed=1", code=2).stderr
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    for command in (("bench", broken), ("bench", tmp_path)):
        result = run(*command, "--threads", "1", "--json", code=2)
        assert json.loads(result.stdout)["error"]
    assert "whole numbers" in run("bench", workspace.teacher, "--threads", "two", code=2).stderr
    for named in (("--dataset", "builtin/verdicts"), ("--set", "dataset.name=builtin/verdicts")):
        assert "not both" in run("bench", workspace.teacher, "--length", "8", *named, code=2).stderr
    assert not (tmp_path / "out").exists()
