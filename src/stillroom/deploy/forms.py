"""The forms of an export, their files, and the manifest that tells what was measured of each.

Imports no torch, so that a process that serves an export needs none.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom import durable
from stillroom.errors import WrongInput
from stillroom.recipe import nearest

DEPLOY = "deploy"
"""Name of the export inside a run folder."""

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

FILES: dict[str, tuple[str, ...]] = {
    "onnx": ("model.onnx",),
    "onnx-int8": ("model.int8.onnx",),
    "openvino": ("openvino.xml", "openvino.bin"),
    "openvino-int8": ("openvino.int8.xml", "openvino.int8.bin"),
    "torch": ("model.safetensors",),
}
"""The files of each form that hold its weights. Tokenizer, configuration and manifest are shared."""

_SHARED = (TOKENIZER, "tokenizer_config.json", "config.json")


def parse(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Return the forms that `onnx,onnx-int8` or a sequence names, each once.

    Raises:
        WrongInput: If one is unknown, or none is named, or OpenVINO is needed and not installed.

    Example:
        >>> parse("onnx,onnx-int8")
        ('onnx', 'onnx-int8')
    """
    given = formats.split(",") if isinstance(formats, str) else list(formats)
    names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise WrongInput(f"Expected at least one format, found none. Valid: {', '.join(FILES)}.")
    for name in names:
        if name not in FILES:
            raise WrongInput(f"Unknown format {name!r}.{nearest(name, list(FILES))}")
    if any(name.startswith("openvino") for name in names):
        require_openvino(quantise="openvino-int8" in names)
    return names


def require_openvino(*, quantise: bool = False) -> None:
    """Raise `WrongInput` unless OpenVINO (and NNCF, to quantise) is installed."""
    for package in ("openvino", "nncf") if quantise else ("openvino",):
        if importlib.util.find_spec(package) is None:
            raise WrongInput(
                f"OpenVINO forms need the package {package}, which is not installed. Install "
                "Stillroom with the extra openvino (in a clone of it: pip install -e '.[openvino]'), or "
                "choose onnx or onnx-int8."
            )


def bytes_of(folder: Path, form: str) -> int:
    """Return the bytes on disk that serving a form takes: weights, tokenizer, configuration."""
    shared = [folder / name for name in _SHARED]
    # Weights of torch may come in several files.
    weights = folder.glob("*.safetensors") if form == "torch" else (folder / name for name in FILES[form])
    return sum(path.stat().st_size for path in (*weights, *shared) if path.exists())


def is_export(folder: Path) -> bool:
    """Return whether a folder is one that `export` wrote."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an export's manifest, or raise `WrongInput` if it is not there or damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not (isinstance(found["forms"], dict) and found["forms"]):
            raise ValueError("it names no form")
        found["inputs"], found["max_length"], found["pad_id"], found["labels"]
    except FileNotFoundError:
        raise WrongInput(
            f"{folder} is no export: it has no {MANIFEST}. Make one with stillroom export."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(
            f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}). Copy or export the "
            "model again."
        ) from None
    return dict(found)


def choose(folder: Path, manifest: dict[str, Any], form: str | None) -> str:
    """Return the form to load: `form` if it is there, else the fastest as it was measured.

    Raises:
        WrongInput: If the form is unknown, was not exported, or its files are missing or damaged.
    """
    there = manifest["forms"]
    if form is None:
        form = min(there, key=lambda name: float(there[name]["ms_per_row"]))
    if form not in FILES:
        raise WrongInput(f"Unknown form {form!r}.{nearest(form, list(FILES))}")
    if form not in there:
        raise WrongInput(f"{folder} holds no {form}; it holds {', '.join(there)}. Export it first.")
    for name, expected in there[form]["sha256"].items():
        path = folder / name
        found = durable.sha256_of_file(path) if path.is_file() else "nothing"
        if found != expected:
            raise WrongInput(
                f"{path} is damaged: expected SHA-256 {expected[:12]}..., found {found[:12]}. Copy or "
                "export the model again."
            )
    return form
