"""`stillroom generator`, a run with a generator, and `stillroom augment` on it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app


def call(*command: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def generator(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "generator"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(folder.parent / "cache"))
        command = ("generator", "--model", workspace.encoder, "--dataset", workspace.data, "-o", folder)
        rates = ("--epochs", 2, "--learning-rate", 0.01)
        found = json.loads(call(*command, *rates, "--json").stdout)
    assert found["rows"] == {"train": 240, "held_out": 100}
    assert found["loss"]["after"] < found["loss"]["before"]
    assert json.loads((folder / "metrics.json").read_text()) == found
    return folder


@pytest.fixture(scope="module")
def run(workspace: Workspace, generator: Path) -> Path:
    folder = generator.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(folder.parent / "cache"))
        call(
            *(
                "distill",
                "--teacher",
                workspace.teacher,
                "--dataset",
                workspace.data,
                "--student",
                "layers:2,4",
            ),
            *("--method", "cilda", "--set", f"method.generator={generator}", "-o", folder, *FAST),
            *("--set", "method.n_generator=2", "--set", "method.n_student=3", "--set", "training.epochs=1"),
        )
    return folder


def test_a_run_needs_a_generator_and_says_how_to_make_one(workspace: Workspace, tmp_path: Path) -> None:
    command = ("distill", "--teacher", workspace.teacher, "--dataset", workspace.data, "--method", "cilda")
    text = call(*command, "-o", tmp_path / "run", code=2).stderr
    assert "stillroom generator --model minilm-l6" in text.replace("\n", " ")


def test_augment_shows_rows_as_the_runs_generator_rewrites_them(run: Path) -> None:
    found = json.loads(call("augment", run, "--rows", 20, "--json").stdout)
    assert found["generator"]["step"] == 15
    assert len(found["rows"]) == 20
    for row in found["rows"]:
        original, masked, new = (row[name].split() for name in ("original", "masked", "augmented"))
        hidden = [i for i, word in enumerate(masked) if word == "[MASK]"]
        assert [original[i] for i in hidden] == [word["old"] for word in row["words"]]
        assert [new[i] for i in hidden] == [word["new"] for word in row["words"]]
        kept = set(range(len(original))) - set(hidden)
        assert all(original[i] == masked[i] == new[i] for i in kept)
        for who in ("teacher", "student"):
            assert all(
                sum(row[who][text].values()) == pytest.approx(1) for text in ("original", "augmented")
            )
    assert any(row["original"] != row["augmented"] for row in found["rows"])
    again = json.loads(call("augment", run, "--rows", 20, "--json").stdout)
    assert again == found
    other = json.loads(call("augment", run, "--rows", 20, "--draw", 1, "--json").stdout)
    assert [row["masked"] for row in other["rows"]] != [row["masked"] for row in found["rows"]]


def test_augment_prints_a_table(run: Path) -> None:
    text = call("augment", run, "--rows", 5, "--split", "validation").stdout
    assert "[MASK]" in text and "->" in text and "after 15 steps" in text


def test_augment_works_without_a_run(workspace: Workspace, run: Path, generator: Path) -> None:
    parts = ("--teacher", workspace.teacher, "--student", run, "--dataset", workspace.data)
    found = json.loads(call("augment", *parts, "--generator", generator, "--json").stdout)
    assert found["generator"] == {"name": str(generator), "step": 0}
    assert len(found["rows"]) == 8


def test_augment_refuses_what_it_cannot_show(workspace: Workspace, run: Path, generator: Path) -> None:
    assert "--teacher, --student, --dataset, --generator" in call("augment", code=2).stderr
    assert "leave out --teacher" in call("augment", run, "--teacher", workspace.teacher, code=2).stderr
    assert "no finished run" in call("augment", workspace.data, code=2).stderr
    assert "no split 'other'" in call("augment", run, "--split", "other", code=2).stderr


def test_generator_needs_text_of_one_kind(workspace: Workspace, tmp_path: Path) -> None:
    for given in ((), ("--dataset", workspace.data, "--text", workspace.data / "train.csv")):
        assert "one of the two" in call("generator", *given, "-o", tmp_path / "g", code=2).stderr


def test_generator_reads_text_files(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the film was good\n" * 60)
    command = (
        "generator",
        "--model",
        workspace.encoder,
        "--text",
        tmp_path / "text.txt",
        "-o",
        tmp_path / "g",
    )
    text = call(*command, "--epochs", 1).stdout
    assert "perplexity" in text and "stillroom distill" in text
