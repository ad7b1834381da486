"""Rows with other words in them: a generator proposes, and learns to make teacher and student differ.

As in MATE-KD (Rashid et al. 2021, arXiv 2105.05912) and CILDA (Haidar et al. 2022, arXiv 2204.07674).
Shapes: B batch, S tokens, n masked positions, V words, D width of a table of word embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Encoder, Outputs
from stillroom.generator import Generator
from stillroom.methods.base import Plan, Stage
from stillroom.processes import sum_gradients
from stillroom.teacher.live import LiveTeacher
from stillroom.training.distiller import Augmented, Distiller, Loss

_LEAST_NOISE = 1e-20


def masked_positions(
    inputs: Inputs, row_ids: Tensor, *, special: frozenset[int], probability: float, seed: int, draw: int
) -> Tensor:
    """Return the positions that are masked, each word with the same probability, independently.

    Special tokens and padding never are. A pure function of its arguments: what a row gets does not
    depend on the rows beside it, and a resumed run draws what it would have drawn.

    Args:
        inputs: A batch on the CPU.
        row_ids: Number of each row in its split, shape `(B,)`.
        special: Ids that are not words.
        probability: Of each word.
        seed: The run's seed.
        draw: Number of the draw: another one, another mask.

    Returns:
        Positions in the flattened `(B, S)`, int64 and rising, shape `(n,)`.

    Example:
        >>> ids = torch.tensor([[2, 7, 8, 3, 0]])
        >>> inputs = Inputs(ids, torch.tensor([[1, 1, 1, 1, 0]]), None)
        >>> rule = {"special": frozenset({2, 3}), "probability": 1.0, "seed": 0, "draw": 0}
        >>> masked_positions(inputs, torch.tensor([0]), **rule).tolist()
        [1, 2]
    """
    ids = inputs.input_ids.numpy()
    chance = np.ones(ids.shape)
    for i, row in enumerate(row_ids.tolist()):
        # The third word of the counter keeps these numbers apart from those of the row order.
        stream = np.random.Philox(key=[seed, row], counter=[0, 0, 1, draw])
        chance[i] = np.random.Generator(stream).random(ids.shape[1])
    word = (inputs.attention_mask.numpy() == 1) & ~np.isin(ids, sorted(special))
    return torch.from_numpy(np.flatnonzero(word & (chance < probability)))


def gumbel_like(logits: Tensor) -> Tensor:
    """Return Gumbel noise ``-log E`` with ``E`` exponential, from torch's random state.

    Args:
        logits: Only shape, dtype and device are read.

    Returns:
        Same shape and dtype, without gradient.

    Example:
        >>> gumbel_like(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return -torch.empty_like(logits).exponential_().clamp_(min=_LEAST_NOISE).log_()


class _StraightThrough(torch.autograd.Function):
    """Rows of a table, with the gradient of ``soft @ table``. The table gets none."""

    @staticmethod
    def forward(context: Any, soft: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        context.save_for_backward(table)
        return table[ids]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (table,) = context.saved_tensors
        return gradients[0] @ table.mT, None, None


def mixed_words(ids_BS: Tensor, positions: Tensor, scores_nV: Tensor, table_VD: Tensor) -> Tensor:
    """Return word embeddings with the highest-scored words at `positions`, all others as they are.

    Straight-through: the value is ``onehot(argmax scores) E``, the gradient that of
    ``softmax(scores) E``, that is, of ``(onehot - soft).detach() + soft`` times E. No one-hot is made.

    Args:
        ids_BS: The rows as they are, shape ``(B, S)``.
        positions: In the flattened ``(B, S)``, shape ``(n,)``.
        scores_nV: Logits plus Gumbel noise, shape ``(n, V)``; gradients flow here only.
        table_VD: Word embeddings, of which the first V count, shape ``(at least V, D)``.

    Returns:
        Shape ``(B, S, D)``.

    Example:
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ids, scores = torch.tensor([[1, 1]]), torch.tensor([[2.0, 0.0]])
        >>> mixed_words(ids, torch.tensor([0]), scores, table).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    table_VD = table_VD.detach()
    words = table_VD[ids_BS.flatten()]
    soft = scores_nV.softmax(-1)
    known = table_VD[: scores_nV.shape[1]]
    new: Tensor = _StraightThrough.apply(soft, scores_nV.argmax(-1), known)  # type: ignore[no-untyped-call]
    return words.index_copy(0, positions, new).view(*ids_BS.shape, -1)


def with_words(inputs: Inputs, positions: Tensor, ids: Tensor) -> Inputs:
    """Return the inputs with other ids at some positions; all else is shared with what is given.

    Args:
        inputs: A batch.
        positions: In the flattened `(B, S)`, int64, shape `(n,)`.
        ids: What stands there now, int64, shape `(n,)`.

    Returns:
        Inputs of the same shape.

    Example:
        >>> ids = torch.tensor([[2, 7, 3]])
        >>> inputs = Inputs(ids, torch.ones_like(ids), None)
        >>> with_words(inputs, torch.tensor([1]), torch.tensor([9])).input_ids.tolist()
        [[2, 9, 3]]
    """
    changed = inputs.input_ids.flatten().index_copy(0, positions, ids)
    return replace(inputs, input_ids=changed.view_as(inputs.input_ids))


class Augmenter:
    """The generator at work: what it writes into the rows, and how it is trained.

    It is no part of the distiller, so that the student's optimiser leaves the generator alone.
    Augmented rows are not known before they are needed: their teacher is the model itself, never a
    recording.
    """

    def __init__(
        self,
        plan: Plan,
        generator: Generator,
        teacher: LiveTeacher,
        distiller: Distiller,
        *,
        seed: int,
        bf16: bool,
    ):
        if plan.augmentation is None:
            raise ValueError("the plan has no augmentation")
        device = next(distiller.parameters()).device
        self.generator = generator.to(device)
        self._plan, self._rule = plan, plan.augmentation
        self._teacher, self._distiller, self._seed, self._bf16 = teacher, distiller, seed, bf16
        tokenizer = generator.tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._pad = int(tokenizer.pad_token_id)
        self._mask = torch.tensor(tokenizer.mask_token_id, device=device)
        # Tables may be longer than the vocabulary, by different amounts.
        self._vocabulary = len(tokenizer)
        own = {
            f"terms.{name}.{key}": parameter
            for name in self._rule.weights
            for key, parameter in plan.terms[name].named_parameters()
        }
        self.trained: dict[str, nn.Parameter] = {
            **{f"generator.{name}": parameter for name, parameter in generator.named_parameters()},
            **({} if self._rule.projections == "frozen" else own),
        }
        """What generator steps move, by name."""
        groups: list[dict[str, Any]] = [{"params": list(generator.parameters()), "maximize": True}]
        if self._rule.projections != "frozen" and own:
            groups.append({"params": list(own.values()), "maximize": self._rule.projections == "adv"})
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=self._rule.learning_rate, weight_decay=0.0, fused=True
        )

    def moves_generator(self, step: int) -> bool:
        """Return whether a step (from 0) is a generator step."""
        return self._rule.moves_generator(step)

    def draw(self, batch: Batch, step: int) -> Tensor:
        """Return the positions that are masked in a step: see `masked_positions`.

        Args:
            batch: Still on the CPU.
            step: Number of the step, from 0.

        Returns:
            Positions in the flattened `(B, S)`, int64, shape `(n,)`, on the generator's device.
        """
        positions = masked_positions(
            batch.student,
            batch.row_ids,
            special=self._special,
            probability=self._rule.mask_probability,
            seed=self._seed,
            draw=step if self._rule.masks == "fresh" else 0,
        )
        return positions.to(self._mask.device, non_blocking=True)

    @torch.no_grad()
    def augment(self, batch: Batch, positions: Tensor, stage: Stage) -> Augmented | None:
        """Return the batch as the generator rewrites it, or None where the stage has no use for it.

        Only the highest score is needed here, so nothing is kept for a gradient.

        Args:
            batch: On the generator's device.
            positions: What `draw` returned for it.
            stage: Says which terms read augmented rows.

        Returns:
            The rows, and what the teacher computes on them.
        """
        if not stage.augmented:
            return None
        self.generator.train(self._rule.student_mode == "train")
        changed = self.rewrite(batch, positions)
        _, needs = self._plan.augmented_needs(stage.augmented)
        return Augmented(changed, self._teacher(changed, needs))

    def rewrite(self, batch: Batch, positions: Tensor) -> Batch:
        """Return the batch with the generator's words in it.

        Args:
            batch: On the generator's device.
            positions: Where they stand, in the flattened `(B, S)`, shape `(n,)`.

        Returns:
            The batch, marked as augmented; student and teacher read the same words.
        """
        ids = self._scores(batch, positions).argmax(-1)
        student = with_words(batch.student, positions, ids)
        alike = batch.teacher is batch.student
        teacher = student if alike else with_words(batch.teacher, positions, ids)
        return replace(batch, student=student, teacher=teacher, augmented=True)

    def objective(self, batch: Batch, positions: Tensor) -> Loss:
        """Return what a generator step raises: weighted terms on the batch as it would be rewritten.

        The gradient reaches the generator, through both models' word embeddings, and the terms' own
        parameters; the student's weights, like the teacher's, get none.

        Args:
            batch: On the generator's device.
            positions: What `draw` returned for it.

        Returns:
            The weighted total, and each term under `generator_` and its name.
        """
        student = self._distiller.student
        needs, teacher_needs = self._plan.augmented_needs(self._rule.weights)
        self.generator.train()
        with _frozen(student, training=self._rule.student_mode == "train"):
            scores = self._scores(batch, positions)
            words = mixed_words(batch.student.input_ids, positions, scores, student.words)
            with self._autocast(), batch.share.own_random(4):
                outputs: Outputs = student(batch.student, needs, words=words)
            words = mixed_words(batch.teacher.input_ids, positions, scores, self._teacher.encoder.words)
            teacher = self._teacher.of_words(batch.teacher, teacher_needs, words)
            loss = self._distiller.weigh(outputs, teacher, batch, self._rule.weights)
        return Loss(loss.total, {f"generator_{name}": value for name, value in loss.terms.items()})

    def step(self, rate: float, share: float, *, max_norm: float) -> Tensor:
        """Move the generator, and the terms' own parameters as set; return the gradient's norm.

        Where several processes train together their gradients are added up first.

        Args:
            rate: The student's learning rate in this step.
            share: Of its peak that this is; the generator's rate is that share of its own peak.
            max_norm: The gradient is clipped to this 2-norm.
        """
        sum_gradients(self.trained.values())
        norm = clip_grad_norm_(self.trained.values(), max_norm)
        for group in self.optimizer.param_groups:
            # Parameters that lower a term learn as those of any term do.
            group["lr"] = self._rule.learning_rate * share if group["maximize"] else rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _scores(self, batch: Batch, positions: Tensor) -> Tensor:
        """Return logits plus Gumbel noise at `positions`, float32, shape `(n, V)`."""
        inputs = batch.student if batch.student.token_type_ids is not None else batch.teacher
        masked = with_words(inputs, positions, self._mask.expand(len(positions)))
        with self._autocast(), batch.share.own_random(3):
            logits = self.generator.guess(masked, positions)
        logits = logits[:, : self._vocabulary].float()
        # Where several processes share a batch each word gets the noise that it would get in one.
        noise = batch.share.own_part(
            lambda n: gumbel_like(logits.new_empty(n, logits.shape[1])), len(logits)
        )
        scores: Tensor = logits + noise
        # Padding inside a text is no text; RoBERTa would even count its positions otherwise.
        scores[:, self._pad] = -torch.inf
        return scores

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._mask.device.type, torch.bfloat16, enabled=self._bf16)


@contextmanager
def _frozen(student: Encoder, *, training: bool) -> Iterator[None]:
    """Compute no gradient for the student's weights meanwhile, in evaluation or training mode."""
    before = student.training
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.train(training).requires_grad_(False)
    try:
        yield
    finally:
        student.train(before)
        for parameter in trained:
            parameter.requires_grad_(True)
