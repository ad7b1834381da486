"""Which teacher a run learns from: the model itself, or a recording of it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Needs
from stillroom.recipe import TeacherSettings
from stillroom.teacher import Teacher
from stillroom.teacher.cache import Cache, Origin
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.recorded import columns_of, record


def choose(
    settings: TeacherSettings,
    live: LiveTeacher,
    tokens: TokenisedRows,
    stages: Sequence[Needs],
    *,
    max_length: int,
    repeated: bool,
    console: Console,
) -> Teacher:
    """Return the teacher that the settings ask for, recorded first where it is to be.

    What `auto` does depends on what was asked for, not on what happens to be recorded: a run that goes
    on after a kill learns from the teacher it started with.

    Args:
        settings: The recipe's.
        live: The teacher.
        tokens: The training rows as the teacher tokenises them.
        stages: What the terms of each stage read of it.
        max_length: The recipe's.
        repeated: Whether rows are read more than once, by several epochs or by several runs.
        console: Where progress goes.

    Raises:
        WrongInput: If the folder that is named holds the cache of another teacher.
        RunFailed: If the disk is full.
    """
    cache = cache_of(settings, live, stages, max_length=max_length, repeated=repeated)
    if cache is None:
        return live
    return record(live, cache, tokens, stages, max_bytes=settings.max_bytes, console=console)


def cache_of(
    settings: TeacherSettings,
    live: LiveTeacher,
    stages: Sequence[Needs],
    *,
    max_length: int,
    repeated: bool,
) -> Cache | None:
    """Return the cache that the settings ask for, not opened yet, or None where all is computed live."""
    if (
        not any(map(columns_of, stages))
        or settings.cache == "off"
        or (settings.cache == "auto" and not repeated)
    ):
        return None
    origin = Origin.of(live.encoder, max_length=max_length, bf16=live.bf16)
    folder = origin.folder if settings.cache == "auto" else Path(settings.cache).expanduser()
    return Cache(folder, origin, name=settings.name)
