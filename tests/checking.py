"""A distillation of the toy task that is sound, ways to spoil it, and what the checks find."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stillroom import preflight
from stillroom.data.tasks import Dataset, Kind
from stillroom.data.tokens import Tokens, fingerprint
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.generator import Generator
from stillroom.recipe import TrainingSettings
from tiny import make_dataset, make_encoder, make_generator, make_plan, make_teacher, make_tokens

QUIET = Console(quiet=True)
SETTINGS = {"epochs": 2, "batch_size": 8}


def make_run(
    folder: Path,
    *,
    kind: Kind = "classification",
    pair: bool = False,
    dataset: Dataset | None = None,
    teacher: Encoder | None = None,
    student: Encoder | None = None,
    method: str = "lrc-bert",
    max_length: int = 32,
    control: bool = False,
    options: dict[str, Any] | None = None,
    generator: Generator | None = None,
    **settings: Any,
) -> preflight.Run:
    """Return a distillation of the toy task by a teacher that solves it; nothing is wrong with it."""
    dataset = dataset or make_dataset(kind, pair=pair)
    teacher = teacher or make_teacher(dataset.task.kind, pair=pair)
    student = student or make_encoder(task=dataset.task)
    options = options or {}
    plan = make_plan(student, teacher, dataset.task, len(dataset.splits["train"]), method=method, **options)

    def tokens_of(model: Encoder) -> dict[str, Any]:
        most = min(max_length, model.positions)
        return {name: make_tokens(rows, model, max_length=most) for name, rows in dataset.splits.items()}

    ours, theirs = tokens_of(student), tokens_of(teacher)
    alike = fingerprint(student.tokenizer) == fingerprint(teacher.tokenizer)
    same = alike and student.positions == teacher.positions
    return preflight.Run(
        dataset,
        max_length,
        TrainingSettings(**{**SETTINGS, **settings}),
        student,
        teacher,
        plan,
        Tokens(ours, ours if same else theirs),
        folder,
        False,
        control,
        generator,
    )


def check(run: preflight.Run) -> dict[str, Any]:
    return preflight.check(run, QUIET)


def problem(run: preflight.Run) -> str:
    """Return the one problem that the checks find."""
    with pytest.raises(WrongInput) as caught:
        check(run)
    text = str(caught.value)
    assert "problems before the first step" not in text, text
    return text


def with_rows(dataset: Dataset, split: str, **changes: Any) -> Dataset:
    rows = replace(dataset.splits[split], **changes)
    return replace(dataset, splits={**dataset.splits, split: rows})


def with_texts(split: str, texts: Sequence[str]) -> Dataset:
    """Return the toy data with the first texts of a split replaced."""
    dataset = make_dataset()
    old = dataset.splits[split].texts[0]
    return with_rows(dataset, split, texts=([*texts, *old[len(texts) :]],))


def make_augmented(folder: Path, **given: Any) -> preflight.Run:
    given = {"method": "cilda", "options": {"generator": "tiny"}, "generator": make_generator(), **given}
    return make_run(folder, **given)
