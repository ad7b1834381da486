"""What the checks are given, and where they report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from stillroom.data.batching import Batch
from stillroom.data.tasks import Dataset, Rows
from stillroom.data.tokens import Tokens
from stillroom.encoder import Encoder, Needs
from stillroom.errors import WrongInput
from stillroom.generator import Generator
from stillroom.methods.base import Plan, Term
from stillroom.recipe import TeacherSettings, TrainingSettings

SPLITS = ("train", "validation")
"""The splits that a run reads."""

_SHOWN = 5


@dataclass(frozen=True)
class Run:
    """What is about to be trained. A fine-tuning is a run without teacher."""

    dataset: Dataset
    max_length: int
    training: TrainingSettings
    student: Encoder
    teacher: Encoder | None
    plan: Plan
    tokens: Tokens
    folder: Path | None
    """Where it is kept; None: nowhere yet, of a dry run."""
    bf16: bool
    control: bool = False
    generator: Generator | None = None
    teacher_logits: np.ndarray | None = None
    """The teacher's logits of the validation rows, where they are known already."""
    recording: TeacherSettings | None = None
    """Where and how much of the teacher is recorded; None: nothing."""
    repeated: bool = False
    """Whether its rows are read more than once."""
    hide: Callable[[Batch, int], Batch] | None = None
    """Hides words of a step's batch, as the loop does."""

    def splits(self) -> list[tuple[str, Rows]]:
        """Return the splits that the run reads, by name."""
        return [(name, self.dataset.splits[name]) for name in SPLITS]

    def models(self) -> list[tuple[str, Encoder]]:
        """Return student and teacher by the name they have in messages."""
        if self.teacher is None:
            return [("model", self.student)]
        return [("student", self.student), ("teacher", self.teacher)]

    def terms(self) -> dict[str, Term]:
        """Return the terms that some stage computes."""
        return self.plan.used_terms()

    def learns_from_teacher(self) -> bool:
        """Return whether any term reads anything of the teacher."""
        return any(term.teacher_needs != Needs() for term in self.terms().values())


@dataclass
class Report:
    """Problems that stop the run, warnings that do not, and facts worth showing."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def error(self, text: str) -> None:
        """Note a problem: expected, found, remedy."""
        self.errors.append(text)

    def warn(self, text: str) -> None:
        """Note a warning."""
        self.warnings.append(text)

    def close(self, console: Console) -> dict[str, Any]:
        """Print the warnings, then raise `WrongInput` if there are errors or return the facts."""
        for text in self.warnings:
            # Label lists look like rich's markup.
            console.print(f"Warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        if len(self.errors) == 1:
            raise WrongInput(self.errors[0])
        if self.errors:
            lines = [f"{i}. {text}" for i, text in enumerate(self.errors, start=1)]
            raise WrongInput(f"{len(lines)} problems before the first step:\n" + "\n".join(lines))
        return {**self.found, "warnings": self.warnings}


@contextmanager
def named(who: str, model: Encoder, *, bf16: bool = False) -> Iterator[None]:
    """Turn what a model raises that cannot compute into `WrongInput` that names its class."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip() or "no reason").splitlines()[0]
        # What else is wrong with a model, float32 does not mend.
        narrow = bf16 and "bfloat16" in reason.lower()
        remedy = "Try --set training.precision=float32, or give" if narrow else "Give"
        raise WrongInput(
            f"The {who}, a {type(model.model).__name__}, cannot compute: {type(error).__name__}: "
            f"{reason.rstrip('.')}. {remedy} a model of another family."
        ) from error


Check = Callable[[Run, Report], None]


def listed(values: Sequence[Any]) -> str:
    """Return `[a, b, c]` without quotes.

    Example:
        >>> listed(("good", "bad"))
        '[good, bad]'
    """
    return f"[{', '.join(map(str, values))}]"


def row_numbers(index: Sequence[int] | np.ndarray) -> str:
    """Return the first few row numbers, counted from 1.

    Example:
        >>> row_numbers([0, 4])
        'rows 1, 5'
    """
    numbers = ", ".join(str(int(i) + 1) for i in index[:_SHOWN])
    more = f" and {len(index) - _SHOWN} more" if len(index) > _SHOWN else ""
    return f"row{'s' if len(index) > 1 else ''} {numbers}{more}"


def shortened(text: str) -> str:
    """Return the text in quotes, cut to 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
