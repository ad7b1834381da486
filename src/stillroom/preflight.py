"""Every check that can be made before the first step."""

from pathlib import Path
from typing import Any

from rich.console import Console

from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, Tokens
from stillroom.encoder import Encoder
from stillroom.methods.base import Plan
from stillroom.recipe import Recipe


def check_run(
    recipe: Recipe,
    dataset: Dataset,
    teacher: Encoder,
    student: Encoder,
    plan: Plan,
    tokens: Tokens,
    folder: Path,
    *,
    bf16: bool,
    console: Console,
) -> dict[str, Any]:
    """Check a distillation."""
    return {}


def check_data(
    dataset: Dataset,
    tokens: dict[str, TokenisedRows],
    folder: Path,
    model: Encoder,
    *,
    console: Console,
) -> dict[str, Any]:
    """Check data and folder of a fine-tuning."""
    return {}
