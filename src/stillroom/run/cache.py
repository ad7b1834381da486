"""The teacher recorded ahead of the runs that read it."""

from typing import Any

from rich.console import Console

from stillroom import methods, preflight
from stillroom.errors import WrongInput
from stillroom.recipe import Recipe
from stillroom.run.parts import Common, Parts
from stillroom.teacher.cache import caches_folder
from stillroom.teacher.recorded import columns_of


def build(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Record what a run of the recipe reads of its teacher, so that the run finds it there.

    Args:
        recipe: The run's. With `teacher.cache: auto` a run has to have several epochs, or be one of
            several in a comparison, to look there.
        console: Where progress goes; standard error by default.

    Returns:
        `recorded`, the names of what is there now; `bytes` of the whole cache; `recording_seconds`.

    Raises:
        WrongInput: If anything is not as expected, as for the run, or there is nothing to record.
        RunFailed: If the disk is full; what is finished stays, and the next call goes on.
    """
    console = console or Console(stderr=True)
    preflight.require_one_process()
    recipe = methods.resolve(recipe)
    if recipe.teacher is None:
        raise WrongInput("Expected a teacher to record, found soft labels alone. Give --teacher.")
    if recipe.teacher.cache == "off":
        raise WrongInput("Expected a cache to build, found teacher.cache=off. Set it to auto or a folder.")
    parts = Parts.of(recipe, Common.load(recipe, console), console)
    if not any(map(columns_of, parts.plan.teacher_needs_of_stages())):
        raise WrongInput(f"The method {recipe.method.name} reads nothing of a teacher: nothing to record.")
    preflight.check(parts.to_check(recipe, caches_folder(), repeated=True), console)
    return parts.chosen_teacher(recipe, parts.live_teacher(), console, repeated=True).served()
