"""Labels of other sources: which class they count as, and that nothing counts by accident."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom import WrongInput, evaluate
from stillroom.encoder import Encoder
from stillroom.evaluation.label_map import LabelMap
from stillroom.recipe import DatasetSettings
from tiny import make_encoder, make_task, save_encoder

NLI = ("entailment", "neutral", "contradiction")
RTE = ("entailment", "not_entailment")


def test_three_classes_of_the_data_count_as_two() -> None:
    given = {"0": "entailment", "1": "not_entailment", "2": "not_entailment"}
    assert LabelMap.of(given, ("0", "1", "2"), RTE) == LabelMap(RTE, (0, 1, 1), (0, 1))


def test_three_classes_of_the_model_count_as_two() -> None:
    given = {"non-entailment": "neutral", "contradiction": "neutral"}
    found = LabelMap.of(given, ("entailment", "non-entailment"), NLI)
    assert found == LabelMap(("entailment", "neutral"), (0, 1), (0, 1, 1))
    logits = np.array([[1.0, 0.5, 3.0], [2.0, 1.9, 1.8]], dtype=np.float32)
    # Together neutral and contradiction are likelier in the second row, but entailment is predicted.
    assert found.logits(logits).argmax(1).tolist() == [1, 0]
    np.testing.assert_allclose(found.logits(logits), [[1.0, 3.0], [2.0, 1.9]])


def test_labels_of_other_order_and_the_same_names_need_no_map() -> None:
    found = LabelMap.of({}, ("contradiction", "entailment", "neutral"), NLI)
    assert (found.classes, found.data, found.model) == (NLI, (2, 0, 1), (0, 1, 2))


@pytest.mark.parametrize(
    ("given", "data", "message"),
    [
        ({"0": "entailment"}, ("0", "1"), "'1' counts as '1', which is no class"),
        ({"0": "entailment", "1": "other"}, ("0", "1"), "'1' counts as 'other'"),
        ({"0": "entailment", "3": "neutral"}, ("0", "1"), "no label '3'"),
        (dict.fromkeys(("0", *NLI), "x"), ("0",), "at least two classes"),
    ],
)
def test_what_counts_as_nothing_is_refused(given: dict[str, str], data: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message) as error:
        LabelMap.of(given, data, NLI)
    assert "entailment, neutral, contradiction" in str(error.value)


def _model(folder: Path, bias: tuple[float, ...], labels: tuple[str, ...]) -> Path:
    """Save a model that says the same of every text."""
    task = make_task()
    made = make_encoder(task=type(task)("toy", "classification", task.text, "label", labels, ("accuracy",)))
    head: Any = made.model.classifier  # type: ignore[union-attr]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor(bias))
    Encoder(made.model, made.tokenizer).save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "other.csv"
    with path.open("w", newline="") as stream:
        rows = [(f"film {i}", i % 3) for i in range(30)]
        csv.writer(stream).writerows([("text", "label"), *rows])
    return path


def test_models_are_scored_on_what_their_labels_count_as(tmp_path: Path, data: Path) -> None:
    three = _model(tmp_path / "nli", (0.0, 1.0, 2.0), NLI)
    two = _model(tmp_path / "rte", (0.0, 1.0), RTE)
    given = {"0": "entailment", "1": "not_entailment", "2": "not_entailment"}
    both = {**given, "neutral": "not_entailment", "contradiction": "not_entailment"}
    with pytest.raises(WrongInput, match="no class of the model"):
        evaluate([three], str(data), split="all", labels=given)
    found = evaluate([three], str(data), split="all", labels=both)
    assert (found["rows"], found["labels"]) == (30, list(RTE))
    (entry,) = found["models"]
    assert entry["metrics"]["accuracy"] == pytest.approx(20 / 30)
    assert entry["confusion"] == [[0, 10], [0, 20]]
    assert found["counts_as"] == {
        "data": given,
        "models": {str(three): {"entailment": "entailment", **{n: "not_entailment" for n in NLI[1:]}}},
    }
    (other,) = evaluate([two], str(data), split="all", labels=given)["models"]
    assert other["metrics"] == entry["metrics"]
    assert "labels" in found and "robustness" not in found


def test_f1_is_that_of_the_classes_that_the_map_leaves(tmp_path: Path, data: Path) -> None:
    """Twenty of thirty rows are b; the model says the same of every row.

    Of two classes F1 is that of the second: all for b is 2 * 20 / (30 + 20), all for a leaves b none. Of
    three, with rows of a and b alone, it is the mean over these and c, where c is said.
    """
    names = ("a", "b", "c")
    says = {name: _model(tmp_path / name, tuple(float(name == n) for n in names), names) for name in names}
    rows = {"0": "a", "1": "b", "2": "b"}
    for labels, expected in (
        ({**rows, "c": "b"}, {"a": 0.0, "b": 0.8, "c": 0.8}),
        (rows, {"a": 0.5 / 2, "b": 0.8 / 2, "c": 0.0}),
    ):
        found = evaluate(list(says.values()), str(data), split="all", labels=labels)["models"]
        assert [one["metrics"]["f1"] for one in found] == pytest.approx(list(expected.values()))
        differences = [one["against_first"]["metrics"]["f1"]["value"] for one in found[1:]]
        assert differences == pytest.approx([expected[n] - expected["a"] for n in "bc"])


def test_models_of_other_classes_are_not_compared(tmp_path: Path, data: Path) -> None:
    three, two = _model(tmp_path / "nli", (0.0, 1.0, 2.0), NLI), _model(tmp_path / "rte", (0.0, 1.0), RTE)
    swapped = _model(tmp_path / "swapped", (0.0, 1.0, 2.0), NLI[::-1])
    given = dict(zip("012", NLI, strict=True))
    with pytest.raises(WrongInput, match="same classes in the same order"):
        evaluate([three, swapped], str(data), split="all", labels=given)
    with pytest.raises(WrongInput, match="no class of the model|no label"):
        evaluate([three, two], str(data), split="all", labels=given)


def test_scores_have_no_labels_to_map(tmp_path: Path, data: Path) -> None:
    model = save_encoder(tmp_path / "model", task=make_task("regression"))
    settings = DatasetSettings(name=str(data), kind="regression")
    with pytest.raises(WrongInput, match="Leave out --labels"):
        evaluate([model], settings, labels={"0": "x"})


def test_perturbed_texts_are_scored_too(tmp_path: Path, data: Path) -> None:
    model = _model(tmp_path / "nli", (0.0, 1.0, 2.0), NLI)
    given = dict(zip("012", NLI, strict=True))
    found = evaluate([model], str(data), split="all", labels=given, robust=True)["robustness"]
    assert (found["rows"], found["metric"]) == (30, "accuracy")
    assert [values[str(model)] for values in found["values"].values()] == [pytest.approx(1 / 3)] * 6
    assert "upper case" in found["values"] and "3 of 10 words swapped" in found["values"]
