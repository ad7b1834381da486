"""The script that measures starts: a tiny trial from end to end, and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import make_rows, make_task, make_teacher, save_encoder

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "starts.py"


@pytest.mark.slow
def test_starts_are_compared(tmp_path: Path) -> None:
    data = tmp_path / "glue" / "sst2"
    data.mkdir(parents=True)
    for split, count, seed in (("train", 200, 0), ("validation", 40, 1)):
        rows = make_rows(make_task(), count, seed=seed)
        table = pa.table({"sentence": rows.texts[0], "label": rows.labels, "idx": np.arange(count)})
        pq.write_table(table, data / f"{split}.parquet")
    work = tmp_path / "work"
    teacher = make_teacher()
    (work / "sst2").mkdir(parents=True)
    teacher.save(work / "sst2" / "teacher")
    (work / "sst2" / "teacher" / "metrics.json").write_text("{}")
    start = save_encoder(tmp_path / "start", width=16, seed=5)

    def run(*more: str) -> str:
        command = [sys.executable, str(SCRIPT), "--work", str(work), "--data-dir", str(tmp_path), "--tiny"]
        command += ["--tasks", "sst2", "--student", "2x16x2x32", "--workers", "1"]
        command += ["--pretrained", f"checkpoint={start}", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

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
