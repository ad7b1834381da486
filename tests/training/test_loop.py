"""The schedule as functions of the step, and what the loop trains, logs, selects and refuses."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from stillroom.data.batching import Batch
from stillroom.encoder import Encoder, Needs, Outputs, weights_hash
from stillroom.errors import RunFailed
from stillroom.methods.base import Plan, Stage, Term
from stillroom.methods.prediction import HardLabels
from stillroom.recipe import TrainingSettings
from stillroom.training.loop import Job, Schedule, Trained, train
from tiny import make_batch_of, make_encoder, make_job

QUIET = Console(quiet=True)
LENGTHS = np.random.default_rng(0).integers(3, 40, size=101)


def schedule(*starts: float, lengths: np.ndarray = LENGTHS, **settings: Any) -> Schedule:
    terms = {"hard": HardLabels("classification")}
    stages = tuple(Stage(start, {"hard": 1.0 + i}) for i, start in enumerate(starts or (0.0,)))
    return Schedule(lengths, Plan(terms, stages), TrainingSettings(**{"batch_size": 8, **settings}))


def run(job: Job) -> Trained:
    return train(job, QUIET)


def log_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]


def steps_of(job: Job) -> list[dict[str, Any]]:
    return [line for line in log_of(job) if "loss" in line]


# The schedule


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_comes_once_an_epoch(accumulation: int) -> None:
    found = schedule(epochs=3, accumulation=accumulation)
    groups = list(found.from_step(0))
    assert len(groups) == found.steps
    assert all(len(group) == accumulation for group in groups[:-1])
    rows = np.concatenate([rows for group in groups for rows in group])
    epochs = rows.reshape(3, len(LENGTHS))
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(LENGTHS)))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("epochs", [0.3, 2, 2.5])
def test_rows_of_a_step_do_not_depend_on_where_a_run_started(accumulation: int, epochs: float) -> None:
    found = schedule(epochs=epochs, accumulation=accumulation, seed=3)
    whole = list(found.from_step(0))
    for step in range(found.steps + 1):
        again = schedule(epochs=epochs, accumulation=accumulation, seed=3)
        tail = list(again.from_step(step))
        assert len(tail) == found.steps - step
        for group, want in zip(tail, whole[step:], strict=True):
            assert [rows.tolist() for rows in group] == [rows.tolist() for rows in want]


def test_order_depends_on_the_seed() -> None:
    first, second = (next(schedule(seed=seed).from_step(0))[0].tolist() for seed in (0, 1))
    assert first != second


def test_a_fraction_of_an_epoch_is_a_fraction_of_its_batches() -> None:
    whole = schedule(epochs=1)
    assert schedule(epochs=0.5).steps == round(0.5 * whole.steps)
    assert schedule(epochs=0.001).steps == 1
    part = schedule(epochs=1.5)
    second = len(list(schedule(epochs=2).from_step(whole.steps)))
    assert part.steps == whole.steps + round(0.5 * second)
    rows = np.concatenate([g[0] for g in part.from_step(whole.steps)])
    assert len(set(rows)) == len(rows)


def test_accumulation_divides_the_steps_and_keeps_the_last_group() -> None:
    batches = schedule(epochs=2).steps
    found = schedule(epochs=2, accumulation=4)
    assert found.steps == math.ceil(batches / 4)
    assert len(list(found.from_step(0))[-1]) == batches - 4 * (found.steps - 1)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.0), (10, 0.1), (10, 0.5), (3, 1.0)])
def test_learning_rate_rises_and_falls_linearly(epochs: int, warmup: float) -> None:
    found = schedule(epochs=epochs, warmup=warmup, learning_rate=2.0)
    rates = np.array([found.learning_rate(step) for step in range(found.steps)])
    peak = round(warmup * found.steps)
    assert (rates > 0).all() and (rates <= 2.0).all()
    if peak < found.steps:
        assert rates[peak] == 2.0
    assert np.diff(rates[: peak + 1], 2) == pytest.approx(0)
    assert np.diff(rates[peak:], 2) == pytest.approx(0)
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    if warmup < 1:
        # One more step would have the rate zero.
        assert found.learning_rate(found.steps) == 0


def test_a_constant_learning_rate_stays_after_its_rise() -> None:
    # Ten steps, of which two warm up.
    found = schedule(lengths=np.full(80, 5), epochs=1, warmup=0.2, learning_rate=3.0, schedule="constant")
    assert [found.learning_rate(step) for step in range(10)] == pytest.approx([1.0, 2.0] + [3.0] * 8)


@pytest.mark.parametrize("epochs", [1, 3, 18, 75])
def test_evaluation_comes_at_the_end_of_every_epoch(epochs: int) -> None:
    found = schedule(lengths=np.full(56, 5), epochs=epochs, evaluate_every=1)
    assert sorted(found.evaluation_steps) == [7 * (i + 1) for i in range(epochs)]


def test_evaluation_comes_within_epochs_and_always_at_the_end() -> None:
    # Ten batches an epoch.
    lengths = np.full(80, 5)
    found = schedule(lengths=lengths, epochs=2, evaluate_every=0.25)
    assert sorted(found.evaluation_steps) == [3, 5, 8, 10, 13, 15, 18, 20]
    assert schedule(lengths=lengths, epochs=2, evaluate_every=50).evaluation_steps == {20}
    assert schedule(lengths=lengths, epochs=2.5, evaluate_every=1).evaluation_steps == {10, 20, 25}
    every = schedule(lengths=lengths, epochs=1, evaluate_every=0.001).evaluation_steps
    assert every == set(range(1, 11))


def test_evaluation_can_count_steps() -> None:
    lengths = np.full(80, 5)
    found = schedule(lengths=lengths, epochs=2.5, evaluate_every_steps=6)
    assert found.evaluation_steps == {6, 12, 18, 24, 25}
    assert schedule(lengths=lengths, epochs=1, evaluate_every_steps=5).evaluation_steps == {5, 10}
    assert schedule(lengths=lengths, epochs=1, evaluate_every_steps=99).evaluation_steps == {10}


def test_epochs_done_are_counted_in_batches() -> None:
    found = schedule(lengths=np.full(80, 5), epochs=2.5)
    assert [found.epoch(step) for step in (0, 5, 10, 15, 20, 25)] == [0, 0.5, 1, 1.5, 2, 2.5]
    found = schedule(lengths=np.full(80, 5), epochs=1, accumulation=4)
    assert [found.epoch(step) for step in range(4)] == [0, 0.4, 0.8, 1]


def test_stages_follow_each_other_at_their_steps() -> None:
    found = schedule(0.0, 0.3, 0.8, lengths=np.full(80, 5), epochs=1)
    stages = [found.stage(step) for step in range(10)]
    assert [number for number, _ in stages] == [1] * 3 + [2] * 5 + [3] * 2
    assert [stage.weights["hard"] for _, stage in stages] == [1.0] * 3 + [2.0] * 5 + [3.0] * 2


@pytest.mark.parametrize(
    ("starts", "steps", "numbers"),
    [
        ((0.0, 0.8), 2, [1, 2]),
        ((0.0, 0.1), 3, [1, 2, 2]),
        ((0.0, 0.95), 3, [1, 1, 2]),
        ((0.0, 0.1, 0.2), 3, [1, 2, 3]),
        ((0.0, 0.8, 0.9), 4, [1, 1, 2, 3]),
        ((0.0, 0.5, 0.6), 2, [1, 2]),
        ((0.0, 1.0), 3, [1, 1, 1]),
    ],
)
def test_no_stage_of_a_short_training_is_skipped(
    starts: tuple[float, ...], steps: int, numbers: list[int]
) -> None:
    found = schedule(*starts, lengths=np.full(8 * steps, 5), epochs=1)
    assert [found.stage(step)[0] for step in range(steps)] == numbers


@pytest.mark.parametrize("name", ["keys", "values", "items", "training", "a.b", ""])
def test_a_term_is_not_named_like_a_part_of_torchs_module(name: str) -> None:
    """`nn.ModuleDict` raises KeyError for these, in the middle of a run's start."""
    with pytest.raises(ValueError, match=f"expected names of terms .* found '{name}'"):
        Plan({name: HardLabels("classification")}, (Stage(0.0, {name: 1.0}),))


# Training


@pytest.mark.parametrize(
    ("method", "term", "factor"), [("none", "hard", 0.2), ("kd", "hard", 0.6), ("lrc-bert", "cos_nce", 0.9)]
)
def test_training_reduces_the_loss(tmp_path: Path, method: str, term: str, factor: float) -> None:
    settings = {"epochs": 12, "learning_rate": 1e-2, "select": "last", "checkpoint_every": 1000}
    job = make_job(tmp_path, method=method, **settings)
    assert run(job).steps == 72
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
        run(job)
        assert weights_hash(job.student.model) != start
        hashes.append(weights_hash(job.student.model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    teacher = job.teacher.module
    before = weights_hash(teacher)
    run(job)
    assert weights_hash(teacher) == before
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_student_is_trained_in_training_mode_and_left_in_evaluation_mode(tmp_path: Path) -> None:
    modes: list[bool] = []
    job = make_job(tmp_path, evaluate_every=0.5)
    job.student.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    run(job)
    # Two passes a step, and an evaluation (one pass) after each third step.
    assert modes == ([True] * 6 + [False]) * 4
    assert not job.student.training


def test_log_tells_every_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=2, learning_rate=3e-3)
    trained = run(job)
    lines, plan = steps_of(job), Schedule(job.student_tokens.lengths, job.plan, job.settings)
    assert [line["step"] for line in lines] == list(range(1, 13)) and trained.steps == 12
    assert lines[5]["epoch"] == 1.0 and lines[-1]["epoch"] == 2.0
    assert [line["stage"] for line in lines] == [1] * 10 + [2] * 2
    for line in lines:
        assert line["learning_rate"] == pytest.approx(plan.learning_rate(line["step"] - 1))
        assert line["examples_per_second"] > 0 and line["tokens_per_second"] > 0
        assert line["gradient_norm"] > 0
        names = {"cos_nce"} if line["stage"] == 1 else {"cos_nce", "soft", "hard"}
        assert names == line.keys() & {"cos_nce", "soft", "hard"}
        # Terms are logged without their weights 1, 1 and 3.
        want = line["cos_nce"] + line.get("soft", 0) + 3 * line.get("hard", 0)
        assert line["loss"] == pytest.approx(want, rel=1e-5)
    assert trained.examples == 2 * len(job.rows)
    assert trained.tokens == 2 * job.student_tokens.lengths.sum()


def test_log_every_thins_the_log_and_keeps_the_last_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=2, log_every=5)
    run(job)
    assert [line["step"] for line in steps_of(job)] == [5, 10, 12]
    evaluations = [line for line in log_of(job) if "validation" in line]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(6, 1.0), (12, 2.0)]


class Counts(HardLabels):
    """Hard labels that count their updates, and how often they are asked for them."""

    def __init__(self) -> None:
        super().__init__("classification")
        self.updates, self.asked = 0, 0

    def after_step(self) -> None:
        self.updates += 1

    def record(self) -> dict[str, Any]:
        self.asked += 1
        return {"updates": [self.updates]}


def test_what_a_term_records_is_in_the_lines_that_are_written_and_asked_for_only_there(
    tmp_path: Path,
) -> None:
    job = make_job(tmp_path, method="none", count=16, epochs=2, log_every=2)
    counts = Counts()
    terms = {"counts": counts, "hard": HardLabels("classification")}
    job = replace(job, plan=Plan(terms, (Stage(0.0, {"counts": 1.0, "hard": 1.0}),)))
    assert run(job).steps == 4
    assert [line["record"] for line in steps_of(job)] == [
        {"counts": {"updates": [2]}},
        {"counts": {"updates": [4]}},
    ]
    assert counts.asked == 2
    plain = make_job(tmp_path / "plain", method="none", count=16, epochs=1)
    run(plain)
    assert all("record" not in line for line in steps_of(plain))


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
    trained = run(job)
    assert len(set(hashes)) == 5
    assert weights_hash(job.student.model) == hashes[chosen]
    assert trained.best_step == (12 if select == "best" else None)


def test_patience_stops_after_so_many_evaluations_without_a_better_one(tmp_path: Path) -> None:
    hashes: list[str] = []
    job = make_job(tmp_path, method="kd", epochs=50, patience=2, evaluate=scripted(SCORES, hashes))
    trained = run(job)
    assert len(hashes) == 4 and trained.steps == 24
    assert weights_hash(job.student.model) == hashes[1]
    # Run again, it knows that it is done.
    again = make_job(tmp_path, method="kd", epochs=50, patience=2, evaluate=scripted(SCORES, []))
    assert run(again) == trained
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
    trained = run(job)
    assert 0 < begin < trained.best_step <= trained.steps
    assert patience is None or trained.steps < taught.steps
    assert all(
        not torch.equal(old, new)
        for old, new in zip(first, job.student.model.classifier.parameters(), strict=True)
    )


def test_where_no_stage_teaches_the_head_all_evaluations_select(tmp_path: Path) -> None:
    hashes: list[str] = []
    job = make_job(tmp_path, options={"switch": 1}, epochs=5, evaluate=scripted(SCORES, hashes))
    assert run(job).best_step == 12 and weights_hash(job.student.model) == hashes[1]


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
        assert run(job).steps == 4
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
    run(job)
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
        run(job)
    finally:
        handle.remove()
    assert all(length < 0.2501 for length in lengths) and max(lengths) > 0.24
    assert max(line["gradient_norm"] for line in steps_of(job)) > 1


def test_bf16_trains_in_float32_weights_to_a_nearby_loss(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path / name, epochs=1) for name in ("wide", "half")]
    jobs[1] = replace(jobs[1], bf16=True)
    for job in jobs:
        run(job)
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
    run(replace(job, teacher_tokens=shifted))
    assert len(seen) == 6
    assert all((ids[:, 0] == 3).all() for ids in seen)


def test_a_stage_that_needs_nothing_of_the_teacher_does_not_run_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, options={"alpha": 0, "beta": 0})
    job.teacher.module.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    assert run(job).steps == 12


# Losses that are not finite


class BreaksAt(HardLabels):
    """Hard labels that are `value` at the n-th batch."""

    def __init__(self, batch: int, value: float):
        super().__init__("classification")
        self.left, self.value = batch, value

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        self.left -= 1
        loss = super().forward(student, teacher, batch)
        return loss * self.value if self.left == 0 else loss


def breaking(folder: Path, batch: int, value: float = math.nan, **settings: Any) -> Job:
    job = make_job(folder, method="none", epochs=4, **settings)
    stages = (Stage(0.0, {"good": 1.0, "bad": 1.0}),)
    terms = {"good": HardLabels("classification"), "bad": BreaksAt(batch, value)}
    return replace(job, plan=Plan(terms, stages))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 5, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step_and_term(
    tmp_path: Path, log_every: int, value: float
) -> None:
    job = breaking(tmp_path, 8, value, log_every=log_every)
    with pytest.raises(RunFailed) as caught:
        run(job)
    message = str(caught.value)
    assert "step 8 " in message and f"bad = {value}" in message and "good =" not in message
    assert str(tmp_path / "checkpoints" / "step-00000006") in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    assert all(math.isfinite(line["loss"]) for line in steps_of(job))


def test_a_loss_that_is_not_finite_is_found_before_it_is_evaluated(tmp_path: Path) -> None:
    job = breaking(tmp_path, 5, log_every=100, checkpoint_every=100)
    job = replace(job, evaluate=lambda _: pytest.fail("weights that are NaN were evaluated"))
    with pytest.raises(RunFailed, match=r"step 5 .*None was saved yet"):
        run(job)


def test_the_term_is_named_whichever_batch_of_an_accumulated_step_it_was(tmp_path: Path) -> None:
    for batch in (5, 6):
        with pytest.raises(RunFailed, match=r"step 3 .*bad = nan"):
            run(breaking(tmp_path / str(batch), batch, accumulation=2))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The loss is 0, its gradient 0/0: the weights would be NaN from here on."""

    class Root(Term):
        student_needs = Needs(logits=True)

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            return (0.0 * student.logits.sum()).sqrt()

    job = make_job(tmp_path, method="none")
    job = replace(job, plan=Plan({"root": Root()}, (Stage(0.0, {"root": 1.0}),)))
    with pytest.raises(RunFailed, match="step 1 .*gradient_norm = nan"):
        run(job)
    assert not (tmp_path / "checkpoints").exists()


def test_default_score_tells_students_apart() -> None:
    """The toy evaluation is not constant, or selection would never be put to the test."""
    rows = make_job(Path("unused")).rows
    logits = [
        encoder(make_batch_of(rows, encoder).student, Needs(logits=True)).logits
        for encoder in (make_encoder(seed=0), make_encoder(seed=1))
    ]
    assert not torch.equal(*logits)
