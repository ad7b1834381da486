"""Processes that do runs: what they make of Ctrl-C, and which GPU they see."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.run.handout import _deaf, in_processes

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
