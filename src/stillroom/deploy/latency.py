"""How fast models are, how large on disk and in memory, side by side."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from rich.console import Console
from rich.progress import Progress

from stillroom import encoder
from stillroom.data import sources
from stillroom.deploy import forms
from stillroom.errors import RunFailed, WrongInput
from stillroom.evaluation import cost
from stillroom.provenance import environment
from stillroom.recipe import DatasetSettings

TURNS = 20
"""How often each model gets its turn in a cell, one after the other."""

REPEATS = 2
"""Timed runs in a turn, after one that does not count."""

LENGTHS = (16, 32, 128)
"""Tokens in a row, where no others are asked for."""

SECONDS = 30.0
"""After so much timed computing in one cell a model has had its turns, at least `_LEAST`."""

_LEAST = 3


def bench(
    models: Sequence[str | Path],
    *,
    threads: Sequence[int] = (1, 2),
    batches: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] | None = None,
    dataset: DatasetSettings | str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure models side by side, in every number of threads, batch size and length.

    Each model runs in a process of its own, in evaluation mode and without gradients; loading and
    tokenising are not timed. In each cell the models take turns, so that a machine whose speed drifts is
    fair to all, and each turn begins with a run that does not count.

    Args:
        models: Model folders, hub ids, run folders (their student) and exports (all their forms).
        threads: How many the model computes with.
        batches: Rows that are computed at once.
        lengths: Tokens in each row, drawn at random, without padding. Default: 16, 32 and 128, or what a
            model reads where that is less.
        dataset: Rows of its validation split in place of `lengths`, cut to its `max_length` and padded to
            the longest of their batch.
        console: Where progress goes; standard error by default.

    Returns:
        `models`: for each its `model`, `form`, `precision`, `bytes` on disk (weights, tokenizer and
        configuration), `smaller` (bytes of the first over its own) and `peak_bytes` by number of
        threads: the largest resident memory of its process, libraries included.
        `times`: for each cell and model `median_ms`, `p95_ms` of one batch, `rows_per_second` and `faster`
        (median of the first over its own).

    Raises:
        WrongInput: If a model or the data is not as expected.
        RunFailed: If a model's process ends.

    Example:
        >>> found = bench(["runs/teacher", "runs/sst2/deploy"], threads=[2])  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    _require_positive(threads=threads, batches=batches, lengths=LENGTHS if lengths is None else lengths)
    sides = [side for model in models for side in _sides(str(model))]
    if not sides:
        raise WrongInput("Expected at least one model to measure, found none.")
    data = None if dataset is None else sources.settings_of(dataset)
    texts, most = (None, None) if data is None else (_texts(data), data.max_length)
    entries: list[dict[str, Any]] = [{"model": model, "peak_bytes": {}} for model, _ in sides]
    times: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Measuring", total=None)
        for count in threads:
            with contextlib.ExitStack() as stack:
                workers = [stack.enter_context(_worker(*side, count, most)) for side in sides]
                for worker, entry in zip(workers, entries, strict=True):
                    entry |= {key: worker.loaded[key] for key in ("form", "precision")}
                read = [None] if texts is not None else _lengths(lengths, sides, workers)
                cells = [(batch, length) for batch in batches for length in read]
                progress.update(task, total=len(threads) * len(cells) * TURNS)
                for batch, length in cells:
                    request = _request(batch, length, texts)
                    measured = _cell(workers, request, lambda: progress.advance(task))
                    for entry, seconds in zip(entries, measured, strict=True):
                        times.append(
                            {
                                "threads": count,
                                "batch": batch,
                                "length": length,
                                "model": entry["model"],
                                "form": entry["form"],
                                **_summary(batch, seconds, measured[0]),
                            }
                        )
                for worker, entry in zip(workers, entries, strict=True):
                    entry["peak_bytes"][str(count)] = worker.ask({"memory": True})["peak_bytes"]
    for (model, form), entry in zip(sides, entries, strict=True):
        entry["bytes"] = _bytes(model, form)
        entry["smaller"] = entries[0]["bytes"] / entry["bytes"]
    return {
        "dataset": None if data is None else data.name,
        "models": entries,
        "times": times,
        "environment": environment(bf16=False),
    }


def _require_positive(**given: Sequence[int]) -> None:
    for name, values in given.items():
        if not values or min(values) < 1:
            raise WrongInput(f"Expected {name} of 1 or more, found {list(values)}.")


def _lengths(
    given: Sequence[int] | None, sides: Sequence[tuple[str, str | None]], workers: "Sequence[_Worker]"
) -> list[int | None]:
    """Return the lengths to measure: those given, which every model reads, or the usual ones, cut to it."""
    most, model = min(
        (worker.loaded["max_length"], side[0]) for worker, side in zip(workers, sides, strict=True)
    )
    if given is None:
        return sorted({min(length, most) for length in LENGTHS})
    if max(given) > most:
        raise WrongInput(
            f"{model} reads at most {most} tokens, found a length of {max(given)}. Give a shorter --length."
        )
    return list(given)


def _sides(model: str) -> list[tuple[str, str | None]]:
    """Return what a name stands for: an export's forms, or one model in torch."""
    if forms.is_export(Path(model)):
        return [(model, form) for form in forms.read_manifest(Path(model))["forms"]]
    return [(encoder.locate(model), None)]


def _bytes(model: str, form: str | None) -> int:
    if Path(model).is_dir():
        return forms.bytes_of(Path(model), form or "torch")
    return cost.bytes_of_weights(model)


def _texts(settings: DatasetSettings) -> list[tuple[str, ...]]:
    rows = sources.load(settings, splits=("validation",)).split("validation")
    return list(zip(*rows.texts, strict=True))


def _request(batch: int, length: int | None, texts: list[tuple[str, ...]] | None) -> dict[str, Any]:
    """Return the request for a cell's batches: random tokens, or rows spread over the split."""
    if texts is None:
        return {"tokens": {"batch": batch, "length": length}}
    chosen = np.linspace(0, len(texts) - 1, TURNS * batch).astype(int)
    # Rows of a batch from all over the split, as requests come; no sorting by length.
    return {"texts": [[texts[i] for i in chosen[turn::TURNS]] for turn in range(TURNS)]}


def _cell(workers: "Sequence[_Worker]", request: dict[str, Any], step: Any) -> list[list[float]]:
    """Return each model's timed seconds on one cell."""
    for worker in workers:
        worker.ask(request)
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(TURNS):
        for worker, kept in zip(workers, seconds, strict=True):
            if turn < _LEAST or sum(kept) < SECONDS:
                kept += worker.ask({"time": {"batch": turn, "repeats": REPEATS}})["seconds"]
        step()
    return seconds


def _summary(batch: int, seconds: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    return {
        "runs": len(seconds),
        "median_ms": 1000 * float(np.median(seconds)),
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "rows_per_second": batch * len(seconds) / sum(seconds),
        "faster": float(np.median(first) / np.median(seconds)),
    }


class _Worker:
    """The other end of `stillroom.deploy.worker`."""

    def __init__(self, process: "subprocess.Popen[str]", model: str):
        self._process = process
        self._model = model
        self.loaded: dict[str, Any] = {}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RunFailed(
                f"The process that measures {self._model} ended with exit code {self._process.wait()}; "
                "what it printed stands above. If memory ran out, give a smaller --batch or --length."
            )
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise WrongInput(found["error"])
        return found


@contextlib.contextmanager
def _worker(model: str, form: str | None, threads: int, max_length: int | None = None) -> Iterator[_Worker]:
    """Yield a process that has loaded a model, which cuts texts to `max_length`; it ends with the block."""
    variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "stillroom.deploy.worker"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        try:
            worker = _Worker(process, model)
            given = {"model": model, "form": form, "threads": threads, "max_length": max_length}
            worker.loaded = worker.ask({"load": given})
            yield worker
        finally:
            # Popen's own exit would wait for a process that computes or waits for more.
            process.kill()
            # What a dead one was not told is still in the pipe's buffer, and closing would write it.
            with contextlib.suppress(BrokenPipeError):
                cast(IO[str], process.stdin).close()
