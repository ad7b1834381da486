"""The checks together: sound input passes in silence, nothing is changed, problems come at once."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from checking import check, make_run, with_texts
from stillroom import preflight
from stillroom.data.tasks import Kind
from stillroom.encoder import weights_hash
from stillroom.errors import WrongInput


@pytest.mark.parametrize(
    ("kind", "pair"),
    # Toy texts with three labels contradict each other, pairs of them do not.
    [*itertools.product(["classification", "regression"], [False, True]), ("multi-label", True)],
)
def test_a_sound_run_passes_without_a_warning(kind: Kind, pair: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=kind, pair=pair)
    found = check(run)
    assert found["warnings"] == []
    assert found["rows"] == {"train": 48, "validation": 24}
    assert found["teacher"]["rows"] == 24
    assert next(iter(found["teacher"]["metrics"].values())) > 0.8
    json.dumps(found, allow_nan=False)


def test_what_was_found_is_what_the_run_will_do(tmp_path: Path) -> None:
    run = make_run(tmp_path, options={"switch": 0.5})
    found = check(run)
    # 48 rows in batches of 8, twice; the second stage starts half-way.
    assert found["steps"] == 12
    assert found["stage_starts"] == {"1": 0, "2": 6}
    # Two student layers, four teacher layers: every second one.
    assert found["layers"] == {"cos_nce": {"student": [1, 2], "teacher": [2, 4]}}
    assert found["labels"]["train"] == {"negative": 24, "positive": 24}
    assert found["truncated"] == {"student": {"train": 0.0, "validation": 0.0}}
    assert found["student"]["parameters"] == sum(p.numel() for p in run.student.parameters())
    assert 0 <= found["padding"] < 0.3


def test_the_checks_change_nothing(tmp_path: Path) -> None:
    """A random state, a memory bank or weights that the checks moved would change the student."""
    run = make_run(tmp_path, options={"negatives": "bank", "vector": "cls"}, method="lrc-bert")
    models = [run.student, run.teacher, *run.plan.terms.values()]
    before = [weights_hash(model) for model in models if model is not None]
    state = torch.get_rng_state()
    check(run)
    assert [weights_hash(model) for model in models if model is not None] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for model in models if model is not None for p in model.parameters())
    assert list(tmp_path.glob("*.*")) == []


def test_a_fine_tuning_is_checked_without_a_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path, method="none")
    found = check(replace(run, teacher=None))
    assert found["warnings"] == []
    assert "teacher" not in found


def test_small_flaws_of_real_data_only_warn(tmp_path: Path) -> None:
    dataset = with_texts("train", ["  ", "the film was good"])
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    train.texts[0][3] = train.texts[0][2]
    validation.texts[0][5] = f"  {train.texts[0][9].upper()} "
    console = Console(file=io.StringIO(), width=40)
    found = preflight.check(make_run(tmp_path, dataset=dataset), console)
    blank, conflict, repeated = found["warnings"]
    assert "1 of the 48 rows of train (toy rows) have an empty text (row 1)" in blank
    assert "1 text(s) of train occur with different labels" in conflict
    assert "(row 3)" in conflict
    assert "1 of the 24 validation rows (4.2%) are also in train" in repeated
    assert "(row 6)" in repeated
    # Every warning is on the console, whole.
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"Warning: {text}\n" in printed for text in found["warnings"])


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, dataset=with_texts("train", [""] * 6), batch_size=1, method="lrc-bert")
    with pytest.raises(WrongInput, match="^2 problems before the first step:\n1. cos_nce needs") as caught:
        check(run)
    assert "\n2. 6 of the 48 rows of train" in str(caught.value)
