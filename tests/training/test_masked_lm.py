"""Guessing words: what is hidden, what is learnt, and what comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForMaskedLM

from stillroom import generator
from stillroom.data.batching import Inputs
from stillroom.data.tasks import Rows
from stillroom.errors import WrongInput
from stillroom.run.generator import make, read_texts
from stillroom.training.augmentation import masked_positions
from stillroom.training.masked_lm import GUESSED, Guessing, Settings, corrupt
from tiny import make_encoder, make_generator, make_rows, make_task, make_tokens, save_encoder

QUIET = Console(quiet=True)
SPECIAL = frozenset({0, 1, 2, 3, 4})
RULES: dict[str, Any] = {"special": SPECIAL, "mask_id": 4, "vocabulary": 30, "seed": 0}


def make_inputs(rows: int = 200, width: int = 30) -> Inputs:
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (rows, width))
    ids[:, 0], ids[:, -1] = 2, 3
    return Inputs(ids, torch.ones_like(ids), None)


def test_shares_of_hidden_changed_and_kept_words() -> None:
    """80 % mask, 10 % a random word, 10 % as it was; 3.2 % of random words are the old one by chance."""
    inputs, rows = make_inputs(), torch.arange(200)
    words = inputs.input_ids.numel() - 400
    found: list[Tensor] = []
    guessed = 0
    for draw in range(20):
        changed, positions = corrupt(inputs, rows, **RULES, draw=draw)
        old, new = (x.flatten()[positions] for x in (inputs.input_ids, changed.input_ids))
        found.append(torch.stack([new == 4, (new != 4) & (new != old), new == old]).float().mean(1))
        guessed += len(positions)
        assert not (torch.isin(new, torch.tensor([0, 1, 2, 3]))).any()
        untouched = np.delete(changed.input_ids.numpy().ravel(), positions)
        assert np.array_equal(untouched, np.delete(inputs.input_ids.numpy().ravel(), positions))
    assert guessed / (20 * words) == pytest.approx(GUESSED, abs=0.005)
    shares = torch.stack(found).mean(0).tolist()
    assert shares == pytest.approx([0.8, 0.1 * 24 / 25, 0.1 + 0.1 / 25], abs=0.01)


def test_corruption_is_a_function_of_its_arguments() -> None:
    inputs, rows = make_inputs(), torch.arange(200)
    first, again, other = (corrupt(inputs, rows, **RULES, draw=draw)[0].input_ids for draw in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    want = masked_positions(inputs, rows, special=SPECIAL, probability=GUESSED, seed=0, draw=1)
    assert torch.equal(corrupt(inputs, rows, **RULES, draw=1)[1], want)


def test_held_out_loss_is_the_mean_over_all_guesses() -> None:
    """A mean of batch means would weigh words of short batches more."""
    model, rows = make_generator(), make_rows(make_task(), 40)
    encoder = make_encoder()
    tokens = make_tokens(rows, encoder)
    task = Guessing(model, seed=0, bf16=False)
    total, count = 0.0, 0
    for row in range(len(rows)):
        ids = torch.tensor([encoder.tokenizer(rows.texts[0][row])["input_ids"]])
        inputs = Inputs(ids, torch.ones_like(ids), None)
        positions = masked_positions(
            inputs, torch.tensor([row]), special=SPECIAL, probability=GUESSED, seed=0, draw=0
        )
        count += len(positions)
    losses = [task.losses(tokens, np.arange(40), 0)]
    total = float(torch.cat(losses).sum().detach())
    assert len(losses[0]) == count > 0
    assert task.held_out_loss(tokens) == pytest.approx(total / count, rel=0.02)


def lines(count: int) -> Rows:
    """Return texts of two words, the second of which follows from the first."""
    pairs = (("cat", "liked"), ("dog", "hated"), ("man", "saw"), ("woman", "here"))
    texts = [" ".join(pairs[i % 4] * 3) for i in range(count)]
    return Rows("lines", (texts,), np.zeros(count, dtype=np.int64))


def test_a_generator_learns_its_text_and_loads_as_a_masked_lm(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    settings = Settings(epochs=8, learning_rate=1e-2, batch_size=16, max_length=32)
    found = make(str(encoder), (lines(160), lines(40)), tmp_path / "generator", settings, QUIET)
    # Eight words occur: knowing them alone is ln 8.
    assert found["loss"]["after"] < 1.5 < 3.0 < found["loss"]["before"]
    assert found["perplexity"]["after"] == pytest.approx(np.exp(found["loss"]["after"]))
    assert found["steps"] == 80
    assert not list((tmp_path / "generator").glob("*.bin"))
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "generator", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    again = generator.load(str(tmp_path / "generator"))
    guess = Guessing(again, seed=0, bf16=False).held_out_loss(make_tokens(lines(40), make_encoder()))
    # Trained in bf16 where the machine has it.
    assert guess == pytest.approx(found["loss"]["after"], rel=0.05)
    with pytest.raises(WrongInput, match="new or empty"):
        make(str(encoder), (lines(16), lines(4)), tmp_path / "generator", settings, QUIET)


def test_texts_are_lines_and_every_twentieth_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f" line {i} \n" for i in range(41)))
    train, held_out = read_texts([tmp_path / "a.txt"])
    assert held_out.texts[0] == ["line 0", "line 20", "line 40"]
    assert len(train) == 38 and train.texts[0][0] == "line 1"


def test_texts_are_those_that_pretraining_reads(tmp_path: Path) -> None:
    table = pa.table({"text": ["one line\nand another", "a third", " "], "id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a row"}\n')
    train, held_out = read_texts([tmp_path])
    assert held_out.texts[0] == ["a row"]
    assert train.texts[0] == ["one line", "and another", "a third"]


def test_texts_that_cannot_be_read_or_are_too_few_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one line\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("one.txt", "at least 2 lines .* found 1"),
        ("bytes.txt", "at byte 0: expected UTF-8 text"),
        ("missing.txt", "found nothing at .*missing.txt"),
        ("folder", "folder holds no text"),
    ):
        with pytest.raises(WrongInput, match=message):
            read_texts([tmp_path / name])


def test_a_model_without_head_is_no_generator(tmp_path: Path) -> None:
    """A head at random would write random words, and the student would learn to ignore them."""
    encoder = save_encoder(tmp_path / "encoder")
    with pytest.raises(WrongInput, match=r"no masked-LM head .* `stillroom generator --model"):
        generator.load(str(encoder))
    assert generator.load(str(encoder), fresh_head=True).model.base_model is not None


def test_another_architecture_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    make_generator().save(tmp_path / "generator")
    weights = tmp_path / "generator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WrongInput, match="damaged, or another than was written"):
        generator.load(str(tmp_path / "generator"))
    (tmp_path / "generator" / "sums.json").unlink()
    with pytest.raises(WrongInput, match="damaged"):
        generator.load(str(tmp_path / "generator"))
    (tmp_path / "generator" / "config.json").write_text("[]")
    with pytest.raises(WrongInput, match="cannot be loaded as a masked language model"):
        generator.load(str(tmp_path / "generator"))
    with pytest.raises(WrongInput, match="found none"):
        generator.load(str(tmp_path / "nothing"))


def test_a_tokenizer_without_mask_token_is_refused(tmp_path: Path) -> None:
    made = make_generator()
    made.tokenizer.mask_token = None
    made.save(tmp_path / "generator")
    with pytest.raises(WrongInput, match="no mask token"):
        generator.load(str(tmp_path / "generator"))


def test_saved_generator_is_the_same(tmp_path: Path) -> None:
    made = make_generator()
    made.save(tmp_path / "generator")
    again = generator.load(str(tmp_path / "generator"))
    inputs = make_inputs(rows=2, width=6)
    positions = torch.tensor([1, 8])
    assert torch.equal(made.guess(inputs, positions), again.guess(inputs, positions))
    assert again.positions == made.positions
