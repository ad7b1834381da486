import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from stillroom.encoder import Needs
from stillroom.training import loop
from stillroom.training.schedule import Schedule
from stillroom.training.vocabulary import Vocabulary, trained_words, whole_table
from tiny import FAMILIES, logits_of, make_batch_of, make_encoder, make_job, make_rows, make_task

QUIET = Console(quiet=True)


@contextmanager
def all_words(*_: Any) -> Any:
    """Stand in for `trained_words`: the plain path, in which the whole table is trained."""
    yield None


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_the_whole_table(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"family": family, "count": 24, "weight_decay": 0.1, "select": "last"}
    few = make_job(tmp_path / "few", **given)
    used = np.unique(few.student_tokens.ids)
    start = few.student.model.get_input_embeddings().weight.detach().clone()
    loop.train(few, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "trained_words", all_words)
        whole = make_job(tmp_path / "whole", **given)
        loop.train(whole, QUIET)
    assert losses_of(tmp_path / "few") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    found, want = few.student.model.state_dict(), whole.student.model.state_dict()
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=name)
    # A word that no row has is only decayed: the product over steps of (1 - rate * decay), in float64.
    unused = [i for i in range(4, len(start)) if i not in used]
    assert unused
    schedule = Schedule(few.student_tokens.lengths, few.plan, few.settings)
    factor = np.prod([1 - schedule.learning_rate(step) * 0.1 for step in range(schedule.steps)])
    after = few.student.model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(after[unused].double(), start[unused].double() * factor, rtol=3e-7, atol=0)


def test_only_used_rows_are_trained(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    model: Any = job.student.model
    plain = model.get_input_embeddings()
    used = set(job.student_tokens.ids.tolist()) | {job.student_tokens.pad_id}
    with trained_words(job.student, job.student_tokens.ids) as words:
        assert words is not None and words.weight.shape == (len(used), 16)
        assert len(used) < plain.num_embeddings
        assert sum(p.numel() for p in plain.parameters()) not in {p.numel() for p in model.parameters()}
    assert model.get_input_embeddings() is plain


def test_a_word_that_is_not_trained_is_an_error() -> None:
    words = Vocabulary(nn.Embedding(6, 2), torch.tensor([0, 1, 4]))
    with pytest.raises(IndexError):
        words(torch.tensor([[1, 3]]))


def test_padding_gets_no_gradient() -> None:
    words = Vocabulary(nn.Embedding(6, 2, padding_idx=3), torch.tensor([1, 3]))
    words(torch.tensor([[3, 1, 1]])).sum().backward()
    assert words.weight.grad is not None
    assert words.weight.grad.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_evaluation_reads_words_that_training_does_not() -> None:
    task = make_task()
    student = make_encoder(task=task)
    batch = make_batch_of(make_rows(task, 8), student)
    want = logits_of(student, batch.student)
    with trained_words(student, np.array([2, 3])) as words, torch.no_grad():
        assert words is not None
        with pytest.raises(IndexError):
            student(batch.student, Needs(logits=True))
        with whole_table(student, words):
            found = student(batch.student, Needs(logits=True)).logits
        assert student.model.get_input_embeddings() is words
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_decay_reaches_rows_without_gradient_and_only_in_steps_that_decay() -> None:
    table = nn.Embedding.from_pretrained(torch.ones(3, 1), freeze=False)
    words = Vocabulary(table, torch.tensor([1]))
    words.after_step(0.5)  # AdamW passes over a parameter without gradient, so nothing decays
    words(torch.tensor([1])).sum().backward()
    words.after_step(0.5)
    words.after_step(0.25)
    assert words.whole().weight.flatten().tolist() == [0.375, 1.0, 0.375]
    assert words.whole().weight.flatten().tolist() == [0.375, 1.0, 0.375]


def test_state_dict_is_that_of_the_whole_table() -> None:
    student, other = make_encoder(), make_encoder(seed=5)
    want = {name: value.clone() for name, value in student.model.state_dict().items()}
    with trained_words(student, np.array([2, 3, 7])) as words:
        found = student.model.state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], value) for name, value in want.items())
        student.model.load_state_dict(other.model.state_dict())
        table = other.model.get_input_embeddings().weight
        assert words is not None and torch.equal(words.weight, table[[0, 2, 3, 7]])
        assert torch.equal(words.whole().weight, table)


@pytest.mark.parametrize("kind", ["tied", "scaled", "frozen", "used", "any"])
def test_a_table_that_cannot_be_told_apart_is_left_alone(kind: str) -> None:
    student = make_encoder()
    model: Any = student.model
    table = model.get_input_embeddings()
    ids: np.ndarray | None = None if kind == "any" else np.array([2, 3])
    if kind == "tied":
        model.decoder = nn.Linear(16, table.num_embeddings, bias=False)
        model.decoder.weight = table.weight
    elif kind == "scaled":
        table.scale_grad_by_freq = True
    elif kind == "frozen":
        table.weight.requires_grad_(False)
    elif kind == "used":
        ids = np.arange(table.num_embeddings)
    with trained_words(student, ids) as words:
        assert words is None and model.get_input_embeddings() is table


def test_a_failed_training_leaves_the_whole_table() -> None:
    student = make_encoder()
    table = student.model.get_input_embeddings()
    with pytest.raises(RuntimeError), trained_words(student, np.array([2, 3])) as words:
        assert words is not None
        with torch.no_grad():
            words.weight += 1
        raise RuntimeError
    assert student.model.get_input_embeddings() is table
    torch.testing.assert_close(table.weight[2], make_encoder().model.get_input_embeddings().weight[2] + 1)
