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
from stillroom.encoder import Encoder, weights_hash
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

    The teacher's weights, the student's and the generator's at the start, and of each split tokens,
    labels and soft labels.
    """
    found = {} if teacher is None else {"teacher": weights_hash(teacher.model)}
    if student is not None:
        found["student at the start"] = weights_hash(student.model)
    if generator is not None:
        found["generator at the start"] = weights_hash(generator.model)
    for name, rows in dataset.splits.items():
        digest = hashlib.sha256(rows.labels.tobytes())
        if rows.soft_labels is not None:
            digest.update(rows.soft_labels.tobytes())
        for kept in (tokens.student[name], tokens.teacher[name]):
            digest.update(kept.lengths.tobytes())
            digest.update(kept.ids.tobytes())
        found[f"{name} rows"] = digest.hexdigest()
    return found


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


def save(folder: Path, inputs: dict[str, str], machine: dict[str, Any]) -> None:
    """Write down what a run starts from."""
    durable.write_json(folder / INPUTS, {"inputs": inputs, "environment": machine})


def require_same(folder: Path, inputs: dict[str, str], machine: dict[str, Any], console: Console) -> None:
    """Check that a resumed run still learns from what it started from.

    Raises:
        WrongInput: If teacher, student or rows are not what they were, naming both hashes: going on
            would make another run. Another machine, version or number of processes or threads only
            warns: the last bits may differ, and between numbers of processes dropout does.
    """
    try:
        before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        old_inputs, old_machine = dict(before["inputs"]), dict(before["environment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(
            f"{folder / INPUTS} cannot be read ({type(error).__name__}: {error}), so it is not known "
            "what the run started from. Start it again in a new folder."
        ) from None
    for name, now in inputs.items():
        then = str(old_inputs.get(name))
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
