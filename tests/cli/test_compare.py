"""Comparisons end to end: figures, going on after a kill, sharing the work, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom import Comparison, WrongInput, compare, start
from stillroom.cli import app
from stillroom.cli.compare import read
from stillroom.evaluation import predictions
from stillroom.run.compare import _changes, resolve
from stillroom.run.handout import open_study

TIMES = {"seconds", "examples_per_second", "ms_per_example", "environment"}
VARIANT = "lrc-bert:perturbation=off"


def command(work: Workspace, output: Path, *more: str, seeds: int = 2) -> list[str]:
    return [
        "compare",
        *("--teacher", str(work.teacher), "--dataset", str(work.data), "-o", str(output)),
        *("--methods", f"none,{VARIANT}", "--students", "layers:2,4", "--seeds", str(seeds)),
        *("--set", "training.epochs=1", "--set", "training.checkpoint_every=4", *FAST),
        *("--set-for", "none:training.learning_rate=1e-3", *more),
    ]


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.stderr
    return result


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return found


@pytest.fixture(scope="module")
def compared(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        return root / "out", json.loads(run(*command(workspace, root / "out", "--json")).stdout)


def test_figures_are_those_of_the_runs(workspace: Workspace, compared: tuple[Path, Any]) -> None:
    folder, found = compared
    assert found == json.loads((folder / "compare.json").read_text())
    assert found["teacher"]["metrics"] == workspace.finetuned["model"]["metrics"]
    entry = found["students"]["layers:2,4"]
    assert list(entry["methods"]) == ["none", VARIANT] and entry["control"] == "none"
    lines = (workspace.data / "validation.csv").read_text().splitlines()[1:]
    labels = [int(line.endswith("positive")) for line in lines]
    mean = {}
    for name, one in entry["methods"].items():
        right = []
        for seed in (0, 1):
            place = folder / "runs" / "layers-2-4" / name.replace(":", "-") / str(seed)
            said = predictions.load(place / "predictions.parquet").logits["student"].argmax(1)
            right.append(sum(int(a) == b for a, b in zip(said, labels, strict=True)) / len(labels))
            assert one["seeds"][str(seed)]["accuracy"] == pytest.approx(right[-1])
            assert {path.name for path in place.iterdir() if path.is_dir()} == set()
            assert (place / "recipe.yaml").exists() and (place / "log.jsonl").exists()
        mean[name] = sum(right) / 2
        assert one["mean"]["accuracy"] == pytest.approx(mean[name])
        spread = abs(right[0] - right[1]) / 2**0.5
        assert one["standard_deviation"]["accuracy"] == pytest.approx(spread)
        assert one["seconds"] > 0 and one["steps"] == 15
    against = entry["methods"][VARIANT]["against_control"]["accuracy"]
    assert against["value"] == pytest.approx(mean[VARIANT] - mean["none"])
    assert against["low"] <= against["value"] <= against["high"]
    assert "against_control" not in entry["methods"]["none"]


def test_each_method_has_its_own_settings(compared: tuple[Path, Any]) -> None:
    runs = compared[0] / "runs" / "layers-2-4"
    rates = {
        path.name: Comparison.load(compared[0] / "compare.yaml").recipe("layers:2,4", name, 0)
        for path, name in ((runs / "none", "none"), (runs / VARIANT.replace(":", "-"), VARIANT))
    }
    none, variant = rates.values()
    assert none.training.learning_rate == 1e-3 != variant.training.learning_rate
    assert variant.method.options["perturbation"] == "off"
    assert "learning_rate: 0.001" in (runs / "none" / "1" / "recipe.yaml").read_text()
    assert "seed: 1" in (runs / "none" / "1" / "recipe.yaml").read_text()


def test_what_is_done_is_not_done_again(workspace: Workspace, compared: tuple[Path, Any]) -> None:
    """The same command, and the saved file, train nothing and say the same."""
    folder, found = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}
    assert json.loads(run(*command(workspace, folder, "--json")).stdout) == found
    again = run("compare", str(folder / "compare.yaml"), "-o", str(folder), "--json")
    assert json.loads(again.stdout) == found
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")} == before
    text = run(*command(workspace, folder)).stdout
    assert f"{found['students']['layers:2,4']['methods'][VARIANT]['mean']['accuracy']:.4f}" in text


def test_a_comparison_can_grow(workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(compared[0], folder)
    more = command(workspace, folder, "--json")
    more[more.index("--methods") + 1] = "kd"
    del more[more.index("--set-for") : more.index("--set-for") + 2]
    found = json.loads(run(*more).stdout)
    methods = found["students"]["layers:2,4"]["methods"]
    assert list(methods) == ["none", VARIANT, "kd"] and "against_control" in methods["kd"]


def test_unequal_trainings_are_named_once(workspace: Workspace, tmp_path: Path) -> None:
    """Else a method that its paper trains for longer looks better than it is."""
    equal = command(workspace, tmp_path / "equal", seeds=1)
    longer = command(workspace, tmp_path / "out", "--set-for", "none:training.epochs=2", seeds=2)
    said = run(*longer).stderr
    assert said.count("not equally long") == 1
    assert f"30 steps of 16 rows (none); 15 steps of 16 rows ({VARIANT})" in said
    assert "not equally long" not in run(*equal).stderr


def test_students_are_scored_out_of_domain(
    workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path
) -> None:
    """Validation rows under other label names: the same accuracy, and mapped the other way 1 - it."""
    lines = (workspace.data / "validation.csv").read_text().splitlines()
    other = tmp_path / "other.csv"
    renamed = [line.replace(",positive", ",good").replace(",negative", ",bad") for line in lines]
    other.write_text("\n".join(renamed) + "\n")
    rows = f"out_of_domain.{{}}={{{{dataset: {other}, labels: {{{{good: {{}}, bad: {{}}}}}}}}}}"
    more = []
    for name, good, bad in (("same", "positive", "negative"), ("turned", "negative", "positive")):
        more += ["--set", rows.format(name, good, bad)]
    folder = tmp_path / "out"
    found = json.loads(run(*command(workspace, folder, "--json", *more, seeds=2)).stdout)
    teacher = found["teacher"]
    assert teacher["out_of_domain"]["same"] == pytest.approx(teacher["metrics"])
    for one in found["students"]["layers:2,4"]["methods"].values():
        same, turned = (one["out_of_domain"][name] for name in ("same", "turned"))
        assert same["mean"] == pytest.approx(one["mean"])
        assert same["standard_deviation"] == pytest.approx(one["standard_deviation"])
        assert turned["mean"]["accuracy"] == pytest.approx(1 - one["mean"]["accuracy"])
    assert "sets of other sources" in (folder / "report.html").read_text()
    assert "out of domain" in run(*command(workspace, folder, *more)).stdout
    moved = tmp_path / "moved.csv"
    shutil.copy(other, moved)
    elsewhere = [text.replace(str(other), str(moved)) for text in more]
    assert "moved.csv" in run(*command(workspace, folder, *elsewhere), code=2).stderr
    refused = run(*command(workspace, folder), code=2)
    assert "out_of_domain.same" in refused.stderr
    wrong = run(*command(workspace, tmp_path / "b", "--set", f"out_of_domain.x={other}"), code=2)
    assert "good" in wrong.stderr and "positive" in wrong.stderr


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_figures(
    workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = [sys.executable, "-m", "stillroom.cli", *command(workspace, folder)]
    environment = os.environ | {"STILLROOM_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    try:
        # In the middle of the second run.
        while not list(folder.glob("runs/*/lrc*/0/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(folder.rglob("metrics.json"))) == 1
    found = json.loads(run(*command(workspace, folder, "--json")).stdout)
    assert without_times(found) == without_times(compared[1])


@pytest.mark.slow
def test_two_comparisons_at_once_share_a_cache_and_find_what_one_alone_finds(
    workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path
) -> None:
    """Each reads while the other may still record; float32, so that the figures are the same to the bit."""
    cache = tmp_path / "recording"
    arguments = [
        [sys.executable, "-m", "stillroom.cli", *command(workspace, tmp_path / name, "--json")]
        + ["--set", f"teacher.cache={cache}"]
        for name in ("first", "second")
    ]
    environment = os.environ | {"STILLROOM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(given, env=environment, **pipes) for given in arguments]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    found = [without_folders(without_times(json.loads(output))) for output, _ in printed]
    assert found[0] == found[1] == without_folders(without_times(compared[1]))
    # One of them recorded, once.
    rows = [shard.name for shard in cache.glob("shard-*")]
    assert len(rows) == len(set(rows)) == 1


def without_folders(found: Any) -> Any:
    """Drop where each comparison lies, and what is only in one whose cache was named."""
    if isinstance(found, dict):
        return {
            key: without_folders(value) for key, value in found.items() if key not in ("folder", "teacher")
        }
    return found


@pytest.mark.slow
def test_two_workers_do_each_run_once(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run(*command(workspace, folder, "--workers", "2", "--json", seeds=3))
    methods = json.loads(result.stdout)["students"]["layers:2,4"]["methods"]
    assert all(len(one["seeds"]) == 3 for one in methods.values())
    name = (folder / "study.txt").read_text().strip()
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
    done = [t.user_attrs["run"] for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]
    assert len(done) == len(set(done)) == 6
    for path in folder.rglob("runs/**/metrics.json"):
        assert json.loads(path.read_text())["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--set", "training.epochs=2"), "training.epochs is 1.0 there, 2.0 here"),
        (("--set", "dataset.max_length=16"), "dataset.max_length is 128 there, 16 here"),
        (("--set-for", "none:training.learning_rate=1e-2"), "learning_rate is 0.001 there, 0.01 here"),
        (("--set", "training.seed=1"), "expected no training.seed"),
        (("--set-for", "kd:training.epochs=1"), "kd is not compared. There are: none, "),
        (("--set-for", "none:epochs=1"), "Expected `--set-for NAME:KEY=VALUE`"),
        (("--set-for", "none:training.epoch=1"), "Did you mean epochs?"),
        (("--methods", "kdd"), "Unknown method 'kdd'"),
        (("--students", "layers:2,4"), "students should differ"),
        (("--students", "layers:2;4"), "would share a folder"),
        (("--storage", "nosuch://x"), "The storage nosuch://x cannot be used"),
    ],
)
def test_other_settings_are_refused(
    workspace: Workspace, compared: tuple[Path, Any], more: tuple[str, ...], what: str
) -> None:
    before = (compared[0] / "compare.yaml").read_text()
    assert what in run(*command(workspace, compared[0], *more), code=2).stderr
    assert (compared[0] / "compare.yaml").read_text() == before


def test_another_teacher_is_refused(
    workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path
) -> None:
    other = tmp_path / "teacher"
    other.mkdir()
    from stillroom import encoder

    model = encoder.load(str(workspace.teacher))
    model.model.classifier.bias.data += 0.01
    model.save(other)
    arguments = command(workspace, compared[0])
    arguments[arguments.index("--teacher") + 1] = str(other)
    assert "The teacher changed" in run(*arguments, code=2).stderr


def test_a_folder_with_something_else_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert "thesis.txt" in run(*command(workspace, tmp_path / "out"), code=2).stderr


def test_what_cannot_be_trained_is_named_before_anything_is(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def with_methods(methods: str) -> list[str]:
        arguments = command(workspace, folder, seeds=1)
        arguments[arguments.index("--methods") + 1] = methods
        return arguments

    stderr = run(*with_methods("none,cilda,codir:bank_negatives=100000"), code=2).stderr
    assert "layers:2,4, cilda: cilda needs a masked language model" in stderr
    assert "layers:2,4, codir:bank_negatives=100000: method.bank_negatives draws 100000" in stderr
    assert not list(folder.glob("runs/*/*/*/recipe.yaml")) and not (folder / "compare.yaml").exists()
    # Nothing stands in the way of what can be.
    run(*with_methods("none"))


def test_a_folded_student_is_folded_once_for_all_runs(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds, plain = [], start.fold
    monkeypatch.setattr(start, "fold", lambda *given: folds.append(given) or plain(*given))
    comparison = Comparison.load(
        teacher=str(workspace.teacher),
        dataset=str(workspace.data),
        students=["2x16x2x32"],
        methods=["none", "kd"],
        seeds=2,
        training={"epochs": 0.2, "precision": "float32"},
    )
    compare(comparison, tmp_path / "out", keep_students=True, console=Console(quiet=True))
    assert len(folds) == 1
    students = [
        p.read_bytes() for p in sorted((tmp_path / "out").glob("runs/*/*/*/student/model.safetensors"))
    ]
    # Each trains a copy of its own.
    assert len(set(students)) == 4


def test_a_run_that_fails_is_named_and_the_others_are_done(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    more = (
        "--set-for",
        "none:training.learning_rate=1e30",
        "--set-for",
        "none:training.max_grad_norm=1e30",
    )
    stderr = run(*command(workspace, folder, *more, seeds=1), code=1).stderr
    assert "1 of 2 runs are not done" in stderr and "layers-2-4/none/0: Training stopped at step" in stderr
    assert "The same command tries them again." in stderr
    found = json.loads((folder / "compare.json").read_text())
    assert list(found["students"]["layers:2,4"]["methods"]) == [VARIANT]


def test_python_refuses_less_than_no_worker(tmp_path: Path) -> None:
    comparison = Comparison.load(teacher="t", dataset="d", methods=["none"])
    with pytest.raises(WrongInput, match="0 to compare what is done"):
        compare(comparison, tmp_path, workers=-1)


def test_without_workers_only_what_is_done_is_compared(
    workspace: Workspace, compared: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(compared[0], folder)
    (folder / "compare.json").unlink()
    runs = sorted(folder.glob("runs/*/*/*"))
    shutil.rmtree(runs[-1])
    stderr = run(*command(workspace, folder, "--workers", "0"), code=1).stderr
    assert f"1 of {len(runs)} runs are not done" in stderr
    assert "give --workers 1 or more" in stderr and "same command" not in stderr
    assert stderr.rstrip().endswith(": not done yet")
    found = json.loads((folder / "compare.json").read_text())["students"]["layers:2,4"]["methods"]
    assert sum(len(one["seeds"]) for one in found.values()) == len(runs) - 1
    assert not runs[-1].exists()


def test_short_forms_stand_for_long_ones() -> None:
    short = Comparison.load(teacher="t", dataset="d", methods=["kd:temperature=2"], seeds=2)
    long = Comparison.load(
        teacher={"name": "t"},
        dataset="d",
        methods={"kd:temperature=2": {"method": {"name": "kd", "temperature": 2}}},
        seeds=[0, 1],
    )
    assert short == long


def test_a_number_of_seeds_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(WrongInput, match="seeds should be at most 1,000 of each run, found 10,000,000,000"):
        Comparison.load(teacher="t", dataset="d", methods=["kd"], seeds=10**10)


@pytest.mark.slow
def test_no_run_is_handed_out_twice(tmp_path: Path) -> None:
    """SQLite has no row locks: workers that look at the same moment would get the same run."""
    study = open_study(tmp_path, None)
    for number in range(30):
        study.enqueue_trial({}, user_attrs={"run": str(number)})
    start, taken = threading.Barrier(4, timeout=30), []

    def work() -> None:
        mine = open_study(tmp_path, None)

        def take(trial: optuna.Trial) -> float:
            taken.append(trial.user_attrs["run"])
            return 0.0

        for _ in range(7):
            start.wait()
            mine.optimize(take, n_trials=1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert len(taken) == 28 and sorted(set(taken)) == sorted(taken)


def test_each_method_may_have_its_own_start() -> None:
    given = {"teacher": "t", "dataset": "d", "methods": ["none", "kd"], "init": "pca"}
    comparison = read(None, [], ["kd:init=runs/pretrained"], **given)
    starts = {name: comparison.recipe("4x312", name, 0).init for name in comparison.methods}
    assert starts == {"none": "pca", "kd": "runs/pretrained"}
    assert resolve(comparison).methods["kd"].init == "runs/pretrained"
    changed = list(_changes(comparison, comparison.model_copy(update={"init": "random"})))
    assert changed == ["init is 'pca' there, 'random' here"]
