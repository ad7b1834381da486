"""The encoder: one forward pass, from `Inputs` to the `Outputs` that are asked for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom import durable
from stillroom.data.batching import Inputs, Layout
from stillroom.encoder.attention import quick, reading
from stillroom.encoder.noise import quiet
from stillroom.encoder.outputs import Needs, Outputs, pool
from stillroom.encoder.unpadded import FAMILIES, drops_attention, has_kernel, unpadded
from stillroom.errors import WrongInput

Head = Literal["classification", "masked-lm", "none"]
"""What an encoder has on top: a classification head, a masked-LM head, or neither."""


class Encoder(nn.Module):
    """A model, with its tokenizer and the kind of its head. `forward` returns what `Needs` names.

    Args:
        model: Of transformers.
        tokenizer: What `save` and the tokenising of rows use; a forward pass does not.
        head: The kind of the model's head.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        ... )
        >>> encoder = Encoder(BertForSequenceClassification(config), tokenizer=None)
        >>> ids = torch.tensor([[2, 7, 3]])
        >>> found = encoder(Inputs(ids, torch.ones_like(ids), None), Needs(hidden_states=frozenset({1})))
        >>> found.logits.shape, found.hidden_states[1].shape
        (torch.Size([1, 2]), torch.Size([1, 3, 8]))
    """

    def __init__(self, model: nn.Module, tokenizer: Any, head: Head = "classification"):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.head = head
        self.packed = True
        """Whether a pass may leave the padding out, where batch and device allow it."""
        self.basis: Tensor | None = None
        """P, `(E, D)` float32, if states stand for a wider teacher's (`start.fold`, `start.align`)."""

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
        model: Any = self.model
        weight: Tensor = model.get_input_embeddings().weight
        return weight

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
            quick(self.model, inputs.attention_mask.device),
            reading(self.model, needs) as attention,
            _head_sees_only(self.model, inputs.positions),
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

    def save_into(self, folder: Path) -> None:
        """Write the same into a folder that holds other files, which stay."""
        aside = folder / "model"
        self.save(aside)
        for path in aside.iterdir():
            path.replace(folder / path.name)
        aside.rmdir()

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
def _head_sees_only(model: Any, positions: Tensor | None) -> Iterator[None]:
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


def settings_that_compute(model: Any) -> dict[str, Any]:
    """Return a model's configuration without the names and paths that say where it came from."""
    return {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
