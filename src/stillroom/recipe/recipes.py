"""What a run is: a distillation, a fine-tuning or a pre-training, read from YAML and saved as it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stillroom.recipe.problems import validate
from stillroom.recipe.settings import (
    DatasetSettings,
    MethodSettings,
    PretrainingSettings,
    Settings,
    TeacherSettings,
    TextSettings,
    TrainingSettings,
)
from stillroom.recipe.syntax import read_yaml, set_value, write_yaml


class _File(Settings):
    """How every recipe is read and written."""

    @model_validator(mode="before")
    @classmethod
    def _names_stand_for_sections(cls, values: Any) -> Any:
        """`dataset: glue/cola`, `teacher: DIR` and `method: kd` are sections with only a name."""
        if isinstance(values, Mapping):
            values = dict(values)
            for section in ("dataset", "teacher", "method"):
                field = cls.model_fields.get(section)
                if (
                    isinstance(values.get(section), str)
                    and field is not None
                    and field.annotation is not str
                ):
                    values[section] = {"name": values[section]}
        return values

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = (), **given: Any) -> Self:
        """Return the recipe of a YAML file, with what is given beside it taking precedence.

        Args:
            path: A YAML file, or None to start from nothing.
            overrides: `a.b=c` each, `c` read as YAML; applied last, in order.
            **given: Top-level values (None means not given).

        Returns:
            The validated recipe.

        Raises:
            WrongInput: If the file is not there or not YAML, or a key or value is not valid; the
                message names the nearest valid key.

        Example:
            >>> recipe = Recipe.load(teacher="t", dataset="glue/cola", overrides=["training.epochs=1"])
            >>> recipe.training.epochs
            1.0
        """
        values = read_yaml(Path(path)) if path is not None else {}
        for key, value in given.items():
            if value is not None:
                old = values.get(key)
                if isinstance(old, dict) and isinstance(value, str):
                    # A name given beside a section replaces the name; another method drops options.
                    value = {"name": value} if key == "method" else {**old, "name": value}
                values[key] = value
        for override in overrides:
            set_value(values, override)
        return validate(cls, values)

    def save(self, path: Path) -> None:
        """Write a resolved recipe (`methods.resolve`) as YAML, every setting spelt out.

        Of one that is not resolved, the method's own training defaults would be lost.
        """
        write_yaml(path, self.model_dump(mode="json"))


class TaskRecipe(_File):
    """What every recipe of a task has."""

    dataset: DatasetSettings
    """The rows to train and to validate on."""
    training: TrainingSettings = TrainingSettings()
    """The loop's settings."""


class Recipe(TaskRecipe):
    """All of a run. Saved as `recipe.yaml`; running that again gives the same student."""

    teacher: TeacherSettings | None = None
    """The model that is distilled; `teacher: DIR` is short for its name. Not needed with soft labels."""
    student: str = "4x312"
    """A size `LxH`, `layers:2,4,6` (copies those teacher layers), or a local or hub checkpoint."""
    init: Annotated[str, Field(min_length=1)] = "auto"
    """Its start: `random`, `teacher` (layers copied), `pca` (folded into fewer dimensions), a checkpoint.
    `auto`: `teacher` for layers, `pca` for a size that fits into the teacher, else `random`."""
    method: MethodSettings = MethodSettings()
    """The distillation method and its options."""
    control: bool = False
    """Train the same student without a teacher as well, to show what distillation added."""

    @model_validator(mode="after")
    def _something_teaches(self) -> Self:
        if self.teacher is None and self.dataset.soft_labels is None:
            raise ValueError(
                "Missing key teacher: give --teacher, or soft labels of the rows with dataset.soft_labels"
            )
        return self


class FinetuneRecipe(TaskRecipe):
    """All of a teacher's fine-tuning. Saved as `recipe.yaml` beside the teacher."""

    model: str = "minilm-l6"
    """A pretrained encoder: a local folder, a hub id, or `minilm-l6`."""


class PretrainRecipe(_File):
    """All of a task-agnostic distillation. Saved as `recipe.yaml`; that gives the same student again."""

    teacher: str
    """A pretrained encoder: a local folder, a hub id, or `minilm-l6`."""
    text: TextSettings
    """What is read."""
    student: str = "4x312"
    """A size `LxH`, `layers:2,4,6` (copies those teacher layers), or a local or hub checkpoint."""
    init: Annotated[str, Field(min_length=1)] = "auto"
    """As a recipe's `init`."""
    dropout: bool = False
    """Whether the student has dropout meanwhile. It always has what its family has in later trainings."""
    method: MethodSettings = MethodSettings(name="minilm")
    """The distillation method and its options."""
    training: PretrainingSettings = PretrainingSettings()
    """The loop's settings."""
