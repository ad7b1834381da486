"""Many distillations of one teacher on one data set, compared with each other and with a control.

The folder says what is done: a run is where its `metrics.json` is. An Optuna study says who does what
is not, so that processes and machines that share the folder share the work.
"""

import functools
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from accelerate import Accelerator
from rich.console import Console

from stillroom import durable, encoder, methods, preflight, provenance, student
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import Tokens
from stillroom.encoder import Encoder
from stillroom.errors import RunFailed, WrongInput
from stillroom.evaluation import cost, predictions
from stillroom.evaluation.metrics import functions_of, score
from stillroom.evaluation.metrics import predictions as answers
from stillroom.evaluation.out_of_domain import OutOfDomain
from stillroom.evaluation.predict import predict
from stillroom.evaluation.predictions import PREDICTIONS, Predictions
from stillroom.evaluation.significance import RESAMPLED, bootstrap_over_seeds
from stillroom.provenance import METRICS, RECIPE, STUDENT, environment
from stillroom.recipe import Comparison, Recipe
from stillroom.report import page
from stillroom.report.sources import COMPARISON, RESULTS
from stillroom.run.handout import DATABASE, RUNS, STUDY, Handout, in_processes
from stillroom.run.parts import Common, Parts, training_figures
from stillroom.training.loop import CHECKPOINTS

_COSTS = "costs.json"
_ELSEWHERE = "out_of_domain.json"


@dataclass(frozen=True)
class Run:
    """One cell of the comparison, and one seed."""

    student: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder below `runs`, and its name in the study."""
        return f"{_slug(self.student)}/{_slug(self.variant)}/{self.seed}"


def compare(
    comparison: Comparison,
    output: str | Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    keep_students: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Distil every student by every method from every seed, and compare them.

    What is done is skipped, and a run that was killed goes on from its checkpoint: after a kill, call
    it again. Processes on other machines take part by calling the same on the same folder. Each
    returns when all runs are done.

    Args:
        comparison: What to compare. The folder may already hold other methods, students and seeds of
            the same comparison: they stay, and are in the result.
        output: The folder.
        workers: Processes of one thread each; 1 trains in this process, with all its threads; 0 trains
            nothing, and compares what is done. A script needs `if __name__ == "__main__":` around a call
            with more than one.
        storage: URL of the database that hands out the runs, for machines whose shared file system has
            no locks that SQLite can use; by default an SQLite file in the folder.
        keep_students: Keep each student beside its figures.
        console: Where progress goes; standard error by default.

    Returns:
        What `compare.json` holds: `teacher`, and under `students` for each its costs and `methods`: for
        each the `folder` of its runs by seed, the metrics by seed, `mean`, `standard_deviation` (None
        for one seed), `kept` (share of the teacher's first metric), `out_of_domain` (mean and
        standard deviation on each set of another source), `seconds` and `examples_per_second` of
        training (means), and where a control `none` is there,
        `against_control`: the difference for each metric with a 95 % interval over rows and seeds
        (`bootstrap_over_seeds`).

    Raises:
        WrongInput: If anything is not as expected, or the folder holds a comparison of another teacher,
            other data or other settings.
        RunFailed: If runs failed, naming them; the others are done, and `compare.json` is written.

    Example:
        >>> comparison = Comparison.load(
        ...     teacher="runs/teacher", dataset="glue/mrpc", methods=["none", "kd"], seeds=3
        ... )
        >>> found = compare(comparison, "runs/mrpc")  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    folder = Path(output)
    preflight.require_one_process()
    if workers < 0:
        raise WrongInput(f"Expected a number of workers, 0 to compare what is done, found {workers}.")
    comparison = resolve(comparison)
    worker = functools.partial(_Worker, folder=folder, storage=storage, keep_students=keep_students)
    with durable.locked(folder, wait=True):
        durable.remove_leftovers(folder)
        comparison = _same_precision(folder, comparison)
        common = Common.load(_any_recipe(comparison), console)
        everything = _joined(folder, comparison, common, console)
        elsewhere = _out_of_domain(everything, common, console)
        here = worker(comparison, common, _teacher_logits(folder, common), elsewhere)
        if workers:
            here.check(console)
        _write(folder, everything, common, here.logits)
        _score_teacher(folder, elsewhere, common, console)
        if workers:
            here.handout.enqueue()
    if here.handout.missing() and workers:
        if workers > 1:
            in_processes(workers, _work, folder, comparison, storage, keep_students)
        else:
            here.handout.work(console)
    found = _collect(folder, everything, common, here.logits)
    durable.write_json(folder / RESULTS, found)
    if any(student["methods"] for student in found["students"].values()):
        page.write_comparison(folder)
    missing = here.handout.missing()
    if missing:
        errors = here.handout.errors()
        lines = [
            f"{name}: {errors.get(name, 'stopped' if workers else 'not done yet')}" for name in missing
        ]
        remedy = "The same command tries them again."
        if not workers:
            remedy = "With --workers 0 none is trained: give --workers 1 or more."
        raise RunFailed(
            f"{len(missing)} of {len(here.runs)} runs are not done; the others are in {folder / RESULTS}. "
            f"{remedy}\n" + "\n".join(lines)
        )
    return found


def resolve(comparison: Comparison) -> Comparison:
    """Return the comparison with each method's options and training defaults spelt out."""
    variants = {}
    for name, given in comparison.methods.items():
        unset = methods.training_defaults(given.method.name, comparison.training)
        update = {"method": methods.spelt_out(given.method), "training": {**unset, **given.training}}
        variants[name] = given.model_copy(update=update)
    comparison = comparison.model_copy(update={"methods": variants})
    for name in variants:
        # A wrong key under a method's training is an error now and not hours later.
        comparison.recipe(comparison.students[0], name, comparison.seeds[0])
    for what, names in (("students", comparison.students), ("methods", tuple(variants))):
        if len({_slug(name) for name in names}) < len(names):
            raise WrongInput(f"Two {what} would share a folder: {', '.join(names)}. Name them differently.")
    return comparison


def runs_of(comparison: Comparison) -> Iterator[Run]:
    """Yield every run, seed by seed, so that a comparison that is cut short compares what it has."""
    for seed in comparison.seeds:
        for made in comparison.students:
            for variant in comparison.methods:
                yield Run(made, variant, seed)


class _Worker:
    """Does the runs that are handed out, with what they share loaded once."""

    def __init__(
        self,
        comparison: Comparison,
        common: Common,
        logits: np.ndarray,
        elsewhere: dict[str, OutOfDomain],
        *,
        folder: Path,
        storage: str | None,
        keep_students: bool,
    ):
        self.runs = {run.name: run for run in runs_of(comparison)}
        self.logits = logits
        self._elsewhere = elsewhere
        self._comparison, self._common, self._keep = comparison, common, keep_students
        self._checked: set[tuple[str, str]] = set()
        self._steps: dict[tuple[str, str], int] = {}
        self.handout = Handout(folder, list(self.runs), self._do, storage=storage)

    def _do(self, name: str, _: optuna.Trial, console: Console) -> float:
        run, place = self.runs[name], self.handout.place(name)
        first = self._common.dataset.task.metrics[0]
        with durable.locked(place):
            if (place / METRICS).exists():
                return float(durable.read_json(place / METRICS)["student"]["metrics"][first])
            durable.remove_leftovers(place)
            metrics = self._train(run, self._recipe(run), place, console)
            durable.write_json(place / METRICS, metrics)
            for heavy in (CHECKPOINTS, *(() if self._keep else (STUDENT,))):
                shutil.rmtree(place / heavy, ignore_errors=True)
        done = len(self.runs) - len(self.handout.missing())
        value = float(metrics["student"]["metrics"][first])
        seconds = metrics["train"]["seconds"]
        text = f"{done}/{len(self.runs)} {run.name}: {first} {value:.4f} in {seconds:.0f} s"
        console.print(text, markup=False, highlight=False)
        return value

    def check(self, console: Console) -> None:
        """Check one run of each student and method that is missing, before any is trained.

        Where they train for unlike lengths, a warning says so.

        Raises:
            WrongInput: With what is wrong of each.
        """
        wrong = []
        for name in self.handout.missing():
            run = self.runs[name]
            if (run.student, run.variant) not in self._checked:
                try:
                    self._checked_parts(run, self._recipe(run), self.handout.place(name), console)
                except WrongInput as error:
                    wrong.append(f"{run.student}, {run.variant}: {error}")
        if wrong:
            raise WrongInput("\n".join(wrong))
        if unequal := self._unequal():
            text = (
                f"Warning: the trainings are not equally long: {unequal}. So a method may differ by its "
                "training alone. To make them equal give training.epochs (or training.max_steps) and "
                "training.batch_size by --set."
            )
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _unequal(self) -> str:
        """Return steps and batch size of each method, where they differ, of what is to be trained."""
        found: dict[str, None] = {}
        for made in self._comparison.students:
            alike: dict[str, list[str]] = {}
            for (one, variant), steps in self._steps.items():
                if one == made:
                    size = self._comparison.recipe(made, variant, 0).training.batch_size
                    alike.setdefault(f"{steps:,} steps of {size} rows", []).append(variant)
            if len(alike) > 1:
                text = "; ".join(f"{length} ({', '.join(names)})" for length, names in alike.items())
                found[text] = None
        return "; ".join(found)

    def _recipe(self, run: Run) -> Recipe:
        return methods.resolve(self._comparison.recipe(run.student, run.variant, run.seed))

    def _checked_parts(self, run: Run, recipe: Recipe, place: Path, console: Console) -> Parts:
        """Return what a run is made of, checked as before every first step."""
        # Another seed would bring the same warnings again.
        again = (run.student, run.variant) in self._checked
        self._checked.add((run.student, run.variant))
        parts = Parts.of(recipe, self._common, console)
        to_check = replace(
            parts.to_check(recipe, place, repeated=self._repeated()), teacher_logits=self.logits
        )
        checked = preflight.check(to_check, Console(quiet=True) if again else console)
        self._steps[run.student, run.variant] = checked["steps"]
        return parts

    def _repeated(self) -> bool:
        """Return whether several runs read the teacher; those without one read nothing of it."""
        named = (self._comparison.methods[run.variant].method.name for run in self.runs.values())
        return sum(name != "none" for name in named) > 1

    def _train(self, run: Run, recipe: Recipe, place: Path, console: Console) -> dict[str, Any]:
        parts = self._checked_parts(run, recipe, place, console)
        parts = parts.labelled(recipe, self._common, console)
        recipe = parts.start(recipe, place, console, resume=(place / RECIPE).exists())
        trained = parts.train(recipe, place, console, repeated=self._repeated())
        tokens = parts.tokens.student["validation"]
        logits = predict(parts.student, tokens, bf16=parts.bf16)
        data = self._common.dataset
        _keep(place, data, "student", logits)
        labels = data.splits["validation"].labels
        return {
            "student": {
                "metrics": score(data.task, logits, labels),
                "out_of_domain": _scores(self._elsewhere, parts.student, parts.bf16),
            },
            "metric": data.task.metrics[0],
            "selected_step": trained.best_step or trained.steps,
            "train": training_figures(trained),
            "environment": environment(bf16=parts.bf16),
        }


def _work(console: Console, folder: Path, comparison: Comparison, storage: str | None, keep: bool) -> None:
    """Do runs in a process of its own."""
    common = Common.load(_any_recipe(comparison), console)
    logits = predictions.load(folder / PREDICTIONS).logits["teacher"]
    elsewhere = _out_of_domain(comparison, common, console)
    worker = _Worker(
        comparison, common, logits, elsewhere, folder=folder, storage=storage, keep_students=keep
    )
    worker.handout.work(console)


def _any_recipe(comparison: Comparison) -> Recipe:
    """Return the first run's recipe: its teacher and data are those of all."""
    run = next(runs_of(comparison))
    return comparison.recipe(run.student, run.variant, run.seed)


def _same_precision(folder: Path, comparison: Comparison) -> Comparison:
    """Return the comparison with the precision that its folder has, where it leaves that open."""
    if comparison.training.precision != "auto" or not (folder / COMPARISON).exists():
        return comparison
    before = Comparison.load(folder / COMPARISON).training.precision
    training = comparison.training.model_copy(update={"precision": before})
    return comparison.model_copy(update={"training": training})


def _inputs(common: Common) -> dict[str, str]:
    tokens = Tokens(common.teacher_tokens, common.teacher_tokens)
    return provenance.inputs_of(common.dataset, common.teacher, None, tokens)


def _write(folder: Path, everything: Comparison, common: Common, teacher_logits: np.ndarray) -> None:
    """Write down what the folder compares, and on which rows."""
    if not (folder / COMPARISON).exists():
        provenance.save(folder, _inputs(common), environment(bf16=common.bf16))
        _keep(folder, common.dataset, "teacher", teacher_logits)
    everything.save(folder / COMPARISON)


def _joined(folder: Path, comparison: Comparison, common: Common, console: Console) -> Comparison:
    """Return all that the folder compares, with what is asked for now, or refuse to mix."""
    machine = environment(bf16=common.bf16)
    precision = comparison.training.model_copy(update={"precision": machine["precision"]})
    comparison = comparison.model_copy(update={"training": precision})
    if not (folder / COMPARISON).exists():
        others = {durable.LOCK, STUDY, DATABASE, provenance.INPUTS, PREDICTIONS}
        teacher = Path(comparison.teacher.name).absolute()
        if teacher.parent == folder.absolute():
            others.add(teacher.name)
        found = [path.name for path in folder.iterdir() if path.name not in others]
        if found:
            raise WrongInput(
                f"Expected a folder that is new, empty, or a comparison, found {folder} with "
                f"{', '.join(sorted(found)[:5])}. Give another folder."
            )
        return comparison
    before = Comparison.load(folder / COMPARISON)
    changed = list(_changes(before, comparison))
    if changed:
        raise WrongInput(
            f"{folder} compares something else: {'; '.join(changed)}. Go on with what it has, or give "
            "another folder."
        )
    provenance.require_same(folder, _inputs(common), machine, console)
    return before.model_copy(
        update={
            "students": tuple(dict.fromkeys((*before.students, *comparison.students))),
            "methods": {**before.methods, **comparison.methods},
            "seeds": tuple(dict.fromkeys((*before.seeds, *comparison.seeds))),
        }
    )


def _changes(before: Comparison, now: Comparison) -> Iterator[str]:
    """Yield each setting that would make other runs of the same name. Places of data may change."""
    places = {"name", "data_dir", "validation"}
    old, new = (
        _flat(
            {
                "dataset": one.dataset.model_dump(mode="json", exclude=places),
                "training": one.training.model_dump(mode="json"),
                "init": one.init,
                # Their rows have no fingerprint in the folder: another file would mix in unseen.
                "out_of_domain": {
                    n: other.model_dump(mode="json") for n, other in one.out_of_domain.items()
                },
                "methods": {
                    name: variant.model_dump(mode="json")
                    for name, variant in one.methods.items()
                    if name in before.methods and name in now.methods
                },
            }
        )
        for one in (before, now)
    )
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            yield f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        inner: value
        for key, below in values.items()
        for inner, value in _flat(below, f"{prefix}.{key}" if prefix else key).items()
    }


def _teacher_logits(folder: Path, common: Common) -> np.ndarray:
    """Return the teacher's logits of the validation rows, those of the comparison that is there."""
    if (folder / COMPARISON).exists():
        return predictions.load(folder / PREDICTIONS).logits["teacher"]
    teacher = common.teacher.to(Accelerator().device)
    return predict(teacher, common.teacher_tokens["validation"], bf16=common.bf16)


def _out_of_domain(comparison: Comparison, common: Common, console: Console) -> dict[str, OutOfDomain]:
    """Return the sets of other sources, by name."""
    return {
        name: OutOfDomain.load(settings, common.teacher, console)
        for name, settings in comparison.out_of_domain.items()
    }


def _scores(sets: dict[str, OutOfDomain], model: Encoder, bf16: bool) -> dict[str, dict[str, float]]:
    quiet = Console(quiet=True)
    return {name: one.score(model, bf16=bf16, console=quiet) for name, one in sets.items()}


def _score_teacher(folder: Path, sets: dict[str, OutOfDomain], common: Common, console: Console) -> None:
    """Score the teacher on the sets of other sources, once for the folder."""
    if not (folder / _ELSEWHERE).exists():
        with console.status("Scoring the teacher out of domain"):
            found = _scores(sets, common.teacher.to(Accelerator().device), common.bf16)
        durable.write_json(folder / _ELSEWHERE, found)


def _keep(folder: Path, dataset: Dataset, model: str, logits: np.ndarray) -> None:
    """Keep what a model said of the validation split, as a run does."""
    kept = Predictions(dataset.task, dataset.splits["validation"], {model: logits})
    predictions.save(folder / PREDICTIONS, kept)


def _collect(
    folder: Path, comparison: Comparison, common: Common, teacher_logits: np.ndarray
) -> dict[str, Any]:
    """Return `compare.json` of the runs that are done."""
    task, rows = common.dataset.task, common.dataset.splits["validation"]
    costs = _costs(folder, comparison, common)
    teacher = score(task, teacher_logits, rows.labels)
    found: dict[str, Any] = {
        "dataset": comparison.dataset.name,
        "rows": len(rows),
        "metric": task.metrics[0],
        "teacher": {
            "metrics": teacher,
            "out_of_domain": durable.read_json(folder / _ELSEWHERE),
            **costs["teacher"],
        },
        "students": {},
    }
    for made in comparison.students:
        said: dict[str, dict[int, np.ndarray]] = {}
        entries: dict[str, Any] = {}
        for variant in comparison.methods:
            places = {seed: folder / RUNS / Run(made, variant, seed).name for seed in comparison.seeds}
            done = {seed: place for seed, place in places.items() if (place / METRICS).exists()}
            if not done:
                continue
            runs = {seed: durable.read_json(place / METRICS) for seed, place in done.items()}
            logits = {
                s: predictions.load(place / PREDICTIONS).logits["student"] for s, place in done.items()
            }
            said[variant] = {seed: answers(value, task.kind) for seed, value in logits.items()}
            entries[variant] = {
                "folder": next(iter(places.values())).parent.relative_to(folder).as_posix(),
                **_summary(runs, teacher, task.metrics),
            }
            found["environment"] = next(iter(runs.values()))["environment"]
        control = next((v for v in said if comparison.methods[v].method.name == "none"), None)
        for variant, entry in entries.items():
            both = [] if control is None else [seed for seed in said[variant] if seed in said[control]]
            if control is None or variant == control or not both:
                continue
            a, b = (np.stack([said[name][seed] for seed in both]) for name in (control, variant))
            entry["against_control"] = {
                name: asdict(bootstrap_over_seeds(metric, a, b, rows.labels))
                for name, metric in functions_of(task, RESAMPLED).items()
            }
        found["students"][made] = {**costs["students"][made], "control": control, "methods": entries}
    return found


def _summary(
    runs: dict[int, dict[str, Any]], teacher: dict[str, float], names: Sequence[str]
) -> dict[str, Any]:
    by_seed = {seed: run["student"]["metrics"] for seed, run in runs.items()}
    summary = _over_seeds(list(by_seed.values()))
    goal = teacher[names[0]]
    # Runs of before there were any have no key for them.
    elsewhere = [run["student"].get("out_of_domain", {}) for run in runs.values()]
    return {
        "seeds": {str(seed): metrics for seed, metrics in by_seed.items()},
        **summary,
        "kept": summary["mean"][names[0]] / goal if goal else None,
        "out_of_domain": {name: _over_seeds([one[name] for one in elsewhere]) for name in elsewhere[0]},
        "seconds": statistics.fmean(run["train"]["seconds"] for run in runs.values()),
        "examples_per_second": statistics.fmean(r["train"]["examples_per_second"] for r in runs.values()),
        "steps": next(iter(runs.values()))["train"]["steps"],
    }


def _over_seeds(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return mean and standard deviation of each metric; None for the deviation of one seed."""
    values = {name: [metrics[name] for metrics in found] for name in found[0]}
    several = len(found) > 1
    return {
        "mean": {name: statistics.fmean(given) for name, given in values.items()},
        "standard_deviation": {n: statistics.stdev(v) for n, v in values.items()} if several else None,
    }


def _costs(folder: Path, comparison: Comparison, common: Common) -> dict[str, Any]:
    """Return what teacher and students cost, measured in turns, once for each form of student."""
    with durable.locked(folder, wait=True):
        path = folder / _COSTS
        if path.exists():
            kept = durable.read_json(path)
            if kept["students"].keys() >= set(comparison.students):
                return kept
        quiet = Console(quiet=True)
        made = {
            text: student.build(text, common.teacher, common.dataset.task, seed=0, init="random")
            for text in comparison.students
        }
        models = [(common.teacher, common.teacher_tokens["validation"])]
        models += [(one, common.tokens(one, quiet).student["validation"]) for one in made.values()]
        device = Accelerator().device
        times = cost.milliseconds([(one.to(device), tokens) for one, tokens in models], bf16=False)
        found: dict[str, Any] = {
            "teacher": cost.of(common.teacher, encoder.locate(comparison.teacher.name), times[0]),
            "students": {},
        }
        for (text, one), ms in zip(made.items(), times[1:], strict=True):
            with tempfile.TemporaryDirectory() as place:
                one.save(Path(place) / STUDENT)
                found["students"][text] = cost.of(one, Path(place) / STUDENT, ms)
        durable.write_json(path, found)
        return found


def _slug(name: str) -> str:
    """Return the name as a folder can have it.

    Example:
        >>> _slug("layers:2,4,6"), _slug("lrc-bert:perturbation=off")
        ('layers-2-4-6', 'lrc-bert-perturbation=off')
    """
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.") or "-"
