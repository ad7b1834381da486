"""What all settings have in common, and the sections that recipes are made of."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

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


def require_different(name: str, given: Sequence[Any]) -> None:
    """Raise `ValueError` if one of the given values comes twice."""
    if len(set(given)) < len(given):
        raise ValueError(f"{name} should differ, found {list(given)}")


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
