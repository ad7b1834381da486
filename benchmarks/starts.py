"""Measure starts of a 4x312 student on GLUE: at random, from its teacher (pca), and pre-trained.

    stillroom pretrain --teacher minilm-l6 --text ../shared/data/corpus --init pca -o runs/pretrained
    python benchmarks/starts.py --work runs/results --pretrained runs/pretrained
    python benchmarks/starts.py --work runs/results --pretrained runs/pretrained --json > starts.json
    python benchmarks/starts.py --markdown starts.json          the table, from that file

Teacher: minilm-l6 fine-tuned on each task, that of `benchmarks/results.py` where --work is its folder. The
learning rate is tuned for each start on a fold of SST-2's training rows; the validation split is used only
to report, and the student is that of the last step. What is done is skipped and a run that was killed goes
on. `--pretrained NAME=RUN`, which may be repeated, compares several. `--tiny` is a trial of a minute.
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

from results import BATCH_SIZE, FOLD, SEEDS, TASKS, Plan, cell, make_fold, read

from stillroom import Comparison, FinetuneRecipe, compare, durable, finetune
from stillroom.errors import RunFailed

STUDENT = "4x312"
RATES = (1e-4, 3e-4, 6e-4)


@dataclass(frozen=True)
class Measurement:
    """Where it is kept, what it reads, and which part of it is asked for."""

    work: Path
    data_dir: Path
    workers: int
    tasks: dict[str, Plan]
    methods: Sequence[str]
    starts: dict[str, str]
    """Names of the table, and what `init` each is."""
    seeds: Sequence[int]
    rates: Sequence[float]
    student: str
    model: str

    def variants(self, rates: dict[str, float]) -> dict[str, Any]:
        """Return the methods of a comparison: each method from each start, at its rate."""
        return {
            f"{method} from {start}": {
                "method": method,
                "init": init,
                "training": {"learning_rate": rates[f"{method} from {start}"]},
            }
            for method in self.methods
            for start, init in self.starts.items()
        }

    def run(self) -> None:
        """Do what is missing: teachers, tuning, then each task."""
        chosen = self.chosen()
        for task, plan in self.tasks.items():
            started = time.perf_counter()
            self.teacher(task, self.data(task), plan)
            compare(self.wanted(task, chosen), self.folder(task), workers=self.workers)
            print(task, f"{time.perf_counter() - started:.0f} s", flush=True)

    def chosen(self) -> dict[str, float]:
        """Return the best learning rate on the fold of each method from each start."""
        names = self.variants(dict.fromkeys(self._names(), 1.0))
        if len(self.rates) == 1:
            return dict.fromkeys(names, self.rates[0])
        fold = {"name": str(make_fold(self.work, self.data_dir))}
        self.teacher("tuning", fold, FOLD)
        tried = {
            f"{name} {rate:g}": {**one, "training": {"learning_rate": rate}}
            for rate in self.rates
            for name, one in names.items()
        }
        wanted = self.comparison("tuning", fold, tried, FOLD.epochs, [0])
        place = self.work / "tuning" / f"starts-{self.student}"
        compare(wanted, place, workers=self.workers)
        scores = {
            name: one["mean"]["accuracy"]
            for name, one in read(place)["students"][self.student]["methods"].items()
        }
        return {n: max(self.rates, key=lambda rate: (scores[f"{n} {rate:g}"], rate)) for n in names}

    def wanted(self, task: str, chosen: dict[str, float]) -> Comparison:
        """Return what is compared on a task."""
        plan = self.tasks[task]
        return self.comparison(task, self.data(task), self.variants(chosen), plan.epochs, self.seeds)

    def comparison(
        self, name: str, data: dict[str, Any], variants: dict[str, Any], epochs: float, seeds: Sequence[int]
    ) -> Comparison:
        """Return a comparison of the student from several starts."""
        return Comparison.load(
            teacher=str(self.work / name / "teacher"),
            dataset=data,
            students=[self.student],
            seeds=list(seeds),
            training={
                "epochs": epochs,
                "batch_size": BATCH_SIZE,
                "select": "last",
                "evaluate_every": epochs,
            },
            methods=variants,
        )

    def data(self, task: str) -> dict[str, Any]:
        """Return the section `dataset` of a task."""
        rows = self.tasks[task].train_rows
        more = {} if rows is None else {"train_rows": rows}
        return {"name": f"glue/{task}", "data_dir": str(self.data_dir)} | more

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
            recipe = FinetuneRecipe.load(model=self.model, dataset=whole, training=training)
            print("teacher", name, finetune(recipe, folder)["model"]["metrics"], flush=True)

    def folder(self, task: str) -> Path:
        """Return where a task's comparison is kept."""
        return self.work / task / f"starts-{self.student}-{self.tasks[task].epochs:g}-epochs"

    def figures(self) -> dict[str, Any]:
        """Return every figure of what is done."""
        chosen = self.chosen()
        found: dict[str, Any] = {
            "settings": {
                "student": self.student,
                "rates": chosen,
                "batch_size": BATCH_SIZE,
                "tasks": {task: asdict(plan) for task, plan in self.tasks.items()},
                "starts": {name: self._start(init) for name, init in self.starts.items()},
            },
            "tasks": {},
        }
        for task in self.tasks:
            if not self.folder(task).exists():
                continue
            with contextlib.suppress(RunFailed):
                compare(self.wanted(task, chosen), self.folder(task), workers=0)
            compared = read(self.folder(task))
            found["environment"] = compared["environment"]
            metric = compared["metric"]
            entries = compared["students"][self.student]["methods"]
            found["tasks"][task] = {
                "metric": metric,
                "teacher": compared["teacher"],
                "students": {
                    name: {
                        "seeds": entries[name]["seeds"],
                        "mean": entries[name]["mean"][metric],
                        "spread": (entries[name]["standard_deviation"] or {}).get(metric),
                        "retained": entries[name]["retained"],
                        "seconds": entries[name]["seconds"],
                        "steps": entries[name]["steps"],
                    }
                    for name in self._names()
                    if name in entries
                },
            }
        return found

    def _names(self) -> list[str]:
        return [f"{method} from {start}" for method in self.methods for start in self.starts]

    def _start(self, init: str) -> Any:
        """Return what made a start: for a pre-trained one, its recipe's figures."""
        place = Path(init) / "metrics.json"
        return json.loads(place.read_text()) if place.exists() else init


def markdown(found: dict[str, Any]) -> str:
    """Return the table: starts by task, in points, with the share of the teacher kept."""
    tasks = found["tasks"]
    heads = [f"{task} ({entry['metric']})" for task, entry in tasks.items()]
    lines = ["| | " + " | ".join(heads) + " | kept |", "|---|" + "---|" * (len(tasks) + 1)]
    teacher = [f"{100 * entry['teacher']['metrics'][entry['metric']]:.1f}" for entry in tasks.values()]
    lines.append("| teacher | " + " | ".join(teacher) + " | 100 % |")
    for name in dict.fromkeys(name for entry in tasks.values() for name in entry["students"]):
        students = [entry["students"].get(name) for entry in tasks.values()]
        kept = [student["retained"] for student in students if student is not None]
        share = f"{100 * sum(kept) / len(kept):.1f} %" if len(kept) == len(tasks) else "-"
        lines.append(f"| {name} | " + " | ".join(map(cell, students)) + f" | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--pretrained", action="append", default=[], metavar="[NAME=]RUN")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of these: %(default)s")
    parser.add_argument("--methods", default="kd", help="separated by commas; default: %(default)s")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: %(default)s")
    parser.add_argument(
        "--rates",
        default=",".join(f"{rate:g}" for rate in RATES),
        help="one is not tuned; default: %(default)s",
    )
    parser.add_argument("--epochs", type=float, help="for all tasks; default: those of results.py")
    parser.add_argument("--teacher-epochs", type=float, help="likewise, of the teachers")
    parser.add_argument("--rows", type=int, help="likewise, of the students' training rows")
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--model", default="minilm-l6", help="what is fine-tuned where there is no teacher")
    parser.add_argument("--tiny", action="store_true", help="64 rows, one epoch, one seed, one rate")
    parser.add_argument("--json", action="store_true", help="print the figures of what is done")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(__file__).with_suffix(".json"),
        help="print the table of figures that --json printed; default: the committed starts.json",
    )
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return
    given = {
        "epochs": options.epochs,
        "teacher_epochs": options.teacher_epochs,
        "train_rows": options.rows,
    }
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    if options.tiny:
        given = {"epochs": 1.0, "teacher_epochs": 1.0, "train_rows": 64}
        seeds, rates = seeds[:1], rates[:1]
    other = {key: value for key, value in given.items() if value is not None}
    named = (text.rpartition("=") for text in options.pretrained)
    starts = {"random": "random", "pca": "pca"}
    starts |= {name or "pretrained": str(Path(run).absolute()) for name, _, run in named}
    measurement = Measurement(
        options.work.absolute(),
        options.data_dir.absolute(),
        options.workers,
        {name: replace(TASKS[name], **other) for name in options.tasks.split(",")},
        options.methods.split(","),
        starts,
        seeds,
        rates,
        options.student,
        options.model,
    )
    if options.json:
        print(json.dumps(measurement.figures(), indent=2))
        return
    measurement.run()
    print(markdown(measurement.figures()))


if __name__ == "__main__":
    main()
