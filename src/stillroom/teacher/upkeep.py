"""What is recorded of teachers on a disk: listed, verified, thrown away."""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from stillroom import durable
from stillroom.errors import WrongInput
from stillroom.teacher.cache import ORIGIN, Cache, caches_folder, read_origin

_DAY = 24 * 3600


def find(folders: Sequence[Path] | None) -> list[Path]:
    """Return the folders of the caches.

    Args:
        folders: Caches that `teacher.cache` names; None or nothing for all those that `auto` has made.

    Raises:
        WrongInput: If one of `folders` is no cache.
    """
    if not folders:
        return sorted(path.parent for path in caches_folder().glob(f"*/{ORIGIN}"))
    for folder in folders:
        read_origin(folder)
    return list(folders)


def describe(folder: Path) -> dict[str, Any]:
    """Return what a cache holds: its origin, `columns` with rows each, `rows`, `bytes`, days since its use.

    Raises:
        WrongInput: If it is no cache.
    """
    origin = read_origin(folder)
    cache = Cache(folder, origin)
    cache.open(check=False)
    named = json.loads((folder / ORIGIN).read_text(encoding="utf-8")).get("name", "")
    return {
        "folder": str(folder),
        "name": named,
        **{key: value for key, value in asdict(origin).items() if key != "version"},
        "columns": cache.columns,
        "rows": cache.rows,
        "shards": len(cache.shards()),
        "bytes": cache.bytes,
        "unused_days": max(0.0, (time.time() - (folder / ORIGIN).stat().st_mtime) / _DAY),
    }


def verify(folders: Iterable[Path], console: Console) -> dict[str, Any]:
    """Return how many shards there are, and what is wrong with each that is damaged. All sums are made.

    Nothing is removed: the next run that reads a damaged shard records its rows again.
    """
    shards = [shard for folder in folders for shard in Cache(folder, read_origin(folder)).shards()]
    found = {
        str(shard): durable.damage(shard)
        for shard in track(shards, "Verifying", console=console, transient=True)
    }
    return {"shards": len(shards), "damaged": {shard: wrong for shard, wrong in found.items() if wrong}}


def choose(
    folders: Iterable[Path], *, teacher: str | None, older_than: float | None, everything: bool
) -> list[dict[str, Any]]:
    """Return what `describe` says of the caches that are to go.

    Args:
        folders: Of which.
        teacher: Only those of the teacher whose hash starts like this.
        older_than: Only those that no run has used for more days.
        everything: All of them.

    Raises:
        WrongInput: If nothing says which.
    """
    if everything == (teacher is not None or older_than is not None):
        raise WrongInput(
            "Expected which caches to remove: --teacher, --older-than or both, or --all alone."
        )
    return [
        found
        for found in map(describe, folders)
        if (teacher is None or found["teacher"].startswith(teacher))
        and (older_than is None or found["unused_days"] > older_than)
    ]


def prune(chosen: Iterable[dict[str, Any]], console: Console) -> dict[str, Any]:
    """Remove caches, and return which, their bytes, and which a process that records kept.

    A run that reads one goes on: its files are freed when it ends.
    """
    removed, freed, kept = [], 0, []
    for found in chosen:
        folder = Path(found["folder"])
        try:
            with durable.locked(folder):
                # First what makes it a cache: half of one must not be taken for one.
                (folder / ORIGIN).unlink(missing_ok=True)
                shutil.rmtree(folder)
        except WrongInput as error:
            console.print(f"Warning: {error}", style="yellow", markup=False)
            kept.append(str(folder))
            continue
        removed.append(str(folder))
        freed += found["bytes"]
    return {"removed": removed, "bytes": freed, "kept": kept}
