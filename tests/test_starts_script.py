"""The script that measures starts: a tiny trial from end to end, and its table."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
    start = save_encoder(tmp_path / "start", width=16, seed=5)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("starts")
    places = ["--work", str(work.parent), "--data-dir", str(tmp_path), "--tasks", "sst2", "--tiny"]
    fixed = ["--student", "2x16x2x32", "--workers", "1", "--pretrained", f"checkpoint={start}"]

    def call(*more: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["starts.py", *places, *fixed, *more])
        script.main()
        return str(capsys.readouterr().out)

    return call


def test_starts_are_compared(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run()
    for name in ("kd from random", "kd from pca", "kd from checkpoint"):
        assert f"| {name} | " in printed
    found = json.loads(run("--json"))
    assert found["settings"]["starts"]["pca"] == "pca"
    students = found["tasks"]["sst2"]["students"]
    assert {one["steps"] for one in students.values()} == {2}
    # A folded start keeps what the teacher knows of the task.
    assert students["kd from pca"]["mean"] > students["kd from random"]["mean"]
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps(found), encoding="utf-8")
    assert run("--markdown", str(figures)).strip() in printed
