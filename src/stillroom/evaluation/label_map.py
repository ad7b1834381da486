"""Labels of a set of another source, and of models, read as one set of classes.

As in out-of-domain evaluation (McCoy et al. 2019, arXiv 1902.01007, on HANS): a model of three classes is
scored on a set of two by what its predicted class counts as.

Metrics are those of the classes that the map makes: where it leaves two, F1 is of the second of them,
in the order of the model's labels; where it leaves more, macro F1, also of a set that has rows of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stillroom.data.tasks import Rows, Task
from stillroom.errors import WrongInput


@dataclass(frozen=True)
class LabelMap:
    """Which class each label of the data counts as, and each label of a model."""

    classes: tuple[str, ...]
    """In the order of the model's labels."""
    data: tuple[int, ...]
    """Class of each label of the data."""
    model: tuple[int, ...]
    """Class of each label of the model."""

    @classmethod
    def of(cls, given: Mapping[str, str], data: Sequence[str], model: Sequence[str]) -> "LabelMap":
        """Return the map that `label: class` pairs make.

        A label that is not given counts as the class of its own name. Classes are what the model's
        labels count as; every label of the data has to count as one of them.

        Args:
            given: Labels of the data or of the model, or of both where they have the same name.
            data: Labels of the data in their order.
            model: Labels of the model in their order.

        Raises:
            WrongInput: If a label that is given is none of these, or a label of the data counts as no
                class of the model, or only one class is left.

        Example:
            >>> nli = ("entailment", "neutral", "contradiction")
            >>> given = {"0": "entailment", "1": "other", "neutral": "other", "contradiction": "other"}
            >>> LabelMap.of(given, ("0", "1"), nli)
            LabelMap(classes=('entailment', 'other'), data=(0, 1), model=(0, 1, 1))
        """
        both = f"the data has [{', '.join(data)}], the model [{', '.join(model)}]"
        for label in given:
            if label not in (*data, *model):
                raise WrongInput(f"There is no label {label!r} to map: {both}.")
        classes = tuple(dict.fromkeys(given.get(label, label) for label in model))
        lost = [label for label in data if given.get(label, label) not in classes]
        if lost:
            raise WrongInput(
                f"The data's label {lost[0]!r} counts as {given.get(lost[0], lost[0])!r}, which is no "
                f"class of the model: {both}. Map it to one of {', '.join(classes)}, such as "
                f"{lost[0]}={classes[-1]}; a label of the model can be mapped as well."
            )
        if len(classes) < 2:
            raise WrongInput(f"Expected at least two classes, found only {classes[0]}: {both}.")
        number = {name: i for i, name in enumerate(classes)}
        return cls(
            classes,
            tuple(number[given.get(label, label)] for label in data),
            tuple(number[given.get(label, label)] for label in model),
        )

    def task(self, task: Task) -> Task:
        """Return the data's task with the classes as its labels."""
        return replace(task, labels=self.classes)

    def rows(self, rows: Rows) -> Rows:
        """Return the rows with the numbers of the classes as their labels."""
        return replace(rows, labels=np.asarray(self.data, dtype=np.int64)[rows.labels])

    def logits(self, logits_NC: np.ndarray) -> np.ndarray:
        """Return for each class the largest of its labels' logits: the class of the predicted label wins.

        Args:
            logits_NC: Of the model's labels.

        Returns:
            float32, one column for each class.

        Example:
            >>> counts = LabelMap(("entailment", "other"), (0, 1), (0, 1, 1))
            >>> counts.logits(np.array([[2.0, 1.0, 3.0]])).tolist()
            [[2.0, 3.0]]
        """
        found = np.full((len(logits_NC), len(self.classes)), -np.inf, dtype=np.float32)
        for label, number in enumerate(self.model):
            found[:, number] = np.maximum(found[:, number], logits_NC[:, label])
        return found
