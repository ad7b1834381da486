"""Tokens: what the tokenizer itself makes, made once, and made again where the cache is damaged."""

import io
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets.utils.tqdm import are_progress_bars_disabled
from rich.console import Console

from stillroom import durable
from stillroom.data import tokens as module
from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows, cache_folder, fingerprint, tokenise
from stillroom.errors import WrongInput
from tiny import WORDS, make_rows, make_task, make_tokenizer

QUIET = Console(quiet=True)


def row(found: TokenisedRows, i: int) -> list[int]:
    return found.ids[found.offsets[i] : found.offsets[i] + found.lengths[i]].tolist()


def types(found: TokenisedRows, i: int) -> list[int]:
    assert found.types is not None
    return found.types[found.offsets[i] : found.offsets[i] + found.lengths[i]].tolist()


def made(rows: Rows, tokenizer: Any = None, *, max_length: int = 32, console: Console = QUIET) -> Any:
    return tokenise(rows, tokenizer or make_tokenizer(), max_length=max_length, console=console)


def rows_of(*texts: str | tuple[str, str]) -> Rows:
    columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
    return Rows("toy", tuple(list(column) for column in columns), np.zeros(len(texts), dtype=np.int64))


def entries() -> list[Path]:
    return sorted(path for path in (cache_folder() / "tokens").iterdir() if path.name != durable.LOCK)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often a split is tokenised."""
    found: list[int] = []
    plain = module._make

    def spy(rows: Rows, *rest: Any) -> Any:
        found.append(len(rows))
        return plain(rows, *rest)

    monkeypatch.setattr(module, "_make", spy)
    return found


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("max_length", [8, 11, 64])
def test_tokens_are_what_the_tokenizer_makes_of_each_row(pair: bool, max_length: int) -> None:
    rows, tokenizer = make_rows(make_task(pair=pair), 30), make_tokenizer()
    found = made(rows, tokenizer, max_length=max_length)
    assert len(found) == 30 and found.pad_id == 0
    truncated = 0
    for i in range(30):
        texts = [column[i] for column in rows.texts]
        want = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        assert row(found, i) == want["input_ids"]
        assert types(found, i) == want["token_type_ids"]
        truncated += len(tokenizer(*texts)["input_ids"]) > max_length
    assert found.truncated == truncated
    assert (truncated > 0) == (max_length < 64)


def test_more_rows_than_are_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(make_task(), 23)
    whole = made(rows)
    monkeypatch.setattr(module, "_CHUNK", 5)
    again = module._make(rows, make_tokenizer(), 32, QUIET)
    assert [list(ids) for ids in again["ids"]] == [row(whole, i) for i in range(23)]


def test_python_holds_no_more_than_the_rows_that_are_tokenised_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Python's numbers in lists the tokens of a set took more memory than its training."""
    monkeypatch.setattr(module, "_CHUNK", 200)
    task, tokenizer, quiet = make_task(), make_tokenizer(), Console(quiet=True)

    def most(count: int) -> int:
        rows = make_rows(task, count)
        tracemalloc.start()
        try:
            module._make(rows, tokenizer, 32, quiet)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(50)
    few, many = most(400), most(1600)
    # A row of ten tokens was 160 bytes of pointers and more. A chunk's table in Arrow is a few objects.
    assert (many - few) / 1200 < 120


def test_no_types_where_the_tokenizer_makes_none() -> None:
    assert made(make_rows(make_task(), 4), make_tokenizer(types=False)).types is None


def test_of_a_pair_the_longer_text_is_cut_first() -> None:
    found = made(rows_of(("good bad", " ".join(["film"] * 20))), max_length=10)
    vocabulary = make_tokenizer().get_vocab()
    good, bad, film = (vocabulary[word] for word in ("good", "bad", "film"))
    assert row(found, 0) == [2, good, bad, 3, film, film, film, film, film, 3]
    assert types(found, 0) == [0] * 4 + [1] * 6


def test_a_second_call_reads_what_the_first_kept(calls: list[int]) -> None:
    rows = make_rows(make_task(), 20)
    first, second = made(rows), made(rows)
    assert calls == [20]
    assert [row(first, i) for i in range(20)] == [row(second, i) for i in range(20)]
    assert second.truncated == first.truncated and (second.types == first.types).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda rows, tokenizer: (rows, tokenizer, 31),
        lambda rows, tokenizer: (rows, make_tokenizer(extra_words=("new",)), 32),
        lambda rows, tokenizer: (rows, make_tokenizer(types=False), 32),
        lambda rows, tokenizer: (rows_of("good film", "ba d"), tokenizer, 32),
        lambda rows, tokenizer: (rows_of("good fil", "mbad"), tokenizer, 32),
        lambda rows, tokenizer: (rows_of("bad", "good film"), tokenizer, 32),
        lambda rows, tokenizer: (rows_of("good film"), tokenizer, 32),
        lambda rows, tokenizer: (rows_of(("good film", "bad")), tokenizer, 32),
    ],
    ids=["max length", "vocabulary", "types", "text", "limits of texts", "order", "fewer", "as a pair"],
)
def test_another_content_has_another_key(calls: list[int], change: Callable[..., Any]) -> None:
    rows, tokenizer = rows_of("good film", "bad"), make_tokenizer()
    made(rows, tokenizer)
    rows, tokenizer, max_length = change(rows, tokenizer)
    made(rows, tokenizer, max_length=max_length)
    assert len(calls) == 2 and len(entries()) == 2


def test_the_side_that_is_cut_is_part_of_the_key() -> None:
    """Or the second tokenizer would be given what the first one made."""
    rows, right, left = rows_of(" ".join(WORDS[:20])), make_tokenizer(), make_tokenizer()
    left.truncation_side = "left"
    found = [made(rows, tokenizer, max_length=8) for tokenizer in (right, left)]
    assert row(found[0], 0) != row(found[1], 0)
    for tokenizer, each in zip((right, left), found, strict=True):
        want = tokenizer(rows.texts[0][0], truncation=True, max_length=8)["input_ids"]
        assert row(each, 0) == want


def test_labels_and_source_are_no_part_of_the_key(calls: list[int]) -> None:
    rows = rows_of("good film", "bad")
    made(rows)
    made(Rows("elsewhere", rows.texts, np.ones(2, dtype=np.int64)))
    assert len(calls) == 1


def test_fingerprint_knows_the_tokenizer_and_not_its_last_call() -> None:
    first, second = make_tokenizer(), make_tokenizer()
    before = fingerprint(first)
    first(["good film", "bad"], padding="max_length", truncation=True, max_length=9)
    backend = first.backend_tokenizer
    state = backend.padding, backend.truncation
    assert None not in state
    assert fingerprint(first) == before == fingerprint(second)
    assert (backend.padding, backend.truncation) == state
    assert fingerprint(make_tokenizer(extra_words=("new",))) != before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(next(folder.glob("*.arrow"))),
        lambda folder: os.truncate(next(folder.glob("*.arrow")), 10),
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "sums.json").unlink(),
    ],
    ids=["a bit", "cut short", "gone", "state", "no sums"],
)
def test_a_damaged_entry_is_made_again_with_a_warning(calls: list[int], damage: Any) -> None:
    rows = make_rows(make_task(), 20)
    first = made(rows)
    want = [row(first, i) for i in range(20)]
    del first
    damage(entries()[0])
    shown = io.StringIO()
    again = made(rows, console=Console(file=shown, width=1000))
    assert [row(again, i) for i in range(20)] == want
    assert len(calls) == 2
    assert "Warning" in shown.getvalue() and str(entries()[0]) in shown.getvalue()
    made(rows)
    assert len(calls) == 2


def test_two_that_need_an_entry_at_once_make_it_once(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one waits and says so: else one takes the folder away that the other reads, or writes."""
    begun = threading.Event()
    plain = module._make

    def slow(rows: Rows, *rest: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        return plain(rows, *rest)

    monkeypatch.setattr(module, "_make", slow)
    rows, shown = make_rows(make_task(), 20), io.StringIO()
    with ThreadPoolExecutor(2) as both:
        first = both.submit(made, rows, make_tokenizer())
        assert begun.wait(10)
        second = both.submit(made, rows, make_tokenizer(), console=Console(file=shown, width=1000))
        found = [each.result() for each in (first, second)]
    assert calls == [20] and len(entries()) == 1
    assert [row(found[0], i) for i in range(20)] == [row(found[1], i) for i in range(20)]
    assert "waiting for it" in shown.getvalue()


def test_what_a_killed_process_left_is_removed_by_the_next_that_makes() -> None:
    made(rows_of("good film"))
    left = entries()[0].parent / ".aside-killed"
    left.mkdir()
    (left / "data.arrow").write_bytes(b"half")
    made(rows_of("bad film"))
    assert not left.exists() and len(entries()) == 2


def test_an_entry_is_read_where_nothing_can_be_written(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(make_task(), 20)
    made(rows)
    monkeypatch.setattr(durable, "locked", None)
    made(rows)
    assert calls == [20]


def test_a_cache_that_cannot_be_written_says_how_to_move_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(WrongInput, match=r"tokens cannot be written .*STILLROOM_CACHE names another place"):
        made(rows_of("good film"))


def test_a_write_that_fails_leaves_nothing_that_looks_whole(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(make_task(), 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(rows)
    assert entries() == []
    assert len(made(rows)) == 20 and len(calls) == 2


def test_empty_and_odd_texts_are_rows_like_others() -> None:
    texts = ("", "good\x00film", "日本語", "a" * 5000)
    found, tokenizer = made(rows_of(*texts)), make_tokenizer()
    assert [row(found, i) for i in range(4)] == [tokenizer(text)["input_ids"] for text in texts]


def test_the_cache_stands_where_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("STILLROOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "stillroom"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "stillroom"


def test_the_bars_of_datasets_are_left_as_they_were() -> None:
    before = are_progress_bars_disabled()
    made(make_rows(make_task(), 4))
    assert are_progress_bars_disabled() == before
