"""Any Hugging Face encoder, read as `Outputs`: with a head for labels, one for masked words, or none.

`outputs` says what is read of one, `model` and `attention` read it, `unpadded` leaves its padding out,
`blocked` lays its weights out for a CPU, `config` knows its settings, and `loading` finds and checks
checkpoints.
"""

from stillroom.encoder.attention import (
    attending,
    computes_plainly,
    plain_attention,
    quick_attention,
    register_attention,
)
from stillroom.encoder.blocked import blocked, can_block
from stillroom.encoder.config import PROBLEM_TYPES, describe_task, ffn_width, kind_of, set_ffn_width
from stillroom.encoder.loading import (
    MINILM,
    MINILM_HUB,
    NoMaskedLMHead,
    fresh,
    load,
    load_body,
    load_like,
    locate,
)
from stillroom.encoder.model import Encoder, settings_that_compute, weights_hash
from stillroom.encoder.noise import quiet
from stillroom.encoder.outputs import Needs, Outputs, Pooling, pool, sum_needs

__all__ = [
    "MINILM",
    "MINILM_HUB",
    "PROBLEM_TYPES",
    "Encoder",
    "Needs",
    "NoMaskedLMHead",
    "Outputs",
    "Pooling",
    "attending",
    "blocked",
    "can_block",
    "computes_plainly",
    "describe_task",
    "ffn_width",
    "fresh",
    "kind_of",
    "load",
    "load_body",
    "load_like",
    "locate",
    "plain_attention",
    "pool",
    "quick_attention",
    "quiet",
    "register_attention",
    "set_ffn_width",
    "settings_that_compute",
    "sum_needs",
    "weights_hash",
]
