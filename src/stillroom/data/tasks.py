"""What a task is: its columns, the meaning of its labels, and its metrics."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stillroom.errors import WrongInput

Kind = Literal["classification", "regression", "multi-label"]


@dataclass(frozen=True)
class Task:
    """Columns, label meaning and metrics of a data set.

    `labels` holds the class names in the order of the label numbers; empty for regression.
    `metrics` names functions of `stillroom.evaluation.metrics`; the first selects and is compared.
    """

    name: str
    kind: Kind
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Width of the logits: one for regression, else one for each label."""
        return 1 if self.kind == "regression" else len(self.labels)


def plain(label: str) -> str:
    """Return a label as those of data and models are compared: case aside, and white space, _ and - alike.

    Example:
        >>> plain("Not_Equivalent") == plain(" not equivalent")
        True
    """
    # A config.json may have numbers for names.
    return re.sub(r"[\s_-]+", " ", str(label).strip()).casefold()


@dataclass(frozen=True)
class Rows:
    """One split. `source` says where it came from, for messages.

    `texts` holds one list of strings per text column. `labels` is int64 `(N,)` for
    classification, float32 `(N,)` for regression, float32 `(N, C)` of zeros and ones for
    multi-label.
    """

    source: str
    texts: tuple[list[str], ...]
    labels: np.ndarray
    soft_labels: np.ndarray | None = None
    """Of a file: probabilities of the labels, or scores, float32 `(N, C)`."""
    unlabelled: np.ndarray | None = None
    """Which rows have no label, so that `labels` says what their soft labels do, bool `(N,)`."""

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, index: np.ndarray) -> "Rows":
        """Return some rows, in the order that is given.

        Args:
            index: Row numbers, shape `(n,)`.

        Example:
            >>> Rows("made", (["a", "b"],), np.array([0, 1])).take(np.array([1])).texts
            (['b'],)
        """
        texts = tuple([column[i] for i in index] for column in self.texts)
        soft, unlabelled = (
            None if kept is None else kept[index] for kept in (self.soft_labels, self.unlabelled)
        )
        return Rows(self.source, texts, self.labels[index], soft, unlabelled)

    def hash_texts(self, digest: Any) -> None:
        """Add all texts, in their order, to a hash of `hashlib`."""
        for column in self.texts:
            for text in column:
                encoded = text.encode("utf-8", "surrogatepass")
                # The length keeps ("ab", "c") and ("a", "bc") apart.
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)

    def text_keys(self) -> list[int]:
        """Return a number for each row, equal where the texts are, but for white space and case.

        Of this process alone: another one hashes otherwise.
        """
        # Hashes, not texts: a set of a million rows would otherwise be in memory a second time.
        return [
            hash(tuple(" ".join(text.split()).casefold() for text in texts))
            for texts in zip(*self.texts, strict=True)
        ]


@dataclass(frozen=True)
class Dataset:
    """A task and those of its splits that were asked for, by name."""

    task: Task
    splits: dict[str, Rows]
    source_rows: np.ndarray | None = None
    """Of the augmented rows, the last of `train`: the position in `train` of the source of each."""

    @property
    def augmented(self) -> int:
        """How many of the last rows of `train` are augmented rows."""
        return 0 if self.source_rows is None else len(self.source_rows)

    def split(self, name: str) -> Rows:
        """Return a split, or raise `WrongInput` naming those there are."""
        if name not in self.splits:
            raise WrongInput(f"{self.task.name} has no split {name!r}; it has {', '.join(self.splits)}.")
        return self.splits[name]


def _glue(
    name: str, text: str, labels: str, metrics: str, kind: Kind = "classification"
) -> tuple[str, Task]:
    task = Task(
        f"glue/{name}",
        kind,
        tuple(text.split()),
        "label",
        tuple(labels.split()),
        tuple(metrics.split()),
    )
    return task.name, task


_PAIR = "sentence1 sentence2"

GLUE: dict[str, Task] = dict(
    (
        _glue("cola", "sentence", "unacceptable acceptable", "mcc"),
        _glue("sst2", "sentence", "negative positive", "accuracy"),
        _glue("mrpc", _PAIR, "not_equivalent equivalent", "f1 accuracy"),
        _glue("stsb", _PAIR, "", "pearson spearman", "regression"),
        _glue("qqp", "question1 question2", "not_duplicate duplicate", "f1 accuracy"),
        _glue("mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy"),
        _glue("qnli", "question sentence", "entailment not_entailment", "accuracy"),
        _glue("rte", _PAIR, "entailment not_entailment", "accuracy"),
    )
)
"""GLUE's tasks with their own metrics and the hub's label order (Wang et al., 2019)."""
