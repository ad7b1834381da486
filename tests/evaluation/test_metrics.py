"""F1 by hand: which one it is follows from the task, never from the rows that happen to be scored."""

from dataclasses import replace

import numpy as np
import pytest

from stillroom.data.tasks import GLUE, Task
from stillroom.evaluation.metrics import functions_of, score
from stillroom.evaluation.significance import RESAMPLED

THREE = Task("made", "classification", ("text",), "label", ("a", "b", "c"), ("accuracy", "f1"))
TWO = replace(THREE, labels=("a", "b"))


def _f1(task: Task, labels: list[int], predicted: list[int]) -> float:
    """Return the metric, once it is the bootstrap's as well."""
    found = score(task, np.eye(task.outputs)[predicted], np.array(labels))["f1"]
    resampled = functions_of(task, RESAMPLED)["f1"](np.array([labels]), np.array([predicted]))
    assert found == pytest.approx(resampled.item(), rel=1e-12)
    return found


def test_rows_of_two_of_three_classes_have_macro_f1() -> None:
    """Confusion [[12, 8], [0, 20]]: F1 of a is 24 / 32, of b 40 / 48, and nothing is said of c."""
    labels, predicted = [0] * 20 + [1] * 20, [0] * 12 + [1] * 28
    assert _f1(THREE, labels, predicted) == pytest.approx((24 / 32 + 40 / 48) / 2, rel=1e-12)
    assert _f1(TWO, labels, predicted) == pytest.approx(40 / 48, rel=1e-12)


def test_a_prediction_of_a_class_that_no_row_has_costs() -> None:
    """F1 of a is 2 / 3, of b 1, of c, which is said once and never right, 0."""
    assert _f1(THREE, [0, 0, 1], [0, 2, 1]) == pytest.approx((2 / 3 + 1 + 0) / 3, rel=1e-12)


@pytest.mark.parametrize("missing", range(3))
def test_it_does_not_matter_which_class_is_missing(missing: int) -> None:
    """Renaming classes renames nothing in a mean over them."""
    there = [c for c in range(3) if c != missing]
    labels, predicted = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 1, 0, 1])
    found = _f1(THREE, np.take(there, labels).tolist(), np.take(there, predicted).tolist())
    assert found == pytest.approx((4 / 6 + 6 / 8) / 2, rel=1e-12)


@pytest.mark.parametrize("name", ["glue/mrpc", "glue/qqp"])
def test_f1_of_two_classes_is_that_of_the_second(name: str) -> None:
    """Precision 2 / 3, recall 2 / 4; of rows without it that nothing is taken for it is 0, not 1."""
    assert _f1(GLUE[name], [0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]) == pytest.approx(4 / 7, rel=1e-12)
    assert _f1(GLUE[name], [0, 0], [0, 0]) == 0.0
