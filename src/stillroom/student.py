"""Build a student from a size, from the teacher's layers, or from a checkpoint, and start it."""

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom import encoder, start
from stillroom.data.tasks import Task
from stillroom.data.tokens import TokenisedRows, fingerprint
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.ops.layer_map import resolve_layer_map

_SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?")
_LAYERS = re.compile(r"layers:(\d+(?:,\d+)*)")
# No hub id has a colon or an equals sign, or is made of these characters alone.
_MEANT = re.compile(r"\s*layers?\s*[:=].*|[-+\d\s.,;:*x×]*", re.IGNORECASE)

_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux says how much memory a container may use, and which group this process is in."""

_TRAINED_BYTES = 16
"""Of a parameter that is trained: weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True)
class Size:
    """Depth, hidden width, attention heads and FFN width."""

    layers: int
    width: int
    heads: int
    ffn: int


def parse_size(text: str) -> Size | None:
    """Return the size that `LxH`, `LxHxHEADS` or `LxHxHEADSxFFN` names, or None for another student.

    312 means 12 heads and an FFN of 1200, as TinyBERT and LRC-BERT use; other widths have heads of
    64 (or the widest divisor below) and an FFN of four times the width.

    Raises:
        WrongInput: If a number is zero, the heads do not divide the width, or a size is misspelt.

    Example:
        >>> parse_size("4x312")
        Size(layers=4, width=312, heads=12, ffn=1200)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        _refuse_misspelt(text)
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
    """Return the teacher layers (from 1) that `layers:2,4,6` names, or None for another student.

    Raises:
        WrongInput: If layers are misspelt.
    """
    match = _LAYERS.fullmatch(text)
    if match is None:
        _refuse_misspelt(text)
        return None
    return tuple(int(part) for part in match[1].split(","))


def _refuse_misspelt(text: str) -> None:
    """Raise `WrongInput` if a description is meant as a size or as layers, and is neither."""
    spelt = _SIZE.fullmatch(text) or _LAYERS.fullmatch(text)
    if _MEANT.fullmatch(text) and not spelt and not (text and Path(text).is_dir()):
        raise WrongInput(
            "Expected a student's size (LxH, LxHxHEADS or LxHxHEADSxFFN, such as 4x312), layers of its "
            f"teacher (such as layers:2,4,6), or a checkpoint, found {text!r}. Write it as one of these."
        )


def require_checkpoint(text: str) -> None:
    """Raise `WrongInput` if a student's description is a size or layers, which need a teacher."""
    if parse_layers(text) is not None or parse_size(text) is not None:
        raise WrongInput(
            f"The student {text} takes architecture and tokenizer from a teacher, and there is none: give "
            "--teacher, or a checkpoint as the student, such as minilm-l6."
        )


def resolve_start(text: str, teacher: Encoder, init: str) -> str:
    """Return `init` with `auto` spelt out for the student that `text` describes.

    Layers start as the `teacher`; a size by `pca` where the teacher's family can be folded and has no
    less of anything, else at `random`. A checkpoint is its own start and stays `auto`.
    """
    if init != "auto":
        return init
    if parse_layers(text) is not None:
        return "teacher"
    size = parse_size(text)
    if size is None:
        return init
    foldable = start.can_fold(teacher, width=size.width, heads=size.heads, ffn=size.ffn)
    return "pca" if foldable and size.layers <= teacher.depth else "random"


def build(
    text: str,
    teacher: Encoder,
    task: Task | None,
    *,
    seed: int,
    init: str = "auto",
    tokens: TokenisedRows | None = None,
) -> Encoder:
    """Return the student that `text` describes, started as `init` says, with a head like the teacher's.

    Args:
        text: `LxH`, `layers:2,4,6`, or a local or hub checkpoint.
        teacher: Gives architecture and tokenizer, and the weights that a student starts from.
        task: Gives a classification head its width and label names; None where the models have none.
        seed: Everything that starts at random starts from this.
        init: `random`; `teacher`: its layers, copied; `pca`: its layers, folded into fewer dimensions
            (`start.fold`); or a checkpoint of the student's shape; `auto` as `resolve_start` says.
        tokens: Training text as the teacher tokenises it, which `pca` looks at, and the basis of a narrower
            checkpoint.

    Raises:
        WrongInput: If the text fits none of the three, the layers are not the teacher's, or the student
            cannot start so.
    """
    layers, size, init = parse_layers(text), parse_size(text), resolve_start(text, teacher, init)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if layers is None and size is None:
            if init != "auto":
                raise WrongInput(
                    f"The student {text} is a checkpoint and starts from its own weights: leave out "
                    f"init={init}, or give the student a size such as 4x312."
                )
            return _aligned(encoder.load_like(text, teacher, task), teacher, tokens)
        kept = layers or ()
        if layers is not None:
            _require_layers(layers, teacher)
        if init in ("teacher", "pca") and size is not None:
            kept = _spread(size.layers, teacher)
        shape = size or Size(len(kept), teacher.width, teacher.heads, encoder.ffn_width(teacher.config))
        same = (shape.width, shape.heads, shape.ffn) == _widths(teacher)
        if init == "teacher" and not same:
            raise WrongInput(
                f"init=teacher copies layers, which needs the teacher's width, heads and FFN "
                f"({'x'.join(map(str, _widths(teacher)))}), found a student of {shape.width}x{shape.heads}"
                f"x{shape.ffn}. Use init=pca for a narrower student, or layers:2,4,6."
            )
        if same and init in ("teacher", "pca"):
            return _copy_layers(kept, teacher, task)
        if init not in ("random", "pca"):
            return _aligned(_from_checkpoint(init, text, shape, teacher, task), teacher, tokens)
        made = _from_size(shape, teacher, task, kept)
        if init == "pca":
            if tokens is None:
                raise ValueError("init=pca looks at training text: give the tokens")
            made.to(teacher.words.device)
            start.fold(teacher, made, kept, tokens)
            made.to("cpu")
        return made


def _spread(depth: int, teacher: Encoder) -> tuple[int, ...]:
    """Return the teacher layers, from 1, that `depth` blocks start from: those of a uniform layer map."""
    if depth > teacher.depth:
        raise WrongInput(
            f"The student has {depth} layers, more than the teacher's {teacher.depth}, so it cannot start "
            "from them: use init=random, or fewer layers."
        )
    return resolve_layer_map("uniform", depth, teacher.depth)


def _widths(model: Encoder) -> tuple[int, int, int]:
    return model.width, model.heads, encoder.ffn_width(model.config)


def _from_checkpoint(place: str, text: str, shape: Size, teacher: Encoder, task: Task | None) -> Encoder:
    """Return a checkpoint that has the student's shape and the teacher's tokenizer."""
    try:
        made = encoder.load_like(place, teacher, task)
    except WrongInput as error:
        raise WrongInput(f"init should be random, teacher, pca or a checkpoint: {error}") from error
    wanted = (shape.layers, shape.width, shape.heads, shape.ffn)
    found = (made.depth, *_widths(made))
    if wanted != found or made.config.model_type != teacher.config.model_type:
        raise WrongInput(
            f"init={place} should be a {teacher.config.model_type} of the student's shape, {text}: "
            f"{'x'.join(map(str, wanted))} (layers, width, heads, FFN), found a {made.config.model_type} "
            f"of {'x'.join(map(str, found))}. Give another checkpoint, or a student of its shape."
        )
    if fingerprint(made.tokenizer) != fingerprint(teacher.tokenizer):
        raise WrongInput(
            f"The tokenizer of init={place} is not the teacher's, so its word embeddings belong to other "
            "tokens. Give a checkpoint that was made with this teacher's tokenizer."
        )
    return made


def _aligned(made: Encoder, teacher: Encoder, tokens: TokenisedRows | None) -> Encoder:
    """Return a narrower checkpoint with the basis on which its states are nearest to the teacher's.

    It has none if its states are not those of the same tokens, or are of more layers.
    """
    if (
        tokens is not None
        and made.width < teacher.width
        and made.depth <= teacher.depth
        and tokens.lengths.max() <= made.positions
        and fingerprint(made.tokenizer) == fingerprint(teacher.tokenizer)
    ):
        made.to(teacher.words.device)
        made.basis = start.align(teacher, made, _spread(made.depth, teacher), tokens)
        made.to("cpu")
    return made


def _heads(width: int) -> int:
    return next(heads for heads in range(-(-width // 64), width + 1) if width % heads == 0)


def _from_size(size: Size, teacher: Encoder, task: Task | None, layers: tuple[int, ...]) -> Encoder:
    config = copy.deepcopy(teacher.config)
    if task is not None:
        encoder.describe_task(config, task)
    _set_depth(config, [layer - 1 for layer in layers] or list(range(size.layers)))
    config.num_attention_heads = size.heads
    config.hidden_size = size.width
    # Names of the widths that follow from the hidden width, where a family has them.
    for name in ("embedding_size", "pooler_hidden_size", "classifier_hidden_size"):
        if getattr(config, name, None) is not None:
            setattr(config, name, size.width)
    encoder.set_ffn_width(config, size.ffn)
    _require_memory(size, config)
    return encoder.fresh(config, teacher)


def _require_memory(size: Size, config: Any) -> None:
    """Raise `WrongInput` if the student cannot be trained on this machine, before it fills the memory."""
    # ALBERT's layers share the weights of a group.
    blocks = getattr(config, "num_hidden_groups", size.layers)
    least = blocks * size.width * (4 * size.width + 2 * size.ffn) + config.vocab_size * size.width
    memory = _memory()
    if memory is not None and least * _TRAINED_BYTES > memory:
        raise WrongInput(
            f"A student of {size.layers} layers, width {size.width} and FFN {size.ffn} has more than "
            f"{least / 1e6:,.0f} million parameters: to train it takes "
            f"{least * _TRAINED_BYTES / 1e9:,.0f} GB, and this machine, or the container, has "
            f"{memory / 1e9:,.0f} GB. Give a smaller size, such as 4x312."
        )


def _memory() -> int | None:
    """Return the bytes that this machine or container has, or its largest GPU if that has more."""
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    host = min([host, *_container_limits()])
    gpus = range(torch.cuda.device_count())
    return max(host, *(torch.cuda.get_device_properties(i).total_memory for i in gpus), 0)


def _container_limits() -> Iterator[int]:
    """Yield the limits of memory of this process's control group and of those around it, v2 and v1."""
    try:
        groups = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (
            (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
        )
        # Inside a container the path may be the host's, of which only the root is there.
        inside = base / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(base):
                break
            # Unlimited is `max` in v2, and a number beyond any memory in v1.
            with contextlib.suppress(OSError, ValueError):
                yield int((folder / name).read_text(encoding="utf-8"))


def _require_layers(layers: tuple[int, ...], teacher: Encoder) -> None:
    if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > teacher.depth:
        raise WrongInput(
            f"Student layers:{','.join(map(str, layers))}: expected rising layer numbers from 1 to "
            f"{teacher.depth}, the teacher's last."
        )


def _copy_layers(layers: tuple[int, ...], teacher: Encoder, task: Task | None) -> Encoder:
    config = copy.deepcopy(teacher.config)
    if task is not None:
        encoder.describe_task(config, task)
    prefix, _ = teacher.blocks()
    _set_depth(config, [layer - 1 for layer in layers])
    student = encoder.fresh(config, teacher)
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
    try:
        config.num_hidden_layers = len(kept)
    except NotImplementedError as error:
        raise WrongInput(
            f"A model of the family {config.model_type} cannot be made with another number of layers: "
            f"{error} Give the student as a checkpoint."
        ) from error
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[block % old] for block in kept]
