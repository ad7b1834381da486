"""What a comparison is: students, methods and seeds of one teacher and data set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stillroom.recipe.problems import validate
from stillroom.recipe.recipes import Recipe, TaskRecipe
from stillroom.recipe.settings import (
    DatasetSettings,
    MethodSettings,
    Settings,
    TeacherSettings,
    require_different,
)
from stillroom.recipe.syntax import read_method, write_yaml


class VariantSettings(Settings):
    """A method of a comparison: its options, and what it starts from and trains with that others do not."""

    method: MethodSettings
    """The method and its options."""
    training: dict[str, Any] = {}
    """Keys of `training` that hold for this method alone, such as its own learning rate."""
    init: Annotated[str, Field(min_length=1)] | None = None
    """How its students start; by default as the comparison says."""

    @model_validator(mode="before")
    @classmethod
    def _text_stands_for_method(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"method": read_method(values)}
        if isinstance(values, Mapping) and isinstance(values.get("method"), str):
            return {**values, "method": read_method(values["method"])}
        return values


class OutOfDomainSettings(Settings):
    """Rows of another source, to score every student and the teacher on; a text is short for `dataset`."""

    dataset: DatasetSettings
    """Where they come from."""
    split: str | None = None
    """Which split. Default: every row of a single file (`all`), else `validation`."""
    labels: dict[str, str] = {}
    """What labels of the data, or of the models, count as, where it is not the one of the same name."""

    @model_validator(mode="before")
    @classmethod
    def _text_stands_for_dataset(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"dataset": values}
        if isinstance(values, Mapping) and isinstance(values.get("dataset"), str):
            values = {**values, "dataset": {"name": values["dataset"]}}
        return values


_MOST_SEEDS = 1_000
"""Far more than anyone compares, and few enough to write down."""


class Comparison(TaskRecipe):
    """All of a comparison: every student by every method and every seed. Saved as `compare.yaml`."""

    teacher: TeacherSettings
    """The model that is distilled; `teacher: DIR` is short for its name."""
    students: Annotated[tuple[str, ...], Field(min_length=1)] = ("4x312",)
    """Each as a recipe's `student`."""
    init: Annotated[str, Field(min_length=1)] = "auto"
    """How they start: as a recipe's `init`."""
    methods: Annotated[dict[str, VariantSettings], Field(min_length=1)]
    """By the name that tables show. A list of `NAME` or `NAME:OPTION=VALUE:...` is short for it."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0, 1, 2)
    """Values of `training.seed`; a single number N is short for 0 to N - 1."""
    out_of_domain: dict[str, OutOfDomainSettings] = {}
    """Sets of other sources to score teacher and students on, by the name that tables show."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            values = dict(values)
            if isinstance(values.get("methods"), list | tuple):
                names = [str(text) for text in values["methods"]]
                require_different("methods", names)
                values["methods"] = {name: name for name in names}
            count = values.get("seeds")
            if isinstance(count, int):
                if count > _MOST_SEEDS:
                    raise ValueError(
                        f"seeds should be at most {_MOST_SEEDS:,} of each run, found {count:,}"
                    )
                values["seeds"] = list(range(count))
            if isinstance(values.get("training"), Mapping) and "seed" in values["training"]:
                raise ValueError("a comparison has `seeds`, expected no training.seed")
        return values

    @model_validator(mode="after")
    def _some_settings_are_the_comparisons(self) -> Self:
        for name, variant in self.methods.items():
            if "seed" in variant.training:
                raise ValueError(f"a comparison has `seeds`, expected no training.seed of {name}")
            for key in ("precision", "packed"):
                # All runs read one teacher, which is computed in one way.
                if key in variant.training:
                    raise ValueError(
                        f"expected training.{key} of the comparison, which holds for all its methods, and "
                        f"found one of {name}"
                    )
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name, given in (("students", self.students), ("seeds", self.seeds)):
            require_different(name, given)
        return self

    def recipe(self, student: str, variant: str, seed: int) -> Recipe:
        """Return the recipe of one run."""
        method = self.methods[variant]
        training = self.training.model_dump(exclude_unset=True) | method.training | {"seed": seed}
        values = {"teacher": self.teacher, "dataset": self.dataset, "student": student}
        values["init"] = self.methods[variant].init or self.init
        return validate(Recipe, {**values, "method": method.method, "training": training}, variant)

    def save(self, path: Path) -> None:
        """Write a resolved comparison as YAML, every setting spelt out."""
        values = self.model_dump(mode="json", exclude={"training": {"seed"}})
        write_yaml(path, values)
