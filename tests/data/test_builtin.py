"""The synthetic set is the same everywhere, clean, balanced, and beyond a bag of words."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from stillroom.data import builtin
from stillroom.data.tasks import Rows
from stillroom.errors import WrongInput


@pytest.fixture(scope="module", params=builtin.NAMES)
def splits(request: pytest.FixtureRequest) -> dict[str, Rows]:
    return {split: builtin.load(request.param, split) for split in builtin.SIZES}


def words(rows: Rows) -> set[str]:
    return {word for text in rows.texts[0] for word in re.findall(r"[\w-]+", text.lower())}


def test_splits_have_the_promised_size_and_balance(splits: dict[str, Rows]) -> None:
    for split, rows in splits.items():
        count = builtin.SIZES[split]
        assert Counter(rows.labels.tolist()) == {0: count // 2, 1: count // 2}
        assert "synthetic" in rows.source


def test_no_sentence_occurs_twice(splits: dict[str, Rows]) -> None:
    """A validation row that is also a training row would be scored from memory."""
    sentences = [text for rows in splits.values() for text in rows.texts[0]]
    assert len(set(sentences)) == sum(builtin.SIZES.values())


def test_sentences_are_whole(splits: dict[str, Rows]) -> None:
    """An unfilled slot, a missing capital or a doubled space is a template gone wrong."""
    for rows in splits.values():
        for text in rows.texts[0]:
            assert re.fullmatch(r"[A-Z][a-zI ,-]*[.?]", text), text
            assert "  " not in text and " ," not in text
            assert 3 <= len(text.split()) <= 30


def test_validation_has_words_that_train_lacks(splits: dict[str, Rows]) -> None:
    new = words(splits["validation"]) - words(splits["train"])
    assert {"touching", "melodious", "unreliable", "burnt"} <= new
    touched = [
        text for text in splits["validation"].texts[0] if new & set(re.findall(r"[\w-]+", text.lower()))
    ]
    assert 0.2 < len(touched) / builtin.SIZES["validation"] < 0.8


def test_labels_are_what_a_reader_would_say(splits: dict[str, Rows]) -> None:
    """Sentences of a known form, judged here by hand: one form for each way of turning a verdict."""
    good = "delicious|tasty|gripping|witty|comfortable|reliable|thorough|useful|excellent|wonderful"
    bad = "bland|greasy|dull|tedious|filthy|buggy|sloppy|pointless|awful|terrible|dreadful"
    forms = {
        rf"The \w+ was ({bad})\.": 0,
        rf"The \w+ was not ({bad})\.": 1,
        rf"The \w+ was far from ({good})\.": 0,
        rf"Although the \w+ was [a-z ]+, the \w+ was ({good})\.": 1,
        rf".* said that the \w+ was ({good}), but I disagree\.": 0,
        rf".* did not find the \w+ ({bad}), and neither did I\.": 1,
        rf"I expected the \w+ to be ({good}), and I was wrong\.": 0,
        rf"Without [\w ]+, the \w+ might have been ({good})\.": 0,
        rf"I doubt that anyone found the \w+ ({bad})\.": 1,
        rf".*[Nn]obody who [a-z ]+ found it ({bad})\W.*": 1,
        rf"The \w+ was ({bad}), and the \w+ was the exact opposite\.": 1,
        rf"Next to the \w+, even the \w+ seemed ({good})\.": 0,
        r"Even the [\w ]+, which was [\w ]+, was better than the [\w ]+\.": 0,
        r"I feared that [\w -]+, but it was not\.": 1,
        r"I hoped that [\w -]+, but it was not\.": 0,
    }
    seen: set[str] = set()
    for rows in splits.values():
        for text, label in zip(rows.texts[0], rows.labels.tolist(), strict=True):
            for form, expected in forms.items():
                if re.fullmatch(form, text):
                    seen.add(form)
                    assert label == expected, text
    assert seen == set(forms)


def test_a_bag_of_words_is_not_enough(splits: dict[str, Rows]) -> None:
    """Otherwise a model could score well without reading, and distillation would have no work."""
    bag = make_pipeline(CountVectorizer(token_pattern=r"[\w-]+"), LogisticRegression(max_iter=1000))
    train, validation = splits["train"], splits["validation"]
    bag.fit(train.texts[0], train.labels)
    assert bag.score(validation.texts[0], validation.labels) < 0.7


def test_every_process_makes_the_same_rows(splits: dict[str, Rows]) -> None:
    """Python's hash seed differs between processes; a set's order would leak into the rows."""
    code = (
        "from stillroom.data.builtin import NAMES, load; rows = load(NAMES[0], 'validation');"
        "print(*rows.texts[0], *rows.labels.tolist(), sep='\\n')"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    made = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = splits["validation"]
    assert made.stdout.splitlines() == [*rows.texts[0], *map(str, rows.labels.tolist())]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(WrongInput, match=r"Did you mean builtin/verdicts\?"):
        builtin.load("builtin/verdict", "train")
    with pytest.raises(WrongInput, match="no split 'test'"):
        builtin.load("builtin/verdicts", "test")
