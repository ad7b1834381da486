"""Named runs of a folder, handed out one by one to the processes and machines that share it.

The folder says what is done: a run is where its `metrics.json` is. An Optuna study says who does what
is not, and which values a run tries.
"""

import contextlib
import functools
import multiprocessing
import os
import platform
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError

from stillroom import durable
from stillroom.errors import StillroomError, WrongInput
from stillroom.provenance import METRICS

RUNS = "runs"
STUDY, DATABASE = "study.txt", "study.db"
"""Names of folders and files inside the shared folder."""

_HEARTBEAT, _GRACE = 10, 120
"""Seconds between two signs of life of a run, and without one after which another worker takes it."""

_POLL = 2.0
"""Seconds between two looks at what others are still doing."""

Do = Callable[[str, optuna.Trial, Console], Any]
"""Does a run, and returns its value, or one value for each objective."""


class Handout:
    """Takes runs from the folder's study until none is left.

    Args:
        folder: Shared by all who take part.
        names: The runs; a name is a run's folder below `runs`.
        do: Does one. It writes the run's `metrics.json`; what it raises on purpose is noted.
        storage: URL of a database; None: an SQLite file in the folder.
        **study: As for `optuna.create_study`: sampler, pruner, directions.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], do: Do, *, storage: str | None = None, **study: Any
    ):
        self.names = list(names)
        self.study = open_study(folder, storage, **study)
        self._folder, self._do = folder, do
        self._overtaken = False

    def place(self, name: str) -> Path:
        """Return a run's folder."""
        return self._folder / RUNS / name

    def missing(self) -> list[str]:
        """Return the runs that are not done."""
        return [name for name in self.names if not (self.place(name) / METRICS).exists()]

    def errors(self) -> dict[str, str]:
        """Return why runs failed, by name, the newest reason of each."""
        trials = self.study.get_trials(deepcopy=False)
        return {t.user_attrs["run"]: t.user_attrs["error"] for t in trials if "error" in t.user_attrs}

    def enqueue(self, values: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Put the missing runs into the study, but for those that wait there or that some process runs.

        A run that was begun before gets the values that it had.

        Args:
            values: What a run tries, by its name; of others the sampler draws it.
        """
        taken: set[str] = set()
        tried: dict[str, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs.get("run", "")
            tried[name] = trial.params or tried.get(name, {})
            here = trial.user_attrs.get("machine") == platform.node()
            if here and trial.state == TrialState.RUNNING and not self._is_held(name):
                # Its process was killed; without this its run would wait for the end of the grace.
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state in (TrialState.WAITING, TrialState.RUNNING):
                taken.add(name)
        for name in self.missing():
            if name not in taken:
                self.study.enqueue_trial(
                    dict(tried.get(name) or (values or {}).get(name, {})), user_attrs={"run": name}
                )

    def work(self, console: Console) -> None:
        """Do runs until all are done, waiting for those that others do."""
        while self.missing():
            with _experimental():
                optuna.storages.fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            # Another command on the same folder may have runs of its own there.
            states = {trial.state for trial in trials if trial.user_attrs.get("run") in self.names}
            if TrialState.WAITING in states:
                objective = functools.partial(self._objective, console=console)
                self._overtaken = False
                try:
                    self.study.optimize(objective, n_trials=1, catch=(StillroomError,))
                except ValueError:
                    # A trial that another process ended cannot be told how it ended here.
                    if not self._overtaken:
                        raise
            elif TrialState.RUNNING in states:
                time.sleep(_POLL)
            else:
                break

    def _objective(self, trial: optuna.Trial, console: Console) -> Any:
        name = trial.user_attrs.get("run")
        if name not in self.names:
            # Another process took the last one meanwhile.
            if name is not None:
                # Or it is a run of another command, to which it goes back.
                given = self.study.get_trials(deepcopy=False)[trial.number].system_attrs
                self.study.enqueue_trial(given.get("fixed_params", {}), user_attrs={"run": name})
            raise optuna.TrialPruned
        try:
            trial.set_user_attr("machine", platform.node())
            try:
                value = self._do(name, trial, console)
            except StillroomError as error:
                trial.set_user_attr("error", str(error))
                console.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)
                raise
            # Refused, as everything is, where the study has given the run to another process meanwhile.
            trial.set_user_attr("done", True)
            return value
        except optuna.exceptions.UpdateFinishedTrialError:
            # This process stood still, as on a laptop asleep, for longer than the grace.
            self._overtaken = True
            raise optuna.TrialPruned from None

    def _is_held(self, name: str) -> bool:
        try:
            with durable.locked(self.place(name)):
                return False
        except WrongInput:
            return True


def open_study(folder: Path, url: str | None, **study: Any) -> optuna.Study:
    """Return the study that hands out the folder's runs; each is enqueued, in order.

    Args:
        folder: Holds the study's name, and its SQLite file unless another storage is given.
        url: Of any storage of Optuna's.
        **study: As for `optuna.create_study`.

    Raises:
        WrongInput: If the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not (folder / STUDY).exists():
        durable.write_text(folder / STUDY, f"stillroom-{uuid.uuid4().hex}\n")
    place = url or f"sqlite:///{(folder / DATABASE).absolute()}"
    # SQLite gives up after five seconds of waiting for another writer.
    options = {"connect_args": {"timeout": 60}} if place.startswith("sqlite") else {}
    try:
        with _experimental():
            kept = optuna.storages.RDBStorage(
                place,
                engine_kwargs=options,
                heartbeat_interval=_HEARTBEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
        if place.startswith("sqlite"):
            _take_turns(kept.engine)
        name = (folder / STUDY).read_text(encoding="utf-8").strip()
        return optuna.create_study(storage=kept, study_name=name, load_if_exists=True, **study)
    except (optuna.exceptions.OptunaError, SQLAlchemyError, ImportError, ValueError) as error:
        raise WrongInput(f"The storage {place} cannot be used: {error}") from None


def _take_turns(engine: Engine) -> None:
    """Let SQLite lock where a transaction begins, and not where it first writes.

    It has no row locks: two workers that look at the same moment would take the same run.
    """

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        # Or Python's sqlite3 would begin transactions itself, late.
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Connections that were made before know nothing of this.
    engine.dispose()


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Silence that Optuna calls its heartbeat experimental, as it has since version 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def in_processes(workers: int, work: Callable[..., None], *given: Any) -> None:
    """Let `workers` processes of one thread work, and wait for them.

    Where there are several GPUs each process sees one, in turn.

    Args:
        workers: How many.
        work: A function of a module. Called with a console and `given`, all of which can be pickled.
        *given: Its arguments.
    """
    context = multiprocessing.get_context("spawn")
    made = [
        context.Process(target=_worker_process, args=(work, *given), daemon=True) for _ in range(workers)
    ]
    with _deaf():
        for place, process in enumerate(made):
            with _environment(OMP_NUM_THREADS="1", **_gpu_of(place)):
                process.start()
    for process in made:
        process.join()


def _gpu_of(worker: int) -> dict[str, str]:
    """Return the variable that shows a worker its GPU; nothing where there are not several."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[worker % count]}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore Ctrl-C, and let processes that start meanwhile ignore it until they say otherwise.

    They end with this one; one that was still loading would write a long traceback before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker_process(work: Callable[..., None], *given: Any) -> None:
    """Work in a process of its own, which ends with the one that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    # Bars of several processes would overwrite each other.
    console = Console(stderr=True, force_terminal=False, soft_wrap=True)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(console, *given)
    except KeyboardInterrupt:
        os._exit(130)
