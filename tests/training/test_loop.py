"""What the loop trains, shows, selects and leaves alone."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from stillroom.data.batching import Batch
from stillroom.encoder import Encoder, Needs, Outputs, weights_hash
from stillroom.methods.base import Plan, Stage, Term
from stillroom.methods.prediction import HardLabels
from stillroom.training.loop import train
from stillroom.training.schedule import Schedule
from tiny import make_batch_of, make_encoder, make_job, run_job, steps_of


@pytest.mark.parametrize("name", ["keys", "values", "items", "training", "a.b", ""])
def test_a_term_is_not_named_like_a_part_of_torchs_module(name: str) -> None:
    """`nn.ModuleDict` raises KeyError for these, in the middle of a run's start."""
    with pytest.raises(ValueError, match=f"expected names of terms .* found '{name}'"):
        Plan({name: HardLabels("classification")}, (Stage(0.0, {name: 1.0}),))


@pytest.mark.parametrize(
    ("method", "term", "factor"), [("none", "hard", 0.2), ("kd", "hard", 0.6), ("lrc-bert", "cos_nce", 0.9)]
)
def test_training_reduces_the_loss(tmp_path: Path, method: str, term: str, factor: float) -> None:
    settings = {"epochs": 12, "learning_rate": 1e-2, "select": "last", "checkpoint_every": 1000}
    job = make_job(tmp_path, method=method, **settings)
    assert run_job(job).steps == 72
    values = [line[term] for line in steps_of(job)]
    # Medians: dropout may spoil one small batch.
    assert np.median(values[-6:]) < factor * np.median(values[:6])


@pytest.mark.parametrize("options", [{}, {"vector": "mean", "negatives": "bank"}])
def test_same_seed_gives_the_same_student_and_another_seed_another(
    tmp_path: Path, options: dict[str, str]
) -> None:
    hashes = []
    for i, seed in enumerate((0, 0, 1)):
        job = make_job(tmp_path / str(i), options=options, seed=seed)
        start = weights_hash(job.student.model)
        # What stands in the global state before the run must not matter.
        torch.manual_seed(1000 + i)
        run_job(job)
        assert weights_hash(job.student.model) != start
        hashes.append(weights_hash(job.student.model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    teacher = job.teacher.module
    before = weights_hash(teacher)
    run_job(job)
    assert weights_hash(teacher) == before
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_student_is_trained_in_training_mode_and_left_in_evaluation_mode(tmp_path: Path) -> None:
    modes: list[bool] = []
    job = make_job(tmp_path, evaluate_every=0.5)
    job.student.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    run_job(job)
    # Two passes a step, and an evaluation (one pass) after each third step.
    assert modes == ([True] * 6 + [False]) * 4
    assert not job.student.training


def test_bar_tells_name_steps_and_rate(tmp_path: Path) -> None:
    shown = io.StringIO()
    train(make_job(tmp_path), Console(file=shown, force_terminal=True, width=120))
    assert "tiny" in shown.getvalue() and "12/12" in shown.getvalue() and "examples/s" in shown.getvalue()


def scripted(values: list[float], hashes: list[str]) -> Callable[[Encoder], dict[str, float]]:
    """Return an evaluation that gives these scores, and notes the student it was asked for."""

    def evaluate(encoder: Encoder) -> dict[str, float]:
        hashes.append(weights_hash(encoder.model))
        # Only the first metric selects.
        return {"score": values[len(hashes) - 1], "other": -values[len(hashes) - 1]}

    return evaluate


SCORES = [0.1, 0.7, 0.7, 0.2, 0.4]


@pytest.mark.parametrize(("select", "chosen"), [("best", 1), ("last", 4)])
def test_selects_the_best_or_the_last(tmp_path: Path, select: str, chosen: int) -> None:
    hashes: list[str] = []
    job = make_job(tmp_path, method="kd", epochs=5, select=select, evaluate=scripted(SCORES, hashes))
    trained = run_job(job)
    assert len(set(hashes)) == 5
    assert weights_hash(job.student.model) == hashes[chosen]
    assert trained.best_step == (12 if select == "best" else None)


def test_patience_stops_after_so_many_evaluations_without_a_better_one(tmp_path: Path) -> None:
    hashes: list[str] = []
    job = make_job(tmp_path, method="kd", epochs=50, patience=2, evaluate=scripted(SCORES, hashes))
    trained = run_job(job)
    assert len(hashes) == 4 and trained.steps == 24
    assert weights_hash(job.student.model) == hashes[1]
    # Run again, it knows that it is done.
    again = make_job(tmp_path, method="kd", epochs=50, patience=2, evaluate=scripted(SCORES, []))
    assert run_job(again) == trained
    assert weights_hash(again.student.model) == hashes[1]


@pytest.mark.parametrize("method", ["lrc-bert", "tinybert", "minilm"])
@pytest.mark.parametrize("patience", [None, 1])
def test_a_stage_before_the_head_is_taught_selects_nothing(
    method: str, patience: int | None, tmp_path: Path
) -> None:
    # A student at chance has one score at every evaluation, and the earliest of equals is the best.
    job = make_job(
        tmp_path, method=method, epochs=20, patience=patience, evaluate=lambda encoder: {"score": 0.0}
    )
    first = [p.detach().clone() for p in job.student.model.classifier.parameters()]
    taught = Schedule(job.student_tokens.lengths, job.plan, job.settings)
    begin = next(s for s in range(taught.steps) if job.plan.student_needs(taught.stage(s)[1]).logits)
    trained = run_job(job)
    assert 0 < begin < trained.best_step <= trained.steps
    assert patience is None or trained.steps < taught.steps
    assert all(
        not torch.equal(old, new)
        for old, new in zip(first, job.student.model.classifier.parameters(), strict=True)
    )


def test_where_no_stage_teaches_the_head_all_evaluations_select(tmp_path: Path) -> None:
    hashes: list[str] = []
    job = make_job(tmp_path, options={"switch": 1}, epochs=5, evaluate=scripted(SCORES, hashes))
    assert run_job(job).best_step == 12 and weights_hash(job.student.model) == hashes[1]


def without_dropout(encoder: Encoder) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_two_accumulated_halves_are_one_whole_batch(tmp_path: Path) -> None:
    weights = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        job = make_job(
            tmp_path / str(batch_size),
            method="none",
            count=8,
            epochs=4,
            batch_size=batch_size,
            accumulation=accumulation,
            select="last",
        )
        without_dropout(job.student)
        assert run_job(job).steps == 4
        weights.append(job.student.model.state_dict())
        assert [line["step"] for line in steps_of(job)] == [1, 2, 3, 4]
    for name, value in weights[0].items():
        # AdamW's first steps divide by the gradient: where it is near zero rounding is not.
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=2e-5, msg=name)
    first, second = (steps_of(replace(job, folder=tmp_path / name)) for name in ("8", "4"))
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-4)


def test_decay_falls_on_matrices_and_not_on_vectors(tmp_path: Path) -> None:
    """A term without gradient: what still moves, moves by ``1 - rate * decay`` alone."""

    class Nothing(Term):
        student_needs = Needs(logits=True)

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            return 0.0 * student.logits.sum()

    job = make_job(tmp_path, method="none", epochs=1, warmup=0, weight_decay=0.5, learning_rate=0.01)
    job = replace(job, plan=Plan({"zero": Nothing()}, (Stage(0.0, {"zero": 1.0}),)))
    before = {name: p.detach().clone() for name, p in job.student.named_parameters()}
    run_job(job)
    shrink = math.prod(1 - 0.5 * line["learning_rate"] for line in steps_of(job))
    assert shrink < 0.99
    for name, parameter in job.student.named_parameters():
        want = before[name] * (shrink if parameter.ndim >= 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), want, msg=name)


def test_gradients_are_clipped_over_student_and_terms_together(tmp_path: Path) -> None:
    lengths: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        # The fused step leaves behind what it used.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        lengths.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
        assert any(p.ndim == 3 for p in parameters), "the projection is trained too"

    job = make_job(tmp_path, max_grad_norm=0.25)
    handle = register_optimizer_step_post_hook(look)
    try:
        run_job(job)
    finally:
        handle.remove()
    assert all(length < 0.2501 for length in lengths) and max(lengths) > 0.24
    assert max(line["gradient_norm"] for line in steps_of(job)) > 1


def test_bf16_trains_in_float32_weights_to_a_nearby_loss(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path / name, epochs=1) for name in ("wide", "half")]
    jobs[1] = replace(jobs[1], bf16=True)
    for job in jobs:
        run_job(job)
    wide, half = ([line["loss"] for line in steps_of(job)] for job in jobs)
    assert half != wide
    assert half == pytest.approx(wide, rel=0.02)
    assert {p.dtype for p in jobs[1].student.parameters()} == {torch.float32}


def test_teacher_reads_its_own_tokens(tmp_path: Path) -> None:
    """Where the two tokenise differently, each gets what its own tokenizer made."""
    job = make_job(tmp_path, method="kd", epochs=1)
    shifted = replace(job.teacher_tokens, ids=np.minimum(job.teacher_tokens.ids + 1, 30))
    seen: list[Tensor] = []
    job.teacher.module.register_forward_pre_hook(lambda module, given: seen.append(given[0].input_ids))
    run_job(replace(job, teacher_tokens=shifted))
    assert len(seen) == 6
    assert all((ids[:, 0] == 3).all() for ids in seen)


def test_a_stage_that_needs_nothing_of_the_teacher_does_not_run_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, options={"alpha": 0, "beta": 0})
    job.teacher.module.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    assert run_job(job).steps == 12


def test_default_score_tells_students_apart() -> None:
    """The toy evaluation is not constant, or selection would never be put to the test."""
    rows = make_job(Path("unused")).rows
    logits = [
        encoder(make_batch_of(rows, encoder).student, Needs(logits=True)).logits
        for encoder in (make_encoder(seed=0), make_encoder(seed=1))
    ]
    assert not torch.equal(*logits)
