"""Measure LRC-BERT, plain distillation and no teacher on GLUE: every figure of docs/results.md.

    python benchmarks/results.py --data-dir ../shared/data --work runs/results
    python benchmarks/results.py --work runs/results --json > benchmarks/results.json
    python benchmarks/results.py --markdown          the tables of docs/results.md, from that file

Teacher: minilm-l6 fine-tuned on each task. Student: its layers 2, 4, 6. Learning rates are tuned on a
fold of SST-2's training rows, for each method; the validation split is used only to report. Nothing is
selected on it: the student is that of the last step. Runs that are done are skipped, so that a killed
measurement goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SEEDS = (0, 1, 2)
RATES = (5e-5, 1e-4, 3e-4)

METHODS: dict[str, dict[str, object]] = {
    "none": {"name": "none"},
    "kd": {"name": "kd"},
    "lrc-bert": {"name": "lrc-bert"},
}
ABLATIONS: dict[str, dict[str, object]] = {
    "without COS-NCE": {"name": "lrc-bert", "alpha": 0},
    "without soft labels": {"name": "lrc-bert", "beta": 0},
    "without hard labels": {"name": "lrc-bert", "gamma": 0},
    "without perturbation": {"name": "lrc-bert", "perturbation": "off"},
    "one stage": {"name": "lrc-bert", "switch": 0},
    "perturbation of the whole tensor": {"name": "lrc-bert", "perturbation_norm": "tensor"},
    "perturbation in stage 2 only": {"name": "lrc-bert", "perturbation": "second"},
}


@dataclass(frozen=True)
class Plan:
    """How much of a task fits the time: epochs, and rows where a subset is used."""

    teacher_epochs: int
    epochs: int
    teacher_rate: float = 5e-5
    train_rows: int | None = None
    ablate: bool = False


TASKS = {
    "sst2": Plan(teacher_epochs=1, epochs=1, train_rows=10_000),
    "qnli": Plan(teacher_epochs=2, epochs=1, train_rows=4_000),
    "cola": Plan(teacher_epochs=3, epochs=1, ablate=True),
    "mrpc": Plan(teacher_epochs=3, epochs=1, ablate=True),
    "stsb": Plan(teacher_epochs=3, epochs=1, ablate=True),
}
BATCH_SIZE = 16
FOLD = Plan(teacher_epochs=2, epochs=1, teacher_rate=1e-4)


@dataclass(frozen=True)
class Run:
    """One training: where it is kept and what it is told."""

    folder: Path
    command: list[str]
    settings: dict[str, object] = field(default_factory=dict)


def overrides(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def execute(run: Run) -> None:
    """Run one training on one thread in a process of its own, unless it is done."""
    if (run.folder / "metrics.json").exists():
        return
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "stillroom.cli", *run.command, "-o", str(run.folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (run.folder.parent / f"{run.folder.name}.log").open("w") as log:
        code = subprocess.run(
            [*command, *overrides(run.settings)], stdout=log, stderr=log, env=environment
        ).returncode
    if code:
        raise SystemExit(f"{run.folder} failed with {code}: see {log.name}")
    for heavy in ("checkpoints", "student"):
        shutil.rmtree(run.folder / heavy, ignore_errors=True)
    print("done", run.folder, flush=True)


def execute_all(runs: list[Run], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(execute, runs))


def teacher_run(folder: Path, data: list[str], plan: Plan) -> Run:
    settings: dict[str, object] = {
        "training.epochs": plan.teacher_epochs,
        "training.learning_rate": plan.teacher_rate,
        "training.select": "last",
    }
    return Run(folder, ["finetune", "--model", "minilm-l6", *data], settings)


def student_run(
    folder: Path,
    teacher: Path,
    data: list[str],
    method: dict[str, object],
    *,
    epochs: int,
    rate: float,
    seed: int,
    rows: int | None = None,
) -> Run:
    settings: dict[str, object] = {
        "training.epochs": epochs,
        "training.batch_size": BATCH_SIZE,
        "training.learning_rate": rate,
        "training.seed": seed,
        "training.select": "last",
        "training.evaluate_every": epochs,
        "training.checkpoint_every": 100_000,
    }
    if rows is not None:
        settings["dataset.train_rows"] = rows
    settings |= {f"method.{key}": value for key, value in method.items() if key != "name"}
    command = ["distill", "--teacher", str(teacher), "--student", "layers:2,4,6"]
    return Run(folder, [*command, "--method", str(method["name"]), *data], settings)


def make_fold(work: Path, data_dir: Path) -> Path:
    """Write 10,000 of SST-2's training rows as two files: every fifth is the fold to tune on."""
    folder = work / "tuning" / "fold"
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data_dir / "glue" / "sst2" / "train.parquet").select(["sentence", "label"])
    drawn = np.random.default_rng(1).choice(table.num_rows, 10_000, replace=False)
    for name, chosen in (("train", np.arange(10_000) % 5 != 0), ("validation", np.arange(10_000) % 5 == 0)):
        if not (folder / f"{name}.parquet").exists():
            pq.write_table(table.take(drawn[chosen]), folder / f"{name}.parquet")
    return folder


def fold_teacher(work: Path, data_dir: Path) -> Run:
    return teacher_run(work / "tuning" / "teacher", ["--dataset", str(make_fold(work, data_dir))], FOLD)


def tuning(work: Path, data_dir: Path, teacher: Run) -> list[tuple[str, float, Run]]:
    """Return a run on the fold for each method and learning rate."""
    data = ["--dataset", str(make_fold(work, data_dir))]
    return [
        (
            name,
            rate,
            student_run(
                work / "tuning" / f"{name}-{rate:g}",
                teacher.folder,
                data,
                method,
                epochs=FOLD.epochs,
                rate=rate,
                seed=0,
            ),
        )
        for rate in RATES
        for name, method in METHODS.items()
    ]


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def fold_score(run: Run) -> float:
    """Return accuracy, the first metric of a file of one's own."""
    return read(run.folder)["student"]["metrics"]["accuracy"]


def tuned_rates(runs: list[tuple[str, float, Run]]) -> dict[str, float]:
    return {
        name: max((fold_score(run), rate) for other, rate, run in runs if other == name)[1]
        for name in METHODS
    }


def grid(work: Path, data_dir: Path, rates: dict[str, float]) -> Iterator[tuple[str, str, int, Run]]:
    """Yield task, variant, seed and run: a seed's methods and its ablations, then the next seed's."""
    for seed in SEEDS:
        for variants, ablation in ((METHODS, False), (ABLATIONS, True)):
            for task, plan in TASKS.items():
                if ablation and not plan.ablate:
                    continue
                data = ["--dataset", f"glue/{task}", "--data-dir", str(data_dir)]
                for name, method in variants.items():
                    folder = work / task / f"{name.replace(' ', '-').lower()}-{seed}"
                    yield (
                        task,
                        name,
                        seed,
                        student_run(
                            folder,
                            work / task / "teacher",
                            data,
                            method,
                            epochs=plan.epochs,
                            rate=rates[str(method["name"])],
                            seed=seed,
                            rows=plan.train_rows,
                        ),
                    )


def table(work: Path, data_dir: Path) -> dict:
    """Return every figure as JSON: mean and spread over the seeds that are done."""
    tuned = tuning(work, data_dir, fold_teacher(work, data_dir))
    rates = tuned_rates(tuned)
    found: dict = {
        "settings": {
            "rates": rates,
            "batch_size": BATCH_SIZE,
            "tasks": {task: vars(plan) for task, plan in TASKS.items()},
        },
        "tuning": {f"{name} {rate:g}": fold_score(run) for name, rate, run in tuned},
        "tasks": {},
    }
    for task, name, seed, run in grid(work, data_dir, rates):
        if not (run.folder / "metrics.json").exists():
            continue
        metrics = read(run.folder)
        found["environment"] = metrics["environment"]
        entry = found["tasks"].setdefault(task, {"metric": metrics["metric"], "students": {}})
        entry["teacher"] = metrics["teacher"]
        student = entry["students"].setdefault(name, {"seeds": {}})
        student["seeds"][str(seed)] = metrics["student"]["metrics"]
    for entry in found["tasks"].values():
        goal = entry["teacher"]["metrics"][entry["metric"]]
        for student in entry["students"].values():
            values = [metrics[entry["metric"]] for metrics in student["seeds"].values()]
            student["mean"] = statistics.mean(values)
            student["spread"] = statistics.stdev(values) if len(values) > 1 else None
            student["retained"] = student["mean"] / goal
    return found


def markdown(found: dict) -> str:
    """Return the tables of docs/results.md."""
    lines = ["| task (metric) | teacher | " + " | ".join(METHODS) + " | kept: " + ", ".join(METHODS) + " |"]
    lines.append("|---|---|" + "---|" * (len(METHODS) + 1))
    for task, entry in found["tasks"].items():
        metric = entry["metric"]
        students = [entry["students"].get(name) for name in METHODS]
        kept = ", ".join("-" if student is None else f"{student['retained']:.1%}" for student in students)
        cells = [f"{task} ({metric})", f"{100 * entry['teacher']['metrics'][metric]:.1f}"]
        lines.append("| " + " | ".join([*cells, *map(cell, students), kept]) + " |")
    tasks = [task for task in found["tasks"] if TASKS[task].ablate]
    lines += ["", "| variant | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name in ["lrc-bert", *ABLATIONS, "kd", "none"]:
        students = [found["tasks"][task]["students"].get(name) for task in tasks]
        lines.append(f"| {name} | " + " | ".join(map(cell, students)) + " |")
    return "\n".join(lines)


def cell(student: dict | None) -> str:
    """Return `mean ± standard deviation (seeds)` in points."""
    if student is None:
        return "-"
    spread = "" if student["spread"] is None else f" ± {100 * student['spread']:.1f}"
    return f"{100 * student['mean']:.1f}{spread} ({len(student['seeds'])})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")
    parser.add_argument("--json", action="store_true", help="print the figures of what is done")
    parser.add_argument("--markdown", action="store_true", help="print the committed figures as tables")
    options = parser.parse_args()
    work, data_dir = options.work.absolute(), options.data_dir.absolute()
    if options.markdown:
        print(markdown(json.loads(Path(__file__).with_suffix(".json").read_text())))
        return
    if options.json:
        print(json.dumps(table(work, data_dir), indent=2))
        return
    tutor = fold_teacher(work, data_dir)
    tuned = tuning(work, data_dir, tutor)
    teachers = [
        teacher_run(
            work / task / "teacher", ["--dataset", f"glue/{task}", "--data-dir", str(data_dir)], plan
        )
        for task, plan in TASKS.items()
    ]
    execute_all([tutor], options.workers)
    execute_all([*teachers, *(run for _, _, run in tuned)], options.workers)
    rates = tuned_rates(tuned)
    print("learning rates", rates, flush=True)
    execute_all([run for *_, run in grid(work, data_dir, rates)], options.workers)


if __name__ == "__main__":
    main()
