"""A resumed run is the run that was started: same teacher, same rows, same precision."""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from stillroom import distill, provenance
from stillroom.data import sources
from stillroom.data.tasks import Dataset
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings, Recipe
from tiny import make_dataset, make_teacher


def give(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr(sources, "load", lambda settings, splits=(): dataset)


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was carried to its end."""
    give(monkeypatch, make_dataset())
    return run(tmp_path, make_teacher())


def run(folder: Path, teacher: Encoder) -> Path:
    """Distil a teacher and return the run's folder."""
    teacher.save(folder / "teacher")
    recipe = Recipe.load(
        teacher=str(folder / "teacher"),
        dataset=DatasetSettings(name="toy", max_length=32).model_dump(),
        student="2x16x2x32",
        method="kd",
        training={"epochs": 1, "batch_size": 8},
    )
    distill(recipe, folder / "run", console=Console(quiet=True))
    return folder / "run"


def resume(folder: Path) -> str:
    """Resume a run and return what it printed."""
    printed = io.StringIO()
    distill(None, folder, resume=True, console=Console(file=printed, width=400))
    return printed.getvalue()


def test_the_same_inputs_go_on_without_a_warning(done: Path) -> None:
    before = (done / "student" / "model.safetensors").read_bytes()
    assert "Warning" not in resume(done)
    assert (done / "student" / "model.safetensors").read_bytes() == before


def test_another_teacher_is_refused(done: Path) -> None:
    """The teacher's folder was trained anew meanwhile: half the run would learn from each."""
    teacher = make_teacher()
    with torch.no_grad():
        next(teacher.parameters()).add_(1e-3)
    teacher.save(done.parent / "teacher")
    with pytest.raises(
        WrongInput, match=r"The teacher changed since this run started: SHA-256 \w{12} then"
    ):
        resume(done)


def test_another_configuration_of_the_teacher_is_refused(done: Path) -> None:
    """The weights are the same, and compute something else."""
    path = done.parent / "teacher" / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert "relu" in path.read_text()
    with pytest.raises(WrongInput, match="The configuration of the teacher changed since"):
        resume(done)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 0.5),
        ("training.epochs", 2.0),
        ("training.checkpoint_every", 7),
        ("method.temperature", 9.0),
    ],
)
def test_another_recipe_is_refused(done: Path, key: str, value: float) -> None:
    path = done / provenance.RECIPE
    recipe = yaml.safe_load(path.read_text())
    part, name = key.split(".")
    recipe[part][name] = value
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        WrongInput, match=rf"recipe.yaml changed since this run started: {key} was .*, found"
    ):
        resume(done)


def test_what_does_not_make_the_student_may_change(done: Path) -> None:
    path = done / provenance.RECIPE
    recipe = yaml.safe_load(path.read_text())
    recipe["training"].update(keep_checkpoints=7, log_every=3)
    path.write_text(yaml.safe_dump(recipe))
    assert "Warning" not in resume(done)


def test_a_run_of_an_earlier_version_goes_on(done: Path) -> None:
    path = done / provenance.INPUTS
    found = json.loads(path.read_text())
    del found["recipe"], found["inputs"]["configuration of the teacher"]
    path.write_text(json.dumps(found))
    assert "Warning" not in resume(done)


def test_a_run_that_was_killed_before_its_recipe_starts_again(done: Path) -> None:
    recipe = Recipe.load(done / provenance.RECIPE)
    again = done.parent / "again"
    again.mkdir()
    (again / provenance.INPUTS).write_bytes((done / provenance.INPUTS).read_bytes())
    with pytest.raises(WrongInput, match="start it again without --resume"):
        resume(again)
    distill(recipe, again, console=Console(quiet=True))
    assert (again / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("part", ["text", "label"])
def test_another_row_is_refused(done: Path, monkeypatch: pytest.MonkeyPatch, split: str, part: str) -> None:
    dataset = make_dataset()
    rows = dataset.splits[split]
    if part == "text":
        rows.texts[0][3] += " quite good"
    else:
        rows.labels[3] = 1 - rows.labels[3]
    give(monkeypatch, dataset)
    with pytest.raises(WrongInput, match=f"The {split} rows changed"):
        resume(done)


def retype(teacher: Path, types: str) -> None:
    """Give the second text of pairs another type in the tokenizer's rules, or take types away."""
    # The folder's sums would tell first, where it has some.
    (teacher / "sums.json").unlink()
    if types == "none":
        path = teacher / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["model_input_names"] = ["input_ids", "attention_mask"]
        path.write_text(json.dumps(config))
        return
    path = teacher / "tokenizer.json"
    rules = json.loads(path.read_text())
    for part in rules["post_processor"]["pair"]:
        next(iter(part.values()))["type_id"] = int(types)
    path.write_text(json.dumps(rules))


@pytest.mark.parametrize("types", ["0", "none"])
def test_other_token_types_of_the_same_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types: str
) -> None:
    """The two texts of a pair would be told apart in one half of the run alone."""
    give(monkeypatch, make_dataset(pair=True))
    folder = run(tmp_path, make_teacher(pair=True))
    retype(tmp_path / "teacher", types)
    with pytest.raises(WrongInput, match="The token types of the train rows changed since"):
        resume(folder)
    # A run of an earlier version has none written down, and goes on.
    path = folder / provenance.INPUTS
    found = json.loads(path.read_text())
    found["inputs"] = {key: value for key, value in found["inputs"].items() if "types" not in key}
    path.write_text(json.dumps(found))
    assert "Warning" not in resume(folder)


def test_other_threads_only_warn(done: Path) -> None:
    path = done / provenance.INPUTS
    found = json.loads(path.read_text())
    found["environment"]["threads"] = 99
    path.write_text(json.dumps(found))
    assert "threads: 99 then" in resume(done)


def test_unreadable_inputs_are_refused(done: Path) -> None:
    (done / provenance.INPUTS).write_text("{")
    with pytest.raises(WrongInput, match=r"inputs\.json cannot be read"):
        resume(done)


def test_automatic_precision_is_spelt_out(done: Path) -> None:
    """`auto` in a saved recipe would be another run on a machine without bf16."""
    saved = yaml.safe_load((done / provenance.RECIPE).read_text())["training"]["precision"]
    assert saved == json.loads((done / provenance.METRICS).read_text())["environment"]["precision"]
    assert saved != "auto"
