"""What the log of a run tells, and that no value in it is other than finite."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import RunFailed
from stillroom.methods.base import Plan, Stage, Term
from stillroom.methods.prediction import HardLabels
from stillroom.training.loop import Job
from stillroom.training.schedule import Schedule
from tiny import log_of, make_job, run_job, steps_of


def test_log_tells_every_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=2, learning_rate=3e-3)
    trained = run_job(job)
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
    run_job(job)
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
    assert run_job(job).steps == 4
    assert [line["record"] for line in steps_of(job)] == [
        {"counts": {"updates": [2]}},
        {"counts": {"updates": [4]}},
    ]
    assert counts.asked == 2
    plain = make_job(tmp_path / "plain", method="none", count=16, epochs=1)
    run_job(plain)
    assert all("record" not in line for line in steps_of(plain))


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
        run_job(job)
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
        run_job(job)


def test_the_term_is_named_whichever_batch_of_an_accumulated_step_it_was(tmp_path: Path) -> None:
    for batch in (5, 6):
        with pytest.raises(RunFailed, match=r"step 3 .*bad = nan"):
            run_job(breaking(tmp_path / str(batch), batch, accumulation=2))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The loss is 0, its gradient 0/0: the weights would be NaN from here on."""

    class Root(Term):
        student_needs = Needs(logits=True)

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            return (0.0 * student.logits.sum()).sqrt()

    job = make_job(tmp_path, method="none")
    job = replace(job, plan=Plan({"root": Root()}, (Stage(0.0, {"root": 1.0}),)))
    with pytest.raises(RunFailed, match="step 1 .*gradient_norm = nan"):
        run_job(job)
    assert not (tmp_path / "checkpoints").exists()
