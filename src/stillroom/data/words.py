"""Words: which are left alone, and which could stand in for others by vectors or by a thesaurus."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillroom.data import tables
from stillroom.errors import WrongInput

MOST_VECTORS = 100_000
"""So many vectors of a file are read, the most frequent words in GloVe's order (TinyBERT's code)."""

STOP_WORDS = frozenset(
    """
    a an the this that these those
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its
    itself we us our ours ourselves they them their theirs themselves one who whom whose which what
    am is are was were be been being do does did doing done have has had having
    can could may might must shall should will would cannot ain aren couldn didn doesn don hadn hasn haven
    isn ll mightn mustn needn ought re shan shouldn ve wasn weren won wouldn d m o s t y
    not no nor neither either and or but if because as until while than though although unless whether
    of at by for with about against between into through during before after above below to from up down
    in out on off over under upon within without toward towards among
    again further then once here there when where why how both each few more most other another some any
    all such only own same so too very just also now ever yet still else
    """.split()
)
"""English function words, which are never replaced: another one would change what a sentence says."""

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Word:
    """A word of a text: `text[start:end]`, letters alone."""

    start: int
    end: int
    form: str


def words_of(text: str) -> list[Word]:
    """Return the words that may be replaced: letters only, between blanks or punctuation, no stop word.

    Example:
        >>> [word.form for word in words_of("It's the 2nd best, well-made film!")]
        ['best', 'well', 'made', 'film']
    """
    return [
        Word(found.start(), found.end(), found[0])
        for found in _WORD.finditer(text)
        if found[0].lower() not in STOP_WORDS and _stands_alone(text, found.start(), found.end())
    ]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no digit or underscore is glued to it, as in `2nd`."""
    around = text[max(0, start - 1) : start] + text[end : end + 1]
    return not any(character.isalnum() or character == "_" for character in around)


class Vectors:
    """Word vectors, and the nearest of them by cosine."""

    def __init__(self, words: Sequence[str], vectors_ND: np.ndarray):
        self.words = list(words)
        norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        self._unit_ND = (vectors_ND / np.maximum(norms, 1e-12)).astype(np.float32)
        self._number = {word: i for i, word in reversed(list(enumerate(self.words)))}

    @classmethod
    def read(cls, path: Path, *, most: int = MOST_VECTORS) -> "Vectors":
        """Return the first vectors of a file in GloVe's text format: a word, then its numbers.

        A first line of two numbers, as word2vec and fastText write it, is left out; so are words that
        are not letters alone.

        Raises:
            WrongInput: If the file cannot be read, or a line does not fit.
        """
        words: list[str] = []
        rows: list[np.ndarray] = []
        try:
            for number, (word, values) in enumerate(_lines(path), start=1):
                if number == 1 and len(values) == 1:
                    continue
                try:
                    row = np.array(values, dtype=np.float32)
                except ValueError:
                    row = np.empty(0, dtype=np.float32)
                if not len(row) or (rows and len(row) != len(rows[0])) or not np.isfinite(row).all():
                    width = len(rows[0]) if rows else "its"
                    raise WrongInput(
                        f"{path}, line {number}: expected a word and {width} finite numbers, as in "
                        f"GloVe's text format, found {' '.join([word, *values])!r:.60}."
                    )
                if number > most:
                    break
                if word.isalpha():
                    words.append(word)
                    rows.append(row)
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInput(f"{path} cannot be read as UTF-8 text: {error}. Check the path.") from None
        if not rows:
            raise WrongInput(f"{path} has no word vectors: expected lines of a word and its numbers.")
        return cls(words, np.stack(rows))

    def nearest(self, words: Sequence[str], count: int) -> dict[str, list[str]]:
        """Return for each word that has a vector its `count` nearest others, the nearest first.

        All by one product of unit vectors, in pieces of 256 words.

        Example:
            >>> vectors = Vectors(["good", "great", "film"], np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]))
            >>> vectors.nearest(["Good", "other"], 1)
            {'Good': ['great']}
        """
        known = [word for word in words if word.lower() in self._number]
        count = min(count, len(self.words) - 1)
        found: dict[str, list[str]] = {}
        for start in range(0, len(known) if count > 0 else 0, 256):
            piece = known[start : start + 256]
            at = np.array([self._number[word.lower()] for word in piece])
            cosine_WN = self._unit_ND[at] @ self._unit_ND.T
            cosine_WN[np.arange(len(at)), at] = -np.inf
            best_WK = np.argpartition(-cosine_WN, count - 1, axis=1)[:, :count]
            for word, row, best in zip(piece, cosine_WN, best_WK, strict=True):
                ordered = sorted(best.tolist(), key=lambda i, row=row: (-row[i], i))  # type: ignore[misc]
                found[word] = [self.words[i] for i in ordered]
        return found


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            word, *values = line.rstrip().split(" ")
            yield word, values


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Return the synonyms of each word, sorted: a table with `lemma` and `synonyms`, as of WordNet.

    Several rows of a lemma, one for each of its meanings, are put together. Synonyms of several words,
    or with other than letters, are left out, and so are words that none are left of.

    Raises:
        WrongInput: If the file or a column is missing or damaged.
    """
    table = tables.read(path)
    for name in ("lemma", "synonyms"):
        if name not in table.columns:
            raise WrongInput(
                f"{path} has no column {name!r}: expected lemma (a word) and synonyms (a list of words), "
                f"found {', '.join(table.columns)}."
            )
    found: dict[str, set[str]] = {}
    pairs = zip(table.columns["lemma"], table.columns["synonyms"], strict=True)
    for row, (lemma, synonyms) in enumerate(pairs):
        if not isinstance(lemma, str) or not isinstance(synonyms, list):
            raise WrongInput(
                f"{table.at(row)}: expected a word and a list of words, found {lemma!r:.40} and "
                f"{synonyms!r:.40}."
            )
        kept = {word for word in synonyms if isinstance(word, str) and word.isalpha()}
        found.setdefault(lemma.lower(), set()).update(w for w in kept if w.lower() != lemma.lower())
    return {lemma: sorted(words) for lemma, words in found.items() if words}
