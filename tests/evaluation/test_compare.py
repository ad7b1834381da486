"""`evaluate` from Python: what it reads, returns and refuses."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from stillroom import DatasetSettings, WrongInput, evaluate
from stillroom.data.tasks import Kind
from stillroom.encoder import locate
from stillroom.evaluation import cost
from tiny import make_encoder, make_rows, make_task, save_encoder


def _write(path: Path, kind: Kind = "classification") -> Path:
    """Write 40 rows of a toy task as one file of a folder."""
    task = make_task(kind)
    rows = make_rows(task, 40, seed=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        if kind == "multi-label":
            labels = [
                "|".join(n for n, y in zip(task.labels, row, strict=True) if y) for row in rows.labels
            ]
        else:
            labels = [task.labels[y] if task.labels else y for y in rows.labels]
        csv.writer(stream).writerows([("text", "label"), *zip(rows.texts[0], labels, strict=True)])
    return path


@pytest.fixture
def data(tmp_path: Path) -> str:
    _write(tmp_path / "data" / "train.csv")
    return str(_write(tmp_path / "data" / "validation.csv").parent)


def test_counts_and_costs(tmp_path: Path, data: str) -> None:
    model = save_encoder(tmp_path / "model")
    found = evaluate([model], data)
    (entry,) = found["models"]
    assert (found["dataset"], found["split"], found["rows"]) == (data, "validation", 40)
    confusion = np.array(entry["confusion"])
    assert confusion.sum(1).tolist() == [20, 20]
    assert entry["metrics"]["accuracy"] == pytest.approx(confusion.trace() / 40)
    encoder = make_encoder()
    assert (entry["parameters"], entry["non_embedding_parameters"]) == cost.parameters(encoder)
    assert entry["bytes"] == (model / "model.safetensors").stat().st_size
    assert entry["ms_per_example"] > 0
    assert entry["model"] == str(model)


def test_only_the_wanted_split_is_read(tmp_path: Path) -> None:
    """A damaged training file is no reason not to score the validation split."""
    model = save_encoder(tmp_path / "model")
    task = make_task()
    single = _write(tmp_path / "validation.csv")
    settings = DatasetSettings(name=str(single.parent), labels=task.labels)
    found = evaluate([model], settings)
    assert found["rows"] == 40


def test_a_model_does_not_differ_from_itself(tmp_path: Path, data: str) -> None:
    model = save_encoder(tmp_path / "model")
    found = evaluate([model, str(model)], data)
    against = found["models"][1]["against_first"]
    assert against["mcnemar"] == {"only_a": 0, "only_b": 0, "p": 1.0}
    for difference in against["metrics"].values():
        assert difference == {"value": 0, "low": 0, "high": 0}


def test_the_difference_is_that_of_the_metrics(tmp_path: Path, data: str) -> None:
    models = [save_encoder(tmp_path / str(seed), seed=seed) for seed in range(3)]
    first, *others = evaluate(models, data)["models"]
    for other in others:
        for name, found in other["against_first"]["metrics"].items():
            assert found["value"] == pytest.approx(other["metrics"][name] - first["metrics"][name])
            assert found["low"] <= found["value"] <= found["high"]


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_other_kinds_have_neither_mcnemar_nor_confusion(tmp_path: Path, kind: Kind) -> None:
    name = str(_write(tmp_path / "data" / "validation.csv", kind).parent)
    settings = DatasetSettings(name=name, kind=kind)
    task = make_task(kind)
    models = [save_encoder(tmp_path / str(seed), task=task, seed=seed) for seed in range(2)]
    found = evaluate(models, settings)["models"][1]
    assert found["against_first"].keys() == {"metrics"}
    assert "confusion" not in found


def test_a_run_folder_means_its_student(tmp_path: Path, data: str) -> None:
    save_encoder(tmp_path / "run" / "student", seed=1)
    save_encoder(tmp_path / "other", seed=2)
    run, student = evaluate([tmp_path / "run", tmp_path / "run" / "student"], data)["models"]
    assert run["confusion"] == student["confusion"]
    assert run["bytes"] == student["bytes"] > 0
    # A model folder that also has a folder named student is itself.
    save_encoder(tmp_path / "other" / "student", seed=1)
    assert locate(str(tmp_path / "other")) == str(tmp_path / "other")


def test_labels_in_another_order_are_refused(tmp_path: Path, data: str) -> None:
    """Both orders score, one of them upside down: the message names both."""
    encoder = make_encoder()
    encoder.config.id2label = {0: "Positive", 1: "negative"}
    encoder.config.label2id = {"Positive": 0, "negative": 1}
    encoder.save(tmp_path / "model")
    with pytest.raises(WrongInput, match=r"\[negative, positive\].*\[Positive, negative\]"):
        evaluate([tmp_path / "model"], data)


def test_another_number_or_kind_of_labels_is_refused(tmp_path: Path, data: str) -> None:
    save_encoder(tmp_path / "scores", task=make_task("regression"))
    with pytest.raises(WrongInput, match=r"2 output\(s\).*regression with 1"):
        evaluate([tmp_path / "scores"], data)
    encoder = make_encoder()
    encoder.config.problem_type = "multi_label_classification"
    encoder.save(tmp_path / "several")
    with pytest.raises(WrongInput, match="multi_label_classification"):
        evaluate([tmp_path / "several"], data)


def test_labels_without_names_are_taken_in_order(tmp_path: Path, data: str) -> None:
    encoder = make_encoder()
    encoder.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    encoder.save(tmp_path / "model")
    save_encoder(tmp_path / "named")
    stream = io.StringIO()
    unnamed, named = evaluate([tmp_path / "model", tmp_path / "named"], data, console=Console(file=stream))[
        "models"
    ]
    assert unnamed["confusion"] == named["confusion"]
    assert "LABEL_0, LABEL_1" in stream.getvalue()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, data: str) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.model.classifier.weight.fill_(float("nan"))
    encoder.save(tmp_path / "model")
    with pytest.raises(WrongInput, match="not finite"):
        evaluate([tmp_path / "model"], data)


def test_no_model_is_refused(data: str) -> None:
    with pytest.raises(WrongInput, match="at least one model"):
        evaluate([], data)


def test_bytes_of_a_hub_model_are_those_of_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id is no folder: its files lie in the hub's cache."""
    repository = tmp_path / "models--somebody--model"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x" * 123)
    (snapshot / "config.json").write_bytes(b"{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cost.bytes_of_weights("somebody/model") == 123
