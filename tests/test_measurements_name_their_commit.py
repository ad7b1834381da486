"""What a benchmark prints names the commit that was measured."""

import importlib
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_commit_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    toys = importlib.import_module("toys")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert toys.commit(tmp_path) is None
    figures, code = tmp_path / "benchmarks" / "peers.json", tmp_path / "code.py"
    figures.parent.mkdir()
    for path in (figures, code):
        path.write_text("1")
    git("init", "-q")
    assert toys.commit(tmp_path) is None
    git("add", ".")
    git("commit", "-q", "-m", "all")
    # The shell empties the file that a script prints into, and untracked files are no part of it.
    figures.write_text("")
    (tmp_path / "notes").touch()
    assert toys.commit(tmp_path) == git("rev-parse", "--short", "HEAD")
    code.write_text("2")
    assert toys.commit(tmp_path) == git("rev-parse", "--short", "HEAD") + "+"
    assert toys.machine()["commit"] == toys.COMMIT
