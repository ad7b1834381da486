"""The protocol: a method is stages of weighted terms, on inputs that may be perturbed first."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Needs, Outputs
from stillroom.recipe import Settings


@dataclass(frozen=True)
class Context:
    """What a method may know of the run it is built for."""

    kind: Kind
    classes: int
    """Width of the logits."""
    rows: int
    """Training rows, for terms that keep something of each."""
    student_depth: int
    student_width: int
    teacher_depth: int
    teacher_width: int


class Term(nn.Module, ABC):
    """One unweighted part of a loss: what student and teacher compute on the same rows, compared.

    Projections are parameters, memory banks are buffers, so both train, move and checkpoint with
    the term; none of it is saved with the student. Inputs are float32, autocast is off.
    """

    student_needs: Needs = Needs()
    teacher_needs: Needs = Needs()
    same_tokens: bool = False
    """Whether states are compared token by token, so that both must tokenise alike."""
    same_heads: bool = False
    """Whether attention is compared head by head, so that both must have equally many heads."""
    least_rows: int = 1
    """Fewest rows in a batch: contrastive terms need two."""

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the term as a scalar; the teacher's outputs carry no gradient."""

    def after_step(self) -> None:
        """Update state that no gradient moves, once per optimiser step. Nothing by default."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training: from which fraction of the steps on, which terms, which weights.

    Terms that are not named are not computed. `perturb` says whether the method's perturbation is
    used in this stage.
    """

    start: float
    weights: Mapping[str, float]
    perturb: bool = False


@dataclass(frozen=True)
class Perturbation:
    """Move the student's embeddings along their own gradient before the step that counts."""

    epsilon: float
    norm: Literal["token", "tensor"]


@dataclass(frozen=True)
class Plan:
    """What a method does in a given context: terms by name, stages in order, a perturbation."""

    terms: Mapping[str, Term]
    stages: tuple[Stage, ...]
    perturbation: Perturbation | None = None

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stages must start at 0 and rise, found {starts}")
        for stage in self.stages:
            unknown = set(stage.weights) - set(self.terms)
            if unknown or not stage.weights:
                raise ValueError(f"a stage needs terms of the plan, found {sorted(stage.weights)}")

    def student_needs(self, stage: Stage) -> Needs:
        """Return what the stage's terms read of the student."""
        return _sum_needs(self.terms[name].student_needs for name in stage.weights)

    def teacher_needs(self, stage: Stage) -> Needs:
        """Return what the stage's terms read of the teacher."""
        return _sum_needs(self.terms[name].teacher_needs for name in stage.weights)


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
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training defaults of the paper, used where a recipe sets none."""


def _sum_needs(needs: Any) -> Needs:
    total = Needs()
    for need in needs:
        total = total | need
    return total
