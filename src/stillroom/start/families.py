"""What families call the parts of a model that a start reads and writes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from stillroom.encoder import Encoder
from stillroom.errors import WrongInput


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a block, and two of each head.

    Of a classification head both layers, of a masked-LM head the linear layer and the LayerNorm.
    """

    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str
    head: tuple[str, str]
    masked_lm: tuple[str, str]


_BERT_BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


_ROBERTA = Names(
    *_BERT_BLOCK,
    head=("classifier.dense", "classifier.out_proj"),
    masked_lm=("lm_head.dense", "lm_head.layer_norm"),
)


FAMILIES = {
    "bert": Names(
        *_BERT_BLOCK,
        head=("bert.pooler.dense", "classifier"),
        masked_lm=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Names(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
        head=("pre_classifier", "classifier"),
        masked_lm=("vocab_transform", "vocab_layer_norm"),
    ),
}


def require_family(teacher: Encoder) -> None:
    """Raise `WrongInput` unless the parts of the teacher's blocks are known."""
    family = teacher.config.model_type
    if family not in FAMILIES:
        raise WrongInput(
            f"init=pca folds the weights of {', '.join(FAMILIES)}, and the teacher is a {family}: which "
            "of its weights read and write the hidden states is not known. Use init=random, or copy "
            "layers with layers:2,4,6."
        )


def embedding_norm(model: Encoder) -> nn.Module:
    """Return the LayerNorm that embeddings leave by."""
    body: Any = model.model.base_model
    norm: nn.Module = body.embeddings.LayerNorm
    return norm


def has(model: Encoder, parts: tuple[str, str]) -> bool:
    """Return whether a model has these two layers of a head."""
    inside = dict(model.model.named_modules())
    return all(name in inside for name in parts)
