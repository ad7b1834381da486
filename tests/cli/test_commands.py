"""The commands end to end on tiny files: what they print, write and refuse."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner
from workspace import FAST, Workspace

import stillroom
from stillroom import Recipe, distill
from stillroom.cli import app
from stillroom.cli.finetune import _student
from stillroom.encoder import Encoder
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predictions import load
from stillroom.methods import METHODS
from tiny import make_encoder, make_tokenizer

COSTS = {"parameters", "non_embedding_parameters", "bytes", "ms_per_example"}
TRAIN = {
    "seconds",
    "steps",
    "examples",
    "tokens",
    "examples_per_second",
    "tokens_per_second",
    "peak_rss_bytes",
    "teacher",
}


def run(*arguments: str | Path, code: int = 0) -> Any:
    """Return a command's outcome, which has to end with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result


def distil(work: Workspace, output: Path, *more: str) -> list[str]:
    command = ["distill", "--teacher", str(work.teacher), "--dataset", str(work.data)]
    return [
        *command,
        "-o",
        str(output),
        "--student",
        "layers:2,4",
        "--set",
        "training.epochs=1",
        *FAST,
        *more,
    ]


@pytest.fixture(scope="module")
def distilled(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with its control, and what the command printed."""
    root = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        return root / "run", run(*distil(workspace, root / "run", "--control", "--json"))


def test_finetune_makes_a_teacher(workspace: Workspace) -> None:
    found = workspace.finetuned
    assert found == json.loads((workspace.teacher / "metrics.json").read_text())
    assert found["model"].keys() == COSTS | {"metrics"}
    assert found["model"]["metrics"]["accuracy"] > 0.9
    assert found["train"].keys() == TRAIN
    assert found["train"]["steps"] == 90 and found["train"]["examples"] == 6 * 240
    assert found["model"]["bytes"] == (workspace.teacher / "model.safetensors").stat().st_size


def test_finetune_shows_its_teacher_and_a_next_command_that_passes(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command names runs/student, which a user of this clone may have.
    monkeypatch.chdir(tmp_path)
    command = ("finetune", "--model", workspace.encoder, "--dataset", workspace.data, *FAST)
    more = ("--set", "training.learning_rate=0.005", "--set", "training.epochs=6")
    result = run(*command, *more, "-o", tmp_path / "teacher")
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert f"{workspace.finetuned['model']['metrics']['accuracy']:.4f}" in row
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    assert "--student layers:2,4 " in line
    run(*shlex.split(line)[2:], "--dry-run")


@pytest.mark.parametrize(
    ("family", "layers", "width", "expected"),
    [
        ("bert", 6, 384, "4x312"),
        ("electra", 6, 384, "layers:2,4,6"),
        ("bert", 3, 384, "layers:3"),
        ("bert", 6, 192, "layers:2,4,6"),
        ("bert", 4, 312, "layers:2,4"),
    ],
    ids=["folded", "unknown family", "fewer layers", "narrower", "already of that size"],
)
def test_finetune_suggests_a_folded_student_where_the_teacher_can_be_folded(
    tmp_path: Path, family: str, layers: int, width: int, expected: str
) -> None:
    config = make_encoder(family, layers=layers, width=width).config
    config.num_attention_heads, config.intermediate_size = 12, 4 * width
    model = AutoModelForSequenceClassification.from_config(config)
    Encoder(model, make_tokenizer()).save(tmp_path)
    assert _student(tmp_path) == expected


def test_distill_prints_its_metrics_as_one_object(distilled: tuple[Path, Any]) -> None:
    folder, result = distilled
    found = json.loads(result.stdout)
    assert found == json.loads((folder / "metrics.json").read_text())
    assert {"teacher", "student", "control", "kept", "train", "environment"} <= found.keys()
    for name in ("teacher", "student", "control"):
        assert found[name].keys() == COSTS | {"metrics"}
        assert found[name]["ms_per_example"] > 0
    assert found["train"].keys() == TRAIN
    assert found["train"]["examples"] == 240 and found["train"]["steps"] == 15
    share = found["student"]["metrics"]["accuracy"] / found["teacher"]["metrics"]["accuracy"]
    assert found["kept"] == pytest.approx(share)
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert found["student"]["parameters"] == found["control"]["parameters"]


def test_distill_keeps_what_each_model_said(distilled: tuple[Path, Any]) -> None:
    """The metrics are those of the kept logits, and robustness starts from the same values."""
    folder, result = distilled
    found = json.loads(result.stdout)
    kept = load(folder / "predictions.parquet")
    assert len(kept.rows) == 100 and set(kept.logits) == {"teacher", "student", "control"}
    robustness = found["robustness"]
    assert robustness["rows"] == 100 and len(robustness["values"]) == 6
    for name, logits in kept.logits.items():
        assert score(kept.task, logits, kept.rows.labels) == found[name]["metrics"]
        assert robustness["values"]["as given"][name] == found[name]["metrics"]["accuracy"]
        # Its tokenizer lowers everything anyway.
        assert robustness["values"]["upper case"][name] == found[name]["metrics"]["accuracy"]
        assert 0 <= robustness["values"]["typos in 3 of 10 words"][name] <= 1


def test_distill_table_shows_what_metrics_say(workspace: Workspace, tmp_path: Path) -> None:
    result = run(*distil(workspace, tmp_path / "run", "--control", "--method", "kd"))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["teacher", "control", "student"]
    for row in rows:
        model = found[row.split()[1]]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        kept = model["metrics"]["accuracy"] / found["teacher"]["metrics"]["accuracy"]
        assert cells[1] == f"{model['metrics']['accuracy']:.4f}"
        assert f"{kept:.1%}" in cells
        assert f"{model['bytes'] / 1e6:.1f}" in cells
        assert f"{model['ms_per_example']:.2f}" in cells
    assert str(tmp_path / "run" / "student") in result.stdout
    assert str(tmp_path / "run" / "metrics.json") in result.stdout


def test_the_next_command_runs(workspace: Workspace, tmp_path: Path) -> None:
    """What `distill` proposes works as it stands, in a folder with a blank too."""
    command = distil(workspace, tmp_path / "a run", "--method", "none", "--set", "dataset.max_length=16")
    result = run(*command)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    look, more = line.removeprefix("Next: ").split("; ")
    assert shlex.split(look) == ["open", str(tmp_path / "a run" / "report.html")]
    assert (tmp_path / "a run" / "report.html").exists()
    program, *arguments = shlex.split(more)
    assert program == "stillroom"
    run(*arguments, "--format", "torch")
    assert (tmp_path / "a run" / "deploy" / "model.safetensors").exists()


def test_evaluate_compares_each_model_with_the_first(
    workspace: Workspace, distilled: tuple[Path, Any]
) -> None:
    folder = distilled[0]
    models = (workspace.teacher, folder, folder / "control")
    found = json.loads(run("evaluate", *models, "--dataset", workspace.data, "--json").stdout)
    assert (found["split"], found["rows"], found["metric"]) == ("validation", 100, "accuracy")
    assert "against_first" not in found["models"][0]
    first, *others = found["models"]
    for model in others:
        for name, against in model["against_first"]["metrics"].items():
            assert against["value"] == pytest.approx(model["metrics"][name] - first["metrics"][name])
            assert against["low"] <= against["value"] <= against["high"]
        test = model["against_first"]["mcnemar"]
        assert (test["only_b"] - test["only_a"]) / 100 == pytest.approx(
            model["against_first"]["metrics"]["accuracy"]["value"]
        )
    text = run("evaluate", *models, "--dataset", workspace.data).stdout
    assert "accuracy difference" in text and text.count("[") == 2 * len(first["metrics"])


def test_evaluate_says_which_columns_it_read(workspace: Workspace, tmp_path: Path) -> None:
    """A usual name would win over the column that a model was trained on, without a word."""
    assert workspace.finetuned["text"] == ["text"]
    for name in ("train", "validation"):
        given = (workspace.data / f"{name}.csv").read_text()
        (tmp_path / f"{name}.csv").write_text(given.replace("text,", "review,", 1))
    result = run("evaluate", workspace.teacher, "--dataset", tmp_path)
    assert "100 rows (review)" in result.stdout
    assert f"{workspace.teacher} was trained on 'text', and 'review' is read here" in result.stderr
    named = run("evaluate", workspace.teacher, "--dataset", tmp_path, "--set", "dataset.text=[review]")
    assert "Warning" not in named.stderr


def test_evaluate_reads_another_split(workspace: Workspace) -> None:
    command = ("evaluate", workspace.teacher, "--dataset", workspace.data, "--json")
    assert json.loads(run(*command, "--split", "train").stdout)["rows"] == 240
    assert "error" in json.loads(run(*command, "--split", "tset", code=2).stdout)


def test_the_saved_recipe_makes_the_same_student(distilled: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = distilled
    run("distill", folder / "recipe.yaml", "-o", tmp_path / "again", "--no-control")
    again = (tmp_path / "again" / "student" / "model.safetensors").read_bytes()
    assert again == (folder / "student" / "model.safetensors").read_bytes()
    assert not (tmp_path / "again" / "control").exists()


def test_python_and_command_line_make_the_same_student(
    workspace: Workspace, distilled: tuple[Path, Any], tmp_path: Path
) -> None:
    recipe = Recipe.load(
        teacher=str(workspace.teacher),
        dataset=str(workspace.data),
        student="layers:2,4",
        overrides=["training.epochs=1", *FAST[1::2]],
    )
    distill(recipe, tmp_path / "run")
    ours = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    assert ours == (distilled[0] / "student" / "model.safetensors").read_bytes()


def test_seed_is_the_recipes(workspace: Workspace, tmp_path: Path) -> None:
    run(*distil(workspace, tmp_path / "run", "--seed", "7", "--method", "none"))
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").training.seed == 7


def test_options_beside_a_recipe_take_precedence(workspace: Workspace, tmp_path: Path) -> None:
    """A name given beside a recipe keeps how the data is read; another method drops options.

    What is not given stays: the control of the recipe too.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"teacher: {workspace.teacher}\nstudent: layers:4\ncontrol: true\n"
        "dataset: {name: elsewhere, max_length: 24}\nmethod: {name: lrc-bert, alpha: 2}\n"
    )
    more = ("--dataset", str(workspace.data), "--method", "none", "--set", "training.epochs=1")
    run("distill", recipe, "-o", tmp_path / "run", *more)
    saved = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert (saved.dataset.name, saved.dataset.max_length) == (str(workspace.data), 24)
    assert (saved.method.name, saved.method.options, saved.student) == ("none", {}, "layers:4")
    assert saved.control and (tmp_path / "run" / "control" / "student").is_dir()


def test_dry_run_writes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(*distil(workspace, tmp_path / "run", "--dry-run"))
    assert "steps" in result.stdout
    found = json.loads(run(*distil(workspace, tmp_path / "run", "--dry-run", "--json")).stdout)
    assert found["steps"] == 15
    # The token cache is kept: it is no part of the run, and saves its time later.
    after = sorted(path.name for path in tmp_path.iterdir())
    assert set(after) - set(before) <= {"cache"}


def test_a_dry_run_needs_no_folder(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes nothing; the folder that it is called in may hold anything, and stays as it is."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "note.txt").write_text("mine")
    monkeypatch.chdir(place)
    command = distil(workspace, tmp_path / "run")
    at = command.index("-o")
    del command[at : at + 2]
    found = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert found["steps"] == 15 and found["disk"]["free_mb"] > 0
    assert [path.name for path in place.iterdir()] == ["note.txt"]
    assert "-o RUN" in run(*command, code=2).stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.epochs=3", "Unknown key trainin. Did you mean training?"),
        ("training.epoch=3", "Unknown key training.epoch. Did you mean epochs?"),
        ("method.temprature=3", "Unknown key method.temprature. Did you mean temperature?"),
        ("dataset.max_len=3", "Unknown key dataset.max_len. Did you mean max_length?"),
        ("training.epochs=many", "training.epochs"),
        ("training.epochs", "Expected `--set key=value`"),
    ],
)
def test_a_wrong_key_names_the_nearest(
    workspace: Workspace, tmp_path: Path, override: str, message: str
) -> None:
    result = run(*distil(workspace, tmp_path / "run", "--set", override), code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_wrong_input_is_2_and_nothing_is_lost(
    workspace: Workspace, distilled: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = distilled
    before = (folder / "student" / "model.safetensors").read_bytes()
    assert "new or empty" in run(*distil(workspace, folder), code=2).stderr
    assert (folder / "student" / "model.safetensors").read_bytes() == before
    assert "no run to resume" in run("distill", "--resume", tmp_path, code=2).stderr
    assert "expected --resume alone" in run("distill", "--resume", folder, "--seed", "1", code=2).stderr
    assert "Missing key dataset" in run("distill", "-o", tmp_path / "x", "--teacher", "t", code=2).stderr
    assert "-o RUN" in run("distill", "--teacher", "t", "--dataset", "d", code=2).stderr
    assert "recipe file" in run("distill", tmp_path / "no.yaml", "-o", tmp_path / "x", code=2).stderr
    assert "No such option" in run("distill", "--teachr", "t", code=2).stderr
    missing = ("evaluate", "./none", "--dataset", workspace.data)
    assert "./none" in run(*missing, code=2).stderr
    wrong = run(
        "evaluate", workspace.teacher, "--dataset", workspace.data, "--set", "training.seed=1", code=2
    )
    assert "Only keys of dataset" in wrong.stderr


def test_a_run_that_fails_is_1(workspace: Workspace, tmp_path: Path) -> None:
    """A loss that is not finite stops the run: exit code 1, as JSON too."""
    wild = ("--set", "training.learning_rate=1e30", "--json")
    result = run(*distil(workspace, tmp_path / "run", *wild), code=1)
    assert "finite" in json.loads(result.stdout)["error"]


def test_methods_lists_and_shows(tmp_path: Path) -> None:
    found = json.loads(run("methods", "--json").stdout)["methods"]
    assert {method["name"] for method in found} >= {"lrc-bert", "kd", "none"}
    text = run("methods").stdout
    assert all(method["name"] in text and method["paper"] in text for method in found)
    one = json.loads(run("methods", "lrc-bert", "--json").stdout)
    assert Path(one["card"]).read_text(encoding="utf-8").startswith("# lrc-bert")
    assert one["options"]["gamma"] == {
        "values": "number >= 0",
        "default": 3.0,
        "meaning": "Weight of the hard labels, in the second stage.",
    }
    assert one["options"]["vector"]["values"] == "token | cls | mean"
    assert one["training"]["batch_size"] == 16
    text = run("methods", "lrc-bert").stdout
    assert "method.switch" in text and "arXiv 2012.07335" in text
    assert "Did you mean lrc-bert?" in run("methods", "lcr-bert", code=2).stderr
    assert "no options" in run("methods", "none").stdout


def test_a_package_without_documents_names_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Card: " in run("methods", "kd").stdout
    monkeypatch.setattr(stillroom, "__file__", str(tmp_path / "lib" / "stillroom" / "__init__.py"))
    assert "Card: " not in run("methods", "kd").stdout
    assert json.loads(run("methods", "kd", "--json").stdout)["card"] is None


def test_every_method_can_be_shown() -> None:
    for name in METHODS:
        found = json.loads(run("methods", name, "--json").stdout)
        assert all(option["meaning"] and option["values"] for option in found["options"].values())


@pytest.mark.parametrize(
    "command", [("datasets",), ("methods",), ("evaluate", "nothing", "--dataset", "d")]
)
def test_what_one_process_does_refuses_to_be_launched_in_several(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Expected one process, found 2" in run(*command, code=2).stderr


def test_datasets_lists(tmp_path: Path) -> None:
    found = {row["name"]: row for row in json.loads(run("datasets", "--json").stdout)["datasets"]}
    assert {"glue/cola", "glue/stsb", "glue/mnli", "builtin/verdicts"} <= found.keys()
    assert found["builtin/verdicts"]["here"] and not found["glue/cola"]["here"]
    text = run("datasets").stdout
    assert all(name in text for name in found)


def test_data_dir_is_where_glue_is_looked_for(workspace: Workspace, tmp_path: Path) -> None:
    command = ("evaluate", workspace.teacher, "--dataset", "glue/cola", "--data-dir", tmp_path)
    assert str(tmp_path / "glue" / "cola" / "validation.parquet") in run(*command, code=2).stderr


def test_evaluate_reads_labels_of_another_source(workspace: Workspace, tmp_path: Path) -> None:
    """Of a file of another source every row is scored, not the tenth that is held out."""
    lines = (workspace.data / "validation.csv").read_text().splitlines()[1:]
    number = {"negative": "7", "positive": "9"}
    text = "\n".join(f"{line.rsplit(',', 1)[0]},{number[line.rsplit(',', 1)[1]]}" for line in lines)
    (tmp_path / "other.csv").write_text(f"text,label\n{text}\n")
    command = ("evaluate", workspace.teacher, "--dataset", tmp_path / "other.csv", "--json")
    found = json.loads(run(*command, "--labels", "7=negative,9=positive", "--robustness").stdout)
    plain = json.loads(run("evaluate", workspace.teacher, "--dataset", workspace.data, "--json").stdout)
    assert (found["rows"], found["split"]) == (100, "all")
    assert found["models"][0]["metrics"] == plain["models"][0]["metrics"]
    assert len(found["robustness"]["values"]) == 6
    assert "no class of the model" in run(*command, "--labels", "7=negative", code=2).stderr
    assert "LABEL=CLASS" in run(*command, "--labels", "7", code=2).stderr
    table = run(*command[:-1], "--labels", "7=negative,9=positive", "--robustness").stdout
    assert "upper case" in table
