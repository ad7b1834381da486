"""The protocol: a method is stages of weighted terms, on rows that may be perturbed or augmented first."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Encoder, Needs, Outputs, sum_needs
from stillroom.processes import Unit
from stillroom.recipe import Settings


@dataclass(frozen=True)
class Context:
    """What a method may know of the run it is built for. `of` reads most of it off the two encoders."""

    kind: Kind
    classes: int
    """Width of the logits."""
    rows: int
    """Training rows, for terms that keep something of each."""
    student_depth: int
    student_width: int
    teacher_depth: int
    teacher_width: int
    labels: np.ndarray | None = None
    """Labels of the training rows, as in `Rows`, for terms that draw rows by label."""
    basis: Tensor | None = None
    """P, `(teacher width, student width)`, where a student's state stands for ``P^T h`` of the teacher's h:
    projections start there. None where nothing is known."""

    @classmethod
    def of(
        cls,
        student: Encoder,
        teacher: Encoder,
        *,
        kind: Kind,
        classes: int,
        rows: int,
        labels: np.ndarray | None = None,
    ) -> "Context":
        """Return the context of these two encoders.

        Args:
            student: Gives its depth, its width, and the basis if it has one.
            teacher: Gives its depth and width.
            kind: Of the task.
            classes: Width of the logits.
            rows: How many training rows there are.
            labels: Of these rows, shape `(rows,)` or for multi-label `(rows, classes)`.

        Raises:
            ValueError: If there are not as many labels as rows.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> small = {"vocab_size": 9, "num_attention_heads": 2, "intermediate_size": 8}
            >>> student, teacher = (
            ...     Encoder(BertModel(BertConfig(hidden_size=4 * n, num_hidden_layers=n, **small)), None)
            ...     for n in (2, 3)
            ... )
            >>> Context.of(student, teacher, kind="classification", classes=2, rows=100).teacher_width
            12
        """
        if labels is not None and len(labels) != rows:
            raise ValueError(f"expected a label for each of {rows} training rows, found {len(labels)}")
        return cls(
            kind,
            classes,
            rows,
            student.depth,
            student.width,
            teacher.depth,
            teacher.width,
            labels,
            student.basis,
        )


class Term(nn.Module, ABC):
    """One unweighted part of a loss: what student and teacher compute on the same rows, compared.

    Projections are parameters, memory banks are buffers, so both train, move and checkpoint with
    the term; none of it is saved with the student. Inputs are float32, autocast is off: only a
    projection may be multiplied in bf16.

    Example:
        >>> class LogitDistance(Term):
        ...     student_needs = teacher_needs = Needs(logits=True)
        ...
        ...     def forward(self, student, teacher, batch):
        ...         return (student.logits - teacher.logits).square().mean()
        >>> plan = Plan({"distance": LogitDistance()}, (Stage(0.0, {"distance": 1.0}),))
        >>> plan.teacher_needs(plan.stages[0]).logits
        True
    """

    student_needs: Needs = Needs()
    teacher_needs: Needs = Needs()
    same_tokens: bool = False
    """Whether states are compared token by token, so that both must tokenise alike."""
    same_heads: bool = False
    """Whether attention is compared head by head, so that both must have equally many heads."""
    least_rows: int = 1
    """Fewest rows in a batch: contrastive terms need two."""
    mean_over: Unit = "rows"
    """What the value is a mean over. Where several processes share a batch, each gives the value of its
    own rows, and the loss is their sum, each weighed by its part of the batch's rows (tokens, pairs of
    tokens). A term that compares rows with each other meets the others' through `batch.share`."""
    bf16: bool = False
    """Whether projections are multiplied in bf16 (`ops.projection.project`); the loop says so."""

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the term as a scalar.

        The teacher's outputs carry no gradient, but in a generator step, for terms that it raises.
        """

    def after_step(self) -> None:
        """Update state that no gradient moves, once per optimiser step. Nothing by default."""

    def record(self) -> dict[str, Any]:
        """Return what a line of log.jsonl says of the last step beside the loss: plain JSON values.

        Called when a line is written, never in between, and written as `record.<name of the term>`.
        It must not wait for the device. Empty by default.
        """
        return {}


@dataclass(frozen=True)
class Stage:
    """A stretch of training: from which fraction of the steps on, which terms, which weights.

    Terms that are not named are not computed. `perturb` says whether the method's perturbation is
    used in this stage. `augmented` weighs terms that are computed on augmented rows, beside
    `weights` on the rows as they are; a term may stand in both.
    """

    start: float
    weights: Mapping[str, float]
    perturb: bool = False
    augmented: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Perturbation:
    """Move the student's embeddings along their own gradient before the step that counts."""

    epsilon: float
    norm: Literal["token", "tensor"]


@dataclass(frozen=True)
class Augmentation:
    """Rewrite masked words with a masked language model, the generator, trained against the student.

    Of every `generator_steps + student_steps` steps the first ones move the generator, so that
    `weights` times terms on augmented rows rises, and the others move the student.
    """

    generator: str
    """A folder or hub id of a masked language model."""
    weights: Mapping[str, float]
    """Which terms the generator raises, with which weights."""
    mask_probability: float
    masks: Literal["fresh", "fixed"]
    """Whether a row's masked words are drawn anew in every step, or once for all of them."""
    generator_steps: int
    student_steps: int
    learning_rate: float
    """Peak rate of the generator; it rises and falls as the student's does."""
    student_mode: Literal["eval", "train"]
    """Whether the student has dropout in generator steps. With `train` the generator always has it."""
    projections: Literal["frozen", "adv", "min"] = "frozen"
    """In generator steps the terms' own parameters stay, raise the terms as well, or lower them."""

    def moves_generator(self, step: int) -> bool:
        """Return whether a step (from 0) is a generator step.

        Example:
            >>> rule = Augmentation("g", {"soft": 1.0}, 0.3, "fresh", 10, 100, 5e-7, "eval")
            >>> [rule.moves_generator(step) for step in (0, 9, 10, 109, 110)]
            [True, True, False, False, True]
        """
        return step % (self.generator_steps + self.student_steps) < self.generator_steps


@dataclass(frozen=True)
class Plan:
    """What a method does in a given context: terms by name, stages in order, changes of the input."""

    terms: Mapping[str, Term]
    stages: tuple[Stage, ...]
    perturbation: Perturbation | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        # Terms become parts of a module, beside its attributes, and columns of the log.
        taken = nn.ModuleDict()
        wrong = [name for name in self.terms if not name or "." in name or hasattr(taken, name)]
        if wrong:
            raise ValueError(
                f"expected names of terms such as soft, found {', '.join(map(repr, wrong))}, which a torch "
                "module cannot have as parts: empty, with a dot, or attributes of its own. Rename them"
            )
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stages must start at 0 and rise, found {starts}")
        raised = {} if self.augmentation is None else self.augmentation.weights
        for stage in self.stages:
            named = {*stage.weights, *stage.augmented, *raised}
            if named - set(self.terms) or not stage.weights:
                raise ValueError(f"a stage needs terms of the plan, found {sorted(named)}")
            if stage.augmented and self.augmentation is None:
                raise ValueError("terms on augmented rows need an augmentation")
        if self.perturbation is not None and self.augmentation is not None:
            raise ValueError("a plan perturbs or augments its rows, it does not do both")

    def stage_at(self, step: int, steps: int) -> tuple[int, Stage]:
        """Return the number (from 1) and the stage of a step (from 0) of so many.

        A stage starts at its share of the steps, or where all stages get one. Where there are fewer
        steps than stages, the last stages start when training is over.

        Example:
            >>> from stillroom.methods.kd import METHOD, KDSettings
            >>> terms = METHOD.build(KDSettings(), Context("classification", 2, 8, 2, 4, 4, 4)).terms
            >>> plan = Plan(terms, (Stage(0.0, {"soft": 1.0}), Stage(0.8, {"hard": 1.0})))
            >>> [plan.stage_at(step, 10)[0] for step in (0, 7, 8, 9)]
            [1, 1, 2, 2]
        """
        count = len(self.stages)
        starts = [
            max(i, min(round(stage.start * steps), steps - (count - i))) if stage.start < 1 else steps
            for i, stage in enumerate(self.stages)
        ]
        number = max(i for i, start in enumerate(starts) if start <= step)
        return number + 1, self.stages[number]

    def used_terms(self) -> dict[str, Term]:
        """Return the terms that some step computes."""
        used = set() if self.augmentation is None else set(self.augmentation.weights)
        used = used.union(*({*stage.weights, *stage.augmented} for stage in self.stages))
        return {name: term for name, term in self.terms.items() if name in used}

    def head_is_taught(self, number: int) -> bool:
        """Return whether stage `number` (from 1) or one before it reads the student's logits, if any does.

        Before that its metrics are those of the head that it started with, and select nothing.
        """
        taught = [self.student_needs(stage).logits for stage in self.stages]
        return any(taught[:number]) or not any(taught)

    def student_needs(self, stage: Stage) -> Needs:
        """Return what the stage's terms read of the student, on the rows as they are."""
        return sum_needs(self.terms[name].student_needs for name in stage.weights)

    def teacher_needs(self, stage: Stage) -> Needs:
        """Return what the stage's terms read of the teacher, on the rows as they are."""
        return sum_needs(self.terms[name].teacher_needs for name in stage.weights)

    def teacher_needs_of_stages(self) -> list[Needs]:
        """Return what the terms of each stage read of the teacher, on the rows as they are."""
        return [self.teacher_needs(stage) for stage in self.stages]

    def augmented_needs(self, names: Iterable[str]) -> tuple[Needs, Needs]:
        """Return what terms read of student and teacher on augmented rows."""
        terms = [self.terms[name] for name in names]
        return sum_needs(t.student_needs for t in terms), sum_needs(t.teacher_needs for t in terms)


@dataclass(frozen=True)
class Method:
    """A named recipe of terms, with where it comes from."""

    name: str
    title: str
    paper: str
    """Citation with arXiv number, or "" where there is none."""
    summary: str
    """One sentence for the methods table."""
    status: str
    """How it relates to the paper, for the methods table."""
    settings: type[Settings]
    build: Callable[[Any, Context], Plan]
    """Settings and context to a plan; raises `WrongInput` where they do not fit."""
    terms: Mapping[str, str]
    """By the name of each term that a plan may have what it does, for readers of a report."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training defaults of the paper, used where a recipe sets none."""
    pretrain: Callable[[Any, Context], Plan] | None = None
    """As `build`, for text without labels: task-agnostic distillation, where the method has it."""
    masked_lm: bool = False
    """Whether logits in `pretrain` are those of a masked LM at hidden words, and labels these words."""
