"""How a run begins: which recipe, in which folder, from what."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from stillroom import durable, processes, provenance
from stillroom.errors import WrongInput
from stillroom.provenance import CONTROL, INPUTS, RECIPE, environment
from stillroom.recipe import PretrainRecipe, Recipe

R = TypeVar("R", Recipe, PretrainRecipe)


def asked(given: R | None, kind: type[R], folder: Path, resolve: Callable[[R], R], *, resume: bool) -> R:
    """Return the recipe as `resolve` spells it out: the given one, or with `resume` the folder's.

    Raises:
        WrongInput: If there is nothing to resume in the folder, or a recipe is not as expected.
    """
    with processes.together():
        if resume:
            path = folder / RECIPE
            if not path.exists():
                raise WrongInput(
                    f"{folder} is no run to resume: it has no {RECIPE}. A run writes it once its checks "
                    "have passed; start it again without --resume."
                )
            given = kind.load(path)
        if given is None:
            raise ValueError("a run needs a recipe, or resume=True")
        return resolve(given)


@contextlib.contextmanager
def held(
    folder: Path | None, *, resume: bool, dry_run: bool, besides: Path | None = None
) -> Iterator[None]:
    """Hold the run folder for these processes, without what a killed run was writing.

    Args:
        folder: New or empty, but with `resume`; a dry run may have none.
        resume: Whether a run is there.
        dry_run: Whether nothing is to be written.
        besides: An entry of the folder that may be there.

    Raises:
        WrongInput: If the folder is not as expected, or another process writes it.
    """
    if folder is None:
        if not dry_run:
            raise ValueError("a run needs a folder; only a dry run goes without")
        yield
        return
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_main():
                if not dry_run:
                    stack.enter_context(durable.locked(folder))
                    for place in (folder, folder / CONTROL):
                        durable.remove_leftovers(place)
                if not resume:
                    remedy = "Give another folder, or go on with --resume."
                    # A run that was killed before it wrote its recipe left no more than its inputs.
                    allowed = [INPUTS] if besides is None else [INPUTS, besides.name]
                    durable.require_empty(folder, remedy, besides=allowed)
        yield


def begin(
    recipe: R, folder: Path, inputs: dict[str, str], console: Console, *, bf16: bool, resume: bool
) -> R:
    """Write down what the run starts from, or with `resume` check that it still is that.

    Args:
        recipe: Resolved; the folder keeps it.
        folder: The run folder.
        inputs: Hashes of all that the student is made from.
        console: Where warnings go.
        bf16: Whether the run computes in bf16.
        resume: Whether the folder holds what it started from.

    Returns:
        The recipe with the precision spelt out, so that it stays what it is on a machine without bf16.

    Raises:
        WrongInput: If what a resumed run starts from changed.
    """
    machine = environment(bf16=bf16)
    if resume:
        provenance.require_same(folder, inputs, machine, console, _settings(recipe))
        return recipe
    training = recipe.training.model_copy(update={"precision": machine["precision"]})
    recipe = recipe.model_copy(update={"training": training})
    provenance.save(folder, inputs, machine, _settings(recipe))
    recipe.save(folder / RECIPE)
    return recipe


# Not `checkpoint_every`: a checkpoint rounds the words that no row has, whose decay waits until then.
_HARMLESS = {"keep_checkpoints", "log_every", "log_with"}
"""Settings of the training that a run may be resumed with changed: its student is the same."""


def _settings(recipe: Recipe | PretrainRecipe) -> dict[str, Any]:
    """Return what the recipe says of the training and its method, by key. Models and rows have hashes."""
    found = recipe.model_dump(mode="json", include={"training", "method"})
    return {
        f"{part}.{key}": value
        for part in found
        for key, value in found[part].items()
        if key not in _HARMLESS and key != "generator"
    }
