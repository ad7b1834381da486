"""A compiled student computes and learns what the plain one does, or is refused with a reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stillroom.encoder import Needs
from stillroom.errors import WrongInput
from stillroom.training import compiling
from stillroom.training.compiling import compiled_blocks, require_compilable
from stillroom.training.loop import Job, train
from tiny import make_batch_of, make_encoder, make_job, make_rows, make_task

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
COMPILER = any(map(shutil.which, compiling._COMPILERS))


def without_dropout(job: Job) -> Job:
    job.student.config.attention_probs_dropout_prob = 0.0
    for module in job.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return job


def losses(job: Job) -> list[float]:
    lines = [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        # Traced and differentiated ahead as for a compiler, but run by torch's own kernels.
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not any(map(shutil.which, compiling._COMPILERS)), reason="no compiler"
            ),
        ),
    ],
)
def test_a_compiled_run_learns_what_a_plain_one_learns(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", backend)
    settings: dict[str, Any] = {"epochs": 1, "options": {"switch": 0.5}, "checkpoint_every": 1000}
    plain = without_dropout(make_job(tmp_path / "plain", **settings))
    train(plain, QUIET)
    calls: list[int] = []
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(1) or compiled(*a, **k))
    job = without_dropout(make_job(tmp_path / "compiled", compile=True, **settings))
    train(job, QUIET)
    assert len(calls) == job.student.depth
    assert losses(job) == pytest.approx(losses(plain), rel=1e-5)
    want = plain.student.model.state_dict()
    for name, value in job.student.model.state_dict().items():
        if not name.endswith("key.bias"):
            # Its gradient is 0 but for rounding, which Adam makes as large as any.
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not any("forward" in vars(block) for block in job.student.blocks()[1])


def test_evaluation_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(*_: Any, **named: Any) -> Any:
        asked.append(named)
        return lambda *_, **__: pytest.fail("compiled")

    monkeypatch.setattr(torch, "compile", compiled)
    student = make_encoder().eval()
    batch = make_batch_of(make_rows(make_task(), 6), student)
    want = student(batch.student, Needs(logits=True)).logits
    student.packed = True
    with compiled_blocks(student):
        assert not student.packed
        assert torch.equal(student(batch.student, Needs(logits=True)).logits, want)
    # Of sizes that are fixed each length of batch would be compiled anew.
    assert [named["dynamic"] for named in asked] == [True] * student.depth
    assert student.packed and not any("forward" in vars(block) for block in student.blocks()[1])


def test_what_cannot_be_compiled_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    student = make_encoder()
    require_compilable(student, Needs(hidden_states=frozenset({1})), CPU)
    with pytest.raises(WrongInput, match="a term of this method reads scores.*training.compile=false"):
        require_compilable(student, Needs(attention_scores=frozenset({1})), CPU)
    with pytest.raises(WrongInput, match="reads scores"):
        train(make_job(tmp_path, method="minilm", compile=True), QUIET)
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    with pytest.raises(WrongInput, match=r"needs a C\+\+ compiler, found none of c\+\+"):
        require_compilable(student, Needs(), CPU)
    require_compilable(student, Needs(), torch.device("cuda"))
