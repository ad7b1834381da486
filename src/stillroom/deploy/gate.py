"""Whether a form is still the model: its logits against torch's, and its metric against the source's.

Shapes: B batch, S tokens, C classes.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track

from stillroom.data.batching import pad, sequential_batches
from stillroom.data.tasks import Rows, Task
from stillroom.data.tokens import TokenisedRows
from stillroom.deploy.predictor import Session, TorchSession, input_names
from stillroom.encoder import Encoder
from stillroom.evaluation.metrics import score

BATCHES = (1, 2, 8)
LENGTHS = (2, 3, 7, 16, 33, 64, 128)
"""The shapes at which logits are compared, each with and without padding."""

SENSITIVITY_ROWS = 256
"""Validation rows on which the harm of each part is measured, spread evenly."""

MOST_LEFT_OUT = (1, 2, 4, 8, 16)
"""How many of the most harmful parts are left out of int8, one try after the other."""


class Int8(Protocol):
    """Writes a model with all of its parts but some in int8."""

    @property
    def parts(self) -> list[str]:
        """Names of the parts."""
        ...

    def __call__(self, left_out: Collection[str], target: Path) -> None:
        """Write the model with all parts but `left_out` in int8."""
        ...


@dataclass(frozen=True)
class Split:
    """What forms are scored on: the rows, and their tokens as the model reads them."""

    task: Task
    rows: Rows
    tokens: TokenisedRows


@dataclass(frozen=True)
class Verdict:
    """What a form scores. `drop` is in points of the task's first metric, or None without a number.

    A drop below zero is a gain.

    Example:
        >>> [Verdict({"accuracy": 0.9}, drop).passes(0.5) for drop in (-1.0, 0.5, 0.6, None)]
        [True, True, False, False]
    """

    metrics: dict[str, float]
    drop: float | None

    def passes(self, most: float) -> bool:
        """Return whether no more than `most` points are lost."""
        # A metric is a ratio of counts: its difference must not fail by the last bit.
        return self.drop is not None and self.drop <= most + 1e-9


def logits_of(session: Session, tokens: TokenisedRows) -> np.ndarray:
    """Return the logits of a split, float32 `(N, C)`, in the rows' order."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for rows in sequential_batches(tokens.lengths):
        found.append((rows, session(arrays(tokens, rows))))
    logits = np.empty((len(tokens), found[0][1].shape[1]), dtype=np.float32)
    for rows, values in found:
        logits[rows] = values
    return logits


def judge(session: Session, split: Split, goal: float) -> Verdict:
    """Return what a form scores, against the `goal` that the source reaches in the first metric."""
    logits = logits_of(session, split.tokens)
    if not np.isfinite(logits).all():
        return Verdict({}, None)
    metrics = score(split.task, logits, split.rows.labels)
    return Verdict(metrics, 100 * (goal - metrics[split.task.metrics[0]]))


def parity(session: Session, encoder: Encoder, *, max_length: int) -> dict[str, float]:
    """Return how far a form's logits are from torch's, over many shapes of random tokens.

    Args:
        session: The form.
        encoder: The same model in torch, on the CPU.
        max_length: The longest input to try.

    Returns:
        `shapes` that were tried, padded and not; `largest`: the largest difference between two
        logits; `relative`: that over the largest logit.
    """
    chance = np.random.Generator(np.random.Philox(key=0))
    torch_session = TorchSession(encoder)
    size = encoder.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    special = set(encoder.tokenizer.all_special_ids)
    ids = np.array([i for i in range(min(size, len(encoder.tokenizer))) if i not in special])
    names = input_names(encoder.tokenizer)
    types = getattr(encoder.config, "type_vocab_size", 0) or 1
    lengths = sorted({min(length, max_length) for length in (*LENGTHS, max_length)})
    shapes = list(itertools.product(BATCHES, lengths, (False, True)))
    largest = scale = 0.0
    for batch, length, padded in shapes:
        mask = np.ones((batch, length), dtype=np.int64)
        if padded:
            real = chance.integers(1, length + 1, size=batch)
            mask = (np.arange(length) < real[:, None]).astype(np.int64)
        drawn = np.where(mask, chance.choice(ids, (batch, length)), encoder.tokenizer.pad_token_id)
        second = (np.arange(length) >= length // 2) & (types > 1)
        given = {
            "input_ids": drawn,
            "attention_mask": mask,
            "token_type_ids": mask * second.astype(np.int64),
        }
        inputs = {name: given[name] for name in names}
        ours, theirs = session(inputs), torch_session(inputs)
        largest = max(largest, _largest(ours - theirs))
        scale = max(scale, _largest(theirs))
    return {"shapes": len(shapes), "largest": largest, "relative": largest / scale if scale else 0.0}


@dataclass(frozen=True)
class Passed:
    """The int8 model that lost little enough, or the best of those tried.

    Attributes:
        verdict: What it scores.
        left_out: The parts that stayed in float32.
        tried: For each try how many parts were left out and the points lost.
    """

    verdict: Verdict
    left_out: tuple[str, ...]
    tried: tuple[dict[str, Any], ...]


def quantise(
    int8: Int8,
    target: Path,
    scratch: Path,
    open_session: Callable[[Path], Session],
    split: Split,
    goal: float,
    max_drop: float,
    console: Console,
) -> Passed:
    """Write the coarsest int8 that passes the gate to `target`, or the last one tried if none does.

    All parts first. If that loses too much, each part is put into int8 alone, the parts are ordered
    by how far they move the logits (mean squared difference), and the worst 1, 2, 4, ... stay in
    float32.

    Args:
        int8: Writes a model with some parts left out.
        target: Where the model goes.
        scratch: An existing folder for what is only measured.
        open_session: From a path to a session.
        split: The validation split.
        goal: The source's first metric on it.
        max_drop: Most points to lose.
        console: Where progress goes.
    """
    tried: list[dict[str, Any]] = []

    def attempt(left_out: Sequence[str]) -> Passed:
        int8(left_out, target)
        verdict = judge(open_session(target), split, goal)
        tried.append({"left_out": len(left_out), "drop": verdict.drop})
        return Passed(verdict, tuple(left_out), tuple(tried))

    best = attempt(())
    if best.verdict.passes(max_drop):
        return best
    lost = "its logits are not finite" if best.verdict.drop is None else f"{best.verdict.drop:.2f} points"
    console.print(
        f"{target.name}: all parts in int8 lose {lost}; measuring each of {len(int8.parts)} parts alone.",
        markup=False,
        highlight=False,
    )
    harm = _harm(int8, scratch / target.name, open_session, split, console)
    worst = sorted(harm, key=lambda part: -harm[part])
    for count in MOST_LEFT_OUT:
        if count >= len(worst):
            break
        best = attempt(worst[:count])
        if best.verdict.passes(max_drop):
            break
    return best


def _harm(
    int8: Int8, trial: Path, open_session: Callable[[Path], Session], split: Split, console: Console
) -> dict[str, float]:
    """Return for each part how far the logits move when it alone is in int8."""
    chosen = np.linspace(0, len(split.tokens) - 1, min(SENSITIVITY_ROWS, len(split.tokens))).astype(int)
    inputs = [arrays(split.tokens, rows) for rows in np.array_split(chosen, -(-len(chosen) // 32))]

    def run(left_out: Collection[str]) -> np.ndarray:
        int8(left_out, trial)
        session = open_session(trial)
        return np.concatenate([session(batch) for batch in inputs])

    parts = int8.parts
    exact = run(parts)
    harm = {}
    for part in track(parts, "Measuring parts", console=console, transient=True):
        moved = float(np.mean((run([other for other in parts if other != part]) - exact) ** 2))
        harm[part] = moved if np.isfinite(moved) else float("inf")
    return harm


def arrays(tokens: TokenisedRows, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return rows of a split as a padded batch, by input name."""
    inputs = pad(tokens, rows)
    arrays = {"input_ids": inputs.input_ids.numpy(), "attention_mask": inputs.attention_mask.numpy()}
    if inputs.token_type_ids is not None:
        arrays["token_type_ids"] = inputs.token_type_ids.numpy()
    return arrays


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())
