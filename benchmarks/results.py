"""Measure every method on GLUE: every figure of docs/results.md.

    python benchmarks/results.py --data-dir ../shared/data --work runs/results
    python benchmarks/results.py --work runs/results --json > benchmarks/results.json
    python benchmarks/results.py --markdown          the tables of docs/results.md, from that file

Teacher: minilm-l6 fine-tuned on each task. Student: its layers 2, 4, 6. Learning rates are tuned on a
fold of SST-2's training rows, for each method (a variant has its method's); the validation split is used
only to report. Nothing is selected on it: the student is that of the last step. All methods take equally
many steps. What is done is skipped and a run that was killed goes on, so that a killed measurement
continues; seed by seed, so that one that is cut short compares what it has.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stillroom import Comparison, FinetuneRecipe, compare, finetune

SEEDS = (0, 1, 2)
RATES = (5e-5, 1e-4, 3e-4)
STUDENT = "layers:2,4,6"

METHODS = ("none", "kd", "lrc-bert", "codir", "bert-emd")
"""In the order of the tables; the first is the control."""

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
    epochs: float
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
class Measurement:
    """Where it is kept, what it reads, and which part of it is asked for."""

    work: Path
    data_dir: Path
    workers: int
    tasks: dict[str, Plan]
    methods: Sequence[str]
    seeds: Sequence[int]

    def run(self) -> None:
        """Do what is missing: tuning and teachers first, then seed by seed."""
        self.teacher("tuning", {"name": str(make_fold(self.work, self.data_dir))}, FOLD)
        for task, plan in self.tasks.items():
            self.teacher(task, self.data(task), plan)
        rates = self.tune()
        print("learning rates", rates, flush=True)
        for seed in self.seeds:
            for task in self.tasks:
                self.compare(task, {name: {"name": name} for name in self.methods}, rates, seed)
            for task, plan in self.tasks.items():
                if plan.ablate and "lrc-bert" in self.methods:
                    self.compare(task, ABLATIONS, rates, seed)

    def data(self, task: str) -> dict[str, Any]:
        """Return the section `dataset` of a task."""
        plan = self.tasks[task]
        return {"name": f"glue/{task}", "data_dir": str(self.data_dir)} | (
            {} if plan.train_rows is None else {"train_rows": plan.train_rows}
        )

    def teacher(self, name: str, data: dict[str, Any], plan: Plan) -> None:
        """Fine-tune the teacher, on all rows, unless that is done."""
        folder = self.work / name / "teacher"
        if (folder / "metrics.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        whole = {key: value for key, value in data.items() if key != "train_rows"}
        training = {
            "epochs": plan.teacher_epochs,
            "learning_rate": plan.teacher_rate,
            "select": "last",
        }
        recipe = FinetuneRecipe.load(model="minilm-l6", dataset=whole, training=training)
        found = finetune(recipe, folder)
        print("teacher", name, found["model"]["metrics"], flush=True)

    def comparison(
        self, name: str, data: dict[str, Any], variants: dict[str, Any], epochs: float, seed: int
    ) -> Comparison:
        """Return the comparison of methods with options, each with a learning rate of its own."""
        training = {
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "select": "last",
            "evaluate_every": epochs,
        }
        return Comparison.load(
            teacher=str(self.work / name / "teacher"),
            dataset=data,
            students=[STUDENT],
            seeds=[seed],
            training=training,
            methods={
                key: {"method": method, "training": {"learning_rate": rate}}
                for key, (method, rate) in variants.items()
            },
        )

    def tune(self) -> dict[str, float]:
        """Return the best learning rate on the fold for each method."""
        tried = {f"{name} {rate:g}": ({"name": name}, rate) for rate in RATES for name in self.methods}
        data = {"name": str(make_fold(self.work, self.data_dir))}
        wanted = self.comparison("tuning", data, tried, FOLD.epochs, 0)
        compare(wanted, self.work / "tuning" / "compare", workers=self.workers)
        scores = self.tuning()
        return {
            name: max(RATES, key=lambda rate: (scores[f"{name} {rate:g}"], rate)) for name in self.methods
        }

    def tuning(self) -> dict[str, float]:
        """Return accuracy on the fold by method and rate."""
        entries = read(self.work / "tuning" / "compare")["students"][STUDENT]["methods"]
        return {name: one["mean"]["accuracy"] for name, one in entries.items()}

    def folder(self, task: str) -> Path:
        """Return where a task's comparison is kept."""
        return self.work / task / f"compare-{self.tasks[task].epochs:g}-epochs"

    def compare(
        self, task: str, variants: dict[str, dict[str, object]], rates: dict[str, float], seed: int
    ) -> None:
        """Do what is missing of these variants of methods on a task, from one seed."""
        rated = {name: (method, rates[str(method["name"])]) for name, method in variants.items()}
        wanted = self.comparison(task, self.data(task), rated, self.tasks[task].epochs, seed)
        started = time.perf_counter()
        compare(wanted, self.folder(task), workers=self.workers)
        print(task, "seed", seed, f"{time.perf_counter() - started:.0f} s", flush=True)

    def figures(self) -> dict[str, Any]:
        """Return every figure of what is done."""
        scores = self.tuning()
        tried = [name for name in self.methods if f"{name} {RATES[0]:g}" in scores]
        rates = {name: max(RATES, key=lambda rate: (scores[f"{name} {rate:g}"], rate)) for name in tried}
        found: dict[str, Any] = {
            "settings": {
                "rates": rates,
                "batch_size": BATCH_SIZE,
                "tasks": {task: asdict(plan) for task, plan in self.tasks.items()},
            },
            "tuning": scores,
            "tasks": {},
        }
        for task in self.tasks:
            if not (self.folder(task) / "compare.json").exists():
                continue
            compared = read(self.folder(task))
            found["environment"] = compared["environment"]
            made = compared["students"][STUDENT]
            found["tasks"][task] = {
                "metric": compared["metric"],
                "teacher": compared["teacher"],
                "student": {key: value for key, value in made.items() if key not in ("methods", "control")},
                "students": {
                    name: {
                        "seeds": one["seeds"],
                        "mean": one["mean"][compared["metric"]],
                        "spread": (one["standard_deviation"] or {}).get(compared["metric"]),
                        "retained": one["retained"],
                        "against_control": one.get("against_control", {}).get(compared["metric"]),
                        "seconds": one["seconds"],
                        "steps": one["steps"],
                    }
                    for name, one in made["methods"].items()
                },
            }
        return found


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


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


def names_in(found: dict) -> list[str]:
    """Return the methods that have figures, in the order of the tables."""
    return [name for name in METHODS if any(name in task["students"] for task in found["tasks"].values())]


def markdown(found: dict) -> str:
    """Return the tables of docs/results.md."""
    names = names_in(found)
    lines = ["| task (metric) | teacher | " + " | ".join(names) + " | kept: " + ", ".join(names) + " |"]
    lines.append("|---|---|" + "---|" * (len(names) + 1))
    for task, entry in found["tasks"].items():
        metric = entry["metric"]
        students = [entry["students"].get(name) for name in names]
        kept = ", ".join("-" if student is None else f"{student['retained']:.1%}" for student in students)
        cells = [f"{task} ({metric})", f"{100 * entry['teacher']['metrics'][metric]:.1f}"]
        lines.append("| " + " | ".join([*cells, *map(cell, students), kept]) + " |")
    if any(
        one.get("against_control") for task in found["tasks"].values() for one in task["students"].values()
    ):
        lines += ["", "| minus none | " + " | ".join(names[1:]) + " |", "|---|" + "---|" * (len(names) - 1)]
        for task, entry in found["tasks"].items():
            cells = [difference(entry["students"].get(name)) for name in names[1:]]
            lines.append(f"| {task} ({entry['metric']}) | " + " | ".join(cells) + " |")
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


def difference(student: dict | None) -> str:
    """Return the difference to the control in points, with its 95 % interval."""
    found = None if student is None else student.get("against_control")
    if found is None:
        return "-"
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of these: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these: %(default)s")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: %(default)s")
    parser.add_argument("--epochs", type=float, help="for all tasks; default: the script's, for each")
    parser.add_argument("--json", action="store_true", help="print the figures of what is done")
    parser.add_argument("--markdown", action="store_true", help="print the committed figures as tables")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(Path(__file__).with_suffix(".json").read_text())))
        return
    tasks = {name: TASKS[name] for name in options.tasks.split(",")}
    if options.epochs is not None:
        tasks = {name: replace(plan, epochs=options.epochs) for name, plan in tasks.items()}
    measurement = Measurement(
        options.work.absolute(),
        options.data_dir.absolute(),
        options.workers,
        tasks,
        options.methods.split(","),
        [int(seed) for seed in options.seeds.split(",")],
    )
    if options.json:
        print(json.dumps(measurement.figures(), indent=2))
        return
    measurement.run()


if __name__ == "__main__":
    main()
