"""Two processes with half of each batch make the student that one makes with all of it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

import two_processes
from stillroom import distill, pretrain, processes
from stillroom.data import sources
from stillroom.data.batching import Batch, Inputs
from stillroom.methods import METHODS
from stillroom.processes import Share
from stillroom.training.loop import train
from tiny import make_dataset
from two_processes import CASES, QUIET, RESUMED, Case, state_of


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes did all that they are to do, once for all tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers have folders side by side.
        folder = folder.parent
    folder /= "two-processes"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not (folder / "told.1").exists():
            (folder / "two").mkdir(parents=True)
            patch.setenv("STILLROOM_CACHE", str(folder / "cache"))
            two_processes.launch(folder)
    return folder


def told(launched: Path, rank: int = 0) -> Any:
    return json.loads((launched / f"told.{rank}").read_text())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]


def assert_close(found: Any, want: Any, where: str = "") -> None:
    """Assert that nested JSON values agree, numbers to 1e-5."""
    if isinstance(want, dict):
        assert found.keys() == want.keys(), where
        for key in want:
            assert_close(found[key], want[key], f"{where}/{key}")
    elif isinstance(want, list):
        assert len(found) == len(want), where
        for i, pair in enumerate(zip(found, want, strict=True)):
            assert_close(*pair, f"{where}/{i}")
    else:
        assert found == pytest.approx(want, rel=1e-5, abs=1e-5), where


def assert_same_weights(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    # Attention does not change with a key's bias: its gradient is rounding, which Adam scales up.
    names = [name for name in want if not name.endswith("self.key.bias")]
    found, want = ({name: weights[name] for name in names} for weights in (found, want))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_make_the_losses_and_the_student_of_one(
    launched: Path, tmp_path: Path, case: Case
) -> None:
    """Also the same banks, masses and generator; and both processes have the same bits."""
    job = case.job(tmp_path)
    train(job, QUIET)
    first, second = (torch.load(launched / "two" / f"{case}.{rank}") for rank in (0, 1))
    want = state_of(job)
    assert first.keys() == second.keys() == want.keys()
    for name in want:
        assert torch.equal(first[name], second[name]), name
    assert_same_weights(first, want)
    assert_close(lines_of(launched / "two" / str(case)), lines_of(job.folder))


def test_the_cases_are_not_trivial(launched: Path) -> None:
    """Tokens differ between processes, one is left without rows, and losses move."""
    job = Case("kd").job(launched)
    lengths = job.student_tokens.lengths
    assert len(set(lengths.tolist())) > 4 and len(lengths) % 2 == 1
    for case in CASES:
        lines = [line for line in lines_of(launched / "two" / str(case)) if "loss" in line]
        assert abs(lines[0]["loss"] - lines[-1]["loss"]) > 1e-5, case


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_two_processes_with_dropout_go_on_to_the_same_bits(launched: Path, case: Case) -> None:
    assert [told(launched, rank)["resumed"][str(case)] for rank in (0, 1)] == [True, True]


def test_a_run_of_two_processes_is_that_of_one(
    launched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its teacher is recorded once, by the first process; the second one writes nothing."""
    monkeypatch.setattr(sources, "load", lambda settings, splits=(): make_dataset())
    alone = distill(two_processes.recipe(tmp_path), tmp_path / "run", console=QUIET)
    first, second = (told(launched, rank) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    assert (first["recordings"], second["recordings"]) == (1, 0)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == json.loads((launched / "run" / "metrics.json").read_text())
    assert first["metrics"]["environment"]["processes"] == 2 and alone["environment"]["processes"] == 1
    assert first["metrics"]["train"]["teacher"]["recorded"] == alone["train"]["teacher"]["recorded"] != []
    for name in ("student", "control"):
        assert_close(first["metrics"][name]["metrics"], alone[name]["metrics"])
    assert first["metrics"]["train"]["tokens"] == alone["train"]["tokens"]
    for place in ("", "control"):
        assert_close(lines_of(launched / "run" / place), lines_of(tmp_path / "run" / place))
        weights = [
            load_file(run / place / "student" / "model.safetensors")
            for run in (launched / "run", tmp_path / "run")
        ]
        assert_same_weights(*weights)


def test_text_is_distilled_by_two_processes_as_by_one(launched: Path, tmp_path: Path) -> None:
    """Each hides and guesses the words of its own rows, however many these are."""
    alone = pretrain(two_processes.pretraining(tmp_path), tmp_path / "pretrained", console=QUIET)
    for rank in (0, 1):
        assert_close(told(launched, rank)["pretrained"], alone["held_out"])
    assert_close(*(lines_of(place / "pretrained") for place in (launched, tmp_path)))


def test_an_error_of_one_process_is_raised_in_all(launched: Path) -> None:
    """The first one alone looks at the folder, the second one alone lacks its data."""
    first, second = (told(launched, rank) for rank in (0, 1))
    assert first["not empty"] == second["not empty"]
    assert first["not empty"].startswith("WrongInput: Expected an output folder that is new or empty")
    assert first["not here"] == second["not here"] == "WrongInput: not on this machine"


# Without processes


def batch_of(*lengths: int) -> Batch:
    mask = torch.tensor([[int(at < n) for at in range(max(lengths))] for n in lengths])
    inputs = Inputs(torch.arange(mask.numel()).view_as(mask), mask, None)
    return Batch(inputs, inputs, torch.arange(len(lengths)), 10 + torch.arange(len(lengths)))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_are_the_batch_in_its_order_and_their_shares_its_means(count: int) -> None:
    batch = batch_of(2, 3, 3, 4, 6)
    parts = [batch.part(rank, count) for rank in range(count)]
    own = [part for part in parts if part.share.of("nothing")]
    assert torch.equal(torch.cat([part.row_ids for part in own]), batch.row_ids)
    assert all(part.student.input_ids.shape[1] == 6 and part.teacher is part.student for part in parts)
    assert [part.share.start for part in own] == [int(part.row_ids[0]) - 10 for part in own]
    for unit in ("rows", "tokens", "token pairs"):
        assert sum(part.share.of(unit) for part in parts) == pytest.approx(1)
    values = np.random.default_rng(0).normal(size=(5, 6)) * batch.student.attention_mask.numpy()
    means = [values[part.row_ids - 10].sum() / int(part.student.attention_mask.sum()) for part in parts]
    found = sum(part.share.of("tokens") * mean for part, mean in zip(parts, means, strict=True))
    assert found == pytest.approx(values.sum() / 18)
    assert {part.rows for part in parts} == {5}


def test_a_process_without_rows_counts_for_nothing() -> None:
    part = batch_of(2, 3).part(2, 3)
    assert part.row_ids.tolist() == [10] and part.share.start == 0
    assert [part.share.of(unit) for unit in ("rows", "tokens", "token pairs", "nothing")] == [0.0] * 4


def test_guessed_words_go_with_their_rows() -> None:
    batch = batch_of(2, 3, 3, 4, 6)
    positions = torch.tensor([1, 6, 8, 13])
    inputs = replace(batch.student, positions=positions)
    whole = replace(batch, student=inputs, teacher=inputs, labels=inputs.input_ids.flatten()[positions])
    parts = [whole.part(rank, 3) for rank in range(3)]
    assert [part.student.positions.tolist() for part in parts] == [[1, 6, 8], [1], [0]]
    for part in parts[:2]:
        assert torch.equal(part.student.input_ids.flatten()[part.student.positions], part.labels)
    assert [part.share.of("labels") for part in parts] == [0.75, 0.25, 0.0]


def test_one_process_passes_through() -> None:
    batch, x = batch_of(2, 3), torch.ones(2, 3)
    assert batch.part(0, 1) is batch and batch.share.whole
    assert batch.share.gather(x) is x and batch.share.total(x) is x and processes.total(x) is x
    state = torch.get_rng_state()
    with batch.share.own_random(0):
        assert torch.equal(torch.get_rng_state(), state)
    assert processes.main_first(lambda: 3) == processes.on_main(lambda: 3) == 3


def test_each_process_and_pass_has_its_own_dropout_and_leaves_the_common_state() -> None:
    state = torch.get_rng_state()
    drawn = set()
    for step, rank, number in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        share = Share((1, 1), rank, draw=(7, step, 1))
        values = []
        for _ in range(2):
            with share.own_random(number):
                values.append(torch.rand(()).item())
        assert values[0] == values[1]
        drawn.add(values[0])
    assert len(drawn) == 4 and torch.equal(torch.get_rng_state(), state)
