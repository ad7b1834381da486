"""What a run is made of: hashes of what it learns from, and the machine that computes it."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from stillroom import durable, processes
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import Tokens
from stillroom.encoder import Encoder, settings_that_compute, weights_hash
from stillroom.errors import WrongInput
from stillroom.generator import Generator

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
STUDENT = "student"
CONTROL = "control"
"""Names of files and folders inside a run folder."""

INPUTS = "inputs.json"
"""Name of the file that holds what a run started from."""


def inputs_of(
    dataset: Dataset,
    teacher: Encoder | None,
    student: Encoder | None,
    tokens: Tokens,
    generator: Generator | None = None,
) -> dict[str, str]:
    """Return the SHA-256 of everything the student is made from, by name.

    Weights and configuration of the teacher, of the student and the generator at the start, and of each
    split tokens, their types, labels and soft labels.
    """
    models = {"teacher": teacher, "student at the start": student, "generator at the start": generator}
    found: dict[str, str] = {}
    for name, part in models.items():
        if part is not None:
            found |= hashes_of(part.model, name)
    for name, rows in dataset.splits.items():
        digest = hashlib.sha256(rows.labels.tobytes())
        if rows.soft_labels is not None:
            digest.update(rows.soft_labels.tobytes())
        types = hashlib.sha256()
        for kept in (tokens.student[name], tokens.teacher[name]):
            digest.update(kept.lengths.tobytes())
            digest.update(kept.ids.tobytes())
            types.update(b"none" if kept.types is None else kept.types.tobytes())
        found[f"{name} rows"] = digest.hexdigest()
        # By themselves: runs of earlier versions have written down none, and go on.
        found[f"token types of the {name} rows"] = types.hexdigest()
    return found


def hashes_of(model: Any, name: str) -> dict[str, str]:
    """Return the SHA-256 of a model's weights, under its name, and of its configuration."""
    config = settings_that_compute(model)
    # The environment tells of another version, which only warns.
    config.pop("transformers_version", None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        name: weights_hash(model),
        f"configuration of the {name}": hashlib.sha256(text.encode()).hexdigest(),
    }


def environment(*, bf16: bool) -> dict[str, Any]:
    """Return machine, device, processes, threads of each, precision and versions."""
    packages = ("stillroom", "torch", "transformers", "accelerate", "tokenizers")
    return {
        "machine": platform.platform(),
        "processor": _processor(),
        "device": str(Accelerator().device),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "precision": "bf16" if bf16 else "float32",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def save(
    folder: Path, inputs: dict[str, str], machine: dict[str, Any], recipe: dict[str, Any] | None = None
) -> None:
    """Write down what a run starts from, and what its recipe says of the student beside that."""
    recipe = recipe or {}
    durable.write_json(folder / INPUTS, {"inputs": inputs, "environment": machine, "recipe": recipe})


def require_same(
    folder: Path,
    inputs: dict[str, str],
    machine: dict[str, Any],
    console: Console,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Check that a resumed run still learns from what it started from.

    Raises:
        WrongInput: If teacher, student or rows are not what they were, naming both hashes, or the
            recipe is not, naming the key: going on would make another run. Another machine, version or
            number of processes or threads only warns: the last bits may differ, and between numbers of
            processes dropout does.
    """
    try:
        before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        old_inputs, old_machine = dict(before["inputs"]), dict(before["environment"])
        old_recipe = dict(before.get("recipe", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(
            f"{folder / INPUTS} cannot be read ({type(error).__name__}: {error}), so it is not known "
            "what the run started from. Start it again in a new folder."
        ) from None
    for key, now in (recipe or {}).items():
        # What an earlier version did not write down cannot be compared.
        if old_recipe.get(key, now) != now:
            raise WrongInput(
                f"{folder / RECIPE} changed since this run started: {key} was "
                f"{old_recipe[key]}, found {now}. Going on would make another run: put it back, or start "
                "again in a new folder."
            )
    for name, now in inputs.items():
        then = str(old_inputs.get(name, now))
        if then != now:
            raise WrongInput(
                f"The {name} changed since this run started: SHA-256 {then[:12]} then, {now[:12]} now. "
                "Going on would make another run: put back what was there, or start "
                "again in a new folder."
            )
    changed = [
        f"{key}: {old_machine.get(key)} then, {now} now"
        for key, now in machine.items()
        if old_machine.get(key) != now
    ]
    if changed:
        console.print(
            "Warning: the run goes on elsewhere than it started, so that its last bits may differ "
            f"({'; '.join(changed)}).",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _processor() -> str:
    """Return the processor's name; `platform` knows none on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
