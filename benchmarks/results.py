"""Measure every method on GLUE: every figure of docs/results.md.

    python benchmarks/results.py --data-dir ../shared/data --work runs/results
    python benchmarks/results.py --students "4x312@pca;4x312@RUN" --methods "none;kd" --work runs/results
    python benchmarks/results.py --augmented --seeds 0 --work runs/results
    python benchmarks/results.py --work runs/results --json > benchmarks/results.json
    python benchmarks/results.py --markdown          the tables of docs/results.md, from that file
    python benchmarks/results.py --work runs/results --pictures docs     docs/flow-TASK.svg

Teacher: minilm-l6 fine-tuned on each task. Students: layers of it, and sizes from a start (`STUDENT@INIT`;
RUN is a folder that `stillroom pretrain` made), on the training rows alone or with rows of replaced words
beside them. Learning rates are tuned on held-out training rows of SST-2, for each method and student (a
variant has its method's); the validation split is used only to report. Nothing is selected on it: the
student is that of the last step. All methods take equally many steps. What is done is skipped and a run
that was killed goes on, so that a killed measurement continues; seed by seed, so that one that is cut
short compares what it has. Several of these, each with other --tasks or --students, can share a --work;
--json collects all that is there, and says under `collected` where, when and at which commit it did:
trainings may be older. `--tiny` is a trial of a minute.
"""

import argparse
import contextlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from toys import machine

from stillroom import Comparison, FinetuneRecipe, compare, durable, finetune
from stillroom.errors import RunFailed
from stillroom.recipe import DatasetSettings
from stillroom.report import flow
from stillroom.run import generator, replace_words
from stillroom.training import masked_lm

SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 6e-4)
STUDENT = "layers:2,4,6"

METHODS: dict[str, dict[str, object]] = {
    "none": {"name": "none"},
    "kd": {"name": "kd"},
    "lrc-bert": {"name": "lrc-bert", "perturbation_norm": "token"},
    "lrc-bert, tensor norm": {"name": "lrc-bert", "perturbation_norm": "tensor"},
    "codir": {"name": "codir"},
    "bert-emd": {"name": "bert-emd"},
    "angular-emd, tensor norm": {"name": "angular-emd", "perturbation_norm": "tensor"},
    "cilda": {"name": "cilda", "generator": "GENERATOR"},
    "mate-kd": {"name": "mate-kd", "generator": "GENERATOR"},
    "pkd": {"name": "pkd"},
    "tinybert": {"name": "tinybert"},
    "minilm": {"name": "minilm"},
    "minilmv2": {"name": "minilmv2"},
    "rail-kd": {"name": "rail-kd"},
    "distilbert": {"name": "distilbert"},
}
"""In the order of the tables; the first is the control. LRC-BERT has the token's norm where none is named,
which was the default when these were first measured. `GENERATOR` is made once, from SST-2's text."""

TENSOR = {"name": "lrc-bert", "perturbation_norm": "tensor"}
ABLATIONS: dict[str, dict[str, object]] = {
    "without COS-NCE": {**TENSOR, "alpha": 0},
    "without soft labels": {**TENSOR, "beta": 0},
    "without hard labels": {**TENSOR, "gamma": 0},
    "without perturbation": {**TENSOR, "perturbation": "off"},
    "one stage": {**TENSOR, "switch": 0},
}
"""Of LRC-BERT with the norm of the whole tensor: with the token's, all stall alike."""


@dataclass(frozen=True)
class Plan:
    """How much of a task fits the time: epochs of the teacher, steps of a student."""

    teacher_epochs: float
    steps: int
    teacher_rate: float = 1e-4
    train_rows: int | None = None
    ablate: bool = False
    out_of_domain: dict[str, dict[str, Any]] | None = None
    """Sets of other sources: as a comparison has them, files below the data folder."""


TASKS = {
    "sst2": Plan(
        teacher_epochs=1,
        steps=313,
        teacher_rate=5e-5,
        train_rows=10_000,
        out_of_domain={
            "imdb": {"dataset": "ood/imdb_subset.parquet", "labels": {"0": "negative", "1": "positive"}}
        },
    ),
    "qnli": Plan(teacher_epochs=3, steps=369),
    "cola": Plan(teacher_epochs=5, steps=535, ablate=True),
    "mrpc": Plan(
        teacher_epochs=5,
        steps=460,
        ablate=True,
        out_of_domain={
            "paws": {
                "dataset": "ood/paws_wiki.parquet",
                "labels": {"0": "not_equivalent", "1": "equivalent"},
            },
            "qqp": {
                "dataset": "glue/qqp/validation.parquet",
                "labels": {"0": "not_equivalent", "1": "equivalent"},
            },
        },
    ),
    "stsb": Plan(teacher_epochs=5, steps=540, ablate=True),
    "mnli": Plan(
        teacher_epochs=1,
        steps=313,
        train_rows=10_000,
        out_of_domain={
            "snli": {
                "dataset": "ood/snli_validation.parquet",
                "labels": {"0": "entailment", "1": "neutral", "2": "contradiction"},
            },
            "anli": {
                "dataset": "ood/anli.parquet",
                "labels": {"0": "entailment", "1": "neutral", "2": "contradiction"},
            },
            "scitail": {
                "dataset": "ood/scitail_test.parquet",
                "labels": {"0": "entailment", "1": "other", "neutral": "other", "contradiction": "other"},
            },
        },
    ),
}
USUAL = ("sst2", "qnli", "cola", "mrpc", "stsb")
"""What is measured where --tasks says nothing else. MNLI is there for its sets of other sources."""
BATCH_SIZE = 32
COPIES = 2
OTHER_ROWS = 2_000
GENERATOR_EPOCHS = 10
TUNING = Plan(teacher_epochs=2, steps=250)


@dataclass(frozen=True)
class Arm:
    """A student, what it starts from, and whether it reads rows of replaced words as well."""

    student: str
    init: str
    augmented: bool = False

    @classmethod
    def read(cls, text: str, *, augmented: bool = False) -> "Arm":
        """Return the arm that `STUDENT@INIT` means; the start of RUN/student is named RUN."""
        student, _, init = text.partition("@")
        init = init or "auto"
        return cls(student, str(Path(init).absolute()) if Path(init).is_dir() else init, augmented)

    @property
    def name(self) -> str:
        """What tables call it."""
        start = "" if self.init == "auto" else f" from {Path(self.init).name}"
        return f"{self.student}{start}" + (", augmented" if self.augmented else "")

    @property
    def folder(self) -> str:
        """Its folder below a task's."""
        return re.sub(r"[:, ]+", "-", self.name)


@dataclass(frozen=True)
class Measurement:
    """Where it is kept, what it reads, and which part of it is asked for."""

    work: Path
    data_dir: Path
    workers: int
    tasks: dict[str, Plan]
    arms: Sequence[Arm]
    methods: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[float]
    model: str
    cache: str

    def prepare(self) -> None:
        """Make what is missing of teachers, generator and augmented rows, and tune."""
        for task, plan in self.tasks.items():
            self.teacher(task, self.data(task), plan)
        if any(arm.augmented for arm in self.arms):
            for task in self.tasks:
                self.augment(task)
        if len(self.rates) > 1:
            for arm in self.arms:
                self.tune(replace(arm, augmented=False))

    def tune(self, arm: Arm) -> None:
        """Try each rate of each method on the held-out rows."""
        if self.chosen(arm).keys() >= set(self.methods):
            return
        rows = {"name": str(hold_out(self.work, self.data_dir))}
        self.teacher("tuning", rows, TUNING)
        variants = self.variants({name: METHODS[name] for name in self.methods})
        tried = {
            f"{name} {rate:g}": (method, rate) for rate in self.rates for name, method in variants.items()
        }
        wanted = self.comparison("tuning", arm, rows, tried, TUNING.steps, [0])
        compare(wanted, self.folder("tuning", arm), workers=self.workers)

    def run(self) -> None:
        """Do what is missing, each task and student seed by seed.

        Raises:
            SystemExit: After all of it, where runs failed, naming them.
        """
        failed = []
        for arm in self.arms:
            for task in self.tasks:
                started = time.perf_counter()
                try:
                    compare(self.wanted(task, arm), self.folder(task, arm), workers=self.workers)
                except RunFailed as error:
                    failed.append(f"{task} {arm.name}: {error}")
                print(task, arm.name, f"{time.perf_counter() - started:.0f} s", flush=True)
        if failed:
            raise SystemExit("\n".join(failed))

    def wanted(self, task: str, arm: Arm) -> Comparison:
        """Return what is compared: the methods, and where it is planned, the ablations."""
        plan, rates = self.tasks[task], self.chosen(replace(arm, augmented=False))
        chosen = {name: METHODS[name] for name in self.methods}
        if plan.ablate and "lrc-bert, tensor norm" in self.methods and arm == Arm.read(STUDENT):
            chosen |= ABLATIONS
        rated = {
            name: (method, rates[name if name in rates else "lrc-bert, tensor norm"])
            for name, method in self.variants(chosen).items()
        }
        data = self.data(task)
        if arm.augmented:
            data["augmented"] = str(self.work / task / "augmented.parquet")
        return self.comparison(task, arm, data, rated, plan.steps, self.seeds, plan.out_of_domain)

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
            recipe = FinetuneRecipe.load(model=self.model, dataset=whole, training=training)
            found = finetune(recipe, folder)
            print("teacher", name, found["model"]["metrics"], flush=True)

    def generator(self) -> Path:
        """Return the masked language model of SST-2's text, made unless that is done."""
        place = self.work / "generator"
        hold_out(self.work, self.data_dir)
        with durable.locked(self.work / "tuning", wait=True):
            if not (place / "metrics.json").exists():
                shutil.rmtree(place, ignore_errors=True)
                text = self.work / "tuning" / "text.txt"
                rows = pq.read_table(self.work / "tuning" / "rows" / "train.parquet")["sentence"]
                text.write_text("\n".join(rows.to_pylist()), encoding="utf-8")
                settings = masked_lm.Settings(epochs=GENERATOR_EPOCHS)
                texts = generator.read_texts([text])
                found = generator.make(self.model, texts, place, settings, Console(stderr=True))
                print("generator", found, flush=True)
        return place

    def augment(self, task: str) -> None:
        """Write rows of a task with words replaced, unless that is done."""
        how = replace_words.Replacement(generator=str(self.generator()), copies=COPIES)
        output = self.work / task / "augmented.parquet"
        with durable.locked(self.work / task, wait=True):
            if not output.exists():
                found = replace_words.write(DatasetSettings(**self.data(task)), how, output)
                print("augmented", task, found["augmented"], flush=True)

    def variants(self, chosen: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        """Return the methods' options, with the generator's folder."""
        given: dict[str, dict[str, object]] = {}
        for name, options in chosen.items():
            more: dict[str, object] = {}
            if "generator" in options:
                more["generator"] = str(self.generator())
            given[name] = {**options, **more}
        return given

    def comparison(
        self,
        name: str,
        arm: Arm,
        data: dict[str, Any],
        variants: dict[str, Any],
        steps: int,
        seeds: Sequence[int],
        elsewhere: dict[str, dict[str, Any]] | None = None,
    ) -> Comparison:
        """Return the comparison of methods with options, each with a learning rate of its own."""
        training = {
            # More than the steps take, so that with more rows there are as many steps.
            "epochs": 1000,
            "max_steps": steps,
            "batch_size": BATCH_SIZE,
            "select": "last",
            "evaluate_every_steps": steps,
        }
        return Comparison.load(
            teacher={"name": str(self.work / name / "teacher"), "cache": self.cache},
            dataset=data,
            students=[arm.student],
            init=arm.init,
            seeds=list(seeds),
            training=training,
            methods={
                key: {"method": method, "training": {"learning_rate": rate}}
                for key, (method, rate) in variants.items()
            },
            out_of_domain=self.elsewhere(elsewhere or {}),
        )

    def elsewhere(self, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return sets of other sources as a comparison has them: of each the same 2,000 rows."""
        found = {}
        for name, one in given.items():
            source, part = self.data_dir / one["dataset"], self.work / "out_of_domain" / f"{name}.parquet"
            with durable.locked(part.parent, wait=True):
                if source.exists() and not part.exists():
                    rows = pq.read_table(source)
                    drawn = np.random.default_rng(2).permutation(rows.num_rows)[:OTHER_ROWS]
                    pq.write_table(rows.take(np.sort(drawn)), part)
            if part.exists():
                found[name] = {**one, "dataset": str(part)}
        return found

    def chosen(self, arm: Arm) -> dict[str, float]:
        """Return the best learning rate on the held-out rows for each method that was tuned."""
        if len(self.rates) == 1:
            return dict.fromkeys(METHODS, self.rates[0])
        scores = self.tuning(arm)
        return {
            name: max(self.rates, key=lambda rate: (scores[f"{name} {rate:g}"], rate))
            for name in METHODS
            if all(f"{name} {rate:g}" in scores for rate in self.rates)
        }

    def tuning(self, arm: Arm) -> dict[str, float]:
        """Return accuracy on the held-out rows by method and rate; empty if that is not done."""
        place = self.folder("tuning", arm)
        if not (place / "compare.json").exists():
            return {}
        entries = read(place)["students"][arm.student]["methods"]
        return {name: one["mean"]["accuracy"] for name, one in entries.items()}

    def folder(self, task: str, arm: Arm) -> Path:
        """Return where a comparison is kept."""
        return self.work / task / arm.folder

    def draw_flows(self, folder: Path) -> list[Path]:
        """Draw which student layer learnt from which teacher layer of a task, as a mean over its seeds."""
        drawn = []
        for task in self.tasks:
            logs = (self.folder(task, self.arms[0]) / "runs").glob("*/bert-emd/*/log.jsonl")
            runs = [log.parent for log in logs if (log.parent / "metrics.json").exists()]
            if runs:
                seeds = "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds"
                drawn.append(flow.write(runs, folder / f"flow-{task}.svg", title=f"{task}, {seeds}"))
        return drawn

    def as_done(self, task: str, plan: Plan) -> dict[str, Any]:
        """Return the plan, with the epochs and the rate that the teacher there was fine-tuned with."""
        recipe = self.work / task / "teacher" / "recipe.yaml"
        if recipe.exists():
            done = FinetuneRecipe.load(recipe).training
            plan = replace(plan, teacher_epochs=done.epochs, teacher_rate=done.learning_rate)
        return asdict(plan)

    def figures(self) -> dict[str, Any]:
        """Return every figure of what is done of the tasks and students that are asked for."""
        places = [(t, arm, self.folder(t, arm)) for t in self.tasks for arm in self.arms]
        places = [(task, arm, place) for task, arm, place in places if (place / "compare.yaml").exists()]
        folders = [place for *_, place in places]
        if self.workers > 1:
            # With one thread each; the bootstrap has no other way to use several cores.
            with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
                found = list(pool.map(collect, folders))
        else:
            found = list(map(collect, folders))
        figures: dict[str, Any] = {
            "settings": {
                "rates": {arm.name: self.chosen(arm) for arm in self.arms if not arm.augmented},
                "ablations": ["lrc-bert, tensor norm", *ABLATIONS],
                "batch_size": BATCH_SIZE,
                "tasks": {task: self.as_done(task, plan) for task, plan in self.tasks.items()},
                "starts": {arm.name: start(arm.init) for arm in self.arms if not arm.augmented},
            },
            "tuning": {arm.name: self.tuning(arm) for arm in self.arms if not arm.augmented},
            "dates": dates(folders),
            "collected": machine(),
            "tasks": {},
        }
        for (task, arm, _), compared in zip(places, found, strict=True):
            if compared is None:
                continue
            metric, made = compared["metric"], compared["students"][arm.student]
            figures["environment"] = compared["environment"]
            entry = figures["tasks"].setdefault(
                task, {"metric": metric, "teacher": compared["teacher"], "students": {}}
            )
            methods = made.pop("methods")
            made.pop("control")
            entry["students"][arm.name] = {
                **made,
                "methods": {name: figure(one, metric) for name, one in methods.items()},
            }
        return figures


def dates(folders: Sequence[Path]) -> list[str]:
    """Return the days on which the first and the last of the trainings ended."""
    ended = sorted(path.stat().st_mtime for place in folders for path in place.rglob("metrics.json"))
    return [time.strftime("%Y-%m-%d", time.gmtime(each)) for each in ended[:1] + ended[-1:]]


def figure(one: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return what is kept of a method's figures."""
    return {
        "seeds": one["seeds"],
        "mean": one["mean"][metric],
        "spread": (one["standard_deviation"] or {}).get(metric),
        "kept": one["kept"],
        "against_control": one.get("against_control", {}).get(metric),
        "out_of_domain": one["out_of_domain"],
        "seconds": one["seconds"],
        "steps": one["steps"],
    }


def collect(folder: Path) -> dict[str, Any] | None:
    """Compare what is done in a folder; None where nothing is."""
    with contextlib.suppress(RunFailed):
        compare(Comparison.load(folder / "compare.yaml"), folder, workers=0, console=Console(quiet=True))
    found = read(folder)
    done = any(one["methods"] for one in found["students"].values())
    return found if done else None


def start(init: str) -> Any:
    """Return what a start is: for a pre-trained one, its run's figures."""
    place = Path(init) / "metrics.json"
    return json.loads(place.read_text()) if place.exists() else init


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def hold_out(work: Path, data_dir: Path) -> Path:
    """Write 10,000 of SST-2's training rows as two files: every fifth is held out to tune on."""
    folder = work / "tuning" / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    with durable.locked(work / "tuning", wait=True):
        table = pq.read_table(data_dir / "glue" / "sst2" / "train.parquet").select(["sentence", "label"])
        count = min(10_000, table.num_rows)
        drawn = np.random.default_rng(1).choice(table.num_rows, count, replace=False)
        tenths = np.arange(count) % 5
        for name, chosen in (("train", tenths != 0), ("validation", tenths == 0)):
            if not (folder / f"{name}.parquet").exists():
                pq.write_table(table.take(drawn[chosen]), folder / f"{name}.parquet")
    return folder


def markdown(found: dict) -> str:
    """Return the tables of docs/results.md."""
    tasks = found["tasks"]
    names = list(dict.fromkeys(name for entry in tasks.values() for name in entry["students"]))
    parts, parted = [*shares(tasks, names), ""], found["settings"]["ablations"]
    for name in names:
        methods = {
            task: entry["students"].get(name, {}).get("methods", {}) for task, entry in tasks.items()
        }
        there = {method for one in methods.values() for method in one} - set(parted[1:])
        shown = [*(method for method in METHODS if method in there), *sorted(there - METHODS.keys())]
        parts += [f"**{name}**", "", *quality(tasks, methods, shown), ""]
        parts += [*differences(tasks, methods, shown), ""]
        parts += [*ablations(methods, parted), ""]
    parts += out_of_domain(tasks)
    return re.sub("\n{3,}", "\n\n", "\n".join(parts)).strip()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; nothing if it has no rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def heads_of(tasks: dict) -> list[str]:
    return [f"{task} ({entry['metric']})" for task, entry in tasks.items()]


def shares(tasks: dict, names: Sequence[str]) -> list[str]:
    """Return what each student kept of all tasks, side by side.

    Of each method over the seeds that all of its students have on all tasks, so that a row compares.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    for method in METHODS:
        for name in names:
            made = [e["students"].get(name, {}).get("methods", {}).get(method) for e in tasks.values()]
            if None not in made:
                found.setdefault(method, {})[name] = made
    found = {method: made for method, made in found.items() if len(made) > 1}
    shown = [name for name in names if any(name in made for made in found.values())]
    rows = []
    for method, made in found.items():
        seeds = set.intersection(*(set(one["seeds"]) for each in made.values() for one in each))
        if seeds:
            cells = (" / ".join(kept(tasks, made[name], seeds)) if name in made else "-" for name in shown)
            rows.append([method, *cells, str(len(seeds))])
    return table(["kept / of the mean", *shown, "seeds"], rows)


def kept(tasks: dict, found: Sequence[dict], seeds: set[str] | None = None) -> tuple[str, str]:
    """Return the mean over tasks of the share kept, and the share of the teacher's mean, as papers give it.

    A task on which the teacher scores low weighs as much as any in the first, and less in the second.
    """
    teacher = [entry["teacher"]["metrics"][entry["metric"]] for entry in tasks.values()]
    student = [
        statistics.mean(one["seeds"][seed][entry["metric"]] for seed in seeds or one["seeds"])
        for entry, one in zip(tasks.values(), found, strict=True)
    ]
    each = statistics.mean(mine / its for mine, its in zip(student, teacher, strict=True))
    return f"{100 * each:.1f} %", f"{100 * sum(student) / sum(teacher):.1f} %"


def quality(tasks: dict, methods: dict, names: Sequence[str]) -> list[str]:
    """Return each method's mean and spread on each task, and what is kept of all."""
    teacher = [f"{100 * entry['teacher']['metrics'][entry['metric']]:.1f}" for entry in tasks.values()]
    rows = [["teacher", *teacher, "100 %", "100 %"]]
    for name in names:
        students = [methods[task].get(name) for task in tasks]
        whole = ("-", "-") if None in students else kept(tasks, students)
        rows.append([name, *map(cell, students), *whole])
    return table(["", *heads_of(tasks), "kept", "of the mean"], rows)


def differences(tasks: dict, methods: dict, names: Sequence[str]) -> list[str]:
    """Return each method's difference to the control on each task."""
    rows = []
    for name in names:
        students = [methods[task].get(name) for task in tasks]
        if any(student and student.get("against_control") for student in students):
            rows.append([name, *map(difference, students)])
    return table(["minus none", *heads_of(tasks)], rows)


def ablations(methods: dict, names: Sequence[str]) -> list[str]:
    """Return LRC-BERT without each of its parts; the first name is LRC-BERT itself."""
    chosen = [task for task, one in methods.items() if one.keys() & set(names[1:])]
    rows = [[name, *(cell(methods[task].get(name)) for task in chosen)] for name in names]
    return table(["variant", *chosen], rows) if chosen else []


def out_of_domain(tasks: dict) -> list[str]:
    """Return the scores on sets of other sources."""
    heads, rows = ["out of domain"], {}
    rows["teacher"] = []
    for task, entry in tasks.items():
        for other, metrics in entry["teacher"]["out_of_domain"].items():
            metric = next(iter(metrics))
            heads.append(f"{task} to {other} ({metric})")
            rows["teacher"].append(f"{100 * metrics[metric]:.1f}")
            for arm, student in entry["students"].items():
                for method, one in student["methods"].items():
                    if method not in ABLATIONS:
                        found = one["out_of_domain"][other]
                        values = {"mean": found["mean"][metric], "seeds": one["seeds"]}
                        values["spread"] = (found["standard_deviation"] or {}).get(metric)
                        cells = rows.setdefault(f"{arm}: {method}", [])
                        cells += ["-"] * (len(heads) - 2 - len(cells)) + [cell(values)]
    full = [[name, *cells, *["-"] * (len(heads) - 1 - len(cells))] for name, cells in rows.items()]
    return table(heads, full) if len(heads) > 1 else []


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
    parser.add_argument(
        "--tasks", default=",".join(USUAL), help=f"of {', '.join(TASKS)}; default: %(default)s"
    )
    parser.add_argument(
        "--students", default=STUDENT, metavar="STUDENT[@INIT]", help="separated by semicolons"
    )
    parser.add_argument("--augmented", action="store_true", help="train on rows of replaced words as well")
    parser.add_argument("--methods", help=f"of these: {'; '.join(METHODS)}; separated by semicolons")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: %(default)s")
    parser.add_argument(
        "--rates",
        default=",".join(f"{rate:g}" for rate in RATES),
        help="one is not tuned; default: %(default)s",
    )
    parser.add_argument("--steps", type=int, help="for all tasks; default: the script's, for each")
    parser.add_argument("--teacher-epochs", type=float, help="likewise, of the teachers")
    parser.add_argument("--rows", type=int, help="likewise, of the students' training rows")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--model", default="minilm-l6", help="what teachers are fine-tuned from")
    parser.add_argument("--cache", default="auto", help="`off` computes the teacher live: faster on a GPU")
    parser.add_argument("--prepare", action="store_true", help="teachers, augmented rows and tuning only")
    parser.add_argument("--tiny", action="store_true", help="64 rows, two steps, one seed, one rate")
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
    given = {"steps": options.steps, "teacher_epochs": options.teacher_epochs, "train_rows": options.rows}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    if options.tiny:
        given = {"steps": 2, "teacher_epochs": 1.0, "train_rows": 64}
        seeds, rates = seeds[:1], rates[:1]
    if options.no_ablations:
        given["ablate"] = False
    other = {key: value for key, value in given.items() if value is not None}
    students = options.students.split(";")
    wanted = (False, True) if options.json else (options.augmented,)
    measurement = Measurement(
        options.work.absolute(),
        options.data_dir.absolute(),
        options.workers,
        {name: replace(TASKS[name], **other) for name in options.tasks.split(",")},
        [Arm.read(text, augmented=augmented) for augmented in wanted for text in students],
        options.methods.split(";") if options.methods else list(METHODS),
        seeds,
        rates,
        options.model,
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
