"""Rows with words replaced ahead of training, as TinyBERT augments its data.

Jiao et al.: "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
arXiv 1909.10351, as the authors' code does it.

Shapes: n masked words, S tokens, V vocabulary, K candidates.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.data.batching import Inputs, pad, sequential_batches
from stillroom.data.tokens import TokenisedRows
from stillroom.data.words import Vectors, Word, words_of
from stillroom.generator import Generator

_MARKS = ("\u0120", "\u2581")
"""What byte-level BPE and SentencePiece put before the first piece of a word."""

_MAX_LENGTH = 512
_MAX_TOKENS = 16384


@dataclass(frozen=True)
class Candidates:
    """The words that may stand in for a word of a text, and who proposed them."""

    word: Word
    forms: list[str]
    source: str


@dataclass(frozen=True)
class Sources:
    """Who proposes words, in the order in which they are asked; at least one is there."""

    generator: Generator | None = None
    """For words that are one token to it."""
    vectors: Vectors | None = None
    synonyms: Mapping[str, Sequence[str]] | None = None


def candidates_of(
    texts: Sequence[str], sources: Sources, *, count: int, bf16: bool = False
) -> list[list[Candidates]]:
    """Return for each text its words that have candidates, in the order of the text.

    A word that is one token to the generator is masked, and the generator reads the text with the mask
    beside the text as it is; candidates are its `count` most probable whole words (which may be the word
    itself). Other words get their `count` nearest vectors by cosine; and where these know nothing of the
    word, its first `count` synonyms. All masked copies of all texts are scored in batches of one length,
    or nearly.

    Args:
        texts: Any number.
        sources: Who proposes.
        count: K, the candidates of a word.
        bf16: Whether the generator computes in bf16 autocast.
    """
    words = [words_of(text) for text in texts]
    found: dict[tuple[int, int], Candidates] = {}
    if sources.generator is not None:
        found = _guessed(texts, words, sources.generator, count, bf16=bf16)
    rest = sorted(
        {word.form for i, row in enumerate(words) for j, word in enumerate(row) if (i, j) not in found}
    )
    near = sources.vectors.nearest(rest, count) if sources.vectors is not None else {}
    for i, row in enumerate(words):
        for j, word in enumerate(row):
            if (i, j) in found:
                continue
            if near.get(word.form):
                found[i, j] = Candidates(word, near[word.form], "vectors")
            elif sources.synonyms and sources.synonyms.get(word.form.lower()):
                known = sources.synonyms[word.form.lower()]
                found[i, j] = Candidates(word, list(known[:count]), "synonyms")
    return [[found[i, j] for j in range(len(row)) if (i, j) in found] for i, row in enumerate(words)]


def draw(
    text: str, candidates: Sequence[Candidates], *, copies: int, probability: float, key: str
) -> list[str]:
    """Return at most `copies` texts that differ from the text and from each other.

    In each of `copies` draws every word that has candidates is replaced with `probability`, by one
    that is drawn among them; what was drawn before, or is the text itself, is dropped. A candidate takes
    over a capital first letter, or capitals throughout.

    Args:
        text: The original.
        candidates: Of its words, in order.
        copies: N_a.
        probability: p_t.
        key: Decides the draw: another key, other words.

    Example:
        >>> words = [Candidates(Word(0, 4, "Good"), ["great"], "vectors")]
        >>> draw("Good film", words, copies=5, probability=1.0, key="0")
        ['Great film']
    """
    chance = random.Random(key)
    found: dict[str, None] = {}
    for _ in range(copies):
        parts, end = [], 0
        for one in candidates:
            replaced = chance.random() < probability
            form = chance.choice(one.forms)
            parts.append(text[end : one.word.start])
            parts.append(_as_written(one.word.form, form) if replaced else one.word.form)
            end = one.word.end
        found["".join([*parts, text[end:]])] = None
    found.pop(text, None)
    return list(found)


def _as_written(old: str, new: str) -> str:
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _guessed(
    texts: Sequence[str],
    words: Sequence[Sequence[Word]],
    generator: Generator,
    count: int,
    *,
    bf16: bool,
) -> dict[tuple[int, int], Candidates]:
    """Return the generator's candidates by number of text and word, for words of one token."""
    tokenizer = generator.tokenizer
    most = min(generator.positions, _MAX_LENGTH)
    encoded = tokenizer(
        list(texts),
        list(texts),
        truncation="longest_first",
        max_length=most,
        return_offsets_mapping=True,
    )
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    types = encoded.get("token_type_ids")
    tokens = TokenisedRows(
        ids=np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]),
        types=None if types is None else np.concatenate([np.array(row, dtype=np.int8) for row in types]),
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
        truncated=0,
    )
    # One masked copy each: number of the text, number of the word, position of its token.
    copies: list[tuple[int, int, int]] = []
    for i, text in enumerate(texts):
        known = [token != tokenizer.unk_token_id for token in encoded["input_ids"][i]]
        first = [known[k] and sequence == 0 for k, sequence in enumerate(encoded.sequence_ids(i))]
        single = _single_tokens(text, encoded["offset_mapping"][i], first)
        copies += [
            (i, j, single[word.start, word.end])
            for j, word in enumerate(words[i])
            if (word.start, word.end) in single
        ]
    if not copies:
        return {}
    names, allowed_V = whole_words(tokenizer)
    of_text, _, at = (np.array(column) for column in zip(*copies, strict=True))
    found: dict[tuple[int, int], Candidates] = {}
    for batch in sequential_batches(lengths[of_text], max_tokens=_MAX_TOKENS):
        best_nK = _most_probable(
            generator, pad(tokens, of_text[batch]), at[batch], allowed_V, count, bf16=bf16
        )
        for copy, best in zip(batch.tolist(), best_nK.tolist(), strict=True):
            i, j, _ = copies[copy]
            found[i, j] = Candidates(words[i][j], [names[number] for number in best], "generator")
    return found


def _single_tokens(
    text: str, offsets: Sequence[tuple[int, int]], wanted: Sequence[bool]
) -> dict[tuple[int, int], int]:
    """Return the position of each token that is wanted, by the characters it stands for."""
    found: dict[tuple[int, int], int] = {}
    for position, ((start, end), take) in enumerate(zip(offsets, wanted, strict=True)):
        if take:
            # SentencePiece counts the blank before a word to its first piece.
            start += len(text[start:end]) - len(text[start:end].lstrip())
            found[start, end] = position
    return found


@torch.no_grad()
def _most_probable(
    generator: Generator,
    inputs: Inputs,
    at: np.ndarray,
    allowed_V: Tensor,
    count: int,
    *,
    bf16: bool,
) -> Tensor:
    """Return the ids of the `count` most probable allowed words at one position of each row, `(n, K)`."""
    device = next(generator.parameters()).device
    rows = torch.arange(len(at))
    position = torch.from_numpy(at)
    inputs.input_ids[rows, position] = generator.tokenizer.mask_token_id
    flat = (rows * inputs.input_ids.shape[1] + position).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits_nV = generator.guess(inputs.to(device), flat).float()
    # The head may be wider than the vocabulary.
    logits_nV = logits_nV[:, : len(allowed_V)].masked_fill(~allowed_V.to(device), -torch.inf)
    best: Tensor = logits_nV.topk(min(count, int(allowed_V.sum())), dim=-1).indices
    return best.cpu()


def whole_words(tokenizer: Any) -> tuple[list[str], Tensor]:
    """Return each token of a vocabulary as text, and which are whole words of letters.

    Where the vocabulary marks the beginnings of words (byte-level BPE, SentencePiece) a whole word has
    the mark; where it marks what continues a word (WordPiece) that mark is no letter.

    Args:
        tokenizer: A Hugging Face tokenizer of V tokens.

    Returns:
        V texts, and bool, shape `(V,)`.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> own = Tokenizer(models.WordPiece({"[UNK]": 0, "film": 1, "##s": 2, "!": 3}, unk_token="[UNK]"))
        >>> whole_words(PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]"))
        (['[UNK]', 'film', '##s', '!'], tensor([False,  True, False, False]))
    """
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    special = set(tokenizer.all_special_tokens)
    mark = next((m for m in _MARKS if any(token.startswith(m) for token in tokens)), None)
    names, allowed = [], []
    for number, token in enumerate(tokens):
        name, whole = token, mark is None or token.startswith(mark)
        if mark is not None and whole:
            # Bytes that are no ASCII letters look like others in a byte-level vocabulary.
            name = tokenizer.decode([number]).strip()
        names.append(name)
        allowed.append(whole and name.isalpha() and token not in special)
    return names, torch.tensor(allowed)
