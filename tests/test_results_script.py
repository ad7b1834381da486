"""The script that measures every method: a tiny trial from end to end, and its tables."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.errors import RunFailed
from tiny import make_rows, make_task, make_teacher, save_encoder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Call the script, in this process, on toy rows that stand for SST-2, and return what it prints."""
    data = tmp_path / "glue" / "sst2"
    data.mkdir(parents=True)
    for split, count, seed in (("train", 200, 0), ("validation", 40, 1)):
        rows = make_rows(make_task(), count, seed=seed)
        table = pa.table({"sentence": rows.texts[0], "label": rows.labels, "idx": np.arange(count)})
        pq.write_table(table, data / f"{split}.parquet")
    work = tmp_path / "work" / "sst2"
    work.mkdir(parents=True)
    make_teacher().save(work / "teacher")
    (work / "teacher" / "metrics.json").write_text("{}")
    save_encoder(tmp_path / "checkpoint", width=16, seed=5)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("results")
    places = ["--work", str(work.parent), "--data-dir", str(tmp_path), "--tasks", "sst2", "--tiny"]
    fixed = ["--workers", "1", "--model", str(save_encoder(tmp_path / "encoder", seed=6))]

    def call(*more: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["results.py", *places, *fixed, *more])
        script.main()
        return str(capsys.readouterr().out)

    return call


def students(checkpoint: Path) -> list[str]:
    """Return the option for a student from three starts."""
    return ["--students", ";".join(f"2x16x2x32@{start}" for start in ("random", "pca", checkpoint))]


def test_methods_are_measured_from_every_start(run: Callable[..., str], tmp_path: Path) -> None:
    chosen = students(tmp_path / "checkpoint")
    run(*chosen, "--methods", "none;kd")
    run("--students", "2x16x2x32@pca", "--methods", "none", "--augmented")
    printed = run(*chosen, "--json")
    found = json.loads(printed)
    made = found["tasks"]["sst2"]["students"]
    names = [f"2x16x2x32 from {start}" for start in ("random", "pca", "checkpoint")]
    assert list(made) == [*names, "2x16x2x32 from pca, augmented"]
    assert {one["steps"] for student in made.values() for one in student["methods"].values()} == {2}
    # A folded start keeps what the teacher knows of the task.
    assert made[names[1]]["methods"]["kd"]["mean"] > made[names[0]]["methods"]["kd"]["mean"]
    figures = tmp_path / "figures.json"
    figures.write_text(printed, encoding="utf-8")
    tables = run("--markdown", str(figures))
    # Of one task both ways to count are one.
    shares = [
        f"{(share := 100 * made[name]['methods']['kd']['kept']):.1f} % / {share:.1f} %" for name in names
    ]
    # No kd has read augmented rows.
    assert f"| kd | {' | '.join(shares)} | - | 1 |" in tables
    assert f"**{names[2]}**" in tables and "| minus none | sst2 (accuracy) |" in tables


def test_what_is_kept_of_several_tasks_is_counted_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("results")
    tasks = {
        name: {"metric": "mcc", "teacher": {"metrics": {"mcc": score}}}
        for name, score in (("a", 0.8), ("b", 0.2))
    }
    found = [
        {"seeds": {"0": {"mcc": 0.5}, "1": {"mcc": 0.3}}},
        {"seeds": {"0": {"mcc": 0.2}, "1": {"mcc": 0.1}}},
    ]
    # Seed 0: (0.5 / 0.8 + 0.2 / 0.2) / 2, and (0.5 + 0.2) / (0.8 + 0.2).
    assert script.kept(tasks, found, {"0"}) == ("81.2 %", "70.0 %")
    # Both: means 0.4 and 0.15.
    assert script.kept(tasks, found) == ("62.5 %", "55.0 %")


def test_a_failed_run_is_named_after_the_rest_is_done(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("results")
    real = script.compare

    def failing(wanted: Any, folder: Path, **more: Any) -> Any:
        if "random" in folder.name:
            raise RunFailed("kd/0: loss = nan")
        return real(wanted, folder, **more)

    monkeypatch.setattr(script, "compare", failing)
    with pytest.raises(SystemExit, match="sst2 2x16x2x32 from random: kd/0: loss = nan"):
        run("--students", "2x16x2x32@random;2x16x2x32@pca", "--methods", "kd")
    (done,) = json.loads(run("--students", "2x16x2x32@pca", "--json"))["tasks"]["sst2"]["students"]
    assert done == "2x16x2x32 from pca"


def test_out_of_domain_columns_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that lacks a task leaves a gap there and does not move the others' figures."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("results")

    def entry(other: str, arms: dict[str, float]) -> dict[str, Any]:
        def one(value: float) -> dict[str, Any]:
            elsewhere = {other: {"mean": {"f1": value}, "standard_deviation": None}}
            return {"seeds": {"0": {}}, "out_of_domain": elsewhere}

        made = {arm: {"methods": {"kd": one(value)}} for arm, value in arms.items()}
        return {"teacher": {"out_of_domain": {other: {"f1": 0.9}}}, "students": made}

    tasks = {
        "a": entry("x", {"s": 0.1, "t": 0.2}),
        "b": entry("y", {"t": 0.3}),
        "c": entry("z", {"s": 0.4}),
    }
    assert script.out_of_domain(tasks) == [
        "| out of domain | a to x (f1) | b to y (f1) | c to z (f1) |",
        "|---|---|---|---|",
        "| teacher | 90.0 | 90.0 | 90.0 |",
        "| s: kd | 10.0 (1) | - | 40.0 (1) |",
        "| t: kd | 20.0 (1) | 30.0 (1) | - |",
    ]
