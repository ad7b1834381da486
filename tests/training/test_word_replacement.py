"""Augmented rows ahead of training: what is replaced, by what, and that the same key draws the same."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from stillroom.data.batching import Inputs
from stillroom.data.words import Vectors, Word
from stillroom.generator import Generator
from stillroom.training.word_replacement import Candidates, Sources, candidates_of, draw, whole_words
from tiny import FAMILIES, make_generator

TEXTS = [
    "A great film, and the actor was good today!",
    "scene",
    "",
    "Never unheardof: music music",
]


def naive(text: str, word: str, at: int, generator: Generator, count: int) -> list[str]:
    """Score one masked copy alone, by the model itself: [CLS] masked [SEP] text [SEP]."""
    tokenizer = generator.tokenizer
    inputs = tokenizer(text, text, return_tensors="pt")
    inputs["input_ids"][0, at] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = generator.model(**inputs).logits[0, at].double()
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    order = sorted(range(len(vocabulary)), key=lambda i: -logits[i].item())
    return [vocabulary[i] for i in order if vocabulary[i].isalpha()][:count]


def test_candidates_are_the_most_probable_words_at_the_mask() -> None:
    generator = make_generator("bert")
    found = candidates_of(TEXTS, Sources(generator), count=5)
    assert [[one.word.form for one in row] for row in found] == [
        ["great", "film", "actor", "good", "today"],
        ["scene"],
        [],
        ["Never", "music", "music"],
    ]
    # [CLS] a great film , and the actor: the tokenizer splits off punctuation.
    for row, number, at in ((0, 0, 2), (0, 2, 7), (1, 0, 1), (3, 2, 5)):
        one = found[row][number]
        assert one.source == "generator"
        assert one.forms == naive(TEXTS[row], one.word.form, at, generator, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_proposes(family: str) -> None:
    found = candidates_of(TEXTS[:2], Sources(make_generator(family)), count=3)
    assert [len(one.forms) for row in found for one in row] == [3] * 6


def test_what_stands_in_a_batch_changes_nothing() -> None:
    sources = Sources(make_generator("bert"))
    together = candidates_of(TEXTS, sources, count=4)
    assert together == [candidates_of([text], sources, count=4)[0] for text in TEXTS]


def test_other_words_come_from_vectors_then_synonyms() -> None:
    vectors = Vectors(["unheardof", "unseen"], np.array([[1.0, 0.0], [1.0, 0.1]]))
    text = ["unheardof film unwritten"]
    found = candidates_of(
        text, Sources(make_generator("bert"), vectors, {"unwritten": ["oral", "spoken"]}), count=1
    )
    assert [(one.forms, one.source) for one in found[0][::2]] == [
        (["unseen"], "vectors"),
        (["oral"], "synonyms"),
    ]
    assert found[0][1].source == "generator"
    only = candidates_of(text, Sources(synonyms={"film": ["movie"]}), count=3)
    assert [(one.word.form, one.forms) for one in only[0]] == [("film", ["movie"])]


def test_long_texts_are_cut_and_their_end_is_left_alone() -> None:
    generator = make_generator("bert")
    (found,) = candidates_of([" ".join(["film"] * 200)], Sources(generator), count=2)
    # 64 positions: three special tokens and two copies of 30 or 31 words.
    assert 30 <= len(found) <= 31
    assert all(one.word.start == 5 * i for i, one in enumerate(found))


class _Tokenizer:
    """A vocabulary without a model."""

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        self.all_special_tokens = ["[MASK]", "<s>"]

    def __len__(self) -> int:
        return len(self._tokens)

    def convert_ids_to_tokens(self, ids: range) -> list[str]:
        return [self._tokens[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return self._tokens[ids[0]].replace("Ġ", " ").replace("▁", " ")


@pytest.mark.parametrize(
    "tokens",
    [
        ["[MASK]", "good", "##ly", "7", ","],
        ["<s>", "Ġgood", "ly", "Ġ7", "Ġ,"],
        ["<s>", "▁good", "ly", "▁", "▁7"],
    ],
)
def test_pieces_that_continue_a_word_are_no_candidates(tokens: list[str]) -> None:
    names, allowed = whole_words(_Tokenizer(tokens))
    assert [name for name, whole in zip(names, allowed.tolist(), strict=True) if whole] == ["good"]


def _words(text: str, forms: list[str]) -> list[Candidates]:
    found, end = [], 0
    for form in text.split():
        start = text.index(form, end)
        end = start + len(form)
        found.append(Candidates(Word(start, end, form), forms, "generator"))
    return found


def test_the_rest_of_the_text_stays_and_nothing_comes_twice() -> None:
    text = "Good  film , GOOD end."
    candidates = [one for one in _words(text, ["one", "two"]) if one.word.form in ("Good", "GOOD")]
    found = draw(text, candidates, copies=200, probability=0.5, key="k")
    expected = {f"{a}  film , {b} end." for a in ("Good", "One", "Two") for b in ("GOOD", "ONE", "TWO")}
    assert len(found) == len(set(found)) and set(found) == expected - {text}


def test_the_key_decides() -> None:
    text = " ".join("abcdefgh")
    candidates = _words(text, ["x", "y", "z"])
    one, again, other = (draw(text, candidates, copies=9, probability=0.4, key=k) for k in "iij")
    assert one == again != other


def test_words_are_replaced_with_the_probability_that_is_asked_for() -> None:
    text = " ".join(["w"] * 20_000)
    (found,) = draw(text, _words(text, ["x", "y"]), copies=1, probability=0.4, key="0")
    counts = Counter(found.split())
    # Four standard deviations of a binomial each.
    assert abs(counts["w"] - 12_000) < 4 * math.sqrt(20_000 * 0.24)
    assert abs(counts["x"] - 4_000) < 4 * math.sqrt(20_000 * 0.16)


def test_no_candidates_no_copies() -> None:
    assert draw("the", [], copies=5, probability=1.0, key="0") == []


def test_a_generator_with_a_wider_head_than_vocabulary() -> None:
    """Heads are padded to multiples of 8 or 64: ids without a word would be candidates."""
    generator = make_generator("bert")

    class Wide(torch.nn.Module):
        def guess(self, inputs: Inputs, positions: torch.Tensor) -> torch.Tensor:
            logits = generator.guess(inputs, positions)
            return torch.cat([logits, torch.full((len(logits), 8), 1e9)], 1)

    wide = Wide()
    wide.positions, wide.tokenizer = generator.positions, generator.tokenizer  # type: ignore[assignment]
    wide.weight = torch.nn.Parameter(torch.zeros(1))
    assert candidates_of(TEXTS, Sources(wide), count=3) == candidates_of(TEXTS, Sources(generator), count=3)  # type: ignore[arg-type]
