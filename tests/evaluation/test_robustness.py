"""Perturbed texts: seeded, bounded, and only where they are meant to be."""

import numpy as np
import pytest

from stillroom.data.tasks import Rows
from stillroom.evaluation import robustness
from stillroom.evaluation.robustness import PERTURBATIONS, measure, perturbed, swapped_words, typos
from tiny import make_rows, make_task

TEXT = "An unexpectedly wonderful evening, with 42 clowns: <b>never</b> dull. The Committee agreed."


def test_no_share_changes_nothing() -> None:
    assert typos(TEXT, share=0.0, seed=0) == TEXT


def test_seed_and_text_decide() -> None:
    assert typos(TEXT, share=1.0, seed=0) == typos(TEXT, share=1.0, seed=0)
    assert len({typos(TEXT, share=1.0, seed=seed) for seed in range(8)}) > 4


def test_every_word_of_four_letters_gets_one_typo_and_nothing_else_does() -> None:
    for seed in range(50):
        before, after = TEXT.split(), typos(TEXT, share=1.0, seed=seed).split()
        for old, new in zip(before, after, strict=True):
            if sum(letter.isalpha() for letter in old) < 4:
                assert new == old
            else:
                assert abs(len(new) - len(old)) <= 1 and new != old
                assert (new[0], new[-1]) == (old[0], old[-1])


def test_a_wrong_key_is_one_beside_the_right_one_and_of_its_case() -> None:
    rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    seen = 0
    for seed in range(200):
        for old in ("wonderful", "COMMITTEE"):
            new = typos(old, share=1.0, seed=seed)
            wrong = [i for i in range(len(old)) if len(new) == len(old) and new[i] != old[i]]
            if len(wrong) == 1:
                a, b = old[wrong[0]], new[wrong[0]]
                seen += 1
                assert a.isupper() == b.isupper()
                assert any(abs(r.find(a.lower()) - r.find(b.lower())) == 1 for r in rows if a.lower() in r)
    assert seen > 50


def test_short_words_digits_and_other_scripts_do_not_break() -> None:
    assert typos("a an the 12345 ...", share=1.0, seed=0) == "a an the 12345 ..."
    assert typos("", share=1.0, seed=0) == ""
    assert typos("прекрасный вечер", share=1.0, seed=0) != "прекрасный вечер"


def test_share_is_that_of_the_words() -> None:
    text = " ".join(["wonderful"] * 5000)
    changed = sum(word != "wonderful" for word in typos(text, share=0.3, seed=1).split())
    # Five standard deviations: 5 * sqrt(5000 * 0.3 * 0.7) = 162.
    assert abs(changed - 1500) < 162


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_a_probability(share: float) -> None:
    for perturb in (typos, swapped_words):
        with pytest.raises(ValueError, match="share"):
            perturb(TEXT, share=share, seed=0)


def test_swapped_words_are_the_same_words_one_place_away() -> None:
    assert swapped_words(TEXT, share=0.0, seed=0) == TEXT
    assert swapped_words(TEXT, share=0.5, seed=3) == swapped_words(TEXT, share=0.5, seed=3)
    assert (
        swapped_words("", share=1.0, seed=0) == "" and swapped_words(" one ", share=1.0, seed=0) == " one "
    )
    before = [str(i) for i in range(50_000)]
    after = swapped_words(" ".join(before), share=0.3, seed=1).split(" ")
    assert sorted(after) == sorted(before)
    moved = [i for i in range(50_000) if after[i] != before[i]]
    assert all(abs(int(after[i]) - i) == 1 for i in moved)
    # A swap moves two: five standard deviations are about 2 * 5 * sqrt(7500).
    assert abs(len(moved) - 15_000) < 866


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_labels_stay_and_every_column_changes(name: str) -> None:
    rows = make_rows(make_task(pair=True), 40)
    found = perturbed(rows, PERTURBATIONS[name])
    assert (found.labels == rows.labels).all() and len(found) == 40
    for old, new in zip(rows.texts, found.texts, strict=True):
        assert (old != new) == (name != "lower case")


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows evenly spread, each with its own logits and label; models are asked of changed texts alone."""
    monkeypatch.setattr(robustness, "ROWS", 5)
    task = make_task()
    rows = make_rows(task, 41)
    right = np.eye(2)[rows.labels]
    wrong_but_for_the_chosen = 1 - right
    wrong_but_for_the_chosen[::10] = right[::10]
    asked: list[Rows] = []

    def says(given: Rows) -> np.ndarray:
        asked.append(given)
        return 1 - np.eye(2)[given.labels]

    found = measure(task, rows, {"a": wrong_but_for_the_chosen}, {"a": says})
    assert (found["rows"], found["metric"]) == (5, task.metrics[0])
    assert found["values"].pop("as given") == {"a": 1.0}
    assert found["values"] == dict.fromkeys(PERTURBATIONS, {"a": 0.0})
    for given, perturb in zip(asked, PERTURBATIONS.values(), strict=True):
        assert given.texts[0] == [perturb(text) for text in rows.texts[0][::10]]
