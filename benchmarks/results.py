"""Measure every method on GLUE: every figure of docs/results.md.

    python benchmarks/results.py --data-dir ../shared/data --work runs/results
    python benchmarks/results.py --work runs/results --json > benchmarks/results.json
    python benchmarks/results.py --markdown          the tables of docs/results.md, from that file
    python benchmarks/results.py --work runs/results --pictures docs     docs/flow-TASK.svg

Teacher: minilm-l6 fine-tuned on each task. Student: its layers 2, 4, 6. Learning rates are tuned on a
fold of SST-2's training rows, for each method (a variant has its method's); the validation split is used
only to report. Nothing is selected on it: the student is that of the last step. All methods take equally
many steps. What is done is skipped and a run that was killed goes on, so that a killed measurement
continues; seed by seed, so that one that is cut short compares what it has. Several of these, each with
other --tasks, can share a --work.
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from stillroom import Comparison, FinetuneRecipe, compare, durable, finetune
from stillroom.errors import RunFailed
from stillroom.report import flow
from stillroom.run import generator
from stillroom.training import masked_lm

SEEDS = (0, 1, 2)
RATES = (5e-5, 1e-4, 3e-4)
STUDENT = "layers:2,4,6"

METHODS: dict[str, dict[str, object]] = {
    "none": {"name": "none"},
    "kd": {"name": "kd"},
    "lrc-bert": {"name": "lrc-bert"},
    "lrc-bert, tensor norm": {"name": "lrc-bert", "perturbation_norm": "tensor"},
    "codir": {"name": "codir"},
    "bert-emd": {"name": "bert-emd"},
    "angular-emd": {"name": "angular-emd"},
    "cilda": {"name": "cilda", "generator": "GENERATOR"},
    "mate-kd": {"name": "mate-kd", "generator": "GENERATOR"},
    "pkd": {"name": "pkd"},
    "tinybert": {"name": "tinybert"},
    "minilm": {"name": "minilm"},
    "minilmv2": {"name": "minilmv2"},
    "rail-kd": {"name": "rail-kd"},
    "distilbert": {"name": "distilbert"},
}
"""In the order of the tables; the first is the control. `GENERATOR` is made once, from SST-2's text."""

ABLATIONS: dict[str, dict[str, object]] = {
    "without COS-NCE": {"name": "lrc-bert", "alpha": 0},
    "without soft labels": {"name": "lrc-bert", "beta": 0},
    "without hard labels": {"name": "lrc-bert", "gamma": 0},
    "without perturbation": {"name": "lrc-bert", "perturbation": "off"},
    "one stage": {"name": "lrc-bert", "switch": 0},
    "perturbation in stage 2 only": {"name": "lrc-bert", "perturbation": "second"},
}


@dataclass(frozen=True)
class Plan:
    """How much of a task fits the time: epochs, and rows where a subset is used."""

    teacher_epochs: float
    epochs: float
    teacher_rate: float = 1e-4
    train_rows: int | None = None
    ablate: bool = False


TASKS = {
    "sst2": Plan(teacher_epochs=1, epochs=1, teacher_rate=5e-5, train_rows=10_000),
    "qnli": Plan(teacher_epochs=3, epochs=1),
    "cola": Plan(teacher_epochs=5, epochs=2, ablate=True),
    "mrpc": Plan(teacher_epochs=5, epochs=4, ablate=True),
    "stsb": Plan(teacher_epochs=5, epochs=3, ablate=True),
}
BATCH_SIZE = 32
GENERATOR_EPOCHS = 10
FOLD = Plan(teacher_epochs=2, epochs=1)


@dataclass(frozen=True)
class Measurement:
    """Where it is kept, what it reads, and which part of it is asked for."""

    work: Path
    data_dir: Path
    workers: int
    tasks: dict[str, Plan]
    methods: Sequence[str]
    seeds: Sequence[int]
    cache: str

    def prepare(self) -> None:
        """Make what is missing of teachers and generator, and tune."""
        for task, plan in self.tasks.items():
            self.teacher(task, self.data(task), plan)
        place = self.work / "tuning" / "compare"
        if (place / "compare.json").exists() and self.rates().keys() >= set(self.methods):
            return
        fold = {"name": str(make_fold(self.work, self.data_dir))}
        self.teacher("tuning", fold, FOLD)
        variants = self.variants({name: METHODS[name] for name in self.methods})
        tried = {f"{name} {rate:g}": (method, rate) for rate in RATES for name, method in variants.items()}
        wanted = self.comparison("tuning", fold, tried, FOLD.epochs, [0])
        compare(wanted, place, workers=self.workers)

    def run(self) -> None:
        """Do what is missing, each task seed by seed."""
        for task in self.tasks:
            started = time.perf_counter()
            compare(self.wanted(task), self.folder(task), workers=self.workers)
            print(task, f"{time.perf_counter() - started:.0f} s", flush=True)

    def wanted(self, task: str) -> Comparison:
        """Return what is compared on a task: the methods, and where it is planned, the ablations."""
        plan, rates = self.tasks[task], self.rates()
        chosen = {name: METHODS[name] for name in self.methods}
        if plan.ablate and "lrc-bert" in self.methods:
            chosen |= ABLATIONS
        rated = {
            name: (method, rates[name if name in rates else "lrc-bert"])
            for name, method in self.variants(chosen).items()
        }
        return self.comparison(task, self.data(task), rated, plan.epochs, self.seeds)

    def data(self, task: str) -> dict[str, Any]:
        """Return the section `dataset` of a task."""
        plan = self.tasks[task]
        return {"name": f"glue/{task}", "data_dir": str(self.data_dir)} | (
            {} if plan.train_rows is None else {"train_rows": plan.train_rows}
        )

    def teacher(self, name: str, data: dict[str, Any], plan: Plan) -> None:
        """Fine-tune the teacher, on all rows, unless that is done."""
        folder = self.work / name / "teacher"
        with durable.locked(self.work / name, wait=True):
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

    def variants(self, chosen: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        """Return the methods' options, with the generator's folder for those that need one."""
        if not any("generator" in options for options in chosen.values()):
            return chosen
        place = self.work / "generator"
        with durable.locked(self.work / "tuning", wait=True):
            if not (place / "metrics.json").exists():
                shutil.rmtree(place, ignore_errors=True)
                text = self.work / "tuning" / "text.txt"
                rows = pq.read_table(self.work / "tuning" / "fold" / "train.parquet")["sentence"]
                text.write_text("\n".join(rows.to_pylist()), encoding="utf-8")
                settings = masked_lm.Settings(epochs=GENERATOR_EPOCHS)
                found = generator.make(
                    "minilm-l6", generator.read_texts([text]), place, settings, Console(stderr=True)
                )
                print("generator", found, flush=True)
        return {
            name: {key: str(place) if key == "generator" else value for key, value in options.items()}
            for name, options in chosen.items()
        }

    def comparison(
        self,
        name: str,
        data: dict[str, Any],
        variants: dict[str, Any],
        epochs: float,
        seeds: Sequence[int],
    ) -> Comparison:
        """Return the comparison of methods with options, each with a learning rate of its own."""
        training = {
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "select": "last",
            "evaluate_every": epochs,
        }
        return Comparison.load(
            teacher={"name": str(self.work / name / "teacher"), "cache": self.cache},
            dataset=data,
            students=[STUDENT],
            seeds=list(seeds),
            training=training,
            methods={
                key: {"method": method, "training": {"learning_rate": rate}}
                for key, (method, rate) in variants.items()
            },
        )

    def rates(self) -> dict[str, float]:
        """Return the best learning rate on the fold for each method that was tuned."""
        scores = self.tuning()
        return {
            name: max(RATES, key=lambda rate: (scores[f"{name} {rate:g}"], rate))
            for name in METHODS
            if all(f"{name} {rate:g}" in scores for rate in RATES)
        }

    def tuning(self) -> dict[str, float]:
        """Return accuracy on the fold by method and rate."""
        entries = read(self.work / "tuning" / "compare")["students"][STUDENT]["methods"]
        return {name: one["mean"]["accuracy"] for name, one in entries.items()}

    def folder(self, task: str) -> Path:
        """Return where a task's comparison is kept."""
        return self.work / task / f"compare-{self.tasks[task].epochs:g}-epochs"

    def draw_flows(self, folder: Path) -> list[Path]:
        """Draw which student layer learnt from which teacher layer of a task, as a mean over its seeds."""
        drawn = []
        for task in self.tasks:
            logs = (self.folder(task) / "runs").glob("*/bert-emd/*/log.jsonl")
            runs = [log.parent for log in logs if (log.parent / "metrics.json").exists()]
            if runs:
                seeds = "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds"
                drawn.append(flow.write(runs, folder / f"flow-{task}.svg", title=f"{task}, {seeds}"))
        return drawn

    def figures(self) -> dict[str, Any]:
        """Return every figure of what is done."""
        found: dict[str, Any] = {
            "settings": {
                "rates": self.rates(),
                "batch_size": BATCH_SIZE,
                "tasks": {task: asdict(plan) for task, plan in self.tasks.items()},
            },
            "tuning": self.tuning(),
            "tasks": {},
        }
        for task in self.tasks:
            if not self.folder(task).exists():
                continue
            with contextlib.suppress(RunFailed):
                compare(self.wanted(task), self.folder(task), workers=0)
            compared = read(self.folder(task))
            found["environment"] = compared["environment"]
            made = compared["students"][STUDENT]
            metric = compared["metric"]
            found["tasks"][task] = {
                "metric": metric,
                "teacher": compared["teacher"],
                "student": {key: value for key, value in made.items() if key not in ("methods", "control")},
                "students": {
                    name: {
                        "seeds": one["seeds"],
                        "mean": one["mean"][metric],
                        "spread": (one["standard_deviation"] or {}).get(metric),
                        "retained": one["retained"],
                        "against_control": one.get("against_control", {}).get(metric),
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
    with durable.locked(work / "tuning", wait=True):
        table = pq.read_table(data_dir / "glue" / "sst2" / "train.parquet").select(["sentence", "label"])
        drawn = np.random.default_rng(1).choice(table.num_rows, 10_000, replace=False)
        tenths = np.arange(10_000) % 5
        for name, chosen in (("train", tenths != 0), ("validation", tenths == 0)):
            if not (folder / f"{name}.parquet").exists():
                pq.write_table(table.take(drawn[chosen]), folder / f"{name}.parquet")
    return folder


def names_in(found: dict) -> list[str]:
    """Return the methods that have figures, in the order of the tables."""
    return [name for name in METHODS if any(name in task["students"] for task in found["tasks"].values())]


def markdown(found: dict) -> str:
    """Return the tables of docs/results.md."""
    tasks, names = found["tasks"], names_in(found)
    heads = [f"{task} ({entry['metric']})" for task, entry in tasks.items()]
    rule = "|---|" + "---|" * len(tasks)
    lines = ["| | " + " | ".join(heads) + " | kept |", rule + "---|"]
    teacher = [f"{100 * entry['teacher']['metrics'][entry['metric']]:.1f}" for entry in tasks.values()]
    lines.append("| teacher | " + " | ".join(teacher) + " | 100 % |")
    for name in names:
        students = [entry["students"].get(name) for entry in tasks.values()]
        kept = [student["retained"] for student in students if student is not None]
        share = f"{100 * sum(kept) / len(kept):.1f} %" if len(kept) == len(tasks) else "-"
        lines.append(f"| {name} | " + " | ".join(map(cell, students)) + f" | {share} |")
    lines += ["", "| minus none | " + " | ".join(heads) + " |", rule]
    for name in names[1:]:
        cells = [difference(entry["students"].get(name)) for entry in tasks.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ablated = set(ABLATIONS)
    tasks = [task for task, entry in tasks.items() if ablated & entry["students"].keys()]
    if not tasks:
        return "\n".join(lines)
    lines += ["", "| variant | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name in ["lrc-bert", *ABLATIONS, "lrc-bert, tensor norm", "kd", "none"]:
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
    parser.add_argument("--methods", help=f"of these: {'; '.join(METHODS)}; separated by semicolons")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: %(default)s")
    parser.add_argument("--epochs", type=float, help="for all tasks; default: the script's, for each")
    parser.add_argument("--teacher-epochs", type=float, help="likewise, of the teachers")
    parser.add_argument("--rows", type=int, help="likewise, of the students' training rows")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--cache", default="auto", help="`off` computes the teacher live: faster on a GPU")
    parser.add_argument("--prepare", action="store_true", help="teachers and tuning only")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="draw the layer flow of each task there"
    )
    parser.add_argument("--json", action="store_true", help="print the figures of what is done")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(__file__).with_suffix(".json"),
        help="print the tables of figures that --json printed; default: the committed results.json",
    )
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return
    tasks = {name: TASKS[name] for name in options.tasks.split(",")}
    given = {
        "epochs": options.epochs,
        "teacher_epochs": options.teacher_epochs,
        "train_rows": options.rows,
    }
    if options.no_ablations:
        given["ablate"] = False
    other = {key: value for key, value in given.items() if value is not None}
    tasks = {name: replace(plan, **other) for name, plan in tasks.items()}
    measurement = Measurement(
        options.work.absolute(),
        options.data_dir.absolute(),
        options.workers,
        tasks,
        options.methods.split(";") if options.methods else list(METHODS),
        [int(seed) for seed in options.seeds.split(",")],
        options.cache,
    )
    if options.json:
        print(json.dumps(measurement.figures(), indent=2))
        return
    if options.pictures is not None:
        print(*measurement.draw_flows(options.pictures), sep="\n")
        return
    measurement.prepare()
    if not options.prepare:
        measurement.run()


if __name__ == "__main__":
    main()
