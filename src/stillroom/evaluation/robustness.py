"""Texts as people also type them: with typos, in another case, with words in another order.

Every function that changes a text is pure: the same text and seed give the same on every machine.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stillroom.data.tasks import Rows, Task
from stillroom.evaluation.metrics import score

ROWS = 1000
"""Most rows of a split that are perturbed; more would take longer than they tell."""

_WORD = re.compile(r"[^\W\d_]{4,}")

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEXT_TO = {key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _KEYS for i, key in enumerate(row)}


def typos(text: str, *, share: float, seed: int) -> str:
    """Return the text with a typo in about this share of its words of four letters and more.

    A typo swaps two neighbouring letters, drops one, doubles one, or hits the key beside it (on a
    QWERTY keyboard, ASCII letters only; others are doubled). First and last letters stay. Which
    words and which typo follow from the seed and the text alone.

    Args:
        text: Any text; what is no letter stays as it is.
        share: Probability of a typo for each word, 0 to 1.
        seed: Another seed, other typos.

    Raises:
        ValueError: If `share` is no probability.

    Example:
        >>> typos("a wonderful evening at the cinema", share=1.0, seed=0)
        'a wondderful ebening at the cinemma'
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Expected a share from 0 to 1, found {share}.")
    chance = random.Random(f"{seed} {text}")

    def mistype(found: re.Match[str]) -> str:
        word = found[0]
        return _typo(word, chance) if chance.random() < share else word

    return _WORD.sub(mistype, text)


def _typo(word: str, chance: random.Random) -> str:
    at = chance.randrange(1, len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    kind = chance.choice(("swap", "drop", "double", "neighbour"))
    if kind == "swap" and at + 1 < len(word) - 1 and letter != after[0]:
        return before + after[0] + letter + after[1:]
    if kind == "drop":
        return before + after
    beside = _NEXT_TO.get(letter.lower())
    if kind == "neighbour" and beside:
        key = chance.choice(beside)
        return before + (key.upper() if letter.isupper() else key) + after
    return before + letter + letter + after


def swapped_words(text: str, *, share: float, seed: int) -> str:
    """Return the text with about this share of its words swapped with the next one.

    A word is what stands between blanks. Which pairs change places follows from the seed and the text
    alone; no word moves twice.

    Args:
        text: Any text; the blanks stay where they are.
        share: Of the words that change places, 0 to 1.
        seed: Another seed, other pairs.

    Raises:
        ValueError: If `share` is no probability.

    Example:
        >>> swapped_words("a dull film , and long", share=1.0, seed=0)
        'dull a , film long and'
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Expected a share from 0 to 1, found {share}.")
    chance = random.Random(f"{seed} {text}")
    # A word that starts a swap takes the next one along: of all words 2 p / (1 + p) move.
    start = share / (2 - share)
    parts = re.split(r"(\s+)", text)
    at = [i for i, part in enumerate(parts) if part and not part.isspace()]
    i = 0
    while i + 1 < len(at):
        if chance.random() < start:
            here, there = at[i], at[i + 1]
            parts[here], parts[there] = parts[there], parts[here]
            i += 1
        i += 1
    return "".join(parts)


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "typos in 1 of 10 words": lambda text: typos(text, share=0.1, seed=0),
    "typos in 3 of 10 words": lambda text: typos(text, share=0.3, seed=0),
    "lower case": str.lower,
    "upper case": str.upper,
    "3 of 10 words swapped": lambda text: swapped_words(text, share=0.3, seed=0),
}
"""What is done to the texts, by the name that reports show."""


def perturbed(rows: Rows, perturb: Callable[[str], str]) -> Rows:
    """Return the rows with every text perturbed and the labels as they are.

    Example:
        >>> perturbed(Rows("made", (["A film"],), np.array([1])), str.upper).texts
        (['A FILM'],)
    """
    return replace(rows, texts=tuple([perturb(text) for text in column] for column in rows.texts))


def measure(
    task: Task,
    rows: Rows,
    logits: Mapping[str, np.ndarray],
    says: Mapping[str, Callable[[Rows], np.ndarray]],
) -> dict[str, Any]:
    """Return each model's first metric on texts as given, and on perturbed ones.

    Args:
        task: Names the metric.
        rows: A split; at most `ROWS` of its rows, evenly spread, are perturbed.
        logits: By model, of the split as it is.
        says: By model, what returns its logits of rows.

    Returns:
        `rows` (how many), `metric`, and `values`: by perturbation, `as given` first, by model.
    """
    chosen = np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int)
    clean, first = rows.take(chosen), task.metrics[0]
    values = {
        "as given": {n: score(task, found[chosen], clean.labels)[first] for n, found in logits.items()}
    }
    for title, perturb in PERTURBATIONS.items():
        changed = perturbed(clean, perturb)
        values[title] = {n: score(task, say(changed), clean.labels)[first] for n, say in says.items()}
    return {"rows": len(clean), "metric": first, "values": values}
