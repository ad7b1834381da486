"""A trimmed vocabulary: the same tokens and logits for text of kept pieces, never unknown for other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from workspace import write_data

from exports import QUIET, Exported
from stillroom import RunFailed, WrongInput, encoder, export
from stillroom.data.batching import pad
from stillroom.data.tasks import Rows
from stillroom.deploy.predictor import Predictor
from stillroom.deploy.vocabulary import (
    _merges_of,
    _unigram,
    coverage,
    piece_counts,
    read_texts,
    trim,
    with_room,
)
from stillroom.encoder import Encoder, Needs, weights_hash
from tiny import WORDS, make_encoder, make_rows, make_task, make_teacher, make_tokens

CORPUS = [" ".join(words) for words in zip(WORDS, WORDS[3:], WORDS[7:], strict=False)] * 3
KEPT = ["the film is never good", "quite a dull plot but fine scene"]
OTHER = ["goodness", "thefilm manwoman", "zebra", "dogs hated cats", "a-b-c"]

BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}


def word_piece() -> Any:
    """A WordPiece of words, of their parts and of every letter, with place holders before the specials."""
    letters = [chr(ord("a") + i) for i in range(26)] + ["-"]
    parts = [
        "good",
        "##ness",
        "the",
        "##film",
        "film",
        "man",
        "##wo",
        "##man",
        "zeb",
        "##ra",
        "##s",
        "##ed",
    ]
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{c}" for c in letters), *WORDS, *parts]
    backend = Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 4), ("[SEP]", 5)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", model_input_names=names, **BERT
    )


def byte_pairs() -> Any:
    """RoBERTa's: byte-level BPE whose padding has id 1."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *OTHER * 4], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        **ROBERTA,
    )


def unigrams() -> Any:
    """XLM-RoBERTa's: Unigram with a mark for spaces, `<mask>` added at the end."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *OTHER * 4], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        **ROBERTA,
    )


def encoder_with(tokenizer: Any, family: str) -> Encoder:
    """Return a tiny encoder of a family that reads another tokenizer."""
    made = make_encoder(family)
    config = made.config
    config.vocab_size = len(tokenizer)
    for name in ("pad", "cls", "sep"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    torch.manual_seed(0)
    return Encoder(type(made.model)(config).eval(), tokenizer)  # type: ignore[call-arg, arg-type]


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "WordPiece": (word_piece, "bert"),
    "BPE": (byte_pairs, "roberta"),
    "Unigram": (unigrams, "xlm-roberta"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: Encoder, texts: list[str]) -> torch.Tensor:
    rows = Rows("texts", (texts,), np.zeros(len(texts), dtype=np.int64))
    tokens = make_tokens(rows, model, max_length=60)
    with torch.no_grad():
        return model(pad(tokens, np.arange(len(texts))), Needs(logits=True)).logits


def trimmed(kind: str) -> tuple[Encoder, Encoder]:
    make, family = KINDS[kind]
    whole = encoder_with(make(), family)
    return whole, trim(whole, piece_counts(whole.tokenizer, KEPT))


@every_kind
def test_texts_of_kept_pieces_have_the_same_tokens_and_logits(kind: str) -> None:
    whole, small = trimmed(kind)
    assert len(small.tokenizer) < len(whole.tokenizer)
    assert small.config.vocab_size == len(small.tokenizer)
    mixed = ["the good never is film", "quite fine scene but dull", *KEPT]
    for text in mixed:
        assert small.tokenizer.tokenize(text) == whole.tokenizer.tokenize(text)
    assert torch.equal(logits(small, mixed), logits(whole, mixed))
    # Padding and special tokens lead to their own rows.
    for name in ("pad", "cls", "sep", "unk", "mask"):
        old = getattr(whole.tokenizer, f"{name}_token_id")
        new = getattr(small.tokenizer, f"{name}_token_id")
        table, smaller = (e.model.get_input_embeddings().weight for e in (whole, small))  # type: ignore[operator]
        assert torch.equal(table[old], smaller[new]), name
    for name in ("pad", "cls", "sep"):
        assert getattr(small.config, f"{name}_token_id") == getattr(small.tokenizer, f"{name}_token_id")
    assert small.model.get_input_embeddings().padding_idx == small.tokenizer.pad_token_id  # type: ignore[operator]


@every_kind
def test_other_texts_fall_into_kept_pieces_and_never_into_unknown(kind: str) -> None:
    whole, small = trimmed(kind)
    changed = 0
    for text in [*OTHER, *CORPUS]:
        before, after = whole.tokenizer(text)["input_ids"], small.tokenizer(text)["input_ids"]
        assert whole.tokenizer.unk_token_id not in before
        assert small.tokenizer.unk_token_id not in after
        assert max(after) < len(small.tokenizer)
        kept = small.tokenizer.get_vocab().keys()
        names = whole.tokenizer.convert_ids_to_tokens(before)
        # Exactly the texts that lost a piece are tokenised otherwise.
        same = names == small.tokenizer.convert_ids_to_tokens(after)
        assert same == (set(names) <= kept)
        changed += not same
    assert changed
    unknown = "日"
    if kind != "BPE":
        assert whole.tokenizer.unk_token_id in whole.tokenizer(unknown)["input_ids"]
        assert small.tokenizer.unk_token_id in small.tokenizer(unknown)["input_ids"]


@every_kind
def test_a_trimmed_model_saves_and_loads(kind: str, tmp_path: Path) -> None:
    _, small = trimmed(kind)
    small.save(tmp_path / "m")
    again = encoder.load(str(tmp_path / "m"))
    texts = [*KEPT, *OTHER]
    assert torch.equal(logits(again, texts), logits(small, texts))


def test_the_source_stays_as_it_was() -> None:
    whole = encoder_with(word_piece(), "bert")
    before = weights_hash(whole.model), len(whole.tokenizer), whole.config.vocab_size
    trim(whole, piece_counts(whole.tokenizer, KEPT))
    assert before == (weights_hash(whole.model), len(whole.tokenizer), whole.config.vocab_size)


def test_what_is_kept_of_a_word_piece() -> None:
    """By hand: the pieces of the text, all letters with their continuations, the special tokens."""
    whole = encoder_with(word_piece(), "bert")
    small = trim(whole, piece_counts(whole.tokenizer, ["goodness"]))
    letters = {chr(ord("a") + i) for i in range(26)} | {"-"}
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    expected = special | letters | {f"##{c}" for c in letters} | {"good", "##ness"}
    assert small.tokenizer.get_vocab().keys() == expected


def test_a_piece_whose_letter_has_no_piece_of_its_own_is_kept() -> None:
    """Without `##q` in the vocabulary, only the pieces that hold a q keep it from being unknown."""
    tokenizer = word_piece()
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = stated["model"]["vocab"]
    vocab["##zzq"] = vocab.pop("##q")
    backend = Tokenizer.from_str(json.dumps(stated))
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **BERT)
    whole = encoder_with(odd, "bert")
    small = trim(whole, piece_counts(odd, ["the film"]))
    assert "##zzq" in small.tokenizer.get_vocab() and "##ness" not in small.tokenizer.get_vocab()
    assert small.tokenizer.unk_token_id not in small.tokenizer("azzq")["input_ids"]


def test_a_vocabulary_has_room_for_the_most_frequent_pieces_of_the_first_corpus_first() -> None:
    whole = encoder_with(word_piece(), "bert")
    vocab = whole.tokenizer.get_vocab()
    first = piece_counts(whole.tokenizer, ["the film film", "film"])
    second = piece_counts(whole.tokenizer, ["good the", "good", "dull"])
    assert first[vocab["film"]] == 3 and first[vocab["[CLS]"]] == 2
    # 27 letters with their continuations, five special tokens.
    least = 2 * 27 + 5
    expected = ["film", "the", "good", "dull"]
    for room in range(5):
        small = trim(whole, with_room(whole, [first, second], least + room))
        assert small.tokenizer.get_vocab().keys() & set(expected) == set(expected[:room])
        assert len(small.tokenizer) == least + room
    assert len(trim(whole, with_room(whole, [first, second], 1000)).tokenizer) == least + 4
    with pytest.raises(WrongInput, match=r"at least 59 pieces.*--pieces 58"):
        with_room(whole, [first], 58)


def test_more_text_adds_its_pieces_to_those_of_the_training_split(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there is no room for all, those of the training split come first."""
    (tmp_path / "text.txt").write_text("goodness\n")
    seen: list[Any] = []

    def spy(model: Encoder, corpora: Any, pieces: int) -> set[int]:
        seen.extend(corpora)
        return with_room(model, corpora, pieces)

    monkeypatch.setattr("stillroom.deploy.export.with_room", spy)
    options: dict[str, Any] = {"dataset": str(model / "data"), "console": QUIET, "formats": "torch"}
    found = [
        export(model / "model", tmp_path / str(i), vocabulary="trim", text=text, pieces=most, **options)
        for i, (text, most) in enumerate((([], None), ([tmp_path / "text.txt"], 10_000)))
    ]
    found = [each["vocabulary"] for each in found]
    assert sum(seen[0].values()) > sum(seen[1].values()) == len(seen[1]) > 0
    assert found[1]["pieces"] == found[0]["pieces"] + 1
    assert found[1]["corpus"] == ["training split", str(tmp_path / "text.txt")]


def test_coverage_counts_tokens_and_rows() -> None:
    whole = encoder_with(word_piece(), "bert")
    small = trim(whole, piece_counts(whole.tokenizer, ["the film"]))
    texts = ["the film", "the zebra", "film"]
    rows = Rows("texts", (texts,), np.zeros(3, dtype=np.int64))
    # Tokens with [CLS] and [SEP]: 4, 5 (the zeb ##ra) and 3; zeb and ##ra are gone.
    found = coverage(make_tokens(rows, whole), make_tokens(rows, small), small, whole)
    assert found.tokens == pytest.approx(10 / 12)
    assert found.rows == pytest.approx(2 / 3)
    # RoBERTa's first id stands in every row.
    whole, small = trimmed("BPE")
    rows = Rows("texts", (KEPT,), np.zeros(2, dtype=np.int64))
    found = coverage(make_tokens(rows, whole), make_tokens(rows, small), small, whole)
    assert (found.tokens, found.rows) == (1.0, 1.0)


def test_padding_keeps_its_id_whatever_stands_before_it() -> None:
    """RoBERTa counts positions from there."""
    tokenizer = word_piece()
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = stated["model"]["vocab"]
    vocab["[PAD]"], vocab["[unused0]"] = vocab["[unused0]"], vocab["[PAD]"]
    for token in stated["added_tokens"]:
        token["id"] = vocab[token["content"]]
    backend = Tokenizer.from_str(json.dumps(stated))
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **BERT)
    assert odd.pad_token_id == 1
    whole = encoder_with(odd, "bert")
    assert trim(whole, piece_counts(odd, KEPT)).tokenizer.pad_token_id == 1


def test_merges_are_those_of_the_leftmost_pairs() -> None:
    rank = {("a", "a"): 0, ("aa", "a"): 1, ("a", "aa"): 2}
    assert _merges_of("aaa", rank) == {("a", "a"), ("aa", "a")}


def test_the_least_likely_piece_stays_for_the_price_of_unknown_characters() -> None:
    vocab = [["<unk>", 0.0], ["a", -1.0], ["ab", -9.0], ["b", -2.0], ["ba", -3.0]]
    assert _unigram({"vocab": vocab, "unk_id": 0}, set())[0] == {0, 1, 2, 3}


def test_vocabularies_that_cannot_be_cut_exactly_are_refused() -> None:
    with pytest.raises(WrongInput, match="WordLevel tokenizer cannot be trimmed"):
        trim(make_encoder(), {5})
    tokenizer = byte_pairs()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(WrongInput, match="BPE tokenizer uses dropout"):
        trim(encoder_with(tokenizer, "roberta"), {5})


def test_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the film\n\ngood", encoding="utf-8")
    assert list(read_texts([tmp_path / "a"])) == ["the film", "", "good"]
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for name in ("b", "nothing"):
        with pytest.raises(WrongInput, match="Check --text"):
            list(read_texts([tmp_path / name]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that solves the toy task and reads WordPiece."""
    folder = tmp_path_factory.mktemp("trim")
    teacher = make_teacher()
    tokenizer = word_piece()
    old, new = teacher.tokenizer.get_vocab(), tokenizer.get_vocab()
    table = teacher.model.get_input_embeddings().weight.data  # type: ignore[operator]
    made = torch.nn.Embedding(len(tokenizer), table.shape[1], padding_idx=0)
    for piece, i in new.items():
        made.weight.data[i] = table[old.get(piece, 1)]
    teacher.model.set_input_embeddings(made)  # type: ignore[operator]
    teacher.config.vocab_size = len(tokenizer)
    Encoder(teacher.model, tokenizer).save(folder / "model")
    write_data(folder / "data")
    return folder


def test_a_trimmed_export_is_smaller_and_loses_nothing(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": str(model / "data"), "console": QUIET, "formats": "onnx"}
    whole = export(model / "model", tmp_path / "whole", **options)
    small = export(model / "model", tmp_path / "small", vocabulary="trim", **options)
    found = small["vocabulary"]
    assert found["pieces"] < found["of"] == len(word_piece())
    assert found["coverage"] == {"tokens": 1.0, "rows": 1.0} and found["drop"] == 0.0
    assert found["corpus"] == ["training split"] and whole["vocabulary"] is None
    assert small["forms"]["onnx"]["bytes"] < whole["forms"]["onnx"]["bytes"]
    assert small["source"] == whole["source"]
    texts = make_rows(make_task(), 20, seed=3).texts[0]
    logits = [Predictor.load(tmp_path / name, threads=1).logits(texts) for name in ("whole", "small")]
    assert np.allclose(*logits, atol=1e-5)


def test_trimming_that_loses_too_much_fails(model: Path, tmp_path: Path) -> None:
    """There is room for the letters and for hardly any word."""
    (tmp_path / "text.txt").write_text("the film is\n")
    with pytest.raises(RunFailed, match=r"Trimming the vocabulary loses .* points"):
        export(
            model / "model",
            tmp_path / "export",
            formats="onnx",
            dataset=str(model / "data"),
            vocabulary="trim",
            text=[tmp_path / "text.txt"],
            pieces=62,
            console=QUIET,
        )
    assert not (tmp_path / "export").exists()


def test_word_level_models_are_refused_before_anything_is_written(
    exported: Exported, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput, match="would become unknown"):
        export(
            exported.model,
            tmp_path / "export",
            dataset=str(exported.data),
            vocabulary="trim",
            console=QUIET,
        )
    assert not (tmp_path / "export").exists()
