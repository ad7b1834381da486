"""Measuring side by side: what is measured, in which order, and what a process of its own tells."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exports import QUIET, Exported
from stillroom import RunFailed, WrongInput, bench
from stillroom.deploy import forms, latency, worker
from stillroom.recipe import DatasetSettings


class FakeWorker:
    """Answers with seconds of its own, and notes when it was asked."""

    def __init__(self, name: str, seconds: float, order: list[str]):
        self.name, self.seconds, self.order = name, seconds, order

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        ((kind, given),) = request.items()
        self.order.append(f"{self.name} {kind}")
        return {"seconds": [self.seconds] * given["repeats"]} if kind == "time" else {}


def test_models_take_turns() -> None:
    order: list[str] = []
    workers: Any = [FakeWorker("a", 0.1, order), FakeWorker("b", 0.2, order)]
    found = latency._cell(workers, {"tokens": {}}, lambda: None)
    assert order[:2] == ["a tokens", "b tokens"]
    assert order[2:] == ["a time", "b time"] * latency.TURNS
    assert [len(seconds) for seconds in found] == [latency.TURNS * latency.REPEATS] * 2


def test_a_slow_model_has_fewer_turns_but_some() -> None:
    order: list[str] = []
    workers: Any = [FakeWorker("slow", latency.SECONDS, order), FakeWorker("fast", 0.001, order)]
    slow, fast = latency._cell(workers, {"tokens": {}}, lambda: None)
    assert len(slow) == 3 * latency.REPEATS and len(fast) == latency.TURNS * latency.REPEATS


def test_figures_by_hand() -> None:
    """Four runs of eight rows in 1, 2, 3 and 4 ms, against 5 ms of the first model."""
    found = latency._summary(8, [0.001, 0.002, 0.003, 0.004], [0.005])
    assert found["runs"] == 4
    assert found["median_ms"] == pytest.approx(2.5)
    # Linear between the third and the fourth, at 95 % of three steps.
    assert found["p95_ms"] == pytest.approx(3.85)
    assert found["rows_per_second"] == pytest.approx(8 * 4 / 0.010)
    assert found["faster"] == pytest.approx(2.0)


def test_batches_of_data_hold_every_row_at_most_once_and_spread() -> None:
    texts = [(str(i),) for i in range(1000)]
    batches = latency._request(5, None, texts)["texts"]
    assert len(batches) == latency.TURNS and all(len(batch) == 5 for batch in batches)
    rows = [int(text) for batch in batches for (text,) in batch]
    assert len(set(rows)) == 100 and min(rows) == 0 and max(rows) == 999


@pytest.mark.parametrize(("dataset", "most"), [({"max_length": 8}, 8), ({}, 128), (None, None)])
def test_rows_of_data_are_cut_to_its_length(
    dataset: dict[str, int] | None, most: int | None, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that reads 512 tokens would be measured on longer rows than its student's export."""
    asked: list[int | None] = []

    @contextlib.contextmanager
    def ready(model: str, form: str | None, threads: int, max_length: int | None) -> Iterator[Any]:
        asked.append(max_length)
        made: Any = FakeWorker(model, 0.1, [])
        made.loaded = {"form": "onnx", "precision": "float32", "max_length": 512}
        made.ask = lambda request: {"peak_bytes": 1, "seconds": [0.1]}
        yield made

    monkeypatch.setattr(latency, "_worker", ready)
    data = None if dataset is None else DatasetSettings(name=str(exported.data), **dataset)
    bench([exported.model], threads=[1], batches=[1], dataset=data, console=QUIET)
    assert asked == [most]


def test_a_worker_cuts_texts_as_it_was_told(exported: Exported) -> None:
    for most, length in ((8, 8), (None, 66)):
        one = worker._Worker()
        place = {"model": str(exported.folder), "form": "onnx", "threads": 1}
        one.answer({"load": {**place, "max_length": most}})
        one.answer({"texts": [[["good film " * 100]]]})
        assert one.batches[0]["input_ids"].shape == (1, length)


@pytest.mark.slow
def test_models_and_exports_in_one_run(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURNS", 2)
    found = bench(
        [exported.model, exported.folder], threads=[1], batches=[1, 4], lengths=[8], console=QUIET
    )
    sides = [(Path(model["model"]).name, model["form"]) for model in found["models"]]
    assert sides == [("model", "torch"), ("export", "onnx"), ("export", "onnx-int8"), ("export", "torch")]
    assert len(found["times"]) == 2 * 4
    for row in found["times"]:
        assert row["threads"] == 1 and row["length"] == 8 and row["runs"] == 4
        assert 0 < row["median_ms"] <= row["p95_ms"]
    first = [row for row in found["times"] if row["model"] == str(exported.model)]
    assert [row["faster"] for row in first] == [1.0, 1.0]
    by_form = {model["form"]: model for model in found["models"][1:]}
    for form, model in by_form.items():
        assert model["bytes"] == forms.bytes_of(exported.folder, form)
        assert model["smaller"] == pytest.approx(found["models"][0]["bytes"] / model["bytes"])
    # A process that imported torch for onnxruntime's sake would be as large as torch's own.
    assert by_form["onnx"]["peak_bytes"]["1"] < 0.7 * by_form["torch"]["peak_bytes"]["1"]
    json.dumps(found, allow_nan=False)


def test_wrong_input_is_named(exported: Exported, tmp_path: Path) -> None:
    for options, match in (
        ({"threads": [0]}, "threads of 1 or more"),
        ({"batches": []}, "batches of 1 or more"),
        ({"lengths": [100], "batches": [1], "threads": [1]}, "at most 66 tokens, found a length of 100"),
    ):
        with pytest.raises(WrongInput, match=match):
            bench([exported.folder], console=QUIET, **options)  # type: ignore[arg-type]
    with pytest.raises(WrongInput, match="at least one model"):
        bench([], console=QUIET)
    with pytest.raises(WrongInput, match="found none at"):
        bench([tmp_path / "nothing"], console=QUIET)


def loaded(*most: int) -> Any:
    return [SimpleNamespace(loaded={"max_length": length}) for length in most]


def test_lengths_are_those_that_every_model_reads() -> None:
    sides = [("long", None), ("short", None)]
    assert latency._lengths(None, sides, loaded(512, 512)) == [16, 32, 128]
    assert latency._lengths(None, sides, loaded(512, 66)) == [16, 32, 66]
    assert latency._lengths(None, sides, loaded(16, 16)) == [16]
    assert latency._lengths([66, 8], sides, loaded(512, 66)) == [66, 8]
    with pytest.raises(WrongInput, match="short reads at most 66 tokens, found a length of 67"):
        latency._lengths([8, 67], sides, loaded(512, 66))


def test_a_length_beyond_a_model_is_found_before_anything_is_measured(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default lengths failed after half a minute of measuring."""
    monkeypatch.setattr(latency, "_cell", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(WrongInput, match="at most 66 tokens"):
        bench([exported.folder], lengths=[8, 67], threads=[1], console=QUIET)


def test_a_process_that_dies_is_said_and_none_is_left(exported: Exported) -> None:
    with pytest.raises(RunFailed, match=r"ended with exit code -9.*--batch"):
        with latency._worker(str(exported.folder), "onnx", 1) as worker:
            process = worker._process
            process.kill()
            # Dead for certain, so that the pipe has no reader.
            process.wait()
            worker.ask({"memory": True})
    assert process.wait() is not None
    assert isinstance(process, subprocess.Popen) and np.isfinite(process.returncode)
