"""Checkpoints from which a killed run goes on to the same bytes."""

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom import durable
from stillroom.generator import Generator
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller

GENERATOR = "generator.safetensors"
"""Name of a checkpoint's file with the generator's weights, where the run trains one."""

_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_GENERATOR_OPTIMIZER = "generator_optimizer.safetensors"
Weights = dict[str, Tensor]
Parameters = dict[str, nn.Parameter]


@dataclass
class Progress:
    """Where a run stands, beside weights and random states. All of it is JSON."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    without_better: int = 0


def save(
    folder: Path,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Weights | None,
    augmenter: Augmenter | None = None,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, whole or not at all, drop the oldest beyond `keep`, and return its path.

    Later checkpoints are dropped too: they are damaged ones that the run had to go back behind.

    Args:
        folder: The run's `checkpoints`.
        distiller: Student and terms.
        optimizer: Its state is stored by parameter name.
        progress: Where the run stands.
        best: The student of the best evaluation, where that is not the present one.
        augmenter: The generator and its optimiser, where the run has one.
        keep: How many of the newest stay.
    """
    target = folder / f"{_PREFIX}{progress.step:08d}"
    with durable.new_folder(target) as aside:
        save_file(_cpu(distiller.student.model.state_dict()), aside / "student.safetensors")
        save_file(_cpu(distiller.terms.state_dict()), aside / "terms.safetensors")
        own = dict(distiller.named_parameters())
        save_file(_cpu(_optimizer_state(own, optimizer)), aside / "optimizer.safetensors")
        if augmenter is not None:
            # Parameters once each: a tied decoder has two names in the state.
            save_file(_cpu(dict(augmenter.generator.model.named_parameters())), aside / GENERATOR)
            moments = _optimizer_state(augmenter.trained, augmenter.optimizer)
            save_file(_cpu(moments), aside / _GENERATOR_OPTIMIZER)
        save_file(_random_states(), aside / "random.safetensors")
        if best is not None:
            save_file(best, aside / "best.safetensors")
        # numpy keeps every second normal number for the next call, outside its keys.
        legacy = np.random.get_state(legacy=False)
        state = {
            "progress": vars(progress),
            "python_random": random.getstate(),
            "numpy_gauss": [legacy["has_gauss"], legacy["gauss"]],
        }
        (aside / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    paths = newest_first(folder)
    kept = paths[paths.index(target) :][:keep]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)
    return target


def newest_sound(folder: Path, console: Console) -> Path | None:
    """Return the newest checkpoint whose sums agree, or None; warn of every damaged one."""
    if not folder.is_dir():
        return None
    durable.remove_leftovers(folder)
    for path in newest_first(folder):
        wrong = durable.damage(path)
        if wrong is None:
            return path
        # Not as markup: a folder may be named [/a].
        warning = f"Warning: checkpoint {path} is damaged ({wrong}); trying an older one."
        console.print(warning, style="yellow", markup=False)
    return None


def restore(
    path: Path,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    augmenter: Augmenter | None = None,
) -> tuple[Progress, Weights | None]:
    """Load a sound checkpoint into the distiller, the optimiser, the generator and the random states.

    Returns:
        Where the run stood, and the best student if that is another one.
    """
    distiller.student.model.load_state_dict(load_file(path / "student.safetensors"))
    distiller.terms.load_state_dict(load_file(path / "terms.safetensors"))
    own = dict(distiller.named_parameters())
    _load_optimizer(own, optimizer, load_file(path / "optimizer.safetensors"))
    if augmenter is not None:
        load_generator(augmenter.generator, path)
        stored = load_file(path / _GENERATOR_OPTIMIZER)
        _load_optimizer(augmenter.trained, augmenter.optimizer, stored)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _restore_random(load_file(path / "random.safetensors"), state["python_random"], state["numpy_gauss"])
    best = path / "best.safetensors"
    return Progress(**state["progress"]), load_file(best) if best.exists() else None


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder; what else lies there is not ours to read or remove."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, reverse=True)


def step_of(path: Path) -> int:
    """Return how many steps a checkpoint was written after."""
    return int(path.name.removeprefix(_PREFIX))


@torch.no_grad()
def load_generator(generator: Generator, path: Path) -> None:
    """Load a checkpoint's weights into the generator that the run started from."""
    stored = load_file(path / GENERATOR)
    for name, parameter in generator.model.named_parameters():
        parameter.copy_(stored[name])


def student_weights(distiller: Distiller) -> Weights:
    """Return a copy of the student's weights on the CPU."""
    return {name: value.clone() for name, value in _cpu(distiller.student.model.state_dict()).items()}


def _cpu(weights: dict[str, Any]) -> Weights:
    found: Weights = {}
    places: set[int] = set()
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        # A tied decoder has its table under two names, and a file of safetensors holds no memory twice.
        found[name] = value.clone() if value.data_ptr() in places and value.numel() else value
        places.add(value.data_ptr())
    return found


def _optimizer_state(parameters: Parameters, optimizer: torch.optim.Optimizer) -> Weights:
    state = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value
    return state


def _load_optimizer(parameters: Parameters, optimizer: torch.optim.Optimizer, stored: Weights) -> None:
    for name, value in stored.items():
        parameter, key = name.rsplit("/", 1)
        owner = parameters[parameter]
        optimizer.state[owner][key] = value.to(owner.device)


def _random_states() -> Weights:
    # Philox and PCG are not used globally; numpy's legacy state is, by third parties.
    _, keys, position, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
        "numpy_position": torch.tensor(position),
    }
    if torch.cuda.is_available():
        # Of the device that this process uses; the same in all processes that train together.
        states["cuda0"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Weights, python: list[Any], numpy_gauss: list[Any]) -> None:
    version, keys, gauss = python
    random.setstate((version, tuple(keys), gauss))
    numpy_keys = states["numpy_keys"].numpy().view(np.uint32)
    np.random.set_state(("MT19937", numpy_keys, int(states["numpy_position"]), *numpy_gauss))
    torch.set_rng_state(states["torch"])
    if "cuda0" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda0"])
