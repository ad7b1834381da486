"""Which text columns a trained model reads, as the folder of its run says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom import durable
from stillroom.data import builtin
from stillroom.data.tasks import GLUE
from stillroom.errors import WrongInput
from stillroom.recipe import read_yaml

# As `provenance` names them, which imports torch.
_RECIPE, _METRICS = "recipe.yaml", "metrics.json"
_INSIDE = ("student", "control", "deploy")
"""Folders of models inside a run."""


def text_of(model: str | Path) -> tuple[str, ...] | None:
    """Return the one or two text columns that a model was trained on, or None where nothing says so.

    Args:
        model: A run folder, a model inside one, or anything else, of which nothing is known.
    """
    folder = Path(model).absolute()
    while not (folder / _RECIPE).is_file():
        if folder.name not in _INSIDE:
            return None
        folder = folder.parent
    try:
        recipe = read_yaml(folder / _RECIPE)
        metrics = durable.read_json(folder / _METRICS) if (folder / _METRICS).is_file() else {}
    except WrongInput:
        return None
    dataset = recipe.get("dataset")
    asked = dataset if isinstance(dataset, Mapping) else {"name": dataset}
    named = {**GLUE, **builtin.TASKS}.get(str(asked.get("name")))
    # A recipe that names no columns leaves them to the file; what they were stands in the metrics.
    found = metrics.get("text") or asked.get("text") or (list(named.text) if named else None)
    return as_columns(found)


def as_columns(found: Any) -> tuple[str, ...] | None:
    """Return one or two names of columns that stand in a file, or None if it holds something else."""
    if not isinstance(found, list) or len(found) not in (1, 2):
        return None
    return tuple(map(str, found))


def was_trained_on(text: tuple[str, ...]) -> str:
    """Return how messages say what a model reads.

    Example:
        >>> was_trained_on(("premise", "hypothesis"))
        "The model was trained on two texts ('premise' and 'hypothesis')"
    """
    return f"The model was trained on {('one text', 'two texts')[len(text) - 1]} ({listed(text)})"


def listed(text: tuple[str, ...]) -> str:
    """Return how messages name text columns.

    Example:
        >>> listed(("premise", "hypothesis"))
        "'premise' and 'hypothesis'"
    """
    return " and ".join(map(repr, text))
