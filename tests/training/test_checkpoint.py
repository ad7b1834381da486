"""Checkpoints: whole or not there, and the run that goes on from one ends at the same bytes."""

import errno
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from stillroom import durable
from stillroom.encoder import weights_hash
from stillroom.errors import RunFailed
from stillroom.training import checkpoint
from stillroom.training.checkpoint import Progress
from stillroom.training.distiller import Distiller
from stillroom.training.loop import Job, _optimizer, train
from tiny import make_job

QUIET = Console(quiet=True)
BANK = {"vector": "mean", "negatives": "bank", "label_aware": True, "bank_negatives": 3}


def make_trained(folder: Path, *, seed: int = 0) -> tuple[Distiller, torch.optim.Optimizer]:
    """Return a distiller with a bank and its optimiser after a step of random gradients."""
    job = make_job(folder, options=BANK)
    distiller = Distiller(job.student, job.plan, bf16=False)
    optimizer = _optimizer(distiller, job.settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        distiller.terms["cos_nce"].bank.copy_(torch.randn(48, 2, 24, generator=generator))
        distiller.terms["cos_nce"].bank_labels[seed] = 1
    optimizer.step()
    return distiller, optimizer


def all_state(distiller: Distiller, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"weight {name}": value for name, value in distiller.state_dict().items()}
    for name, parameter in distiller.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"optimiser {name} {key}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def draw() -> list[Any]:
    return [
        torch.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.random(2).tolist(),
        [random.random(), random.gauss(0, 1)],
    ]


PROGRESS = Progress(
    7, examples=56, tokens=600, seconds=1.25, best_step=6, best_value=0.1 + 0.2, without_better=1
)


def test_restores_every_bit(tmp_path: Path) -> None:
    distiller, optimizer = make_trained(tmp_path)
    best = {name: value + 1 for name, value in checkpoint.student_weights(distiller).items()}
    draw()
    path = checkpoint.save(tmp_path / "c", distiller, optimizer, PROGRESS, best, keep=2)
    saved, numbers = all_state(distiller, optimizer), draw()

    other, its_optimizer = make_trained(tmp_path, seed=1)
    draw()
    progress, its_best = checkpoint.restore(path, other, its_optimizer)
    assert progress == PROGRESS
    assert its_best is not None and its_best.keys() == best.keys()
    assert all(torch.equal(its_best[name], best[name]) for name in best)
    restored = all_state(other, its_optimizer)
    assert restored.keys() == saved.keys()
    assert {"weight terms.cos_nce.bank", "optimiser terms.cos_nce.projection exp_avg_sq"} < saved.keys()
    for name, value in saved.items():
        assert torch.equal(restored[name], value) and restored[name].dtype == value.dtype, name
    assert draw() == numbers


@pytest.mark.parametrize("draws", [1, 2])
def test_random_states_go_on_where_they_stood(tmp_path: Path, draws: int) -> None:
    """After an odd number of normal numbers numpy and Python each hold one back."""
    np.random.seed(0)
    np.random.standard_normal(draws)
    for _ in range(draws):
        random.gauss(0, 1)
    distiller, optimizer = make_trained(tmp_path)
    path = checkpoint.save(tmp_path / "c", distiller, optimizer, PROGRESS, None, keep=1)
    want = draw()
    np.random.seed(5)
    _, best = checkpoint.restore(path, distiller, optimizer)
    assert draw() == want
    assert best is None


def test_a_fresh_optimiser_is_saved_and_restored_empty(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    distiller = Distiller(job.student, job.plan, bf16=False)
    optimizer = _optimizer(distiller, job.settings)
    path = checkpoint.save(tmp_path / "c", distiller, optimizer, Progress(), None, keep=1)
    assert checkpoint.restore(path, distiller, optimizer) == (Progress(), None)
    assert not optimizer.state


def save_steps(folder: Path, *steps: int, keep: int = 9) -> tuple[Distiller, torch.optim.Optimizer]:
    distiller, optimizer = make_trained(folder)
    for step in steps:
        checkpoint.save(folder / "c", distiller, optimizer, Progress(step), None, keep=keep)
    return distiller, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 900, 1000, 99_999_999, keep=2)
    assert names(tmp_path / "c") == ["step-00001000", "step-99999999"]
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == tmp_path / "c" / "step-99999999"


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """Loading a pickle runs what it says; a checkpoint may come from another machine."""
    save_steps(tmp_path, 1)
    found = {path.suffix for path in (tmp_path / "c" / "step-00000001").iterdir()}
    assert found == {".safetensors", ".json"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda c: flip(c / "student.safetensors"),
    "cut short": lambda c: os.truncate(c / "optimizer.safetensors", 100),
    "empty": lambda c: (c / "state.json").write_bytes(b""),
    "gone": lambda c: (c / "terms.safetensors").unlink(),
    "no sums": lambda c: (c / "sums.json").unlink(),
    "half the sums": lambda c: os.truncate(c / "sums.json", 70),
    "sums of another kind": lambda c: (c / "sums.json").write_text("[]"),
    "sums of nothing": lambda c: (c / "sums.json").write_text("{}"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_an_older_one_with_a_warning(tmp_path: Path, how: str) -> None:
    save_steps(tmp_path, 1, 2, 3)
    # A name that rich would take for markup.
    folder = (tmp_path / "c").rename(tmp_path / "[red]c")
    for step in (2, 3):
        DAMAGES[how](folder / f"step-0000000{step}")
    shown = io.StringIO()
    found = checkpoint.newest_sound(folder, Console(file=shown, width=1000))
    assert found == folder / "step-00000001"
    assert shown.getvalue().count("Warning") == 2
    assert f"{folder / 'step-00000003'} is damaged" in shown.getvalue()
    DAMAGES[how](folder / "step-00000001")
    assert checkpoint.newest_sound(folder, QUIET) is None


def test_a_file_that_a_desktop_leaves_in_a_checkpoint_does_not_make_it_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "c" / "step-00000002"
    (newest / ".DS_Store").write_bytes(b"\0Bud1")
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == newest


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) is None
    (tmp_path / "c").mkdir()
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) is None


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    """Started over behind a damaged step 9, step 3 is the only sound one there is."""
    distiller, optimizer = save_steps(tmp_path, 9, keep=1)
    flip(tmp_path / "c" / "step-00000009" / "student.safetensors")
    path = checkpoint.save(tmp_path / "c", distiller, optimizer, Progress(3), None, keep=1)
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == path
    assert names(tmp_path / "c") == ["step-00000003"]


def test_what_is_no_checkpoint_is_neither_read_nor_removed(tmp_path: Path) -> None:
    """It stood in the way at the end of a run that was resumed."""
    distiller, optimizer = save_steps(tmp_path, 1, 2)
    (tmp_path / "c" / "step-x").write_text("mine")
    (tmp_path / "c" / "step-00000abc").mkdir()
    (tmp_path / "c" / "step-00000009").write_text("mine")
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == tmp_path / "c" / "step-00000002"
    checkpoint.save(tmp_path / "c", distiller, optimizer, Progress(3), None, keep=1)
    assert names(tmp_path / "c") == ["step-00000003", "step-00000009", "step-00000abc", "step-x"]


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed cleans nothing up: here its cleaning is switched off."""
    distiller, optimizer = save_steps(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(durable, "_seal", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "c", distiller, optimizer, Progress(2), None, keep=2)
    assert len(names(tmp_path / "c")) == 2 and names(tmp_path / "c")[-1] == "step-00000001"
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == tmp_path / "c" / "step-00000001"
    assert names(tmp_path / "c") == ["step-00000001"]


NO_SPACE = {
    "write": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    # What safetensors 0.6 raises on a full disk, where it writes by itself.
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


@pytest.mark.parametrize("place", ["sync", "save_file"])
@pytest.mark.parametrize("how", NO_SPACE)
def test_a_full_disk_fails_the_run_and_leaves_the_last_checkpoint_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, place: str
) -> None:
    distiller, optimizer = save_steps(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise NO_SPACE[how]

    if place == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match=r"disk that holds .*step-00000002 is full"):
        checkpoint.save(tmp_path / "c", distiller, optimizer, Progress(2), None, keep=1)
    assert names(tmp_path / "c") == ["step-00000001"]
    assert checkpoint.newest_sound(tmp_path / "c", QUIET) == tmp_path / "c" / "step-00000001"


def test_another_error_of_the_disk_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save_steps(tmp_path, 1)


# A run that was interrupted

RUNS: dict[str, dict[str, Any]] = {
    "token": {"evaluate_every": 0.5},
    "bank": {"options": BANK, "evaluate_every": 0.5},
    "accumulated": {"options": {"perturbation": "off"}, "accumulation": 2, "select": "last"},
}


def job_of(folder: Path, run: str) -> Job:
    return make_job(folder, **{"epochs": 2, "checkpoint_every": 2, "keep_checkpoints": 2, **RUNS[run]})


def outcome(job: Job) -> tuple[str, dict[str, str], list[dict[str, Any]]]:
    """Return the student's hash, the sums of the last checkpoint, and the log without its rates."""
    last = max((job.folder / "checkpoints").iterdir())
    sums = json.loads((last / "sums.json").read_text())
    # Seconds differ.
    sums.pop("state.json")
    lines = [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]
    rates = ("examples_per_second", "tokens_per_second")
    log = [{k: v for k, v in line.items() if k not in rates} for line in lines]
    return weights_hash(job.student.model), sums, log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        for run in RUNS:
            job = job_of(tmp_path_factory.mktemp(run), run)
            train(job, QUIET)
            found[run] = outcome(job)
    return found


class Interrupt:
    """Calls through, and raises KeyboardInterrupt before or after the n-th call."""

    def __init__(self, function: Callable[..., Any], call: int, *, after: bool):
        self.function, self.left, self.after = function, call, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        found = self.function(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return found


def interrupt(job: Job, where: str, call: int, *, after: bool) -> None:
    """Start a run and stop it at a call of a function, as ctrl-C or a kill would."""
    places = {
        "evaluate": (job, "evaluate"),
        "save": (checkpoint, "save"),
        "fsync": (os, "fsync"),
        "forward": (Distiller, "forward"),
    }
    owner, name = places[where]
    stopper = Interrupt(getattr(owner, name), call, after=after)
    with pytest.MonkeyPatch.context() as patch:
        if where == "evaluate":
            object.__setattr__(job, name, stopper)
        elif where == "forward":
            patch.setattr(owner, name, lambda *args: stopper(*args))
        else:
            patch.setattr(owner, name, stopper)
        with pytest.raises(KeyboardInterrupt):
            train(job, QUIET)


@pytest.mark.parametrize(
    ("run", "where", "call", "after"),
    [
        ("token", "forward", 1, False),
        ("token", "forward", 6, True),
        ("token", "save", 1, False),
        ("token", "save", 2, True),
        ("token", "evaluate", 2, False),
        ("token", "evaluate", 3, True),
        ("token", "fsync", 20, False),
        ("token", "fsync", 41, True),
        ("bank", "forward", 5, False),
        ("bank", "save", 3, True),
        ("bank", "evaluate", 4, True),
        ("bank", "fsync", 30, False),
        ("accumulated", "forward", 6, False),
        ("accumulated", "save", 2, True),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_student(
    tmp_path: Path, uninterrupted: dict[str, Any], run: str, where: str, call: int, after: bool
) -> None:
    interrupt(job_of(tmp_path, run), where, call, after=after)
    job = job_of(tmp_path, run)
    # A new process has other random states, and starts from weights that must not matter.
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    if (tmp_path / "checkpoints").is_dir() and checkpoint.newest_sound(tmp_path / "checkpoints", QUIET):
        with torch.no_grad():
            for value in (*job.student.parameters(), *job.plan.terms["cos_nce"].parameters()):
                value.add_(1.0)
    train(job, QUIET)
    assert outcome(job) == uninterrupted[run]


def test_a_run_interrupted_again_and_again_ends_at_the_same_student(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    for where, call in (("save", 2), ("evaluate", 1), ("save", 1), ("forward", 3)):
        interrupt(job_of(tmp_path, "token"), where, call, after=True)
    job = job_of(tmp_path, "token")
    train(job, QUIET)
    assert outcome(job) == uninterrupted["token"]


def test_a_run_goes_on_behind_a_damaged_checkpoint_to_the_same_student(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    interrupt(job_of(tmp_path, "bank"), "save", 3, after=True)
    flip(tmp_path / "checkpoints" / "step-00000006" / "terms.safetensors")
    job = job_of(tmp_path, "bank")
    train(job, QUIET)
    assert outcome(job) == uninterrupted["bank"]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    first = train(job_of(tmp_path, "token"), QUIET)
    job = job_of(tmp_path, "token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "forward", lambda *_: pytest.fail("trained again"))
        assert train(job, QUIET) == first
    assert outcome(job) == uninterrupted["token"]


def test_half_a_line_at_the_end_of_the_log_is_dropped(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    interrupt(job_of(tmp_path, "token"), "save", 3, after=True)
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 7, "sta')
    job = job_of(tmp_path, "token")
    train(job, QUIET)
    assert outcome(job) == uninterrupted["token"]
