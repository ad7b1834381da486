"""Many runs of one recipe with other values of some keys, to find the better ones.

Runs are handed out as those of a comparison are; Optuna's sampler proposes their values.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from accelerate import Accelerator
from rich.console import Console

from stillroom import durable, methods, preflight
from stillroom.data.tasks import Dataset
from stillroom.errors import RunFailed, WrongInput
from stillroom.evaluation import cost
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predict import predict
from stillroom.provenance import METRICS, RECIPE, STUDENT, environment
from stillroom.recipe import Range, Recipe, Sweep
from stillroom.run.handout import DATABASE, RUNS, STUDY, Handout, in_processes
from stillroom.run.parts import Common, Parts, training_figures
from stillroom.training.log import LOG
from stillroom.training.loop import CHECKPOINTS

SWEEP = "sweep.yaml"
RESULTS = "sweep.json"
BEST = "best.yaml"

TRIALS = 20
"""How many runs there are, where a key has a range and the sweep names no number."""

HELD_OUT, MOST_HELD_OUT = 10, 2000
"""One of how many training rows is held out to score on, and most rows that are."""

_COSTS = "costs.json"

_DIRECTIONS = {"quality": "maximize", "latency": "minimize", "size": "minimize"}

_SAME_ROWS = ("dataset.max_length", "dataset.augmented", "dataset.augmented_labels", "teacher.name")
"""Keys of these sections that can be tried: with others, runs would be scored on other rows."""


def sweep(
    chosen: Sweep,
    output: str | Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Distil by one recipe with many values of some of its keys, and say which are best.

    What is done is skipped, and a run that was killed goes on from its checkpoint with the values that
    it had: after a kill, call it again, also with more `trials`. Processes on other machines take part
    by calling the same on the same folder.

    Args:
        chosen: The recipe, and what is tried.
        output: The folder: new, empty, or of this sweep.
        workers: Processes of one thread each; 1 trains in this process, with all its threads. A script
            needs `if __name__ == "__main__":` around a call with more than one.
        storage: URL of any storage of Optuna's; by default an SQLite file in the folder.
        console: Where progress goes; standard error by default.

    Returns:
        What `sweep.json` holds: `dataset`, `split` and `rows` that were scored, `metric`, `objectives`,
        `trials` (for each its `run`, `state`, `values` by key, the objectives, `seconds`, and of one
        that failed the `error`) and `best`: the runs that no other beats in every objective, best
        quality first; of equal ones the first. `best.yaml` is the recipe of the first of these, for the
        data as it is.

    Raises:
        WrongInput: If anything is not as expected, or the folder holds another sweep.
        RunFailed: If no run is done.

    Example:
        >>> tries = {"training.learning_rate": "1e-5:1e-3:log", "method.alpha": [0, 1, 2]}
        >>> chosen = Sweep.load(teacher="t", dataset="glue/mrpc", method="lrc-bert", tries=tries)
        >>> found = sweep(chosen, "runs/sweep")  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    folder = Path(output)
    preflight.require_one_process()
    if workers < 1:
        raise WrongInput(f"Expected at least one worker, found {workers}.")
    require_valid(chosen)
    with durable.locked(folder, wait=True):
        durable.remove_leftovers(folder)
        _join(folder, chosen)
        here = _Worker(chosen, folder, storage)
        here.handout.enqueue(grid(chosen))
    if here.handout.missing():
        if workers > 1:
            in_processes(workers, _work, folder, chosen, storage)
        else:
            here.handout.work(console)
    found = _collect(folder, chosen, here.handout)
    durable.write_json(folder / RESULTS, found)
    if not found["best"]:
        errors = "\n".join(f"{one['run']}: {one.get('error', 'stopped')}" for one in found["trials"])
        raise RunFailed(f"No run of {folder} is done. The same command tries them again.\n{errors}")
    Recipe.load(here.handout.place(found["best"][0]) / RECIPE).save(folder / BEST)
    return found


def require_valid(chosen: Sweep) -> None:
    """Raise `WrongInput` if a key cannot be tried, or a value of it is none of a recipe."""
    first = {key: _ends(given)[0] for key, given in chosen.tries.items()}
    for key, given in chosen.tries.items():
        if key.split(".")[0] in ("dataset", "teacher", "control") and key not in _SAME_ROWS:
            raise WrongInput(
                f"{key} cannot be tried: all runs of a sweep share rows and teacher. Expected keys of "
                f"training and method, student, or one of {', '.join(_SAME_ROWS)}."
            )
        for value in _ends(given):
            try:
                methods.resolve(chosen.recipe({**first, key: value}))
            except WrongInput as error:
                raise WrongInput(f"--try {key}: {value!r} does not fit. {error}") from None


def _ends(given: Range | list[Any]) -> list[Any]:
    if isinstance(given, list):
        return given
    return [int(given.low), int(given.high)] if given.whole else [given.low, given.high]


def grid(chosen: Sweep) -> dict[str, dict[str, Any]]:
    """Return the values of every run by its name, where all combinations are tried, else nothing."""
    lists = {key: given for key, given in chosen.tries.items() if isinstance(given, list)}
    every = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    if len(lists) < len(chosen.tries) or (chosen.trials is not None and chosen.trials < len(every)):
        return {}
    return {_name(i): {key: json.dumps(v) for key, v in one.items()} for i, one in enumerate(every)}


def names_of(chosen: Sweep) -> list[str]:
    """Return the names of all runs."""
    every = grid(chosen)
    return list(every) or [_name(i) for i in range(chosen.trials or TRIALS)]


def _name(number: int) -> str:
    return f"{number:04}"


def hold_out(dataset: Dataset) -> Dataset:
    """Return the data with a tenth of its training rows (2,000 at most) as the validation split.

    They are drawn with a fixed seed. Augmented rows that were made of them are not trained on, nor are
    rows of the same text.
    """
    train = dataset.splits["train"]
    count = len(train) - dataset.augmented
    labelled = np.arange(count)
    if train.unlabelled is not None:
        labelled = np.flatnonzero(~train.unlabelled)
    if len(labelled) < 2 * HELD_OUT:
        raise WrongInput(
            f"{train.source} has {len(labelled)} rows with a label, too few to hold out one in {HELD_OUT} "
            "to score on. Give more, or score on the validation split with --split validation."
        )
    # Philox by name: what default_rng means may change with numpy.
    chance = np.random.Generator(np.random.Philox(key=2))
    held = np.zeros(len(train), dtype=bool)
    held[chance.permutation(labelled)[: min(len(labelled) // HELD_OUT, MOST_HELD_OUT)]] = True
    keys = np.array(train.text_keys())
    rest, sources = ~np.isin(keys, keys[held]), dataset.source_rows
    if sources is not None:
        rest[count:] = rest[sources]
        sources = (np.cumsum(rest) - 1)[sources[rest[count:]]]
    splits = {
        "train": replace(train.take(np.flatnonzero(rest)), source=f"{train.source} (rows held out)"),
        "validation": replace(train.take(np.flatnonzero(held)), source=f"{train.source} (held out)"),
    }
    return replace(dataset, splits=splits, source_rows=sources)


class _Worker:
    """Does the runs that are handed out, with what they share loaded once."""

    def __init__(self, chosen: Sweep, folder: Path, storage: str | None):
        self._sweep, self._folder = chosen, folder
        self._commons: dict[str, tuple[Common, np.ndarray | None]] = {}
        self._checked = False
        self.handout = Handout(
            folder,
            names_of(chosen),
            self._do,
            storage=storage,
            directions=[_DIRECTIONS[name] for name in chosen.objectives],
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if self._prunes else None,
        )
        begun = len(self.handout.study.get_trials(deepcopy=False))
        # Or a sweep that goes on, and every worker of one, would propose the same again.
        other = os.getpid() if multiprocessing.parent_process() else 0
        self.handout.study.sampler = optuna.samplers.TPESampler(
            seed=chosen.training.seed + begun + other, n_startup_trials=5
        )

    @property
    def _prunes(self) -> bool:
        return self._sweep.prune and self._sweep.objectives == ("quality",)

    def _do(self, name: str, trial: optuna.Trial, console: Console) -> tuple[float, ...]:
        place = self.handout.place(name)
        values = {key: _propose(trial, key, given) for key, given in self._sweep.tries.items()}
        with durable.locked(place):
            if (place / METRICS).exists():
                return _objectives(durable.read_json(place / METRICS))
            durable.remove_leftovers(place)
            recipe = methods.resolve(self._sweep.recipe(values))
            try:
                metrics = self._train(recipe, place, trial, console)
            except optuna.TrialPruned:
                # Its values and evaluations are kept by the study.
                metrics = {"pruned": True}
            durable.write_json(place / METRICS, {"values": values, **metrics})
            for heavy in (CHECKPOINTS, STUDENT):
                shutil.rmtree(place / heavy, ignore_errors=True)
        done = len(self.handout.names) - len(self.handout.missing())
        tried = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in values.items()
        )
        said = "pruned" if "pruned" in metrics else _said(metrics["objectives"])
        console.print(
            f"{done}/{len(self.handout.names)} {name}: {said} ({tried})", markup=False, highlight=False
        )
        if "pruned" in metrics:
            raise optuna.TrialPruned
        return _objectives(metrics)

    def _train(self, recipe: Recipe, place: Path, trial: optuna.Trial, console: Console) -> dict[str, Any]:
        common, teacher_logits = self._common(recipe, console)
        parts = Parts.of(recipe, common, console)
        checked = parts.to_check(recipe, place, repeated=True)
        # Other values would bring the same warnings again.
        quiet = Console(quiet=True) if self._checked else console
        preflight.check(replace(checked, teacher_logits=teacher_logits), quiet)
        self._checked = True
        parts = parts.labelled(recipe, common, console)
        recipe = parts.start(recipe, place, console, resume=(place / RECIPE).exists())

        def watch(metrics: Mapping[str, float]) -> None:
            if self._prunes:
                trial.report(next(iter(metrics.values())), len(_evaluations(place)))
                if trial.should_prune():
                    raise optuna.TrialPruned

        trained = parts.train(recipe, place, console, repeated=True, watch=watch)
        rows = common.dataset.splits["validation"]
        logits = predict(parts.student, parts.tokens.student["validation"], bf16=parts.bf16)
        metrics = score(common.dataset.task, logits, rows.labels)
        return {
            "student": {"metrics": metrics},
            "metric": common.dataset.task.metrics[0],
            "rows": len(rows),
            "objectives": self._measure(recipe, parts, metrics),
            "selected_step": trained.best_step or trained.steps,
            "train": training_figures(trained),
            "environment": environment(bf16=parts.bf16),
        }

    def _common(self, recipe: Recipe, console: Console) -> tuple[Common, np.ndarray | None]:
        """Return what runs with this teacher and these rows share, and its logits of what is scored."""
        # Without a teacher a student's own checkpoint says what it looks like.
        model = recipe.student if recipe.teacher is None else recipe.teacher.name
        how = [recipe.training.precision, recipe.training.packed]
        key = json.dumps([model, recipe.dataset.model_dump(mode="json"), how])
        if key not in self._commons:
            # One at a time: another teacher is rarely tried, and would fill the memory.
            self._commons.clear()
            change = hold_out if self._sweep.split == "held-out" else None
            common = Common.load(recipe, console, change=change)
            logits = None
            if common.teaches:
                tokens, device = common.teacher_tokens["validation"], Accelerator().device
                logits = predict(common.teacher.to(device), tokens, bf16=common.bf16)
            self._commons[key] = common, logits
        return self._commons[key]

    def _measure(self, recipe: Recipe, parts: Parts, metrics: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in self._sweep.objectives:
            if name == "quality":
                found[name] = next(iter(metrics.values()))
            elif name == "size":
                found[name] = float(cost.bytes_in_memory(parts.student))
            else:
                found[name] = self._latency(recipe, parts)
        return found

    def _latency(self, recipe: Recipe, parts: Parts) -> float:
        """Return milliseconds per example, measured once for each form of student."""
        key = f"{recipe.student} {recipe.dataset.max_length}"
        with durable.locked(self._folder / _COSTS.removesuffix(".json"), wait=True):
            path = self._folder / _COSTS
            kept = durable.read_json(path) if path.exists() else {}
            if key not in kept:
                timed = [(parts.student, parts.tokens.student["validation"])]
                kept[key] = cost.milliseconds(timed, bf16=False)[0]
                durable.write_json(path, kept)
        return float(kept[key])


def _work(console: Console, folder: Path, chosen: Sweep, storage: str | None) -> None:
    """Do runs in a process of its own."""
    _Worker(chosen, folder, storage).handout.work(console)


def _propose(trial: optuna.Trial, key: str, given: Range | list[Any]) -> Any:
    if isinstance(given, list):
        # As JSON: Optuna keeps no lists.
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in given]))
    if given.whole:
        return trial.suggest_int(key, int(given.low), int(given.high), log=given.log)
    return trial.suggest_float(key, given.low, given.high, log=given.log)


def _join(folder: Path, chosen: Sweep) -> None:
    """Write down what is tried, or refuse to mix it with what the folder tries."""
    path = folder / SWEEP
    if not path.exists():
        others = {durable.LOCK, STUDY, DATABASE}
        found = [entry.name for entry in folder.iterdir() if entry.name not in others]
        if found:
            raise WrongInput(
                f"Expected a folder that is new, empty, or a sweep, found {folder} with "
                f"{', '.join(sorted(found)[:5])}. Give another folder."
            )
        chosen.save(path)
        return
    before, now = (one.model_dump(mode="json", exclude={"trials"}) for one in (Sweep.load(path), chosen))
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise WrongInput(
            f"{folder} is a sweep of something else: {changed[0]} is {before[changed[0]]!r:.200} there, "
            f"{now[changed[0]]!r:.200} here. Go on with what it has ({SWEEP}), or give another folder."
        )
    chosen.save(path)


def _collect(folder: Path, chosen: Sweep, handout: Handout) -> dict[str, Any]:
    """Return `sweep.json` of the runs that are done."""
    errors, trials = handout.errors(), []
    done: dict[str, dict[str, Any]] = {}
    for name in handout.names:
        path = folder / RUNS / name / METRICS
        if not path.exists():
            trials.append({"run": name, "state": "failed", "error": errors.get(name, "stopped")})
            continue
        metrics = durable.read_json(path)
        one = {
            "run": name,
            "state": "pruned" if "pruned" in metrics else "done",
            "values": metrics["values"],
        }
        if "pruned" not in metrics:
            done[name] = metrics
            one |= {**metrics["objectives"], "seconds": metrics["train"]["seconds"]}
        trials.append(one)
    first = next(iter(done.values()), {})
    best = front({name: metrics["objectives"] for name, metrics in done.items()})
    return {
        "dataset": chosen.dataset.name,
        "split": chosen.split,
        "rows": first.get("rows"),
        "metric": first.get("metric"),
        "objectives": list(chosen.objectives),
        "trials": trials,
        "best": best,
    }


def front(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the runs that no other beats: as good in every objective, better in one. Best quality first.

    Of runs that are equal in every objective the first stands for all.

    Example:
        >>> a, b, c = ({"quality": q, "latency": t} for q, t in ((0.9, 3.0), (0.8, 1.0), (0.8, 2.0)))
        >>> front({"a": a, "b": b, "c": c, "d": b})
        ['a', 'b']
    """

    def losses(values: Mapping[str, float]) -> list[float]:
        return [-v if _DIRECTIONS[name] == "maximize" else v for name, v in values.items()]

    runs: dict[tuple[float, ...], str] = {}
    for name, values in found.items():
        runs.setdefault(tuple(losses(values)), name)

    def beaten(mine: tuple[float, ...]) -> bool:
        others = (other for other in runs if other != mine)
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in others)

    kept = {runs[point]: point for point in runs if not beaten(point)}
    return sorted(kept, key=lambda name: (-found[name].get("quality", 0.0), kept[name]))


def _objectives(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    if "pruned" in metrics:
        raise optuna.TrialPruned
    return tuple(metrics["objectives"].values())


def _said(objectives: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in objectives.items())


def _evaluations(place: Path) -> Sequence[dict[str, float]]:
    """Return what the evaluations before have found, from the run's log."""
    lines = (place / LOG).read_text(encoding="utf-8").splitlines() if (place / LOG).exists() else []
    return [line["validation"] for line in map(json.loads, lines) if "validation" in line]
