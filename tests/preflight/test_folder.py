"""The run's place and processes: the disk, one process, trackers."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checking import check, make_augmented, make_run, problem
from stillroom import preflight
from stillroom.errors import WrongInput
from stillroom.preflight import folder as folder_checks
from stillroom.recipe import TeacherSettings
from tiny import make_encoder, make_generator


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "not" / "there", method="none", keep_checkpoints=2)
    weights = sum(4 * p.numel() for p in run.student.parameters())
    # Two checkpoints and one written aside, each with weights, two moments and the best student;
    # then the student itself.
    need = (3 * 4 + 1) * weights
    free = SimpleNamespace(free=need)
    asked = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return free

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert check(run)["disk"] == {"need_mb": round(need / 1e6, 1), "free_mb": round(need / 1e6, 1)}
    assert asked == [tmp_path]
    free.free = need - 1
    text = problem(run)
    assert f"found {free.free / 1e6:,.0f} MB free at {tmp_path}" in text
    assert "training.keep_checkpoints (now 2)" in text


def test_what_a_run_needs_of_the_disk(tmp_path: Path) -> None:
    def need(**changes: Any) -> float:
        need_mb: float = check(make_run(tmp_path, student=make_encoder(width=64), **changes))["disk"][
            "need_mb"
        ]
        return need_mb

    plain = need(method="none")
    assert need(method="none", keep_checkpoints=4) == pytest.approx(plain * 21 / 13, rel=0.05)
    assert need(method="none", select="last") == pytest.approx(plain * 10 / 13, rel=0.05)
    assert need(method="none", control=True) == pytest.approx(plain * 2, rel=0.05)
    assert need(method="lrc-bert") > plain


def recording(run: preflight.Run, **settings: Any) -> preflight.Run:
    teacher = TeacherSettings(name="t", max_bytes=10**9, **settings)
    return replace(run, recording=teacher, repeated=True)


def bytes_of_logits(run: preflight.Run) -> int:
    """Two float32 for each row, where rows of equal tokens count once."""
    tokens = run.tokens.teacher["train"]
    spans = zip(tokens.offsets, tokens.lengths, strict=True)
    return 4 * 2 * len({tuple(tokens.ids[start : start + n]) for start, n in spans})


def test_what_is_recorded_counts_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "kept"))
    run = recording(make_run(tmp_path / "run", method="kd"))
    need = 13 * sum(4 * p.numel() for p in run.student.parameters()) + bytes_of_logits(run)
    free = SimpleNamespace(free=need)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    found = check(run)["recorded_teacher"]
    assert found["recorded"] == ["logits"] and found["live"] == []
    assert Path(found["folder"]).parent == tmp_path / "kept/teacher"
    assert not (tmp_path / "kept/teacher").exists(), "checks write nothing"
    free.free = need - 1
    text = problem(run)
    assert "checkpoints, recorded teacher and student" in text and "teacher.max_bytes" in text
    for alone in (replace(run, repeated=False), recording(make_run(tmp_path / "run", method="none"))):
        assert "recorded_teacher" not in check(alone)


def test_a_cache_on_another_disk_is_checked_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    run = recording(make_run(tmp_path, method="kd"), cache=f"{other}/stillroom-not-there/cache")
    more = bytes_of_logits(run)
    free = {other: more, tmp_path: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    assert check(run)["recorded_teacher"]["live"] == []
    free[other] = more - 1
    assert f"at {other}" in problem(run) and "teacher.cache" in problem(run)


def test_what_is_there_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that filled most of the disk with its own checkpoints can still be resumed."""
    run = make_run(tmp_path, method="none")
    need = 13 * sum(4 * p.numel() for p in run.student.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1000))
    assert "Free some space" in problem(run)
    saved = tmp_path / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    (saved / "student.safetensors").write_bytes(bytes(1000))
    assert check(run)["warnings"] == []


@pytest.mark.parametrize(("accelerate", "torchrun"), [(2, "1"), (1, "2")])
def test_several_processes_are_refused(
    accelerate: int, torchrun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight.require_one_process()
    monkeypatch.setattr(folder_checks, "Accelerator", lambda: SimpleNamespace(num_processes=accelerate))
    monkeypatch.setenv("WORLD_SIZE", torchrun)
    with pytest.raises(WrongInput, match="Expected one process, found 2"):
        preflight.require_one_process()


@pytest.mark.parametrize("name", ["nope", "wandb"])
def test_a_tracker_that_is_not_there_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would leave it out without a word, and the curves of a day would be nowhere."""
    monkeypatch.setattr("stillroom.preflight.folder.get_available_trackers", list)
    with pytest.raises(WrongInput, match=f"{name} is not installed or not known"):
        check(make_run(tmp_path, log_with=(name,)))


def test_the_generator_counts_on_the_disk(tmp_path: Path) -> None:
    generator = make_generator()
    own = sum(value.numel() * value.element_size() for value in generator.model.state_dict().values())
    run = make_augmented(tmp_path, generator=generator)
    difference = folder_checks._need(run) - folder_checks._need(replace(run, generator=None))
    # Weights and two moments, in each checkpoint and in the one that is written aside.
    assert difference == (run.training.keep_checkpoints + 1) * 3 * own
