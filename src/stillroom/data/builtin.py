"""Built-in data: synthetic sentences, made by a generator, the same on every machine.

`builtin/verdicts` asks whether the writer of a short review liked the thing that is reviewed. The
sentences are put together from templates and word lists, so they are **not real reviews**. They
exist for demos and tests that must run offline in minutes. Words of praise and of blame stand in
sentences of either class, so that only a model that follows negation, contrast, scope, hearsay,
comparison and the unreal can tell the classes apart: a bag of words gets some 0.6 of them right.
What a model scores here says whether a training run works; it says nothing about real text, and
is no substitute for a real data set.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stillroom.data.tasks import Rows, Task
from stillroom.errors import WrongInput
from stillroom.recipe import nearest

_Choice = TypeVar("_Choice")

TASKS: dict[str, Task] = {
    "builtin/verdicts": Task(
        "builtin/verdicts",
        "classification",
        ("sentence",),
        "label",
        ("negative", "positive"),
        ("accuracy", "f1"),
    )
}
"""The built-in tasks by name."""

NAMES: tuple[str, ...] = tuple(TASKS)
"""Names of the built-in data sets."""

SIZES: dict[str, int] = {"train": 4400, "validation": 900}
"""Rows of each split."""


@dataclass(frozen=True)
class _Words:
    """A word list; the last ones are kept from the training split."""

    known: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class _Domain:
    met: str
    item: _Words
    part: _Words
    good: _Words
    bad: _Words


def _words(text: str, held_out: int = 0) -> _Words:
    words = tuple(word.strip() for word in text.split(","))
    return _Words(words[: len(words) - held_out], words[len(words) - held_out :])


def _domain(met: str, items: str, parts: str, good: str, bad: str) -> _Domain:
    return _Domain(met, _words(items, 2), _words(parts), _words(good, 2), _words(bad, 2))


_DOMAINS = (
    _domain(
        "tasted",
        "soup, curry, stew, pasta, risotto, pie, chowder, paella",
        "bread, wine, dessert, coffee",
        "delicious, tasty, well seasoned, perfectly cooked, flavourful, mouth-watering, fresh, satisfying",
        "bland, greasy, overcooked, tasteless, soggy, undercooked, disgusting, burnt",
    ),
    _domain(
        "saw",
        "film, thriller, comedy, drama, sequel, documentary, western, remake",
        "soundtrack, ending, poster, trailer",
        "gripping, moving, clever, witty, well acted, suspenseful, exciting, touching",
        "dull, tedious, clumsy, predictable, forgettable, badly acted, awkward, incoherent",
    ),
    _domain(
        "stayed at",
        "hotel, hostel, inn, guest house, campsite, cabin, lodge, motel",
        "breakfast, lobby, garden, neighbourhood",
        "spotless, comfortable, peaceful, cosy, welcoming, well kept, clean, charming",
        "filthy, noisy, shabby, cramped, damp, run-down, dirty, dingy",
    ),
    _domain(
        "used",
        "app, program, website, browser, game, calendar, spreadsheet, plug-in",
        "manual, logo, licence, price",
        "fast, reliable, intuitive, stable, easy to use, responsive, dependable, user-friendly",
        "slow, buggy, confusing, unstable, hard to use, sluggish, unreliable, glitchy",
    ),
    _domain(
        "heard",
        "concert, album, recital, song, symphony, opera, ballad, encore",
        "venue, lighting, programme, advertising",
        "beautiful, lively, tuneful, inspired, uplifting, graceful, melodious, captivating",
        "monotonous, shrill, out of tune, lifeless, grating, repetitive, off-key, dreary",
    ),
    _domain(
        "paid for",
        "repair, haircut, massage, delivery, car wash, inspection, renovation, cleaning",
        "booking, parking, invoice, waiting room",
        "prompt, professional, careful, thorough, efficient, skilful, competent, first-rate",
        "sloppy, careless, rushed, amateurish, late, inept, incompetent, botched",
    ),
    _domain(
        "read",
        "novel, biography, memoir, essay, play, anthology, diary, sonnet",
        "cover, preface, title, typeface",
        "absorbing, elegant, insightful, well written, thoughtful, vivid, fascinating, eloquent",
        "boring, rambling, shallow, badly written, muddled, pretentious, wordy, long-winded",
    ),
    _domain(
        "attended",
        "lecture, course, workshop, seminar, tutorial, class, webinar, conference",
        "room, handout, schedule, buffet",
        "clear, useful, stimulating, informative, well organised, engaging, enlightening, helpful",
        "pointless, confused, disorganised, superficial, useless, tiresome, unhelpful, uninformative",
    ),
    _domain(
        "went on",
        "cruise, tour, hike, flight, train ride, boat trip, safari, excursion",
        "weather, view, lunch, departure",
        "pleasant, relaxing, smooth, enjoyable, memorable, well planned, delightful, fun",
        "exhausting, stressful, miserable, badly planned, unpleasant, uncomfortable, tiring, horrid",
    ),
    _domain(
        "bought",
        "blender, vacuum cleaner, kettle, printer, heater, camera, toaster, lamp",
        "box, cable, warranty, colour",
        "sturdy, durable, practical, powerful, well made, handy, solid, convenient",
        "flimsy, faulty, impractical, feeble, badly made, fragile, broken, defective",
    ),
)
_GOOD = _words(
    "lovely, excellent, superb, wonderful, outstanding, a joy, a delight, a treat, a pleasure, a success", 2
)
_BAD = _words(
    "awful, terrible, dreadful, horrible, appalling, a mess, a letdown, a chore, a failure, a disaster", 2
)
_WHO = _words(
    "my sister, my neighbour, the critics, my colleagues, the local paper, my uncle, our friends, "
    "a stranger, my cousin, the newspapers"
)
_BIT = _words("the first half, the last part, that one change, the extra hour, the final touch")

# `+` marks a word or claim of the row's own verdict, `-` one of the other verdict; a word of praise or
# blame for the thing has no name, one that fits everything is `any`.
_SAYS = (
    "{item} was {+}",
    "{item} was {+}",
    "{item} was simply {+}",
    "{item} turned out to be {+}",
    "{item} was {+} from start to finish",
    "{item} was not {-}",
    "{item} was not {-}",
    "{item} was anything but {-}",
    "{item} was far from {-}",
)
_CLAIMS = (
    *_SAYS,
    "everyone who {met} {item} found it {+}",
    "nobody denied that {item} was {+}",
    "{item} never stopped being {+}",
    "it was hard not to find {item} {+}",
    "nobody who {met} {item} found it {-}",
    "not one of us found {item} {-}",
    "{item} was never {-}",
    "{item} was by no means {-}",
    "it was hard to find {item} {-}",
)
_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "plain": (
        "{claim}.",
        "I must say that {claim}.",
        "On the whole, {claim}.",
        "All in all, {claim}.",
    ),
    "contrast": (
        "Although {part} was {any-}, {claim}.",
        "{part} was {any-}, but {claim}.",
        "{claim}, although {part} was {any-}.",
        "{claim}, and that despite {part}, which was {any-}.",
        "{claim}, unlike {other}, which was {-}.",
        "{other} was {-}, but {claim}.",
        "Far from being {-}, {item} was {+}.",
        "{item} seemed {-} for a minute, but after that it was {+}.",
    ),
    "hearsay": (
        "{who} said that {says-}, but I disagree.",
        "{who} said that {says+}, and I agree.",
        "{who} said that {says-}, and I could not agree less.",
        "{who} said that {says+}, and I could not agree more.",
        "{who} claimed that {says-}, which is not true.",
        "{who} claimed that {says+}, which is quite true.",
        "{who} tried to persuade me that {says-}, and failed.",
        "{who} tried to persuade me that {says+}, and succeeded.",
        "Unlike {who}, I found {item} {+}.",
        "Unlike {who}, I did not find {item} {-}.",
        "{who} found {item} {-}, but I did not.",
        "{who} found {item} {+}, and so did I.",
        "{who} did not find {item} {+}, but I did.",
        "{who} did not find {item} {-}, and neither did I.",
    ),
    "expectation": (
        "I expected {item} to be {-}, and I was wrong.",
        "I expected {item} to be {+}, and I was right.",
        "I was told that {says-}, and that turned out to be false.",
        "I was told that {says+}, and that turned out to be true.",
        "I {hope-} that {item} would be {-}, but it was not.",
        "I {hope+} that {item} would be {+}, and it was.",
        "At first I thought that {says-}, but I changed my mind.",
        "At first I thought that {says+}, and I have not changed my mind.",
    ),
    "unreal": (
        "{item} would have been {-} without {bit}.",
        "Without {bit}, {item} might have been {-}.",
        "If {item} had been {-}, I would have said so.",
        "I doubt that anyone found {item} {-}.",
        "I never doubted that {says+}.",
        "I refuse to believe that {says-}.",
        "Who could say that {says-}?",
        "Who could deny that {says+}?",
    ),
    "comparison": (
        "Next to {item}, even {other} seemed {-}.",
        "{other} was {+}, and {item} was no {rank-}.",
        "Even {other}, which was {+}, was {rank-} than {item}.",
        "{other} was {-}, and {item} was the exact opposite.",
        "{other} was {+}, and so was {item}.",
    ),
}


def load(name: str, split: str) -> Rows:
    """Return a split of a built-in data set.

    Args:
        name: One of `NAMES`.
        split: `train` or `validation`. No sentence is in both; validation also uses words that
            train never does.

    Raises:
        WrongInput: If there is no such data set or split.

    Example:
        >>> rows = load("builtin/verdicts", "validation")
        >>> len(rows), sorted(set(rows.labels.tolist()))
        (900, [0, 1])
    """
    if name not in TASKS:
        raise WrongInput(f"Unknown built-in data set {name!r}.{nearest(name, NAMES)}")
    if split not in SIZES:
        raise WrongInput(f"{name} has no split {split!r}; it has {', '.join(SIZES)}.")
    train = _draw("train", SIZES["train"], frozenset())
    drawn = train if split == "train" else _draw(split, SIZES[split], frozenset(train))
    labels = np.array([i % 2 for i in range(len(drawn))], dtype=np.int64)
    return Rows(f"{name} {split} (synthetic)", (drawn,), labels)


def _draw(split: str, count: int, taken: frozenset[str]) -> list[str]:
    """Return `count` distinct sentences, none of `taken`; every other one is positive."""
    # The raw stream of Philox is fixed for good; what Generator makes of it is not.
    raw: Callable[[], int] = np.random.Philox(key=list(SIZES).index(split)).random_raw
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        sentence = _Writer(raw, held_out=split != "train").sentence(positive=len(sentences) % 2 == 1)
        if sentence not in taken:
            sentences[sentence] = None
    return list(sentences)


class _Writer:
    """Writes one sentence. No thing and no word of judgement occurs in it twice."""

    def __init__(self, raw: Callable[[], int], *, held_out: bool):
        self._raw = raw
        self._held_out = held_out
        self._used: set[str] = set()
        self._domain = self._one_of(_DOMAINS)
        self._item = self._fresh(self._domain.item)

    def sentence(self, *, positive: bool) -> str:
        """Return a sentence whose writer is pleased, or not."""
        kind = self._one_of(list(_SENTENCES))
        text = self._fill(self._one_of(_SENTENCES[kind]), positive)
        return text[0].upper() + text[1:]

    def _fill(self, template: str, positive: bool) -> str:
        def slot(found: re.Match[str]) -> str:
            return self._slot(found[1], positive if found[2] != "-" else not positive)

        return re.sub(r"{(\w*)([+-]?)}", slot, template)

    def _slot(self, name: str, positive: bool) -> str:
        match name:
            case "claim":
                return self._fill(self._one_of(_CLAIMS), positive)
            case "says":
                return self._fill(self._one_of(_SAYS), positive)
            case "item":
                return f"the {self._item}"
            case "other":
                return f"the {self._fresh(self._domain.item)}"
            case "part":
                return f"the {self._fresh(self._domain.part)}"
            case "met":
                return self._domain.met
            case "who":
                return self._fresh(_WHO)
            case "bit":
                return self._fresh(_BIT)
            case "rank":
                return "better" if positive else "worse"
            case "hope":
                return "hoped" if positive else "feared"
        if name == "any" or self._raw() % 3 == 0:
            return self._fresh(_GOOD if positive else _BAD)
        return self._fresh(self._domain.good if positive else self._domain.bad)

    def _fresh(self, words: _Words) -> str:
        """Return a word that the sentence does not have yet; a third of validation's are held out."""
        held_out = self._held_out and words.held_out and self._raw() % 3 == 0
        pool = words.held_out if held_out else words.known
        word = self._one_of([word for word in pool if word not in self._used])
        self._used.add(word)
        return word

    def _one_of(self, options: Sequence[_Choice]) -> _Choice:
        return options[self._raw() % len(options)]
