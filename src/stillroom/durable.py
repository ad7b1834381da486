"""Files and folders that are either whole or not there: written aside, synced, renamed, summed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from stillroom.errors import RunFailed, WrongInput

SUMS = "sums.json"
"""Name of the file that holds the SHA-256 of every other file of a sealed folder."""

LOCK = ".lock"
"""Name of the file that the process which writes a folder holds locked."""

_ASIDE = ".aside-"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_NOT_HERE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_full(error: OSError) -> bool:
    """Return whether there was no space left for what was written, or a limit was reached."""
    return error.errno in _FULL


@contextlib.contextmanager
def explain_writing(path: Path) -> Iterator[None]:
    """Say what is wrong where `path` cannot be written, and what to do.

    Raises:
        RunFailed: If there is no space left, or the quota or a limit of the file's size is used up.
        WrongInput: If nothing may be written there, or something is in the way.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has no errno, it puts the number into its text.
        text = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(text[1]) if text else None
        if number in _FULL:
            raise RunFailed(
                f"The disk that holds {path} is full ({os.strerror(number)}). What was there before is "
                "untouched. Free some space and run the same command again, with --resume for a run."
            ) from error
        if number in _NOT_HERE:
            raise WrongInput(
                f"{path} cannot be written ({os.strerror(number)}). Give a place where you may write and "
                "nothing else is in the way."
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: readers see the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: readers see the old file or the new one."""
    with new_file(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream to write; on success its file replaces `path`, else `path` is as it was."""
    with explain_writing(path):
        if path.is_dir():
            raise WrongInput(f"Expected a file to write, found a folder at {path}. Give a file in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_ASIDE, dir=path.parent)
        aside = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.chmod(0o644)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON in one step. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that `write_json` wrote.

    Raises:
        WrongInput: If it cannot be read, or holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WrongInput(f"{path} cannot be read ({error}). Make it again, or remove it.") from None
    if not isinstance(found, dict):
        raise WrongInput(f"Expected a JSON object in {path}, found {type(found).__name__}.")
    return found


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it is summed, synced and renamed to `target`.

    A folder that stood at `target` is replaced. If the block raises, or the process dies, `target`
    is as it was before; only in the moment between the two renames of a replacement is it not there.
    """
    with explain_writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=target.parent))
        try:
            yield aside
            aside.chmod(0o755)
            _seal(aside)
            if target.exists():
                # A rename cannot replace a folder that is not empty: move the old one out first.
                old = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=target.parent))
                target.rename(old / target.name)
                try:
                    aside.rename(target)
                except BaseException:
                    (old / target.name).rename(target)
                    raise
                finally:
                    shutil.rmtree(old, ignore_errors=True)
            else:
                aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _sync_folder(target.parent)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that `new_folder` wrote, or None if it is sound.

    Files that it did not write there, such as a desktop's `.DS_Store`, are no damage.
    """
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        if not sums:
            return f"{SUMS} lists no file"
        for name, expected in sums.items():
            found = sha256_of_file(folder / name)
            if found != expected:
                return f"{name} has SHA-256 {found[:12]}..., {SUMS} says {expected[:12]}..."
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there: whose disk it will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing aside in `folder`."""
    for leftover in folder.glob(f"{_ASIDE}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(
    folder: Path, *, wait: bool = False, say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Hold the folder for this process, or raise `WrongInput` if another one writes it.

    The lock is the operating system's, so it ends with the process however that ends.

    Args:
        folder: Made if it is not there.
        wait: Wait for the other process instead of raising.
        say: Is told when there is one to wait for.
    """
    with explain_writing(folder):
        if folder.exists() and not folder.is_dir():
            raise WrongInput(f"Expected an output folder, found a file at {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise WrongInput(
                    f"Another process is writing {folder}. Wait for it, or give another folder."
                ) from None
            if say is not None:
                say(f"Another process is writing {folder}; waiting for it.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_empty(folder: Path, remedy: str, *, besides: Iterable[str] = ()) -> None:
    """Raise `WrongInput` if `folder` holds anything but Stillroom's lock file.

    Args:
        folder: It need not exist.
        remedy: Ends the message.
        besides: Names of entries that may be there, such as the teacher of a run.
    """
    allowed = {LOCK, *besides}
    if folder.is_dir() and all(entry.name in allowed for entry in folder.iterdir()):
        return
    if folder.exists():
        raise WrongInput(f"Expected an output folder that is new or empty, found {folder}. {remedy}")


def _seal(folder: Path) -> None:
    """Write the sums of all files in `folder`, then sync every file and the folder itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): sha256_of_file(path) for path in files}
    seal = folder / SUMS
    seal.write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for path in [*files, seal]:
        # safetensors writes for the owner alone; a student is for others to serve.
        path.chmod(0o644)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
