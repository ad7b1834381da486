"""Sets of another source than a model's training rows, read as its classes, to score it on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console

from stillroom.data import sources
from stillroom.data.tasks import Rows, Task
from stillroom.encoder import Encoder
from stillroom.evaluation.compare import label_map, require_same_labels
from stillroom.evaluation.label_map import LabelMap
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predict import predict_rows
from stillroom.recipe import OutOfDomainSettings


@dataclass(frozen=True)
class OutOfDomain:
    """Rows of another source."""

    task: Task
    rows: Rows
    counts: LabelMap | None
    max_length: int

    @classmethod
    def load(cls, settings: OutOfDomainSettings, model: Encoder, console: Console) -> Self:
        """Return the rows with the labels that models such as this one are scored on.

        Raises:
            WrongInput: If the data is not as expected, or its labels are not the model's.
        """
        name, split = settings.dataset.name, settings.split
        if split is None:
            # Of a file of another source no model has seen a row.
            split = "all" if Path(name).expanduser().is_file() else "validation"
        data = sources.load(settings.dataset, splits=(split,))
        task, rows = data.task, data.split(split)
        if task.kind != "classification" and not settings.labels:
            require_same_labels("the teacher", model, task, console)
            return cls(task, rows, None, settings.dataset.max_length)
        # Labels of other names are never taken to mean the same: another source may count them otherwise.
        counts = label_map("the teacher", settings.labels, task, model)
        return cls(counts.task(task), counts.rows(rows), counts, settings.dataset.max_length)

    def score(self, model: Encoder, *, bf16: bool, console: Console) -> dict[str, float]:
        """Return the metrics of a model that has the labels of the one that this was loaded for."""
        logits = predict_rows(model, self.rows, max_length=self.max_length, bf16=bf16, console=console)
        if self.counts is not None:
            logits = self.counts.logits(logits)
        return score(self.task, logits, self.rows.labels)
