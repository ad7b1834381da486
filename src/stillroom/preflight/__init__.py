"""Every check that can be made before the first step, so that no day is lost to a wrong input."""

from typing import Any

from rich.console import Console

from stillroom.preflight import data, folder, models, soft_labels, teacher
from stillroom.preflight.base import Check, Report, Run
from stillroom.preflight.folder import require_one_process
from stillroom.preflight.models import require_same_head

__all__ = [
    "Run",
    "check",
    "check_augmentation",
    "check_pretraining",
    "require_one_process",
    "require_same_head",
]

_FIRST: tuple[Check, ...] = (data.labels, models.vocabulary)
"""What must hold before a model can be scored on the rows."""

_REST: tuple[Check, ...] = (
    models.label_names,
    models.same_tokens,
    models.layers,
    models.attention,
    models.perturbation,
    models.augmentation,
    data.batches,
    data.blank_texts,
    data.repeated_rows,
    data.augmented_rows,
    soft_labels.soft_labels,
    data.truncation,
    folder.trackers,
    folder.disk,
)


def check(run: Run, console: Console) -> dict[str, Any]:
    """Make every check, print the warnings, and return what was found.

    Args:
        run: What is about to be trained.
        console: Where the warnings go.

    Returns:
        Plain values, ready for JSON: rows, labels, teacher's score, steps, disk and more, and the
        warnings under `warnings`.

    Raises:
        WrongInput: With every problem that was found, numbered where there are several.
    """
    report = Report()
    for examine in _FIRST:
        examine(run, report)
    if not report.errors:
        teacher.solves_the_task(run, report)
    for examine in _REST:
        examine(run, report)
    if not report.errors:
        models.trial(run, report)
    return report.close(console)


def check_pretraining(run: Run, console: Console) -> dict[str, Any]:
    """Make every check that needs no labels, as `check` does."""
    report = Report()
    for examine in (models.layers, models.attention, models.perturbation, folder.trackers, folder.disk):
        examine(run, report)
    if not report.errors:
        models.trial(run, report)
    return report.close(console)


def check_augmentation(run: Run, console: Console) -> None:
    """Check only that generator, teacher and student go together, or raise `WrongInput`."""
    report = Report()
    models.augmentation(run, report)
    report.close(console)
