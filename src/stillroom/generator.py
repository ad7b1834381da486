"""The generator: a masked language model that rewrites masked words of the training rows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from stillroom import durable, encoder
from stillroom.data.batching import Inputs
from stillroom.errors import WrongInput

REMEDY = "`stillroom generator --model {model} --dataset D -o DIR` makes one from an encoder"


class Generator(nn.Module):
    """A masked language model with its tokenizer. `forward` returns logits where they are asked for."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @property
    def positions(self) -> int:
        """Longest input in tokens that the model can read."""
        return encoder.Encoder(self.model, self.tokenizer).positions

    def forward(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Return the logits at some positions, and compute the head nowhere else.

        Args:
            inputs: A padded batch, with the mask token where a word is to be guessed.
            positions: Numbers of positions in the flattened `(B, S)`, shape `(n,)`.

        Returns:
            Shape `(n, V)`.
        """
        given: dict[str, Any] = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        if inputs.token_type_ids is not None and "token_type_ids" in self.tokenizer.model_input_names:
            given["token_type_ids"] = inputs.token_type_ids
        with encoder.head_sees_only(self.model, positions):
            logits: Tensor = self.model(**given).logits
        return logits[0]

    def save(self, folder: Path) -> None:
        """Replace `folder` by what `AutoModelForMaskedLM.from_pretrained` loads, with the tokenizer."""
        model: Any = self.model
        with durable.new_folder(folder) as aside, encoder.quiet():
            model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)


def load(name: str, *, fresh_head: bool = False) -> Generator:
    """Load a masked language model from a folder or the hub: safetensors only, no remote code.

    Args:
        name: A folder, a hub id, or `minilm-l6`.
        fresh_head: Start the head at random (from torch's seed) where the checkpoint has none; its
            decoder is tied to the word embeddings.

    Returns:
        The generator in float32 and evaluation mode.

    Raises:
        WrongInput: If nothing is there, the files are damaged or not safetensors, the model has no
            masked-LM head, or its tokenizer no mask token.
    """
    place = encoder.locate(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    with encoder.explain_load(name, "a masked language model"), encoder.quiet():
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model, report = AutoModelForMaskedLM.from_pretrained(
            place,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    missing = {*report["missing_keys"], *(entry[0] for entry in report.get("mismatched_keys", ()))}
    prefix = f"{model.base_model_prefix}."
    # The head of the family whose body is called `model` (ModernBERT) has no such prefix either.
    body = sorted(key for key in missing if key.startswith(prefix))
    if body:
        raise WrongInput(
            f"{name} lacks weights of its {type(model).__name__}: {', '.join(body[:3])} ({len(body)} in "
            "all). The file belongs to another architecture or is cut short."
        )
    if missing and not fresh_head:
        raise WrongInput(
            f"{name} has no masked-LM head ({', '.join(sorted(missing)[:3])} are missing), so it cannot "
            f"propose words: {REMEDY.format(model=name)}."
        )
    encoder.require_fast(tokenizer, name)
    if tokenizer.mask_token_id is None:
        raise WrongInput(
            f"The tokenizer of {name} has no mask token, so no word can be masked. Give another model."
        )
    return Generator(model.eval(), tokenizer)
