"""Words that may be replaced, and their neighbours by vectors and in a thesaurus."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.data.words import STOP_WORDS, Vectors, read_synonyms, words_of
from stillroom.errors import WrongInput


def test_stop_words_numbers_and_what_is_glued_to_digits_are_left_alone() -> None:
    text = "Don't  watch the 2nd film_noir, it's 42 TIMES worse than été!"
    words = words_of(text)
    assert [word.form for word in words] == ["watch", "TIMES", "worse", "été"]
    assert all(text[word.start : word.end] == word.form for word in words)
    assert not words_of(" ".join(sorted(STOP_WORDS)))


def _vectors(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_nearest_are_those_of_a_loop_over_cosines(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    words = [f"w{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}" for i in range(100)]
    rows = chance.standard_normal((100, 5))
    lines = "\n".join(
        " ".join([w, *(repr(float(x)) for x in row)]) for w, row in zip(words, rows, strict=True)
    )
    found = Vectors.read(_vectors(tmp_path / "v.txt", lines)).nearest([*words[:3], "other"], 7)
    assert set(found) == set(words[:3])
    for i in range(3):
        cosine = {
            word: float(rows[i] @ row) / float(np.linalg.norm(rows[i]) * np.linalg.norm(row))
            for word, row in zip(words, rows, strict=True)
            if word != words[i]
        }
        assert found[words[i]] == sorted(cosine, key=lambda word: -cosine[word])[:7]


def test_vectors_start_with_the_most_frequent_and_are_words(tmp_path: Path) -> None:
    path = _vectors(tmp_path / "v.txt", "3 2\n, 1 0\ngood 1 0\ngreat 1 0.1\nlate 1 0\n")
    assert Vectors.read(path, most=4).words == ["good", "great"]
    assert Vectors.read(path).nearest(["GOOD"], 9) == {"GOOD": ["late", "great"]}


@pytest.mark.parametrize("text", ["good 1 0\nbad 1\n", "good 1 x\n", "good 1 nan\n", "", "12 1\n"])
def test_a_file_that_holds_no_vectors_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(WrongInput, match="v.txt"):
        Vectors.read(_vectors(tmp_path / "v.txt", text))


def test_synonyms_of_all_meanings_single_words_only(tmp_path: Path) -> None:
    table = {
        "lemma": ["Good", "good", "odd"],
        "synonyms": [["well", "good"], ["in effect", "fine"], ["a1"]],
    }
    pq.write_table(pa.table(table), tmp_path / "s.parquet")
    assert read_synonyms(tmp_path / "s.parquet") == {"good": ["fine", "well"]}
    pq.write_table(pa.table({"lemma": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(WrongInput, match="synonyms"):
        read_synonyms(tmp_path / "t.parquet")
    pq.write_table(pa.table({"lemma": ["a"], "synonyms": ["b"]}), tmp_path / "u.parquet")
    with pytest.raises(WrongInput, match="row 1"):
        read_synonyms(tmp_path / "u.parquet")
