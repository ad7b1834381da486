"""What two processes do in `training/test_processes.py`; each is started with what torchrun tells it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from stillroom import PretrainRecipe, distill, pretrain, processes
from stillroom.data import sources
from stillroom.errors import RunFailed, StillroomError, WrongInput
from stillroom.recipe import Recipe
from stillroom.teacher import recorded
from stillroom.training import checkpoint
from stillroom.training.loop import Job, train
from tiny import WORDS, make_dataset, make_generator, make_job, make_teacher

QUIET = Console(quiet=True)
GENERATOR = {"generator": "tiny", "n_generator": 2, "n_student": 2, "generator_learning_rate": 5e-5}
BANK = {"negatives": "bank", "bank_negatives": 4}
FEW = {"bank_negatives": 3, "dimension": 8, "alpha2": 1.0}
CONTRAST = {"pooling": "mean", "tau2": 0.1, "a2": 5.0, **GENERATOR}
"""First tokens of tiny models are so alike that their contrast has a gradient of rounding alone."""
TWICE = {"accumulation": 2, "epochs": 2}
LONELY = {"batch_size": 2}
"""Batches of two rows, and one of a single row, of which the second process has none."""


@dataclass(frozen=True)
class Case:
    """A training that two processes share and that one does alone."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    """For `make_job`."""

    def __str__(self) -> str:
        named = {**self.options, **self.given}.items()
        return "-".join([self.method, *(f"{k}={v}" for k, v in named if "generator" not in k)])

    def job(self, folder: Path, *, dropout: bool = False) -> Job:
        """Return it made anew in `folder`."""
        return processes.main_first(lambda: self._job(folder, dropout))

    def _job(self, folder: Path, dropout: bool) -> Job:
        chosen = {"count": 27, "epochs": 1, "checkpoint_every": 1000, **self.given}
        job = make_job(folder / str(self), method=self.method, options=self.options, **chosen)
        for model in (job.student, job.generator, job.live_teacher.encoder if job.live_teacher else None):
            if model is not None:
                make_diverse(model)
            if model is not None and not dropout:
                without_dropout(model)
        return job


@torch.no_grad()
def make_diverse(model: nn.Module) -> None:
    """Enlarge the blocks' matrices: layers and rows that are all alike tie, and rounding would decide."""
    for name, parameter in model.named_parameters():
        if "layer." in name and parameter.ndim == 2:
            parameter *= 5


def without_dropout(model: nn.Module) -> None:
    """Turn off all dropout, whose difference would hide every other."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


CASES = [
    Case("none"),
    Case("kd", given={"kind": "regression"}),
    Case("kd", given={"kind": "multi-label", "accumulation": 3}),
    Case("kd", given=LONELY),
    Case("lrc-bert"),
    Case("lrc-bert", {"vector": "cls", "perturbation_norm": "tensor"}, TWICE),
    Case("lrc-bert", {"vector": "mean", "label_aware": True, **BANK}),
    Case("lrc-bert", {"label_aware": True, "perturbation": "off"}),
    Case("codir", FEW),
    Case("codir", {"loss": "nce_official", "pooling": "unmasked_mean", **FEW}, TWICE),
    Case("codir", {"direction": "symmetric", **FEW}, LONELY),
    Case("bert-emd", {"beta": 1.0}),
    Case("bert-emd", {"beta": 1.0, "padding": "masked", "alpha": 0.5}, LONELY),
    Case("angular-emd"),
    Case("mate-kd", GENERATOR),
    Case("cilda", {"objective": "minILD", "anchor": "symmetric", "alpha2": True, **CONTRAST}),
    Case("cilda", {"teacher_layers": "random", "projections": "adv", **CONTRAST}, TWICE),
    Case("pkd"),
    Case("distilbert"),
    Case("rail-kd", given={"epochs": 2}),
    Case("rail-kd", {"reduction": "sum", "pooling": "unmasked_mean"}),
    Case("tinybert"),
    Case("tinybert", {"padding": "masked"}, LONELY),
    Case("minilm"),
    Case("minilmv2", {"relation_heads": 8}),
    Case(
        "mixture",
        {
            "stages": [
                {"terms": {"lrc-bert:cos_nce": 1.0, "tinybert:hidden_states": 0.5}, "perturb": True},
                {"start": 0.5, "terms": {"kd:soft": 1.0, "distilbert:cosine": 1.0}},
            ],
            "input": "lrc-bert",
        },
    ),
]
RESUMED = [
    Case("cilda", GENERATOR, {"checkpoint_every": 1}),
    Case("codir", FEW, {"checkpoint_every": 1}),
]


def state_of(job: Job) -> dict[str, Tensor]:
    """Return all that training has moved: student, terms with their banks and masses, generator."""
    modules = {"student": job.student.model, **job.plan.terms}
    if job.generator is not None:
        modules["generator"] = job.generator.model
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def recipe(folder: Path) -> Recipe:
    """Return a run that records its teacher, of toy rows and without dropout."""
    teacher = make_teacher()
    teacher.config.hidden_dropout_prob = teacher.config.attention_probs_dropout_prob = 0.0
    teacher.save(folder / "teacher")
    return Recipe.load(
        teacher=str(folder / "teacher"),
        dataset={"name": "toy", "max_length": 32},
        student="layers:2,4",
        method="lrc-bert",
        control=True,
        training={"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32"},
    )


def pretraining(folder: Path) -> PretrainRecipe:
    """Return a distillation of a masked language model on text, without dropout."""
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS, size=20)) for _ in range(40)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    teacher = make_generator(width=24)
    teacher.model.config.hidden_dropout_prob = teacher.model.config.attention_probs_dropout_prob = 0.0
    teacher.save(folder / "lm")
    return PretrainRecipe.load(
        teacher=str(folder / "lm"),
        text={"files": [str(folder / "text.txt")], "sequence_length": 16, "held_out": 8},
        student="1x16x2x32",
        method={"name": "codir", "direction": "symmetric", "alpha2": 1.0, "dimension": 8},
        training={"batch_size": 7, "max_steps": 6, "log_every": 1, "precision": "float32"},
    )


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def raising(error: Exception, *, before: int = 0, instead: Callable[..., Any] | None = None) -> Any:
    """Return a function that is `instead` so many times and then raises."""
    left = [before]

    def function(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        assert instead is not None
        return instead(*args, **kwargs)

    return function


def error_of(work: Callable[[], Any]) -> str:
    """Return what `work` raises."""
    try:
        work()
    except StillroomError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def resumed(case: Case, folder: Path) -> bool:
    """Return whether a training with dropout, stopped after two steps, goes on to the same bits."""
    whole = case.job(folder / "whole", dropout=True)
    train(whole, QUIET)
    with changed(checkpoint, "save", raising(RunFailed("full"), before=2, instead=checkpoint.save)):
        assert error_of(lambda: train(case.job(folder / "rest", dropout=True), QUIET)) == "RunFailed: full"
    rest = case.job(folder / "rest", dropout=True)
    train(rest, QUIET)
    want, found = state_of(whole), state_of(rest)
    # The decay of words that no row has is put off until they are read, and only the first process saves.
    names = [name for name in want if processes.is_main() or not name.endswith("word_embeddings.weight")]
    return want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in names)


def whole_runs(folder: Path) -> dict[str, Any]:
    """Return what comes of `distill`: a run, and errors that one process alone has."""
    told: dict[str, Any] = {}
    recordings: list[int] = []
    record = recorded._record

    def counted(*args: Any) -> None:
        recordings.append(1)
        record(*args)

    given = processes.on_main(lambda: recipe(folder))
    with changed(recorded, "_record", counted):
        metrics = distill(given, folder / "run", console=QUIET)
    told["metrics"], told["recordings"] = metrics, len(recordings)
    text = processes.on_main(lambda: pretraining(folder))
    told["pretrained"] = pretrain(text, folder / "pretrained", console=QUIET)["held_out"]
    told["not empty"] = error_of(lambda: distill(given, folder / "run", console=QUIET))
    if not processes.is_main():
        sources.load = raising(WrongInput("not on this machine"))
    told["not here"] = error_of(lambda: distill(given, folder / "other", console=QUIET))
    return told


def launch(folder: Path, *, count: int = 2) -> None:
    """Run this file in `count` processes and wait for them; raise `RuntimeError` if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        told |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        started.append(subprocess.Popen([sys.executable, __file__, str(folder)], env=environment))
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}")


def main(folder: Path) -> None:
    """Do everything, and tell in a file of this process what came of it."""
    processes.start()
    told: dict[str, Any] = {"processes": processes.count(), "resumed": {}}
    for case in CASES:
        job = case.job(folder / "two")
        train(job, QUIET)
        torch.save(state_of(job), folder / "two" / f"{case}.{processes.rank()}")
    for case in RESUMED:
        told["resumed"][str(case)] = resumed(case, folder)
    sources.load = lambda settings, splits=(): make_dataset()
    told |= whole_runs(folder)
    (folder / f"told.{processes.rank()}").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
