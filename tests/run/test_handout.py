"""Who does which run, and processes that do them: what they make of Ctrl-C, and which GPU they see."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from rich.console import Console

from stillroom.provenance import METRICS
from stillroom.run.handout import Handout, _deaf, in_processes

_SAYS = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"]


def test_a_process_that_still_loads_is_deaf_to_the_keyboard() -> None:
    """Else it would write the traceback of an import, behind what this one says."""
    before = signal.getsignal(signal.SIGINT)
    with _deaf():
        within = subprocess.run(_SAYS, capture_output=True, text=True, check=True).stdout
    assert within == "True\n" and signal.getsignal(signal.SIGINT) == before
    after = subprocess.run(_SAYS, capture_output=True, text=True, check=True).stdout
    # A shell that starts the tests in the background makes them deaf themselves.
    assert after == f"{before == signal.SIG_IGN}\n"


def _note_what_is_seen(_: Any, folder: Path) -> None:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    (folder / str(os.getpid())).write_text(" ".join(os.environ.get(name, "-") for name in names))


@pytest.mark.parametrize(
    ("cards", "given", "seen"),
    [
        (0, None, ["-", "-", "-"]),
        (2, None, ["0", "0", "1"]),
        (2, "5,7", ["5", "5", "7"]),
        (1, "3", ["3", "3", "3"]),
    ],
)
def test_workers_share_the_gpus(
    cards: int, given: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    before = dict(os.environ)
    in_processes(3, _note_what_is_seen, tmp_path)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == [f"1 {name}" for name in seen]
    assert dict(os.environ) == before


def test_runs_of_another_command_on_the_folder_are_left_to_it(tmp_path: Path) -> None:
    done: list[tuple[str, str, float]] = []

    def taker(command: str, *names: str) -> Handout:
        def do(name: str, trial: optuna.Trial, _: Console) -> float:
            x = trial.suggest_float("x", 0, 10)
            done.append((command, name, x))
            handout.place(name).mkdir(parents=True)
            (handout.place(name) / METRICS).write_text("{}")
            return x

        handout = Handout(tmp_path, names, do)
        return handout

    first, second = taker("first", "a", "b"), taker("second", "c", "d")
    second.enqueue({"c": {"x": 3.0}, "d": {"x": 4.0}})
    first.enqueue({"a": {"x": 1.0}, "b": {"x": 2.0}})
    first.work(Console(quiet=True))
    assert done == [("first", "a", 1.0), ("first", "b", 2.0)]
    second.work(Console(quiet=True))
    assert sorted(done[2:]) == [("second", "c", 3.0), ("second", "d", 4.0)]
    assert not first.missing() and not second.missing()


def test_a_process_that_stood_still_goes_on_with_the_next_run(tmp_path: Path) -> None:
    """A laptop that slept: to the others its run was without a sign of life, and one of them took it."""
    done: list[str] = []

    def do(name: str, trial: optuna.Trial, _: Console) -> float:
        if name == "a" and not done:
            handout.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        handout.place(name).mkdir(parents=True)
        (handout.place(name) / METRICS).write_text("{}")
        done.append(name)
        return 0.0

    handout = Handout(tmp_path, ["a", "b"], do)
    handout.enqueue()
    handout.work(Console(quiet=True))
    assert done == ["a", "b"] and not handout.missing()
