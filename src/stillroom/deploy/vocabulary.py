"""A smaller vocabulary: the pieces that a corpus uses, and an alphabet to fall back on.

Kept are the pieces of the corpus, all special and added tokens, and the alphabet: for WordPiece every
single character and its `##` continuation, for byte-level BPE every byte, for Unigram every character.
A text whose pieces are all kept is tokenised as before, so that its logits are the same bits:

- WordPiece takes the longest piece that fits. One that is kept was the longest, and still is.
- BPE applies the merge of lowest rank. A merge that made a kept piece is kept, and no merge is added.
- Unigram takes the likeliest split. It is still among the splits, of which none is added.

Any other text falls apart into shorter pieces. It becomes unknown only where it was before, as long as
each of its characters is in the alphabet.
"""

import bisect
import copy
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoTokenizer

from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, quiet
from stillroom.errors import WrongInput

_CHUNK = 1000


@dataclass(frozen=True)
class Coverage:
    """How much of a split the kept pieces cover: shares in [0, 1]."""

    tokens: float
    """Of its tokens, as the whole vocabulary makes them, those whose piece was kept."""
    rows: float
    """Of its rows, those that are tokenised as before."""


def piece_counts(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """Return how often a tokenizer makes each id of texts."""
    counts: Counter[int] = Counter()
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, _CHUNK)):
        for found in backend.encode_batch_fast(chunk):
            counts.update(found.ids)
    return counts


def texts_of(rows: Rows) -> Iterable[str]:
    """Return all texts of a split, of every text column."""
    return (text for column in rows.texts for text in column)


def read_texts(paths: Sequence[Path]) -> Iterable[str]:
    """Yield the lines of text files in UTF-8.

    Raises:
        WrongInput: If a file is missing or is not UTF-8.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8") as stream:
                yield from (line.rstrip("\n") for line in stream)
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInput(
                f"{path} cannot be read as lines of UTF-8 text ({error}). Check --text."
            ) from None


def with_room(encoder: Encoder, corpora: Sequence[Counter[int]], pieces: int) -> set[int]:
    """Return the ids of corpora for which a vocabulary of so many pieces has room.

    Those of the first corpus come first, then those of the next; of each the most frequent first.
    What is kept in any case counts, too.

    Args:
        encoder: The model whose vocabulary is to be trimmed.
        corpora: How often each id occurs: see `piece_counts`.
        pieces: The most pieces to keep.

    Raises:
        WrongInput: If what is kept in any case is more, or the vocabulary cannot be trimmed.
    """
    ranked = list(dict.fromkeys(i for counts in corpora for i, _ in counts.most_common()))
    stated = json.loads(encoder.tokenizer.backend_tokenizer.to_str())

    def size(count: int) -> int:
        return len(_kept(encoder, stated, ranked[:count])[0])

    if size(0) > pieces:
        raise WrongInput(
            f"Expected room for at least {size(0):,} pieces, the special tokens and the alphabet, found "
            f"--pieces {pieces}. Raise it."
        )
    # More pieces never make a smaller vocabulary, so that the last count that fits can be bisected.
    return set(ranked[: bisect.bisect_right(range(len(ranked) + 1), pieces, key=size) - 1])


def trim(encoder: Encoder, used: Collection[int]) -> Encoder:
    """Return the same model with only the kept pieces in its vocabulary and embedding table.

    Args:
        encoder: The model; it stays as it is.
        used: The ids that the corpus uses: see `piece_counts`.

    Raises:
        WrongInput: If the tokenizer is of a kind whose vocabulary cannot be cut exactly.
    """
    table = encoder.model.get_input_embeddings()  # type: ignore[operator]
    stated = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    kept, cut = _kept(encoder, stated, used)
    order = np.array(sorted(i for i in kept if i < table.num_embeddings))
    moved = {int(old): new for new, old in enumerate(order)}
    model = copy.deepcopy(encoder.model)
    smaller = nn.Embedding(len(order), table.embedding_dim, padding_idx=table.padding_idx)
    smaller.weight.data.copy_(table.weight.data[order])
    model.set_input_embeddings(smaller)  # type: ignore[operator]
    config: Any = model.config
    config.vocab_size = len(order)
    for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start"):
        old = getattr(config, f"{name}_token_id", None)
        if isinstance(old, int):
            setattr(config, f"{name}_token_id", moved.get(old))
    return Encoder(model.eval(), _rebuild(encoder.tokenizer, cut(moved), moved))


def coverage(before: TokenisedRows, after: TokenisedRows, kept: Encoder, whole: Encoder) -> Coverage:
    """Return how much of a split is tokenised as before."""
    names = whole.tokenizer.convert_ids_to_tokens(range(len(whole.tokenizer)))
    now = kept.tokenizer.get_vocab()
    # Of each id of the whole vocabulary the new one, -1 where it was dropped.
    moved = np.array([now.get(name, -1) for name in names])
    ids = moved[before.ids]
    same = 0
    for row in range(len(before)):
        ours = ids[before.offsets[row] :][: before.lengths[row]]
        theirs = after.ids[after.offsets[row] :][: after.lengths[row]]
        same += bool(np.array_equal(ours, theirs))
    return Coverage(float(np.mean(ids >= 0)), same / max(1, len(before)))


def _kept(encoder: Encoder, stated: dict[str, Any], used: Collection[int]) -> tuple[set[int], Any]:
    """Return what `_cut` does, with the ids up to that of the padding.

    RoBERTa counts positions from the padding id: it must stay where it is.
    """
    kept, cut = _cut(stated, set(used))
    return kept | set(range(int(encoder.tokenizer.pad_token_id) + 1)), cut


def _cut(stated: dict[str, Any], used: set[int]) -> tuple[set[int], Any]:
    """Return the ids to keep, and a function from old to new ids to the tokenizer's new `model`."""
    kind = stated["model"].get("type")
    if kind not in _KINDS:
        raise WrongInput(
            f"The vocabulary of a {kind} tokenizer cannot be trimmed: a word that the corpus lacks would "
            f"become unknown. Expected {', '.join(_KINDS)}. Export without --vocabulary trim."
        )
    added = {int(token["id"]) for token in stated["added_tokens"]}
    return _KINDS[kind](stated["model"], used | added)


def _word_piece(model: dict[str, Any], used: set[int]) -> tuple[set[int], Any]:
    prefix, vocab = model["continuing_subword_prefix"], model["vocab"]
    alphabet = {i for piece, i in vocab.items() if piece in (piece[-1:], prefix + piece[-1:])}
    unknown = vocab[model["unk_token"]]
    # A character with no piece of its own can be reached only through the pieces that hold it.
    lone = {
        i
        for piece, i in vocab.items()
        if any(single not in vocab for single in _singles(piece, prefix)) and not _bracketed(piece)
    }
    kept = used | alphabet | lone | {unknown}

    def cut(moved: dict[int, int]) -> dict[str, Any]:
        return {**model, "vocab": {piece: moved[i] for piece, i in vocab.items() if i in moved}}

    return kept, cut


def _singles(piece: str, prefix: str) -> list[str]:
    """Return the pieces of one character that a piece falls apart into."""
    inside = piece.startswith(prefix) and len(piece) > len(prefix)
    body = piece[len(prefix) :] if inside else piece
    return [prefix + c if inside or i else c for i, c in enumerate(body)]


def _bracketed(piece: str) -> bool:
    """Return whether a piece is a place holder such as `[unused7]`, which no text makes."""
    return piece.startswith("[") and piece.endswith("]") and len(piece) > 2


def _bpe(model: dict[str, Any], used: set[int]) -> tuple[set[int], Any]:
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    odd += ["ignore_merges"] if model.get("ignore_merges") else []
    if odd:
        raise WrongInput(
            f"This BPE tokenizer uses {', '.join(odd)}, with which its vocabulary cannot be trimmed "
            "exactly. Export without --vocabulary trim."
        )
    vocab = model["vocab"]
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    rank = {pair: i for i, pair in enumerate(pairs)}
    names = {i: piece for piece, i in vocab.items()}
    needed: set[tuple[str, ...]] = set()
    for i in used:
        needed |= _merges_of(names.get(i, ""), rank)
    kept = used | {i for piece, i in vocab.items() if len(piece) == 1 or _is_byte(piece)}
    kept |= {vocab["".join(pair)] for pair in needed}
    if model.get("unk_token") is not None:
        kept.add(vocab[model["unk_token"]])

    def cut(moved: dict[int, int]) -> dict[str, Any]:
        merges = [list(pair) for pair in pairs if pair in needed]
        return {
            **model,
            "vocab": {piece: moved[i] for piece, i in vocab.items() if i in moved},
            "merges": merges,
        }

    return kept, cut


def _merges_of(piece: str, rank: dict[tuple[str, ...], int]) -> set[tuple[str, ...]]:
    """Return the merges by which BPE makes a piece of its characters."""
    parts = list(piece)
    applied: set[tuple[str, ...]] = set()
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        best = min(range(len(pairs)), key=lambda i: (rank.get(pairs[i], len(rank)), i))
        if pairs[best] not in rank:
            break
        applied.add(pairs[best])
        parts[best : best + 2] = ["".join(pairs[best])]
    return applied


def _unigram(model: dict[str, Any], used: set[int]) -> tuple[set[int], Any]:
    pieces = [piece for piece, _ in model["vocab"]]
    scores = [score for _, score in model["vocab"]]
    singles = {piece for piece in pieces if len(piece) == 1}
    kept = set(used) | {i for i, piece in enumerate(pieces) if len(piece) == 1 or _is_byte(piece)}
    kept |= {i for i, piece in enumerate(pieces) if not set(piece) <= singles and not _bracketed(piece)}
    # An unknown character costs ten less than the least likely piece: that piece sets the price.
    kept.add(int(np.argmin(scores)))
    if model.get("unk_id") is not None:
        kept.add(int(model["unk_id"]))

    def cut(moved: dict[int, int]) -> dict[str, Any]:
        vocab = [entry for i, entry in enumerate(model["vocab"]) if i in moved]
        unknown = model.get("unk_id")
        return {**model, "vocab": vocab, "unk_id": None if unknown is None else moved[unknown]}

    return kept, cut


def _is_byte(piece: str) -> bool:
    """Return whether a piece stands for one byte, such as `<0x0A>`."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


_KINDS = {"WordPiece": _word_piece, "BPE": _bpe, "Unigram": _unigram}


def _rebuild(tokenizer: Any, model: dict[str, Any], moved: dict[int, int]) -> Any:
    """Return a Hugging Face tokenizer with another `model` and its ids moved."""
    with TemporaryDirectory() as name, quiet():
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer.json"
        stated = json.loads(path.read_text(encoding="utf-8"))
        stated["model"] = model
        stated["truncation"] = stated["padding"] = None
        for token in stated["added_tokens"]:
            token["id"] = moved[token["id"]]
        stated["post_processor"] = _move_specials(stated["post_processor"], moved)
        path.write_text(json.dumps(stated, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _move_specials(processor: Any, moved: dict[int, int]) -> Any:
    """Return a post-processor with the ids of its special tokens moved."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    kind = made.get("type")
    if kind == "Sequence":
        made["processors"] = [_move_specials(inner, moved) for inner in made["processors"]]
    elif kind == "TemplateProcessing":
        made["special_tokens"] = {
            name: {**token, "ids": [moved[i] for i in token["ids"]]}
            for name, token in made["special_tokens"].items()
        }
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            made[key] = [made[key][0], moved[made[key][1]]]
    return made
