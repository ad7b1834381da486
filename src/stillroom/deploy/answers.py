"""What a model's logits say, in words: a label with probabilities, several labels, or a score."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.deploy.predictor import Predictor, Texts
from stillroom.errors import RunFailed


@dataclass(frozen=True)
class Answer:
    """What a model says of one text, or of one pair of texts.

    Attributes:
        predicted: The label of the highest probability; for multi-label a list of all labels of a
            probability of at least a half; for regression a number.
        probabilities: By label, in the model's order; empty for regression.
        cut: Whether the text had more tokens than the model reads, and its end was not read.
    """

    predicted: Any
    probabilities: dict[str, float]
    cut: bool


def answer(predictor: Predictor, texts: Texts, *, batch_size: int = 32) -> list[Answer]:
    """Return what the model says of each text, in their order.

    Args:
        predictor: The model.
        texts: Strings, or tuples of two.
        batch_size: Most texts that are computed at once.

    Raises:
        RunFailed: If the model computes something that is no finite number.
    """
    rows = predictor.encode(texts)
    logits_NC = predictor.logits_of(rows, batch_size=batch_size).astype(np.float64)
    if not np.isfinite(logits_NC).all():
        row = int(np.flatnonzero(~np.isfinite(logits_NC).all(1))[0])
        raise RunFailed(
            f"The model's logits of text {row + 1} of {len(texts)} are not finite: the model is damaged. "
            "Export it again, or use another form."
        )
    cut = [bool(row.overflowing) for row in rows]
    if is_score(predictor):
        return [Answer(float(score), {}, long) for score, long in zip(logits_NC[:, 0], cut, strict=True)]
    multi = predictor.kind == "multi-label"
    answers = []
    for values, long in zip(_sigmoid(logits_NC) if multi else _softmax(logits_NC), cut, strict=True):
        said = dict(zip(predictor.labels, map(float, values), strict=True))
        chosen = [name for name in said if said[name] >= 0.5] if multi else max(said, key=said.__getitem__)
        answers.append(Answer(chosen, said, long))
    return answers


def is_score(predictor: Predictor) -> bool:
    """Return whether the model gives a score and no labels."""
    return predictor.kind == "regression" or (predictor.kind is None and len(predictor.labels) < 2)


def _softmax(logits_NC: np.ndarray) -> np.ndarray:
    powers = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _sigmoid(logits_NC: np.ndarray) -> np.ndarray:
    # tanh does not overflow where exp does.
    return np.asarray((1 + np.tanh(logits_NC / 2)) / 2)
