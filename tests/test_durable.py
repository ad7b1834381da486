"""Files and folders that are whole or not there, whatever happens while they are written."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stillroom import durable
from stillroom.errors import RunFailed, WrongInput
from tiny import make_encoder


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Files


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "file.json", {"größe": [1, None, 0.5]})
    assert durable.read_json(tmp_path / "file.json") == {"größe": [1, None, 0.5]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"file\.json cannot be read .* Make it again"),
        (b"", r"file\.json cannot be read"),
        (b'{"a": 1', r"file\.json cannot be read"),
        (b"\xff\xfe", r"file\.json cannot be read"),
        (b"[1]", r"a JSON object in .*file\.json, found list"),
    ],
)
def test_json_that_is_missing_damaged_or_no_object_is_refused_by_name(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(WrongInput, match=message):
        durable.read_json(tmp_path / "file.json")


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    durable.write_text(path, "first")
    durable.write_text(path, "zweite Fassung: größer\n")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: größer\n"
    assert names(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_readers_see_the_old_file_until_the_new_one_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "old")
    seen: list[str] = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(path.read_text()) or plain(handle))
    durable.write_text(path, "new")
    # The file's bytes first, then the folder that names it.
    assert seen == ["old", "new"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, raising(error))
        with pytest.raises(type(error)):
            durable.write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {"a": [1, 2.5, None], "b": "ü"}
    durable.write_json(path, value)
    assert json.loads(path.read_text()) == value and path.read_text().endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_json_are_refused(tmp_path: Path, value: float) -> None:
    """`NaN` is no JSON: most readers of metrics.json would fail at it."""
    path = tmp_path / "file.json"
    durable.write_json(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.write_json(path, {"loss": value})
    assert path.read_text() == "1\n"


# Folders


def fill(folder: Path, **files: str) -> None:
    with durable.new_folder(folder) as aside:
        for name, text in files.items():
            (aside / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "sums.json"}


def test_a_folder_is_summed_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    fill(target, a="1", b="2")
    with durable.new_folder(target) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "c").write_text("3")
        assert content(target) == {"a": "1", "b": "2"}
    assert names(target) == ["inner", "sums.json"]
    sums = json.loads((target / "sums.json").read_text())
    assert sums == {"inner/c": hashlib.sha256(b"3").hexdigest()}
    assert durable.damage(target) is None
    assert names(target.parent) == ["target"]


def test_a_folder_can_be_read_by_others(tmp_path: Path) -> None:
    """Safetensors writes files that only their owner can read, and so does mkdtemp with folders."""
    make_encoder().save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o644}


def test_every_file_is_synced_before_the_folder_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that outlives a power cut must not name files that did not."""
    events: list[Any] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino) or sync(fd))
    monkeypatch.setattr(os, "rename", lambda *args: events.append("rename") or rename(*args))
    fill(tmp_path / "target", a="1", b="2")
    inodes = {path.stat().st_ino for path in (tmp_path / "target").iterdir()}
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert len(inodes) == 3 and inodes <= set(before)
    assert (tmp_path / "target").stat().st_ino in before
    assert tmp_path.stat().st_ino in after


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("there", [True, False])
def test_a_block_that_raises_leaves_the_old_folder(
    tmp_path: Path, there: bool, error: BaseException
) -> None:
    target = tmp_path / "target"
    if there:
        fill(target, a="1")
    with pytest.raises(type(error)), durable.new_folder(target) as aside:
        (aside / "a").write_text("2")
        raise error
    assert names(tmp_path) == (["target"] if there else [])
    assert not there or (content(target) == {"a": "1"} and durable.damage(target) is None)


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    target = tmp_path / "target"
    fill(target, a="1")
    plain, calls = os.rename, []

    def rename(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        plain(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        fill(target, a="2")
    assert content(target) == {"a": "1"} and durable.damage(target) is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "a").write_text("2"), "a has SHA-256"),
        (lambda f: (f / "a").write_text(""), "a has SHA-256"),
        (lambda f: (f / "a").unlink(), "FileNotFoundError"),
        (lambda f: (f / "sums.json").unlink(), "FileNotFoundError"),
        (lambda f: (f / "sums.json").write_text('{"a": "1'), "JSONDecodeError"),
        (lambda f: (f / "sums.json").write_text("3"), "AttributeError"),
        (lambda f: (f / "sums.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
        (lambda f: (f / "sums.json").write_text("{}"), "sums.json lists no file"),
        (lambda f: (f / "sums.json").write_text('{"a": 1, "b": 2}'), "TypeError"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, spoil: Any, reason: str) -> None:
    folder = tmp_path / "f"
    fill(folder, a="1", b="2")
    assert durable.damage(folder) is None
    spoil(folder)
    assert reason in str(durable.damage(folder))


def test_files_that_others_put_into_a_folder_are_no_damage(tmp_path: Path) -> None:
    """A desktop that showed a checkpoint, or a network disk, made the run go back to an older one."""
    folder = tmp_path / "f"
    fill(folder, a="1", b="2")
    for name in (".DS_Store", "Thumbs.db", ".nfs000000000123", "@eaDir/a", "sums.json~"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0")
    assert durable.damage(folder) is None
    (folder / "b").unlink()
    assert "FileNotFoundError" in str(durable.damage(folder))


def test_a_folder_that_is_not_there_is_damaged(tmp_path: Path) -> None:
    assert durable.damage(tmp_path / "nowhere") is not None


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", a="1")
    durable.write_text(tmp_path / "file", "1")
    with monkeypatch.context() as patch:
        # What a kill leaves: neither cleaning nor renaming is reached.
        patch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(os, "fsync", raising(KeyboardInterrupt()))
        for write in (
            lambda: fill(tmp_path / "folder", a="2"),
            lambda: durable.write_text(tmp_path / "file", "2"),
        ):
            with pytest.raises(KeyboardInterrupt):
                write()
    assert len(names(tmp_path)) == 4
    durable.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["file", "folder"]
    assert content(tmp_path / "folder") == {"a": "1"} and (tmp_path / "file").read_text() == "1"
    durable.remove_leftovers(tmp_path / "nowhere")


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(RunFailed, match=r"disk that holds .*place is full \(.*--resume"):
        with durable.explain_writing(tmp_path / "place"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
        SafetensorError("invalid header"),
        ValueError("os error 28"),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, durable.explain_writing(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
    ],
)
def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WrongInput, match=r"place cannot be written \(.*Give a place where you may write"):
        with durable.explain_writing(tmp_path / "place"):
            raise error


def test_what_is_in_the_way_is_left_as_it_is(tmp_path: Path) -> None:
    """A file above the place, a folder where a file is to be, a name that is too long."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "new", tmp_path / ("n" * 300) / "new"):
        for write in (lambda place=place: durable.write_text(place, "2"), lambda place=place: fill(place)):
            with pytest.raises(WrongInput, match="cannot be written"):
                write()
    with pytest.raises(WrongInput, match="Expected a file to write, found a folder at .*folder"):
        durable.write_text(tmp_path / "folder", "2")
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_known_by_what_python_really_raises(tmp_path: Path) -> None:
    with pytest.raises(RunFailed), durable.explain_writing(tmp_path):
        with open("/dev/full", "w") as stream:
            stream.write("text")


def test_an_error_of_safetensors_still_tells_its_number(tmp_path: Path) -> None:
    """The number in its text is all there is to go by: it must not leave a later version."""
    with pytest.raises(SafetensorError, match=r"os error \d+"):
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "folder" / "x.safetensors")


# Output folders


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with durable.locked(folder):
        with pytest.raises(WrongInput, match="Another process is writing .*run"):
            with durable.locked(folder):
                pytest.fail("two at once")
        with durable.locked(tmp_path / "other"):
            pass
    with pytest.raises(ValueError, match="failed"), durable.locked(folder):
        raise ValueError("failed")
    with durable.locked(folder):
        assert durable.require_empty(folder, "") is None


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(WrongInput, match="found a file at"), durable.locked(tmp_path / "file"):
        pytest.fail("locked a file")
    with pytest.raises(WrongInput, match="new or empty"):
        durable.require_empty(tmp_path / "file", "")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_folder_must_be_new_or_empty(tmp_path: Path) -> None:
    durable.require_empty(tmp_path / "new", "")
    folder = tmp_path / "run"
    folder.mkdir()
    durable.require_empty(folder, "")
    (folder / "teacher").mkdir()
    with pytest.raises(WrongInput, match="new or empty, found .*run. Take another."):
        durable.require_empty(folder, "Take another.")
    durable.require_empty(folder, "", besides=["teacher"])
    (folder / "notes.txt").write_text("")
    with pytest.raises(WrongInput):
        durable.require_empty(folder, "", besides=["teacher"])
