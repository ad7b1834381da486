"""Build a student from a size, from the teacher's layers, or from a checkpoint."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from stillroom import encoder
from stillroom.data.tasks import Task
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput

_SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?")
_LAYERS = re.compile(r"layers:(\d+(?:,\d+)*)")


@dataclass(frozen=True)
class Size:
    """Depth, hidden width, attention heads and FFN width."""

    layers: int
    width: int
    heads: int
    ffn: int


def parse_size(text: str) -> Size | None:
    """Return the size that `LxH`, `LxHxHEADS` or `LxHxHEADSxFFN` names, or None if it is none.

    312 means 12 heads and an FFN of 1200, as TinyBERT and LRC-BERT use; other widths have heads of
    64 (or the widest divisor below) and an FFN of four times the width.

    Raises:
        WrongInput: If a number is zero or the heads do not divide the width.

    Example:
        >>> parse_size("4x312")
        Size(layers=4, width=312, heads=12, ffn=1200)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    layers, width = int(match[1]), int(match[2])
    if not layers or not width:
        raise WrongInput(f"Student {text}: expected at least one layer and one unit.")
    default_heads, default_ffn = (12, 1200) if width == 312 else (_heads(width), 4 * width)
    heads = int(match[3]) if match[3] else default_heads
    ffn = int(match[4]) if match[4] else default_ffn
    if not heads or width % heads or not ffn:
        raise WrongInput(
            f"Student {text}: {heads} heads do not divide a width of {width}. Give both, such as "
            f"{layers}x{width}x{_heads(width)}."
        )
    return Size(layers, width, heads, ffn)


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Return the teacher layers (from 1) that `layers:2,4,6` names, or None if it names none."""
    match = _LAYERS.fullmatch(text)
    return None if match is None else tuple(int(part) for part in match[1].split(","))


def build(text: str, teacher: Encoder, task: Task, *, seed: int) -> Encoder:
    """Return the student that `text` describes, with the task's head.

    Args:
        text: `LxH`, `layers:2,4,6`, or a local or hub checkpoint.
        teacher: Gives architecture and tokenizer, and the weights of copied layers.
        task: Gives the head its width and label names.
        seed: Everything that starts at random starts from this.

    Raises:
        WrongInput: If the text fits none of the three, or the layers are not the teacher's.
    """
    layers = parse_layers(text)
    size = parse_size(text)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if layers is not None:
            return _copy_layers(layers, teacher, task)
        if size is not None:
            return _from_size(size, teacher, task)
        return encoder.load(text, task, fresh_head=True)


def _heads(width: int) -> int:
    return next(heads for heads in range(-(-width // 64), width + 1) if width % heads == 0)


def _from_size(size: Size, teacher: Encoder, task: Task) -> Encoder:
    config = copy.deepcopy(teacher.config)
    encoder.describe_task(config, task)
    _set_depth(config, list(range(size.layers)))
    config.num_attention_heads = size.heads
    config.hidden_size = size.width
    # Names of the widths that follow from the hidden width, where a family has them.
    for name in ("embedding_size", "pooler_hidden_size", "classifier_hidden_size"):
        if getattr(config, name, None) is not None:
            setattr(config, name, size.width)
    setattr(config, "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size", size.ffn)
    return _from_config(config, teacher)


def _copy_layers(layers: tuple[int, ...], teacher: Encoder, task: Task) -> Encoder:
    if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > teacher.depth:
        raise WrongInput(
            f"Student layers:{','.join(map(str, layers))}: expected rising layer numbers from 1 to "
            f"{teacher.depth}, the teacher's last."
        )
    config = copy.deepcopy(teacher.config)
    encoder.describe_task(config, task)
    prefix, _ = teacher.blocks()
    _set_depth(config, [layer - 1 for layer in layers])
    student = _from_config(config, teacher)
    position = {layer - 1: i for i, layer in enumerate(layers)}
    wanted = student.model.state_dict()
    weights = {}
    for name, value in teacher.model.state_dict().items():
        inside = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if inside is None:
            weights[name] = value
        elif int(inside[1]) in position:
            weights[f"{prefix}.{position[int(inside[1])]}.{inside[2]}"] = value
    # ModernBERT's first block has no attention norm: the one of a copied later block is dropped.
    weights = {name: value for name, value in weights.items() if name in wanted}
    student.model.load_state_dict(weights)
    return student


def _set_depth(config: Any, kept: list[int]) -> None:
    """Set the number of blocks; `kept` are the teacher's blocks (from 0) that they stand for."""
    old = config.num_hidden_layers
    config.num_hidden_layers = len(kept)
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[block % old] for block in kept]


def _from_config(config: Any, teacher: Encoder) -> Encoder:
    with encoder.explain_load("the student"), encoder.quiet():
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return Encoder(model.float().eval(), copy.deepcopy(teacher.tokenizer))
