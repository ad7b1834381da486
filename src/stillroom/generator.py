"""The generator: a masked language model that rewrites masked words of the training rows."""

from typing import Any

from torch import Tensor, nn

from stillroom.data.batching import Inputs
from stillroom.encoder import Encoder, Needs, NoMaskedLMHead, load_body
from stillroom.errors import WrongInput

REMEDY = "`stillroom generator --model {model} --dataset D -o DIR` makes one from an encoder"


class Generator(Encoder):
    """A masked language model with its tokenizer, which says what may stand at masked positions."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__(model, tokenizer, "masked-lm")

    def guess(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Return the logits at some positions, and compute the head nowhere else.

        Args:
            inputs: A padded batch, with the mask token where a word is to be guessed. It may be another
                model's: token types that this one does not know are left out.
            positions: Numbers of positions in the flattened `(B, S)`, int64, shape `(n,)`.

        Returns:
            Shape `(n, V)`; gradients flow to the generator's parameters.
        """
        known = "token_type_ids" in self.tokenizer.model_input_names
        types = inputs.token_type_ids if known else None
        # Without a layout: the padding is never left out.
        read = Inputs(inputs.input_ids, inputs.attention_mask, types, positions)
        logits: Tensor = self(read, Needs(logits=True)).logits
        return logits


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
    try:
        made = load_body(name, head="masked-lm", fresh_head=fresh_head)
    except NoMaskedLMHead as error:
        raise WrongInput(f"{error} So it cannot propose words: {REMEDY.format(model=name)}.") from error
    return Generator(made.model, made.tokenizer)
