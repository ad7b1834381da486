"""Where rows come from: GLUE as Parquet or from the hub, the built-in data, files of the user's own.

Whatever is wrong with a file is a `WrongInput` that names the file and the row. Rows count from 1,
without a header; text formats name the line of the file as well.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import load_dataset

from stillroom.data import augmented, builtin, tables
from stillroom.data.columns import rows_of, task_of
from stillroom.data.tables import Table
from stillroom.data.tasks import GLUE, Dataset, Kind, Rows, Task
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings, nearest

HUB = "nyu-mll/glue"
"""The hub's data set that GLUE comes from where no folder is given."""

HELD_OUT = "every tenth row, held out"
"""What the source of a validation split says that was taken from a single file."""

_STEMS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}


@dataclass(frozen=True)
class Known:
    """A data set that can be named, and whether it is on this machine."""

    name: str
    kind: Kind
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    source: str
    """The folder it is read from, the hub, or the generator."""
    here: bool
    """Whether loading it needs no network."""


def describe(data_dir: Path | None = None) -> list[Known]:
    """Return every data set with a name of its own, without touching the network.

    Args:
        data_dir: As `DatasetSettings.data_dir`.
    """
    root = _data_dir(data_dir)
    known = []
    for name, task in GLUE.items():
        source, here = f"hub {HUB}", False
        if root is not None:
            source = str(root / name)
            here = all((root / name / f"{_glue_split(name, s)}.parquet").is_file() for s in _STEMS)
        known.append(_known(task, source, here))
    return [*known, *(_known(task, "generated", True) for task in builtin.TASKS.values())]


def settings_of(given: DatasetSettings | str) -> DatasetSettings:
    """Return the settings of data, of which a caller may give the name alone."""
    return DatasetSettings(name=given) if isinstance(given, str) else given


def has_own_columns(settings: DatasetSettings) -> bool:
    """Return whether the data is GLUE or built in, and says itself which columns hold its texts."""
    return settings.name.startswith(("glue/", "builtin/"))


def load(settings: DatasetSettings, splits: Sequence[str] = ("train", "validation")) -> Dataset:
    """Return a data set with the splits that are asked for; no other is kept.

    GLUE comes from `data_dir` or $STILLROOM_DATA, and from the hub if neither is given. In a folder
    of the user's own, files are found by their names (`train.csv`, `dev.jsonl`). A single file is
    the training split; without `settings.validation` every tenth row of it is held out. Label names
    follow from the training file wherever there is one, so that all splits number them alike.

    Args:
        settings: The data set's name and how to read it.
        splits: Names of the splits. MNLI has `validation_matched` (also called `validation`) and
            `validation_mismatched`. A single file has `train`, `validation` and `all`, every row of it.

    Raises:
        WrongInput: If the data set, a file, a column, a text or a label is missing or not as
            expected; the message names file and row.
    """
    try:
        dataset = _load(settings, splits)
    except OSError as error:
        raise WrongInput(f"{settings.name} cannot be read: {error}. Check the path.") from error
    if "train" not in dataset.splits:
        return dataset
    every = dataset.splits["train"]
    if settings.soft_labels is not None and settings.augmented is not None:
        raise WrongInput(
            "Augmented rows have no soft labels in a file: remove dataset.augmented or dataset.soft_labels."
        )
    drawn = drawn_rows(len(every), settings.train_rows)
    train = every if drawn is None else _draw(every, drawn)
    if settings.augmented is None:
        return replace(dataset, splits={**dataset.splits, "train": train})
    more, source = augmented.read(settings.augmented, dataset.task, every)
    if drawn is not None:
        kept = np.flatnonzero(np.isin(source, drawn))
        more, source = more.take(kept), np.searchsorted(drawn, source[kept])
    joined = augmented.join(train, more)
    return replace(dataset, splits={**dataset.splits, "train": joined}, source_rows=source)


def drawn_rows(total: int, wanted: int | None) -> np.ndarray | None:
    """Return which rows of the training split `train_rows` draws; None where it is all of them.

    Args:
        total: Rows of the split.
        wanted: How many are drawn; None for all. More of them hold those of fewer.

    Returns:
        Numbers of the rows, int64 and rising, shape `(wanted,)`.

    Example:
        >>> few, more = drawn_rows(100, 5), drawn_rows(100, 10)
        >>> len(more), bool(np.isin(few, more).all())
        (10, True)
    """
    if wanted is None or wanted >= total:
        return None
    # Philox by name: what default_rng means may change with numpy.
    chance = np.random.Generator(np.random.Philox(key=0))
    return np.sort(chance.permutation(total)[:wanted])


def _load(settings: DatasetSettings, splits: Sequence[str]) -> Dataset:
    if has_own_columns(settings):
        _require_no_reading(settings)
        return (_builtin if settings.name in builtin.TASKS else _glue)(settings, splits)
    path = Path(settings.name).expanduser()
    if path.is_dir():
        return _folder(path, settings, splits)
    if path.exists():
        return _file(path, settings, splits)
    raise WrongInput(
        f"Expected a file, a folder or a known data set, found nothing at {settings.name!r}."
        f"{nearest(settings.name, [*GLUE, *builtin.TASKS])}"
    )


def _known(task: Task, source: str, here: bool) -> Known:
    return Known(task.name, task.kind, (*task.text, task.label), task.labels, task.metrics, source, here)


def _draw(rows: Rows, index: np.ndarray) -> Rows:
    return replace(rows.take(index), source=f"{rows.source} ({len(index)} of {len(rows)} rows, seed 0)")


def _require_no_reading(settings: DatasetSettings) -> None:
    """GLUE and the built-in sets say themselves how they are read."""
    kind = _named(settings.name).kind
    for key in ("validation", "text", "label", "labels", "soft_labels"):
        if getattr(settings, key) is not None:
            raise WrongInput(f"{settings.name} has its own columns and labels: remove dataset.{key}.")
    if settings.kind not in ("auto", kind):
        raise WrongInput(f"{settings.name} is {kind}, not {settings.kind}: remove dataset.kind.")


def _named(name: str) -> Task:
    tasks = {**GLUE, **builtin.TASKS}
    if name not in tasks:
        raise WrongInput(f"Unknown data set {name!r}.{nearest(name, list(tasks))}")
    return tasks[name]


def _builtin(settings: DatasetSettings, splits: Sequence[str]) -> Dataset:
    rows = {split: builtin.load(settings.name, split) for split in splits}
    return Dataset(builtin.TASKS[settings.name], rows)


# GLUE


def _data_dir(given: Path | None) -> Path | None:
    if given is None and os.environ.get("STILLROOM_DATA"):
        given = Path(os.environ["STILLROOM_DATA"])
    return None if given is None else given.expanduser()


def _glue_split(name: str, split: str) -> str:
    return "validation_matched" if (name, split) == ("glue/mnli", "validation") else split


def _glue(settings: DatasetSettings, splits: Sequence[str]) -> Dataset:
    task = _named(settings.name)
    root = _data_dir(settings.data_dir)
    found = {}
    for split in splits:
        wanted = _glue_split(task.name, split)
        table = _from_hub(task.name, wanted) if root is None else _from_folder(root / task.name, wanted)
        found[split] = rows_of(table, task, numbered=True)
    return Dataset(task, found)


def _from_folder(folder: Path, split: str) -> Table:
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise WrongInput(
            f"Expected {path}, {_listing(folder)}. Check --data-dir or $STILLROOM_DATA (DIR in "
            "DIR/glue/<task>/<split>.parquet) and the split's name; without either, the hub is asked."
        )
    return tables.read(path)


def _from_hub(name: str, split: str) -> Table:
    try:
        found = load_dataset(HUB, name.removeprefix("glue/"), split=split)
    # The hub's client fails in more ways than it documents; to the caller they are all one.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WrongInput(
            f"{name} ({split}) cannot be fetched from the hub's {HUB}: {reason} Give a folder that "
            "holds DIR/glue/<task>/<split>.parquet with --data-dir DIR or $STILLROOM_DATA, or try "
            "again with a network connection."
        ) from error
    columns = {column: list(found[column]) for column in found.column_names}
    return Table(f"{HUB} {name.removeprefix('glue/')} {split}", columns, len(found))


# Files of the user's own


def _folder(folder: Path, settings: DatasetSettings, splits: Sequence[str]) -> Dataset:
    if settings.validation is not None:
        raise WrongInput(
            f"{folder} is a folder, whose own files are the splits: remove dataset.validation, or "
            "name the training file instead of the folder."
        )
    found: dict[str, Table] = {}
    for split in splits:
        path = _find(folder, split)
        if path is None:
            wanted = " or ".join(f"{stem}.*" for stem in _STEMS.get(split, (split,)))
            raise WrongInput(
                f"Expected {folder / wanted} (CSV, TSV, JSONL or Parquet), {_listing(folder)}. "
                "Rename the file, or name the training file itself as the data set."
            )
        found[split] = tables.read(path)
    train = None if "train" in found else _find(folder, "train")
    naming = tables.read(train) if train else found.get("train", found[splits[0]])
    task, numbered = task_of(naming, settings)
    soft = settings.soft_labels
    rows = {
        split: rows_of(table, task, numbered, soft=soft, optional=soft is not None and split == "train")
        for split, table in found.items()
    }
    return Dataset(task, rows)


def _find(folder: Path, split: str) -> Path | None:
    stems = _STEMS.get(split, (split,))
    found = sorted(p for p in folder.iterdir() if p.stem.lower() in stems and tables.is_readable(p))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise WrongInput(f"{folder} holds several files for {split}: {names}. Keep one of them there.")
    return found[0] if found else None


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"but there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 20 else ""
    return f"found {', '.join(names[:20])}{more}" if names else f"but {folder} is empty"


def _file(path: Path, settings: DatasetSettings, splits: Sequence[str]) -> Dataset:
    for split in splits:
        if split not in (*_STEMS, "all"):
            raise WrongInput(
                f"{path} is a single file: it has train, validation and all, but no split {split!r}. Put "
                "the files into a folder as train.*, validation.*, test.* and name the folder."
            )
    table = tables.read(path)
    task, numbered = task_of(table, settings)
    soft = settings.soft_labels
    every = rows_of(table, task, numbered, soft=soft, optional=soft is not None)
    found = {"train": every, "all": every}
    if "all" in splits and len(splits) == 1:
        return Dataset(task, {"all": every})
    if settings.validation is None:
        found |= _hold_out(every)
    elif "validation" in splits:
        other = tables.read(settings.validation.expanduser())
        found["validation"] = rows_of(other, task, numbered, soft=soft)
    return Dataset(task, {split: found[split] for split in splits})


def _hold_out(rows: Rows) -> dict[str, Rows]:
    """Return every tenth row (that has a label) as validation and the others as train."""
    labelled = np.arange(len(rows)) if rows.unlabelled is None else np.flatnonzero(~rows.unlabelled)
    held = np.zeros(len(rows), dtype=bool)
    held[labelled[9::10]] = True
    if not held.any():
        raise WrongInput(
            f"{rows.source} has {len(labelled)} rows with a label, too few to hold out every tenth "
            "as validation. Give a validation file with dataset.validation."
        )
    return {
        "train": replace(
            rows.take(np.flatnonzero(~held)), source=f"{rows.source} (without every tenth row)"
        ),
        "validation": replace(rows.take(np.flatnonzero(held)), source=f"{rows.source} ({HELD_OUT})"),
    }
