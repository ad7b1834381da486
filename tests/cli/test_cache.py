"""`stillroom cache`: what a build records is what the run reads; list, verify and prune."""

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app
from stillroom.encoder import Needs
from stillroom.teacher.live import LiveTeacher

WIDE = {"COLUMNS": "250", "TERMINAL_WIDTH": "250"}


def run(*arguments: str | Path, code: int = 0, given: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def what(work: Workspace, *more: str) -> list[str]:
    given = ["--teacher", str(work.teacher), "--dataset", str(work.data), "--student", "layers:2,4"]
    return [*given, "--method", "kd", *FAST, *more]


@pytest.fixture
def recorded(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a build said, in a folder of caches of its own."""
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "kept"))
    return json.loads(run("cache", "build", *what(workspace), "--json").stdout)


def listed(*more: str | Path) -> list[dict[str, Any]]:
    return list(json.loads(run("cache", "list", *more, "--json").stdout)["caches"])


def damage() -> Path:
    shard = next(Path(listed()[0]["folder"]).glob("shard-*"))
    content = bytearray((shard / "rows.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (shard / "rows.arrow").write_bytes(content)
    return shard


def test_a_run_finds_what_was_built(
    recorded: Any, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recorded["recorded"] == ["logits"] and recorded["bytes"] > 4 * 2 * 200
    (before,) = listed()
    two = ("--set", "training.epochs=2")
    checks = run("distill", *what(workspace), *two, "-o", tmp_path / "run", "--dry-run", "--json").stdout
    found = json.loads(checks)["recorded_teacher"]
    assert found["recorded"] == ["logits"] and found["new_mb"] == 0
    monkeypatch.setattr("stillroom.teacher.recorded._record", lambda *_: pytest.fail("recorded again"))
    said = run("distill", *what(workspace), *two, "-o", tmp_path / "run", "--json").stdout
    assert json.loads(said)["train"]["teacher"]["recorded"] == ["logits"]
    assert listed()[0]["rows"] == before["rows"]


def test_the_list_says_what_there_is(recorded: Any, workspace: Workspace, tmp_path: Path) -> None:
    (found,) = listed()
    texts = (workspace.data / "train.csv").read_text().splitlines()[1:]
    # Rows whose tokens are equal share an entry; here all texts differ.
    assert found["rows"] == len(texts) and found["columns"] == {"logits": len(texts)}
    assert found["bytes"] == recorded["bytes"]
    assert found["name"] == str(workspace.teacher) and found["precision"] == "float32"
    assert re.fullmatch(r"[0-9a-f]{64}", found["teacher"]) and found["unused_days"] < 0.1
    shown = run("cache", "list").stdout
    assert all(
        text in shown for text in (found["teacher"][:12], found["tokenizer"][:12], "logits", "float32")
    )
    mine = ("--set", f"teacher.cache={tmp_path / 'mine'}")
    run("cache", "build", *what(workspace), *mine)
    assert len(listed()) == 1 and len(listed(tmp_path / "mine")) == 1


def test_nothing_recorded_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "none"))
    assert "Nothing is recorded" in run("cache", "list").stdout
    assert "0 of 0" in run("cache", "verify").stdout
    assert json.loads(run("cache", "prune", "--all", "--json").stdout)["removed"] == []


def test_verify_names_what_is_damaged(recorded: Any) -> None:
    assert json.loads(run("cache", "verify", "--json").stdout) == {"shards": 1, "damaged": {}}
    shard = damage()
    # What was found sound before is summed again: this is the time to find a bad disk.
    times = (shard / "rows.arrow").stat()
    os.utime(shard / "rows.arrow", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert str(shard) in run("cache", "verify", code=1).stdout
    found = json.loads(run("cache", "verify", "--json", code=1).stdout)
    assert list(found["damaged"]) == [str(shard)]
    assert "SHA-256" in found["damaged"][str(shard)]
    assert shard.exists()


def test_prune_removes_what_is_chosen_and_says_what_that_freed(recorded: Any) -> None:
    (found,) = listed()
    for other in (("--teacher", "0" * 64), ("--older-than", "1")):
        assert json.loads(run("cache", "prune", *other, "--yes", "--json").stdout)["removed"] == []
    month = time.time() - 31 * 24 * 3600
    os.utime(Path(found["folder"]) / "origin.json", (month, month))
    assert listed()[0]["unused_days"] == pytest.approx(31, abs=0.01)
    chosen = ("--teacher", found["teacher"][:12], "--older-than", "30")
    said = json.loads(run("cache", "prune", *chosen, "--yes", "--json").stdout)
    assert said == {"removed": [found["folder"]], "bytes": found["bytes"], "kept": []}
    assert listed() == [] and not Path(found["folder"]).exists()


def test_a_run_marks_its_cache_as_used(recorded: Any, workspace: Workspace) -> None:
    origin = Path(listed()[0]["folder"]) / "origin.json"
    os.utime(origin, (0, 0))
    run("cache", "build", *what(workspace))
    assert listed()[0]["unused_days"] < 0.1


def test_prune_asks(recorded: Any) -> None:
    (found,) = listed()
    result = run("cache", "prune", "--all", given="n\n")
    assert "Remove 1 cache(s)" in result.stderr and found["folder"] in result.stderr
    assert "Give --yes" in run("cache", "prune", "--all", code=2).stderr
    assert len(listed()) == 1
    result = run("cache", "prune", "--all", given="y\n")
    assert f"{found['bytes'] / 1e6:,.1f} MB freed" in result.stdout and listed() == []


def test_prune_leaves_a_cache_that_is_written(recorded: Any) -> None:
    folder = Path(listed()[0]["folder"])
    with FileLock(folder / ".lock"):
        found = json.loads(run("cache", "prune", "--all", "--yes", "--json", code=1).stdout)
    assert found == {"removed": [], "bytes": 0, "kept": [str(folder)]} and len(listed()) == 1


@pytest.mark.parametrize("given", [(), ("--all", "--older-than", "3")])
def test_prune_has_to_be_told_which(given: tuple[str, ...]) -> None:
    assert "--all alone" in run("cache", "prune", *given, code=2).stderr


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for command in (("list",), ("verify",), ("prune", "--all", "--yes")):
        name, *more = command
        assert "is no cache" in run("cache", name, tmp_path, *more, code=2).stderr
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("--set", "teacher.cache=off"), "teacher.cache=off"), (("--method", "none"), "nothing to record")],
)
def test_nothing_to_build_is_said(workspace: Workspace, given: tuple[str, ...], expected: str) -> None:
    assert expected in run("cache", "build", *what(workspace), *given, code=2).stderr


@pytest.mark.parametrize("one_epoch", [True, False])
def test_a_comparison_computes_the_teacher_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_epoch: bool
) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "kept"))
    rows = [0]
    real = LiveTeacher.of_words

    def count(self: LiveTeacher, inputs: Any, needs: Needs, words: Any) -> Any:
        rows[0] += 0 if needs == Needs() else len(inputs.input_ids)
        return real(self, inputs, needs, words)

    monkeypatch.setattr(LiveTeacher, "of_words", count)
    command = ("compare", "--teacher", workspace.teacher, "--dataset", workspace.data, *FAST)
    settings = ("--students", "layers:2,4", "--set", f"training.epochs={1 if one_epoch else 2}")

    def compared(methods: str, seeds: int, name: str) -> int:
        rows[0] = 0
        run(*command, *settings, "--methods", methods, "--seeds", str(seeds), "-o", tmp_path / name)
        return rows[0]

    # 240 rows, and the few on which each run is tried out.
    assert 240 <= compared("none,kd", 2, "several") < 240 + 40
    assert compared("kd", 2, "again") < 40
    metrics = json.loads((tmp_path / "again/runs/layers-2-4/kd/0/metrics.json").read_text())
    assert metrics["train"]["teacher"]["recorded"] == ["logits"]
    if one_epoch:
        # One run that reads each row once has nothing to read back.
        assert compared("none,kd", 1, "single") >= 240


def test_examples_of_the_commands_parse() -> None:
    group = typer.main.get_command(app).commands["cache"]
    assert tuple(group.commands) == ("build", "list", "verify", "prune")
    for name in group.commands:
        text = CliRunner().invoke(app, ["cache", name, "--help"], env=WIDE).stdout
        _, found, end = text.partition("Examples:")
        lines = [line.strip() for line in end.splitlines() if line.strip()]
        assert found and lines
        for line in lines:
            stillroom, cache, first, *arguments = shlex.split(line.removeprefix("$ "))
            assert (stillroom, cache, first) == ("stillroom", "cache", name)
            group.commands[name].make_context(name, arguments)
    for command in group.commands.values():
        assert all(getattr(parameter, "help", None) for parameter in command.params)
