"""Train a masked language model: a head that is tied to an encoder's word embeddings, on text.

Devlin et al.: "BERT", 2019, arXiv 1810.04805, sec. 3.1: 15 % of the words are to be guessed; of these
80 % become the mask token, 10 % a random word, and 10 % stay.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from stillroom.data.batching import Batch, Inputs, epoch_batches, pad, sequential_batches
from stillroom.data.tokens import TokenisedRows
from stillroom.errors import WrongInput
from stillroom.generator import Generator
from stillroom.training.augmentation import masked_positions, with_words

GUESSED, HIDDEN, RANDOM = 0.15, 0.8, 0.1
"""Share of words to guess; of these, shares that become the mask token, and a random word."""

_WARMUP, _MAX_NORM, _WEIGHT_DECAY = 0.1, 1.0, 0.01


@dataclass(frozen=True)
class Settings:
    """How long and how fast."""

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0


def corrupt(
    inputs: Inputs,
    row_ids: Tensor,
    *,
    special: frozenset[int],
    mask_id: int,
    vocabulary: int,
    seed: int,
    draw: int,
) -> tuple[Inputs, Tensor]:
    """Return the inputs with some words hidden or changed, and the positions to guess.

    A pure function of its arguments; see `GUESSED` for the shares.

    Args:
        inputs: A batch on the CPU.
        row_ids: Number of each row, shape `(B,)`.
        special: Ids that are not words: never guessed, never put in.
        mask_id: Of the mask token.
        vocabulary: Number of ids.
        seed: The run's seed.
        draw: Number of the draw.

    Returns:
        Inputs, and positions in the flattened `(B, S)`, int64 and rising, shape `(n,)`.

    Example:
        >>> ids = torch.full((1, 200), 7)
        >>> rules = {"special": frozenset({0, 4}), "mask_id": 4, "vocabulary": 10, "seed": 0, "draw": 0}
        >>> inputs = Inputs(ids, torch.ones_like(ids), None)
        >>> changed, positions = corrupt(inputs, torch.tensor([0]), **rules)
        >>> elsewhere = changed.input_ids.flatten().index_fill(0, positions, 7)
        >>> 10 < len(positions) < 60, bool((elsewhere == 7).all())
        (True, True)
    """
    positions = masked_positions(
        inputs, row_ids, special=special, probability=GUESSED, seed=seed, draw=draw
    )
    chance = np.random.Generator(np.random.Philox(key=[seed, draw], counter=[0, 0, 2, 0]))
    share = torch.from_numpy(chance.random(len(positions)))
    words = np.setdiff1d(np.arange(vocabulary), sorted(special))
    random = torch.from_numpy(chance.choice(words, size=len(positions)))
    ids = inputs.input_ids.flatten()[positions]
    ids = torch.where(share < HIDDEN + RANDOM, random, ids)
    return with_words(inputs, positions, torch.where(share < HIDDEN, mask_id, ids)), positions


class Guessing:
    """The task of a masked language model: the loss of a batch, and that of held-out rows."""

    def __init__(self, model: Generator, *, seed: int, bf16: bool):
        self.model, self._seed, self._bf16 = model, seed, bf16
        tokenizer = model.tokenizer
        self._rules: dict[str, Any] = {
            "special": frozenset(tokenizer.all_special_ids),
            "mask_id": int(tokenizer.mask_token_id),
            "vocabulary": len(tokenizer),
        }
        self._device = next(model.parameters()).device

    def losses(self, tokens: TokenisedRows, index: np.ndarray, draw: int) -> Tensor:
        """Return the cross-entropy of each guess.

        Args:
            tokens: The split.
            index: Numbers of the batch's rows, shape `(B,)`.
            draw: Number of the draw of hidden words.

        Returns:
            Nats, float32, shape `(n,)` for n words that are guessed; gradients flow to the model.
        """
        inputs, row_ids = pad(tokens, index), torch.from_numpy(index.astype(np.int64))
        changed, positions = corrupt(inputs, row_ids, **self._rules, seed=self._seed, draw=draw)
        goals = inputs.input_ids.flatten()[positions].to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = self.model.guess(changed.to(self._device), positions.to(self._device))
        return F.cross_entropy(logits.float(), goals, reduction="none")

    @torch.no_grad()
    def held_out_loss(self, tokens: TokenisedRows) -> float:
        """Return the mean loss over all guesses in all rows, with one draw for good."""
        self.model.eval()
        found = [self.losses(tokens, rows, 0).cpu() for rows in sequential_batches(tokens.lengths)]
        losses = torch.cat(found)
        if not len(losses):
            raise WrongInput("No word of the held-out rows is to be guessed. Give more or longer text.")
        return losses.mean().item()


def train(task: Guessing, tokens: TokenisedRows, settings: Settings, console: Console) -> tuple[int, float]:
    """Train on all rows, `epochs` times; return steps and seconds."""
    parameters = list(task.model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=_WEIGHT_DECAY, fused=True)
    batches = list(_batches(tokens, settings))
    warmup = round(_WARMUP * len(batches))
    task.model.train()
    started = time.perf_counter()
    shown = track(batches, "Training the generator", console=console)
    for step, rows in enumerate(shown):
        losses = task.losses(tokens, rows, step + 1)
        # Without a word to guess, the sum is 0 and so is its gradient.
        loss: Tensor = losses.sum() / max(1, len(losses))
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(parameters, _MAX_NORM)
        rise, fall = (step + 1) / (warmup + 1), (len(batches) - step) / max(1, len(batches) - warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(rise, fall, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return len(batches), time.perf_counter() - started


def _batches(tokens: TokenisedRows, settings: Settings) -> Iterator[np.ndarray]:
    for epoch in range(settings.epochs):
        yield from epoch_batches(
            tokens.lengths,
            seed=settings.seed,
            epoch=epoch,
            batch_size=settings.batch_size,
            max_tokens=settings.batch_size * settings.max_length,
        )


class Hiding:
    """Hides words of a batch, to be guessed by student and teacher alike, as `corrupt` draws them.

    The batch's labels become the words that stood there, and its inputs' `positions` where they stood.
    """

    def __init__(self, tokenizer: Any, *, seed: int):
        self._seed = seed
        self._rules: dict[str, Any] = {
            "special": frozenset(tokenizer.all_special_ids),
            "mask_id": int(tokenizer.mask_token_id),
            "vocabulary": len(tokenizer),
        }

    def __call__(self, batch: Batch, step: int) -> Batch:
        """Return the batch as a step (from 0) sees it; -1 is the one draw for held-out rows.

        The batch is on the CPU. Where no word was drawn, the first token is guessed as it is: a batch
        without a guess would have no loss.
        """
        given = batch.student
        inputs, positions = corrupt(given, batch.row_ids, **self._rules, seed=self._seed, draw=step + 1)
        if not len(positions):
            positions = torch.zeros(1, dtype=torch.int64)
        goals = given.input_ids.flatten()[positions]
        inputs = replace(inputs, positions=positions)
        return replace(batch, student=inputs, teacher=inputs, labels=goals)
