"""A run that is killed with SIGKILL at any moment goes on to the same bytes."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app

STUDENT = "student/model.safetensors"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that does the same with a real teacher and ten kills."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("kill_resume", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_runs_end_in_the_same_student_and_control(
    workspace: Workspace, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = ["--dataset", str(workspace.data)]
    command = script.distillation(workspace.teacher, data, "--student", "layers:2,4")
    found = script.compare(command, tmp_path, kills=2, seed=0)
    assert len(found["killed"]) == 2
    for run in found["killed"]:
        assert run["sha256"] == found["sha256"], run
    for folder in tmp_path.glob("killed-*/"):
        left = [path for path in folder.rglob(".aside-*")]
        assert not left, f"a killed process left {left}"


def test_a_damaged_checkpoint_is_gone_back_behind(workspace: Workspace, tmp_path: Path) -> None:
    """The newest checkpoint is cut short: the run says so and ends in the same bytes all the same."""
    run = tmp_path / "run"
    command = ["distill", "--teacher", workspace.teacher, "--dataset", workspace.data, "-o", run, *FAST]
    more = ["--student", "layers:2,4", "--set", "training.epochs=1", "--set", "training.checkpoint_every=4"]
    assert CliRunner().invoke(app, [str(part) for part in (*command, *more)]).exit_code == 0
    expected = (run / STUDENT).read_bytes()
    shutil.rmtree(run / "student")
    (run / "metrics.json").unlink()
    for place in (run, run / "control"):
        # What a process that is killed while it saves a student leaves behind.
        (place / ".aside-x").mkdir(parents=True)
    newest = max((run / "checkpoints").iterdir())
    with (newest / "student.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    result = CliRunner().invoke(app, ["distill", "--resume", str(run)])
    assert result.exit_code == 0
    assert newest.name in result.stderr and "damaged" in result.stderr
    assert (run / STUDENT).read_bytes() == expected
    assert (run / "metrics.json").exists()
    assert not list(run.rglob(".aside-*"))


def test_a_run_that_was_killed_before_it_began_can_start_again(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Killed while it wrote its recipe, a run leaves a lock and half a file: that is still empty."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".aside-x").write_text("teacher:")
    command = ["distill", "--teacher", workspace.teacher, "--dataset", workspace.data, "-o", run, *FAST]
    more = ["--student", "layers:4", "--method", "none", "--set", "training.epochs=0.2"]
    result = CliRunner().invoke(app, [str(part) for part in (*command, *more)])
    assert result.exit_code == 0, result.stderr
