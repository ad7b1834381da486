"""`stillroom generator`, a run with a generator, and `stillroom augment` on it."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app
from stillroom.data.words import STOP_WORDS
from stillroom.run import replace_words


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


def test_generator_cuts_rows_as_either_option_says(workspace: Workspace, tmp_path: Path) -> None:
    command = ("generator", "--model", workspace.encoder, "--dataset", workspace.data, "--epochs", 1)

    def loss(name: str, *options: Any) -> Any:
        found = call(*command, "-o", tmp_path / name, *options, "--json").stdout
        return json.loads(found)["loss"]["before"]

    cut, short = ("--set", "dataset.max_length=8"), ("--max-length", 8)
    assert loss("a") != loss("b", *cut) == loss("c", *short)
    assert "leave one out" in call(*command, "-o", tmp_path / "d", *cut, *short, code=2).stderr
    assert not (tmp_path / "d").exists()


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


# Method tinybert


def replace(workspace: Workspace, output: Path, *options: Any, code: int = 0) -> Any:
    command = ("augment", "--method", "tinybert", "--dataset", workspace.data, "-o", output, "--copies", 3)
    return call(*command, *options, code=code)


@pytest.fixture(scope="module")
def augmented(workspace: Workspace, generator: Path) -> Path:
    path = generator.parent / "augmented.parquet"
    found = json.loads(replace(workspace, path, "--generator", generator, "--json").stdout)
    assert (found["rows"], found["copies"]) == (240, 3)
    assert found["augmented"] == pq.read_metadata(path).num_rows
    assert set(found["words"]) == {"generator"}
    return path


def texts_of(path: Path) -> list[str]:
    with path.open(newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def test_augmented_rows_are_new_and_know_their_source(workspace: Workspace, augmented: Path) -> None:
    rows = pq.read_table(augmented).to_pylist()
    train, validation = (texts_of(workspace.data / f"{name}.csv") for name in ("train", "validation"))
    assert {tuple(row) for row in rows} == {("text", "source_row")}
    assert len({(row["text"], row["source_row"]) for row in rows}) == len(rows) > 240
    for row in rows:
        old, new = train[row["source_row"]].split(), row["text"].split()
        assert old != new and len(old) == len(new)
        assert all(a == b for a, b in zip(old, new, strict=True) if a in STOP_WORDS)
    assert not {row["text"] for row in rows} & set(validation)


def test_a_killed_augmentation_goes_on_to_the_same_file(
    workspace: Workspace, generator: Path, augmented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = tmp_path / "again.parquet", []
    real = replace_words._write_part

    def dies(path: Path, *rest: Any) -> None:
        if left:
            raise KeyboardInterrupt
        left.append(path)
        real(path, *rest)

    monkeypatch.setattr(replace_words, "_PART", 100)
    whole = tmp_path / "whole.parquet"
    replace(workspace, whole, "--generator", generator)
    monkeypatch.setattr(replace_words, "_write_part", dies)
    assert "goes on from here" in replace(workspace, output, "--generator", generator, code=130).stderr
    assert not output.exists()
    other = replace(workspace, output, "--generator", generator, "--draw", 1, code=2).stderr
    assert "draw was 0, now it is 1" in other.replace("\n", " ")
    made = left[0].stat().st_mtime_ns
    monkeypatch.setattr(replace_words, "_write_part", real)
    kept = []
    monkeypatch.setattr(
        replace_words, "_write_part", lambda path, *rest: (kept.append(path.name), real(path, *rest))
    )
    replace(workspace, output, "--generator", generator)
    assert kept == ["000001.parquet", "000002.parquet"] and made
    assert output.read_bytes() == whole.read_bytes()
    assert pq.read_table(output).to_pylist() == pq.read_table(augmented).to_pylist()
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []
    assert "not there yet" in replace(workspace, output, "--generator", generator, code=2).stderr


def test_a_call_that_was_killed_over_its_parts_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was whole, and the same call asked for it to be removed."""
    data, output = tmp_path / "data", tmp_path / "a.parquet"
    data.mkdir()
    for name in ("train", "validation"):
        (data / f"{name}.csv").write_text(f"text,label\ngood {name},x\nbad {name},y\n")
    table = {"lemma": ["good", "bad"], "synonyms": [["great", "fine"], ["poor"]]}
    pq.write_table(pa.table(table), tmp_path / "synonyms.parquet")
    command = ("augment", "--method", "tinybert", "--dataset", data, "-o", output, "--json")
    options = ("--synonyms", tmp_path / "synonyms.parquet")

    def dies(folder: Path) -> None:
        (folder / "plan.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replace_words.shutil, "rmtree", dies)
        call(*command, *options, code=130)
    parts, made = tmp_path / "a.parquet.parts", output.read_bytes()
    assert parts.exists()
    assert "not there yet" in call(*command, *options, "--draw", 1, code=2).stderr
    assert parts.exists()
    found = json.loads(call(*command, *options).stdout)
    assert output.read_bytes() == made and not parts.exists()
    output.unlink()
    again = json.loads(call(*command, *options).stdout)
    assert {**found, "seconds": 0} == {**again, "seconds": 0} and output.read_bytes() == made


def test_a_copy_that_is_a_validation_row_is_left_out(workspace: Workspace, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("text,label\ngood film,x\nbad film,y\n")
    (data / "validation.csv").write_text("text,label\nGreat  film,x\nthe end,y\n")
    table = {"lemma": ["good", "bad"], "synonyms": [["great", "fine"], ["poor"]]}
    pq.write_table(pa.table(table), tmp_path / "synonyms.parquet")
    command = (
        "augment",
        "--method",
        "tinybert",
        "--dataset",
        data,
        "--synonyms",
        tmp_path / "synonyms.parquet",
    )
    call(*command, "--copies", 50, "-o", tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert sorted((row["text"], row["source_row"]) for row in rows) == [("fine film", 0), ("poor film", 1)]
    assert "fine film" in call(*command, "--rows", 1, "--copies", 50).stdout


def test_pairs_are_rewritten_one_text_at_a_time(tmp_path: Path) -> None:
    """TinyBERT's code puts the second text beside the last rewritten first one."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "validation"):
        (data / f"{name}.csv").write_text(f"sentence1,sentence2,label\ngood {name},bad {name},x\na,b,y\n")
    table = {"lemma": ["good", "bad"], "synonyms": [["great", "fine"], ["poor"]]}
    pq.write_table(pa.table(table), tmp_path / "synonyms.parquet")
    command = (
        "augment",
        "--method",
        "tinybert",
        "--dataset",
        data,
        "--synonyms",
        tmp_path / "synonyms.parquet",
    )
    call(*command, "--copies", 50, "-o", tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert sorted((row["sentence1"], row["sentence2"]) for row in rows) == [
        ("fine train", "bad train"),
        ("good train", "poor train"),
        ("great train", "bad train"),
    ]


def test_what_method_tinybert_is_not_for(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    assert "who proposes words" in replace(workspace, tmp_path / "a.parquet", code=2).stderr
    assert "leave out RUN" in replace(workspace, tmp_path / "a.parquet", run, code=2).stderr
    assert ".parquet" in replace(workspace, tmp_path / "a.csv", code=2).stderr
    for option in ("--output", "--copies", "--candidates", "--probability", "--vectors", "--synonyms"):
        said = call("augment", run, option, 1, code=2).stderr
        assert f"reads no {option}: add --method tinybert" in said
    for option, value in (("--rows", 8), ("--split", "validation")):
        said = replace(workspace, tmp_path / "a.parquet", option, value, code=2).stderr
        assert f"leave out {option} {value}" in said
    assert "give --dataset" in call("augment", "--method", "tinybert", code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_student_learns_from_augmented_rows(
    workspace: Workspace, augmented: Path, tmp_path: Path
) -> None:
    parts = (
        "distill",
        "--teacher",
        workspace.teacher,
        "--dataset",
        workspace.data,
        "--student",
        "layers:2",
    )
    options = ("--method", "kd", "--augmented", augmented, *FAST, "--set", "training.epochs=1")
    checked = json.loads(call(*parts, *options, "-o", tmp_path / "run", "--dry-run", "--json").stdout)
    count = pq.read_metadata(augmented).num_rows
    assert checked["augmented_rows"] == count
    found = json.loads(call(*parts, *options, "-o", tmp_path / "run", "--json").stdout)
    assert found["train"]["examples"] == 240 + count
    said = call(*parts, *options, "-o", tmp_path / "other", "--set", "dataset.validation=x", code=2).stderr
    assert "remove dataset.validation" in said


def test_augmented_rows_that_are_validation_rows_stop_a_run(workspace: Workspace, tmp_path: Path) -> None:
    text = texts_of(workspace.data / "validation.csv")[0]
    pq.write_table(pa.table({"text": ["new", text.upper()], "source_row": [0, 1]}), tmp_path / "a.parquet")
    parts = (
        "distill",
        "--teacher",
        workspace.teacher,
        "--dataset",
        workspace.data,
        "--student",
        "layers:2",
    )
    said = call(*parts, "--augmented", tmp_path / "a.parquet", "-o", tmp_path / "run", code=2).stderr
    assert "1 of the 2 augmented rows are validation rows" in said and "(row 2)" in said
