"""Texts as people also type them: with typos, in lower case, in upper case.

Every function is pure: the same text and seed give the same result on every machine.
"""

import random
import re
from collections.abc import Callable
from dataclasses import replace

from stillroom.data.tasks import Rows

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


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "typos in 1 of 10 words": lambda text: typos(text, share=0.1, seed=0),
    "typos in 3 of 10 words": lambda text: typos(text, share=0.3, seed=0),
    "lower case": str.lower,
    "upper case": str.upper,
}
"""What is done to the texts, by the name that reports show."""


def perturbed(rows: Rows, perturb: Callable[[str], str]) -> Rows:
    """Return the rows with every text perturbed and the labels as they are."""
    return replace(rows, texts=tuple([perturb(text) for text in column] for column in rows.texts))
