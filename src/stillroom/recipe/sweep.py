"""What a sweep is: a recipe, and the values of its keys that are tried."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from stillroom.errors import WrongInput
from stillroom.recipe.problems import validate
from stillroom.recipe.recipes import Recipe
from stillroom.recipe.settings import Settings, require_different
from stillroom.recipe.syntax import read_value, set_value, write_yaml


class Range(Settings):
    """Numbers from `low` to `high`, drawn evenly, or evenly by their logarithm."""

    low: float
    """The least."""
    high: float
    """The most."""
    log: bool = False
    """Whether each power of ten is as likely."""
    whole: bool = False
    """Whether only whole numbers are drawn."""

    @model_validator(mode="after")
    def _low_to_high(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            least = " from above 0" if self.log else ""
            raise ValueError(f"expected a range from low to high{least}, found {self}")
        return self

    def __str__(self) -> str:
        low, high = (int(end) if self.whole else end for end in (self.low, self.high))
        return f"{low}:{high}" + (":log" if self.log else "")


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})(:log)?")


def read_tries(text: str) -> Range | list[Any]:
    """Return the values to try that a text means: a range `LOW:HIGH[:log]`, or values with commas between.

    A comma inside brackets belongs to a value, and so does one before a layer's number in `layers:2,4,6`.
    A range between whole numbers has whole numbers.

    Example:
        >>> read_tries("0,1,off"), read_tries("4x312,layers:2,4"), read_tries("[1,2],[2,4]")
        ([0, 1, 'off'], ['4x312', 'layers:2,4'], [[1, 2], [2, 4]])
        >>> str(read_tries("1e-5:1e-3:log")), read_tries("1:4").whole
        ('1e-05:0.001:log', True)
    """
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        parts = re.split(r",(?![^\[]*\])", text)
        joined: list[str] = []
        for part in parts:
            if joined and joined[-1].lstrip().startswith("layers:") and part.strip().isdecimal():
                joined[-1] += f",{part}"
            else:
                joined.append(part)
        try:
            return [read_value(part) for part in joined]
        except yaml.YAMLError as error:
            raise WrongInput(f"--try {text}: the values are not YAML: {error}") from None
    low, high, log = found.groups()
    whole = low.lstrip("+-").isdecimal() and high.lstrip("+-").isdecimal()
    return validate(Range, {"low": float(low), "high": float(high), "log": bool(log), "whole": whole})


class Sweep(Recipe):
    """All of a sweep: a recipe, keys of it that are tried, and what is better. Saved as `sweep.yaml`."""

    tries: Annotated[dict[str, Range | list[Any]], Field(min_length=1)]
    """By key of the recipe: `LOW:HIGH`, `LOW:HIGH:log`, or a list of values."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """How many runs. Default: every combination where all keys have lists, else 20."""
    objectives: Annotated[tuple[Literal["quality", "latency", "size"], ...], Field(min_length=1)] = (
        "quality",
    )
    """`quality` (the first metric), `latency` (ms per example), `size` (bytes of the weights)."""
    split: Literal["held-out", "validation"] = "held-out"
    """What is scored: a tenth of the training rows, which is not trained on, or the validation split."""
    prune: bool = True
    """Stop runs whose evaluations are below the median of earlier runs; with one objective only."""

    @model_validator(mode="before")
    @classmethod
    def _texts_are_ranges_or_lists(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("tries"), Mapping):
            tries = {
                key: read_tries(given) if isinstance(given, str) else given
                for key, given in values["tries"].items()
            }
            values = {**values, "tries": tries}
        return values

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        require_different("objectives", self.objectives)
        for key, given in self.tries.items():
            if isinstance(given, list) and not given:
                raise ValueError(f"expected values for {key}, found none")
        return self

    def recipe(self, tried: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a run that tries these values.

        Raises:
            WrongInput: If a key or a value is not one of a recipe.
        """
        own = set(Sweep.model_fields) - set(Recipe.model_fields)
        values = self.model_dump(mode="json", exclude=own, exclude_unset=True)
        for key, value in tried.items():
            # JSON is YAML; a value may hold what YAML would read otherwise.
            set_value(values, f"{key}={json.dumps(value)}")
        return validate(Recipe, values)

    def save(self, path: Path) -> None:
        """Write it as YAML."""
        values = self.model_dump(mode="json", exclude_unset=True)
        values["tries"] = {
            key: str(given) if isinstance(given, Range) else given for key, given in self.tries.items()
        }
        write_yaml(path, values)
