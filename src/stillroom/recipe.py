"""What a run is: typed settings, read from YAML and from `a.b=c`, refused where misspelt."""

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from stillroom import durable
from stillroom.errors import WrongInput

_Model = TypeVar("_Model", bound=BaseModel)

Precision = Literal["auto", "float32", "bf16"]


class Settings(BaseModel):
    """Base of all settings: frozen; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read true as 1, and the text "1_000" as a number."""
        inside = set(_within(cls.model_fields[info.field_name or ""].annotation))
        if inside & {int, float} and not inside & {str, Path, Any}:
            for one in value if isinstance(value, list | tuple) else [value]:
                is_bool = isinstance(one, bool) and bool not in inside
                if is_bool or (isinstance(one, str) and _NUMERIC.fullmatch(one)):
                    raise PydanticKnownError("float_type" if float in inside else "int_type")
        return value


_NUMERIC = re.compile(r"[-+\s\d._eE]*\d[-+\s\d._eE]*")
"""Text that Pydantic might read as a number."""


def _within(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _within(part)


def _as_label(value: Any) -> Any:
    """Return a whole number as its text, as files have it."""
    if isinstance(value, bool):
        raise ValueError('expected text in quotes, such as \'["true","false"]\'')
    return str(value) if isinstance(value, int) else value


class DatasetSettings(Settings):
    """Where the rows come from and how to read them."""

    name: str
    """`glue/<task>`, `builtin/<name>`, or a file or folder of CSV, TSV, JSONL or Parquet."""
    data_dir: Path | None = None
    """Folder with `glue/<task>/<split>.parquet`; else $STILLROOM_DATA, else the hub."""
    validation: Path | None = None
    """Validation file, where `name` is a single training file. Default: every tenth row."""
    text: tuple[str, ...] | None = None
    """One or two text columns; found by their usual names if not given."""
    label: str | None = None
    """Label column; found by its usual names if not given."""
    kind: Literal["auto", "classification", "regression", "multi-label"] = "auto"
    """What the labels mean; `auto` reads it off the column."""
    labels: tuple[Annotated[str, BeforeValidator(_as_label)], ...] | None = None
    """Class names in the order of the label numbers, for files whose labels are numbers."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Rows are cut to this many tokens."""
    train_rows: Annotated[int, Field(ge=2)] | None = None
    """Use only this many training rows, drawn with a fixed seed (0). Default: all."""
    soft_labels: Annotated[str, Field(min_length=1)] | None = None
    """Column of probabilities in place of the teacher's logits, or how the names of several begin."""
    augmented: Path | None = None
    """File of augmented rows, from `stillroom augment`, to train on beside the training rows."""
    augmented_labels: Literal["teacher", "source"] = "teacher"
    """Hard labels of augmented rows: the teacher's predictions, or those of their source rows."""


class TeacherSettings(Settings):
    """Which model teaches, and what is recorded of it."""

    name: str
    """A fine-tuned sequence-classification encoder: a local folder or a hub id."""
    cache: Annotated[str, Field(min_length=1)] = "auto"
    """Where its outputs are recorded: a folder; `auto`: Stillroom's own, if read again; `off`."""
    max_bytes: Annotated[int, Field(ge=0)] | None = None
    """Most bytes to record; the rest is computed live. Default: 20 GB, or 10 % of the free disk if less."""


class MethodSettings(BaseModel):
    """A method's name, and its own options beside it, which the method itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "lrc-bert"
    """One of `stillroom methods`."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `name`."""
        return dict(self.__pydantic_extra__ or {})


_MOST_EPOCHS = 100_000
"""Far more than anyone trains, and few enough that each can be laid out before the first."""


class TrainingSettings(Settings):
    """The training loop's settings, the same for every method."""

    epochs: Annotated[float, Field(gt=0, le=_MOST_EPOCHS)] = 3
    """Passes over the training rows; a fraction is allowed."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Most rows in a batch, over all processes that share it."""
    max_tokens: Annotated[int, Field(ge=8)] = 8192
    """Most tokens in a batch, padding included: long rows make smaller batches."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are averaged into one optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate, reached after warm-up."""
    schedule: Literal["linear", "constant"] = "linear"
    """After warm-up the rate falls linearly to zero, or stays."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decay, on matrices only (not on biases and norms)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of student and terms together are clipped to this 2-norm."""
    precision: Precision = "auto"
    """`bf16` autocast, `float32`, or `auto`: bf16 where the device computes it fast."""
    packed: Literal["auto", "off"] = "auto"
    """`auto` leaves padding out where a GPU has the kernel and nothing reads it; `off` never does."""
    compile: bool = False
    """Compile the student's blocks (`torch.compile`): slow to start; slower on the CPU that was timed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of row order, dropout and everything that starts at random."""
    evaluate_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two evaluations on the validation split."""
    evaluate_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations, in place of `evaluate_every`. One comes at the end, too."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Most optimiser steps, where `epochs` would take more: rate and stages then fit these steps."""
    select: Literal["best", "last"] = "best"
    """Keep the student of the best evaluation, or of the last step. Stages before the head is taught (the
    first of `lrc-bert` and `tinybert`) are not judged."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations without a better one. Default: never."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two lines of log.jsonl."""
    log_with: tuple[str, ...] = ()
    """Trackers of accelerate to log to as well, such as `tensorboard` or `wandb`."""

    @model_validator(mode="after")
    def _patience_needs_selection(self) -> Self:
        if self.patience is not None and self.select == "last":
            raise ValueError("patience stops at the best evaluation; it needs select: best")
        return self


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
        durable.write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


class _RecipeFile(_File):
    """What every recipe of a task has."""

    dataset: DatasetSettings
    """The rows to train and to validate on."""
    training: TrainingSettings = TrainingSettings()
    """The loop's settings."""


class Recipe(_RecipeFile):
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


def _require_different(name: str, given: Sequence[Any]) -> None:
    if len(set(given)) < len(given):
        raise ValueError(f"{name} should differ, found {list(given)}")


_MOST_SEEDS = 1_000
"""Far more than anyone compares, and few enough to write down."""


class Comparison(_RecipeFile):
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
                _require_different("methods", names)
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
    def _seeds_are_the_comparisons(self) -> Self:
        for name, variant in self.methods.items():
            if "seed" in variant.training:
                raise ValueError(f"a comparison has `seeds`, expected no training.seed of {name}")
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name, given in (("students", self.students), ("seeds", self.seeds)):
            _require_different(name, given)
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
        durable.write_text(path, yaml.safe_dump(values, sort_keys=False))


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
            return [yaml.load(part, Loader=_Yaml) for part in joined]
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
    split: Literal["fold", "validation"] = "fold"
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
        _require_different("objectives", self.objectives)
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
        durable.write_text(path, yaml.safe_dump(values, sort_keys=False))


class FinetuneRecipe(_RecipeFile):
    """All of a teacher's fine-tuning. Saved as `recipe.yaml` beside the teacher."""

    model: str = "minilm-l6"
    """A pretrained encoder: a local folder, a hub id, or `minilm-l6`."""


class TextSettings(Settings):
    """Text without labels, and how it becomes sequences."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Files of plain text, JSONL, Parquet, CSV or TSV, or folders of these."""
    column: str | None = None
    """Column of the text in a table; found by its usual names if not given."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of a sequence: documents are packed into full ones."""
    held_out: Annotated[int, Field(ge=1)] = 256
    """Most sequences to hold out, evenly spread over the text; a tenth of all if that is fewer."""


class PretrainingSettings(TrainingSettings):
    """The training loop's settings, with the defaults of task-agnostic distillation."""

    epochs: Annotated[float, Field(gt=0, le=_MOST_EPOCHS)] = 1
    """Passes over the text; a fraction is allowed."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Most sequences in a batch."""
    max_tokens: Annotated[int, Field(ge=8)] = 131072
    """Most tokens in a batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate, reached after warm-up."""
    evaluate_every: Annotated[float, Field(gt=0)] = 0.1
    """Epochs between two evaluations on held-out sequences."""
    select: Literal["last"] = "last"
    """The student of the last step is kept."""


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


class _Yaml(yaml.SafeLoader):
    """YAML as version 1.2 reads it: `off` is a word, 1e-4 is a number, and a date is text.

    A number that others read otherwise is text, too, and refused where a number is expected: 010 (8 or
    10), 0x10, 1_000, and 12:30 (750). A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping that follows; PyYAML would take the last of equal keys, and say nothing."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Before keys that a `<<` brings in join them: those may be set anew.
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands in line {lines[name]} and again in line {line}. Remove "
                    "one of them."
                )
            lines[name] = line
        return node


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Before the numbers with a point: the first that fits is taken.
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, or raise `WrongInput` naming the file and line."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)
    except FileNotFoundError:
        raise WrongInput(f"Expected a recipe file, found nothing at {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise WrongInput(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise WrongInput(f"{path} should hold `key: value` lines, found {type(values).__name__}.")
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to nested `values` in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise WrongInput(f"Expected `--set key=value`, such as training.epochs=3, found {override!r}.")
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str):
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise WrongInput(f"--set {override}: {section} is a single value, it has no {name}.")
        values = inner
    try:
        values[name] = yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        raise WrongInput(f"--set {override}: the value is not YAML: {error}") from None


def read_method(text: str) -> dict[str, Any]:
    """Return the section `method` that `NAME` or `NAME:OPTION=VALUE:OPTION=VALUE` stands for.

    Example:
        >>> read_method("lrc-bert:perturbation=off:alpha=0.5")
        {'name': 'lrc-bert', 'perturbation': 'off', 'alpha': 0.5}
    """
    name, *options = re.split(r":(?=\w+=)", text)
    values: dict[str, Any] = {"name": name}
    for option in options:
        set_value(values, option)
    return values


def validate(model: type[_Model], values: Mapping[str, Any], section: str = "") -> _Model:
    """Return `model(**values)`, or raise `WrongInput` with one line per wrong key or value."""
    if not isinstance(values, Mapping):
        where = section or "recipe"
        raise WrongInput(f"{where} should hold `key: value` lines, found {values!r:.60}.")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise WrongInput("\n".join(_explain(model, error.errors(), section))) from None


def setting(key: str, value: Any) -> str:
    """Return the option that sets a key, as it is typed in a shell.

    Example:
        >>> print(setting("dataset.labels", ["1", "it's"]))
        --set 'dataset.labels=["1","it'"'"'s"]'
    """
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"--set {shlex.quote(f'{key}={value}')}"


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return ` Did you mean x?` for the valid name nearest to `name`, and the list of all."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Valid: {', '.join(valid)}."


_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "`key: value` lines",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt:.10g}",
    "greater_than_equal": "a number greater than or equal to {ge:.10g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt:.10g}",
    "less_than_equal": "a number less than or equal to {le:.10g}",
    "list_type": "a list in brackets",
    "literal_error": "{expected}",
    "model_type": "`key: value` lines",
    "path_type": "a path",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_short": "at least {min_length}",
    "tuple_type": "a list in brackets",
}
"""What pydantic's problems mean, by their type."""

# Pydantic's names for the members of a union, which stand among the keys.
_MEMBER = re.compile(r"(literal|tuple|list|function-after)\[.*\]|constrained-(int|float)")


def _explain(model: type[BaseModel], problems: Sequence[Any], section: str) -> list[str]:
    """Return a line for each wrong key or value."""
    # A value that fits no member of a union has a problem with each, and one line.
    told: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        path = [str(part) for part in problem["loc"] if not _MEMBER.fullmatch(str(part))]
        where = ".".join([section, *path] if section else path)
        found = f", found {problem['input']!r}" if path else ""
        if problem["type"] == "extra_forbidden":
            told[f"Unknown key {where}.{_valid_keys(model, path)}", ""] = []
        elif problem["type"] == "missing":
            told[f"Missing key {where}: set it in the recipe or on the command line.", ""] = []
        elif problem["type"] in _EXPECTED:
            expected = _EXPECTED[problem["type"]].format(**problem.get("ctx", {}))
            told.setdefault((where, found), []).append(expected)
        else:
            message = problem["msg"].removeprefix("Value error, ")
            told[f"{where or 'recipe'}: {message}{found}.", ""] = []
    return [
        f"{head}: expected {' or '.join(one_of)}{found}." if one_of else head
        for (head, found), one_of in told.items()
    ]


def _valid_keys(model: type[BaseModel], path: Sequence[str]) -> str:
    """Return what `nearest` says of the last part of a path; nothing where its section is not known."""
    inner: type[BaseModel] | None = model
    for part in path[:-1]:
        # A name in a mapping, or a place in a list, is no section: its model is already found.
        if inner is not None and part in inner.model_fields:
            inner = _model_in(inner.model_fields[part].annotation)
    return "" if inner is None else nearest(path[-1], list(inner.model_fields))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the settings that an annotation holds: itself, or inside a union, a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
