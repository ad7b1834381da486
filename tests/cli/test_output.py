"""What goes where: results to stdout, the rest to stderr, one JSON object, exit codes."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from stillroom.cli import app, frame
from stillroom.errors import RunFailed, WrongInput


def _app(work: Any) -> typer.Typer:
    made = typer.Typer()

    @made.command()
    def command(as_json: frame.AsJson = False) -> None:
        found = frame.execute(work, as_json=as_json, stopped=lambda: "Stopped. Go on so.")
        if not as_json:
            frame.show(f"found {found}")

    return made


def _raises(error: BaseException) -> Any:
    def work(console: Console) -> dict[str, Any]:
        raise error

    return work


def test_only_the_result_is_on_stdout() -> None:
    """Prints of Python, of C and of child processes, and warnings, must not break the JSON."""
    code = """
import ctypes, os, subprocess, sys, warnings
import typer
from stillroom.cli import frame

def work(console):
    print("from python")
    sys.stdout.write("through sys.stdout\\n")
    ctypes.CDLL(None).puts(b"from C")
    subprocess.run(["echo", "from a child"], check=True)
    os.write(1, b"to the descriptor\\n")
    console.print("progress")
    return {"a": 1}

app = typer.Typer()

@app.command()
def command():
    frame.execute(work, as_json=True)

app()
"""
    # Buffered, as by default: what is printed early could come out late.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(found.stdout) == {"a": 1}
    for text in ("python", "through sys.stdout", "from C", "from a child", "descriptor", "progress"):
        assert text in found.stderr


def test_a_path_that_the_system_refuses_is_wrong_input() -> None:
    def work(console: Console) -> dict[str, Any]:
        return {"found": Path("n" * 300).is_dir()}

    result = CliRunner().invoke(_app(work))
    assert result.exit_code == 2 and "not expected" not in result.stderr
    assert "nnn cannot be used: File name too long. Check the path" in result.stderr
    # Without a path it is none of the user's.
    assert CliRunner().invoke(_app(_raises(PermissionError(13, "denied")))).exit_code == 1


@pytest.mark.parametrize(
    ("error", "code"), [(WrongInput("no such thing"), 2), (RunFailed("no such thing"), 1)]
)
def test_errors_of_ours(error: Exception, code: int) -> None:
    result = CliRunner().invoke(_app(_raises(error)))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "Error: no such thing\n"


def test_errors_with_json_are_one_object() -> None:
    result = CliRunner().invoke(_app(_raises(WrongInput("no [such] thing"))), ["--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": "no [such] thing"}
    assert "no [such] thing" in result.stderr


def test_unexpected_errors_show_their_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(frame.DEBUG, raising=False)
    short = CliRunner().invoke(_app(_raises(KeyError("x"))))
    assert (short.exit_code, short.stdout) == (1, "")
    assert short.stderr.startswith("Error: KeyError: 'x'") and frame.DEBUG in short.stderr
    assert "Traceback" not in short.stderr
    monkeypatch.setenv(frame.DEBUG, "1")
    long = CliRunner().invoke(_app(_raises(KeyError("x"))))
    assert long.exit_code == 1
    assert "Traceback" in long.stderr and "test_output.py" in long.stderr


def test_debug_option_sets_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(frame.DEBUG, "")
    result = CliRunner().invoke(app, ["--debug", "methods", "nothing"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_stopped_run_says_how_to_go_on() -> None:
    result = CliRunner().invoke(_app(_raises(KeyboardInterrupt())))
    assert result.exit_code == 130
    assert result.stderr == "Stopped. Go on so.\n"


def test_a_result_that_is_no_json_is_an_error() -> None:
    """NaN is no JSON: better an error than an object that nothing can read."""
    result = CliRunner().invoke(_app(lambda console: {"a": float("nan")}), ["--json"])
    assert result.exit_code == 1
    assert "error" in json.loads(result.stdout)


def test_third_parties_are_quiet_and_the_user_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")

    def work(console: Console) -> dict[str, Any]:
        for module in ("transformers.models", "torch", "of_the_user"):
            warnings.warn_explicit(f"by {module}", UserWarning, "x.py", 1, module=module)
        return {
            "tokenizers": os.environ["TOKENIZERS_PARALLELISM"],
            "level": os.environ["TRANSFORMERS_VERBOSITY"],
        }

    with pytest.warns(UserWarning) as seen:
        result = CliRunner().invoke(_app(work), ["--json"])
    assert json.loads(result.stdout) == {"tokenizers": "false", "level": "info"}
    assert [str(warning.message) for warning in seen] == ["by of_the_user"]


def test_overrides_keep_paths_as_text() -> None:
    """A folder named 2024 is no number, and --set has the last word."""
    assert frame.overrides(["training.seed=1"], data_dir=Path("2024"), seed=3) == [
        'dataset.data_dir="2024"',
        "training.seed=3",
        "training.seed=1",
    ]


# Standard streams, of a process of its own


def stillroom(shell: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's line in which `stillroom` is the command line."""
    command = f'stillroom() {{ "{sys.executable}" -m stillroom "$@"; }}; {shell}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("command", ["methods --json", "methods", "--version", "--help"])
def test_a_result_that_cannot_be_written_is_one_line(command: str) -> None:
    done = stillroom(f"stillroom {command} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "Error: Standard output cannot be written (No space left on device).\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_stand_in_the_way(closed: str) -> None:
    done = stillroom(f"stillroom methods --json {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))
