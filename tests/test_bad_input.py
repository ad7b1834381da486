"""Wrong input through `distill` and `finetune`: a clear error, before anything is written."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from stillroom import Comparison, compare, distill, durable, encoder, finetune, preflight
from stillroom.data import sources
from stillroom.data.tasks import Dataset
from stillroom.encoder import Encoder, weights_hash
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings, FinetuneRecipe, Recipe
from stillroom.run import generator
from stillroom.training import masked_lm
from tiny import make_dataset, make_encoder, make_task, make_teacher

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _toy_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, make_dataset())


def give(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Let every recipe read this data set."""
    monkeypatch.setattr(sources, "load", lambda settings, splits=(): dataset)


def recipe(folder: Path, teacher: Encoder | None = None, **given: Any) -> Recipe:
    """Return a tiny run's recipe; its teacher lies in `folder`."""
    place = folder / "teacher"
    (teacher or make_teacher()).save(place)
    training = {"epochs": 1, "batch_size": 8, **given.pop("training", {})}
    method = {"name": "lrc-bert"}
    chosen = {"student": "2x16x2x32", "method": method, **given}
    return Recipe.load(
        teacher=str(place),
        dataset=DatasetSettings(name="toy", max_length=32).model_dump(),
        training=training,
        **chosen,
    )


def refuse(given: Recipe, folder: Path, **options: Any) -> str:
    """Return why a run is refused; its folder holds nothing but the lock."""
    with pytest.raises(WrongInput) as caught:
        distill(given, folder, console=QUIET, **options)
    assert [path.name for path in folder.iterdir()] == [durable.LOCK]
    return str(caught.value)


def test_a_sound_run_trains(tmp_path: Path) -> None:
    """What the tests below break is sound before."""
    metrics = distill(recipe(tmp_path), tmp_path / "run", console=QUIET)
    assert metrics["train"]["steps"] == 6


def test_a_dry_run_tells_what_it_found_and_leaves_no_folder(tmp_path: Path) -> None:
    found = distill(recipe(tmp_path), tmp_path / "run", dry_run=True, console=QUIET)
    assert found["steps"] == 6
    assert found["warnings"] == []
    assert found["teacher"]["metrics"]["accuracy"] == 1.0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_what_is_wrong_and_leaves_no_folder(tmp_path: Path) -> None:
    given = recipe(tmp_path, make_teacher(order=(1, 0)))
    with pytest.raises(WrongInput, match=r"read as \[positive, negative\]"):
        distill(given, tmp_path / "run", dry_run=True, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_checks_do_not_change_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(tmp_path, method={"name": "lrc-bert", "negatives": "bank", "vector": "cls"})
    hashes = []
    for name in ("checked", "unchecked"):
        distill(given, tmp_path / name, console=QUIET)
        student = encoder.load(str(tmp_path / name / "student"))
        hashes.append(weights_hash(student.model))
        monkeypatch.setattr(preflight, "check", lambda run, console: {})
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (lambda: make_encoder(layers=4, width=24), "does not solve this task"),
        (lambda: make_teacher(order=(1, 0)), "[positive, negative]"),
        (lambda: make_encoder(task=make_task("multi-label")), "the teacher has 3 [x, y, z]"),
        (lambda: make_encoder(task=make_task("regression")), "the teacher is for regression"),
    ],
)
@pytest.mark.parametrize("student", ["2x16x2x32", "layers:1,2"])
def test_a_wrong_teacher(teacher: Any, expected: str, student: str, tmp_path: Path) -> None:
    method = {"name": "lrc-bert", "layer_map": [1, 2]}
    given = recipe(tmp_path, teacher(), student=student, method=method)
    assert expected in refuse(given, tmp_path / "run")


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    model: Any = make_encoder().model
    model.bert.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "sums.json").unlink()
    assert "no trained classification head" in refuse(given, tmp_path / "run")


def test_a_student_deeper_than_its_teacher(tmp_path: Path) -> None:
    text = refuse(recipe(tmp_path, student="5x16x2x32"), tmp_path / "run")
    assert "each of 5 student layers, the teacher has 4" in text


def test_a_layer_that_the_teacher_lacks(tmp_path: Path) -> None:
    method = {"name": "lrc-bert", "layer_map": [2, 5]}
    assert "teacher layers from 1 to 4" in refuse(recipe(tmp_path, method=method), tmp_path / "run")


def test_embeddings_that_cannot_be_perturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "embedding_dropout", lambda self: None)
    assert "method.perturbation=off" in refuse(recipe(tmp_path), tmp_path / "run")


def test_a_batch_of_one(tmp_path: Path) -> None:
    text = refuse(recipe(tmp_path, training={"batch_size": 1}), tmp_path / "run")
    assert "cos_nce needs at least 2 rows in every batch" in text


def test_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset()
    dataset.splits["train"].labels[:] = 1
    give(monkeypatch, dataset)
    assert "All 48 labels of train" in refuse(recipe(tmp_path), tmp_path / "run")


def test_several_problems_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset()
    dataset.splits["validation"].texts[0][:4] = dataset.splits["train"].texts[0][:4]
    give(monkeypatch, dataset)
    text = refuse(recipe(tmp_path, training={"batch_size": 1}), tmp_path / "run")
    assert text.startswith("2 problems before the first step:\n1. ")


def test_a_student_that_tokenises_otherwise(tmp_path: Path) -> None:
    """A case-sensitive checkpoint as the student of a teacher that lower-cases."""
    student = make_encoder()
    student.tokenizer.backend_tokenizer.normalizer = None
    student.save(tmp_path / "student")
    dataset = make_dataset()
    dataset.splits["train"].texts[0][0] = "The Film was bad"
    given = recipe(tmp_path, student=str(tmp_path / "student"))
    with pytest.MonkeyPatch.context() as patch:
        give(patch, dataset)
        text = refuse(given, tmp_path / "run")
    assert "[[CLS], [UNK], [UNK], was, bad, [SEP]] to the student" in text
    assert "[[CLS], the, film, was, bad, [SEP]] to the teacher" in text


def test_a_full_folder(tmp_path: Path) -> None:
    """Whatever lies there stays as it is."""
    given = recipe(tmp_path)
    note = tmp_path / "run" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    for dry_run in (False, True):
        with pytest.raises(WrongInput, match="new or empty, found .*run.*--resume"):
            distill(given, note.parent, dry_run=dry_run, console=QUIET)
        with pytest.raises(WrongInput, match="new or empty"):
            finetune(teacher_recipe(tmp_path), note.parent, console=QUIET)
    assert note.read_text() == "mine"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    (tmp_path / "run").write_text("mine")
    for dry_run in (False, True):
        with pytest.raises(WrongInput, match="found"):
            distill(given, tmp_path / "run", dry_run=dry_run, console=QUIET)
    assert (tmp_path / "run").read_text() == "mine"


def test_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(WrongInput, match="no run to resume"):
        distill(None, tmp_path / "run", resume=True, console=QUIET)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    hold = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / durable.LOCK
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        assert "Another process is writing" in refuse(given, tmp_path / "run")
        with pytest.raises(WrongInput, match="Another process is writing"):
            finetune(teacher_recipe(tmp_path), tmp_path / "run", console=QUIET)
        other.stdin.close()
    # The lock went with its process.
    with FileLock(lock, timeout=0):
        pass


# Fine-tuning


def teacher_recipe(folder: Path) -> FinetuneRecipe:
    make_encoder().save(folder / "pretrained")
    return FinetuneRecipe.load(
        model=str(folder / "pretrained"),
        dataset=DatasetSettings(name="toy", max_length=32).model_dump(),
        training={"epochs": 1, "batch_size": 8},
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_teacher_is_not_trained_on_one_class(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset()
    rows = dataset.splits[split]
    changed = {**dataset.splits, split: replace(rows, labels=np.zeros_like(rows.labels))}
    give(monkeypatch, replace(dataset, splits=changed))
    with pytest.raises(WrongInput, match=f"labels of {split} .* are the same .negative."):
        finetune(teacher_recipe(tmp_path), tmp_path / "run", console=QUIET)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [durable.LOCK]


def test_a_fresh_head_needs_no_score(tmp_path: Path) -> None:
    metrics = finetune(teacher_recipe(tmp_path), tmp_path / "run", console=QUIET)
    assert metrics["train"]["steps"] == 6


# Several processes


def test_several_processes_are_refused_by_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each but the first would say that another process writes the folder."""

    def refused() -> None:
        raise WrongInput("one process")

    monkeypatch.setattr(preflight, "require_one_process", refused)
    comparison = Comparison.load(teacher="t", dataset="builtin/verdicts", methods=["kd"])
    rows = make_dataset().splits
    text = rows["train"], rows["validation"]
    for start in (
        lambda: compare(comparison, tmp_path / "run", console=QUIET),
        lambda: generator.make("minilm-l6", text, tmp_path / "run", masked_lm.Settings(), QUIET),
    ):
        with pytest.raises(WrongInput, match="one process"):
            start()
    assert not (tmp_path / "run").exists()
