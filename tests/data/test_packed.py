"""Packed text: every token once and in order, whatever the files; and files that are not as expected."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from stillroom import durable
from stillroom.data import packed
from stillroom.data.batching import EvenBatches, epoch_batches, pad
from stillroom.data.packed import pack, pieces
from stillroom.errors import WrongInput
from stillroom.recipe import TextSettings
from tiny import WORDS, make_tokenizer

QUIET = Console(quiet=True)
TOKENIZER = make_tokenizer()
CLS, SEP = 2, 3


def documents(count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, size=chance.integers(1, 30))) for _ in range(count)]


def ids_of(texts: list[str]) -> list[int]:
    """Return what the stream of documents should be: a separator after each."""
    return [i for text in texts for i in [*TOKENIZER(text, add_special_tokens=False)["input_ids"], SEP]]


def settings(*files: Path, **more: Any) -> TextSettings:
    return TextSettings(**{"files": files, "sequence_length": 10, "held_out": 5, **more})


def sequences(found: packed.Packed) -> np.ndarray:
    """Return all sequences in the order of the text."""
    rows = [
        (tokens.offsets[row], pad(tokens, np.array([row])).input_ids[0].numpy())
        for tokens in (found.train, found.held_out)
        for row in range(len(tokens))
    ]
    starts = [int(start) for start, _ in rows]
    assert len(set(starts)) == len(starts), "a sequence is both trained on and held out"
    return np.stack([ids for _, ids in sorted(rows, key=lambda row: row[0])])


def write(folder: Path, form: str, texts: list[str]) -> Path:
    path = folder / f"text.{form}"
    if form == "txt":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    elif form == "tsv":
        path.write_text("\n".join(["text", *texts]), encoding="utf-8")
    else:
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("form", ["txt", "jsonl", "tsv", "parquet"])
def test_every_token_comes_once_and_in_order(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packed, "_ROWS", 8)
    texts = documents(60)
    found = pack(settings(write(tmp_path, form, texts)), TOKENIZER, QUIET)
    rows, want = sequences(found), ids_of(texts)
    assert found.documents == 60 and found.tokens == len(want)
    assert (rows[:, 0] == CLS).all() and (rows[:, -1] == SEP).all()
    assert len(rows) == len(want) // 8
    assert rows[:, 1:-1].reshape(-1).tolist() == want[: 8 * len(rows)]
    assert len(found.held_out) == 5 and found.train.lengths.tolist() == [10] * (len(rows) - 5)
    # A second time it is found, not made.
    monkeypatch.setattr(packed, "_make", None)
    assert np.array_equal(sequences(pack(settings(tmp_path), TOKENIZER, QUIET)), rows)


def test_many_files_are_one_text(tmp_path: Path) -> None:
    for name, part in (("b", documents(30, 1)), ("a", documents(30, 2))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "txt", part)
    found = pack(settings(tmp_path / "b", tmp_path / "a" / "text.txt"), TOKENIZER, QUIET)
    want = ids_of([*documents(30, 1), *documents(30, 2)])
    assert sequences(found)[:, 1:-1].reshape(-1).tolist() == want[: len(want) // 8 * 8]


def test_an_empty_line_ends_a_document_and_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n\r\none\r\ntwo \r\n  \r\n\r\nthree")
    assert [piece for piece, _ in pieces(path, None)] == [
        ("one", False),
        ("two ", False),
        ("", True),
        ("three", False),
        ("", True),
    ]


@pytest.mark.parametrize("space", [True, False])
def test_a_line_of_any_length_is_read_in_pieces(tmp_path: Path, monkeypatch: Any, space: bool) -> None:
    """A stand-in for a line of 1 GB: 64 times the piece, with a character of two bytes on each border."""
    monkeypatch.setattr(packed, "PIECE", 1 << 12)
    text = ("wörd " if space else "ö" * 5) * (64 * (1 << 12) // 5)
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    found, last = [], False
    for (part, ended), share in pieces(path, None):
        last = ended
        assert len(part) <= 1 << 12 and 0 <= share <= 1
        found.append(part)
        if space and part:
            assert part.startswith((" ", "w")) and part.rstrip().endswith("wörd")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "".join(found).rstrip() == text.rstrip() and last
    assert peak - len(text.encode()) < 40 * (1 << 12), "the line was in memory twice"


def test_a_cell_of_any_length_is_tokenised_in_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packed, "PIECE", 64)
    texts = [" ".join(documents(40)), *documents(5)]
    found = pack(settings(write(tmp_path, "parquet", texts)), TOKENIZER, QUIET)
    want = ids_of(texts)
    assert found.documents == 6
    assert sequences(found)[:, 1:-1].reshape(-1).tolist() == want[: len(want) // 8 * 8]


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packed, "PIECE", 1 << 14)
    monkeypatch.setattr(packed, "_ROWS", 256)
    peaks = []
    for times in (1, 8):
        folder = tmp_path / str(times)
        folder.mkdir()
        path = write(folder, "jsonl", documents(1000) * times)
        tracemalloc.start()
        found = pack(settings(path), TOKENIZER, QUIET)
        pad(found.train, np.arange(8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(found.train) > 8 * 1500
    assert peaks[1] < 1.5 * peaks[0] + 1e5


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.txt", b"", "t.txt is empty"),
        ("t.txt", b" \n\n \n", "at least 4 sequences of 10 tokens, found 0 tokens in 0 documents"),
        ("t.txt", b"a film\n", "at least 4 sequences .*lower text.sequence_length"),
        ("t.txt", b"a film was \n" * 40 + b"caf\xe9\n", "at byte 483: expected UTF-8 text, found .*0xe9"),
        ("t.txt", "a film".encode("utf-16"), "at byte 0: expected UTF-8 text, found the byte 0xff"),
        ("t.parquet", b"PAR1 and then nothing", "truncated or damaged"),
        ("t.jsonl", b'{"text": "a film"}\n{"text": ', "row 2 .line 2.: expected JSON"),
        ("t.jsonl", b'{"text": null}\n', "row 1 .*expected text in 'text', found nothing"),
        ("t.jsonl", b'{"words": "a film"}\n', "no text column of a usual name.*text.column words"),
        ("t.csv", b'text\n"a film\n', "quotes"),
        ("t.pdf", b"%PDF", "Cannot tell the format of .*t.pdf: expected .txt"),
    ],
)
def test_files_that_are_not_as_expected_are_refused_by_name(
    name: str, content: bytes, match: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongInput, match=match):
        pack(settings(tmp_path / name), TOKENIZER, QUIET)
    left = {path.name for path in (tmp_path / "cache").glob("packed/*")}
    assert left <= {durable.LOCK}, "half a text was kept"


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="found nothing at .*gone.txt"):
        pack(settings(tmp_path / "gone.txt"), TOKENIZER, QUIET)
    with pytest.raises(WrongInput, match="holds no text: expected files that end in .txt"):
        pack(settings(tmp_path), TOKENIZER, QUIET)
    path = write(tmp_path, "txt", documents(9))
    with pytest.raises(WrongInput, match="given twice"):
        pack(settings(path, tmp_path), TOKENIZER, QUIET)
    with pytest.raises(WrongInput, match="no column 'words'"):
        pack(settings(write(tmp_path, "jsonl", documents(9)), column="words"), TOKENIZER, QUIET)


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    given = settings(write(tmp_path, "txt", documents(60)))
    want = sequences(pack(given, TOKENIZER, QUIET))
    entry = next((tmp_path / "cache" / "packed").glob("*/ids.arrow"))
    with entry.open("r+b") as stream:
        stream.truncate(300)
    assert np.array_equal(sequences(pack(given, TOKENIZER, QUIET)), want)


def test_another_text_length_or_tokenizer_is_another_entry(tmp_path: Path) -> None:
    path = write(tmp_path, "txt", documents(60))
    other = make_tokenizer(extra_words=("unheard",))
    keys = {
        pack(settings(path, sequence_length=n), t, QUIET).key for n in (10, 12) for t in (TOKENIZER, other)
    }
    write(tmp_path, "txt", documents(61))
    assert len({*keys, pack(settings(path), TOKENIZER, QUIET).key}) == 5


def test_another_column_or_format_of_the_same_bytes_is_another_entry(tmp_path: Path) -> None:
    texts = list(zip(documents(60, 1), documents(60, 2), strict=True))
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in texts))
    for number, column in enumerate(("a", "b")):
        want = ids_of([pair[number] for pair in texts])
        found = sequences(pack(settings(path, column=column), TOKENIZER, QUIET))
        assert found[:, 1:-1].reshape(-1).tolist() == want[: len(want) // 8 * 8]
    plain = tmp_path / "t.txt"
    plain.write_bytes(path.read_bytes())
    found, other = (pack(settings(p, column="a"), TOKENIZER, QUIET) for p in (path, plain))
    assert found.tokens != other.tokens


def test_so_much_text_is_enough_and_a_word_less_is_not(tmp_path: Path) -> None:
    """Four sequences of eight words: 31 and a separator."""
    words = ["film"] * 31
    found = pack(settings(write(tmp_path, "txt", [" ".join(words)])), TOKENIZER, QUIET)
    assert (len(found.train), len(found.held_out)) == (3, 1)
    with pytest.raises(WrongInput, match="at least 4 sequences of 10 tokens, found 31 tokens"):
        pack(settings(write(tmp_path, "txt", [" ".join(words[1:])])), TOKENIZER, QUIET)


def test_at_most_a_tenth_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path, "txt", documents(60))
    few, many = (pack(settings(path, held_out=n), TOKENIZER, QUIET) for n in (2, 10_000))
    rows = len(many.train) + len(many.held_out)
    assert rows == len(few.train) + len(few.held_out) > 60
    assert len(few.held_out) == 2 and rows / 10 - 1 < len(many.held_out) <= rows / 10 + 1


# The order of sequences


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 1000])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_even_batches_hold_every_row_once(rows: int, size: int) -> None:
    found = EvenBatches(rows, size, np.random.default_rng(0))
    assert sorted(np.concatenate(list(found)).tolist()) == list(range(rows))
    counts = [len(batch) for batch in found]
    assert max(counts) <= size and max(counts) - min(counts) <= 1
    assert [b.tolist() for b in found[1:]] == [b.tolist() for b in found][1:]


def test_even_batches_are_shuffled_anew_each_epoch_and_cost_no_memory() -> None:
    lengths = np.broadcast_to(np.int64(128), (10**9,))
    tracemalloc.start()
    options = {"batch_size": 64, "max_tokens": 10**6}
    first, again, later = (
        epoch_batches(lengths, seed=seed, epoch=epoch, **options)
        for seed, epoch in ((0, 0), (0, 0), (0, 1))
    )
    assert len(first) == 10**9 // 64
    place = 12_345_678
    assert first[place].tolist() == again[place].tolist() != later[place].tolist()
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    # Rows of a batch are spread over the text as uniform draws are.
    drawn = np.concatenate([first[i] for i in range(200)]) / 10**9
    assert abs(drawn.mean() - 0.5) < 0.02 and np.histogram(drawn, 10, (0, 1))[0].min() > 1000
    assert len(epoch_batches(lengths, seed=0, epoch=0, batch_size=64, max_tokens=300)[0]) == 2
