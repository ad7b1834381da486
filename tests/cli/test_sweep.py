"""Sweeps end to end: what is tried, what is best, going on after a kill, sharing the work, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console
from typer.testing import CliRunner
from workspace import FAST, Workspace

from stillroom.cli import app
from stillroom.data.tasks import Dataset
from stillroom.errors import WrongInput
from stillroom.recipe import Recipe, Sweep
from stillroom.run import sweep as sweeping
from stillroom.run.handout import open_study
from tiny import make_dataset, make_rows

QUIET = Console(quiet=True)


def command(work: Workspace, output: Path, *more: str) -> list[str]:
    return [
        "sweep",
        *("--teacher", str(work.teacher), "--dataset", str(work.data), "-o", str(output)),
        *("--method", "kd", "--student", "layers:2", "--set", "training.epochs=1", *FAST),
        *more,
    ]


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.stderr
    return result


GRID = ("--try", "training.learning_rate=1e-6,5e-3", "--try", "method.temperature=1,2")


@pytest.fixture(scope="module")
def swept(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        return root / "out", json.loads(run(*command(workspace, root / "out", *GRID, "--json")).stdout)


def test_every_combination_is_tried_and_the_best_is_a_recipe(
    workspace: Workspace, swept: tuple[Path, Any]
) -> None:
    folder, found = swept
    assert found == json.loads((folder / "sweep.json").read_text())
    tried = [
        (t["values"]["training.learning_rate"], t["values"]["method.temperature"]) for t in found["trials"]
    ]
    assert tried == [(1e-6, 1), (1e-6, 2), (5e-3, 1), (5e-3, 2)]
    assert (found["split"], found["rows"], found["objectives"]) == ("held-out", 24, ["quality"])
    qualities = {one["run"]: one.get("quality", -1.0) for one in found["trials"]}
    best = found["best"][0]
    assert qualities[best] == max(qualities.values())
    for one in found["trials"]:
        place = folder / "runs" / one["run"]
        kept = Recipe.load(place / "recipe.yaml")
        assert kept.training.learning_rate == one["values"]["training.learning_rate"]
        assert kept.method.options["temperature"] == one["values"]["method.temperature"]
        assert not (place / "checkpoints").exists() and not (place / "student").exists()
    recipe = Recipe.load(folder / "best.yaml")
    assert recipe == Recipe.load(folder / "runs" / best / "recipe.yaml")
    assert recipe.dataset.name == str(workspace.data)


def test_each_run_has_the_precision_that_it_tries(workspace: Workspace, tmp_path: Path) -> None:
    tries = ("--try", "training.precision=float32,bf16", "--json")
    found = json.loads(run(*command(workspace, tmp_path / "out", *tries)).stdout)
    for one in found["trials"]:
        metrics = json.loads((tmp_path / "out" / "runs" / one["run"] / "metrics.json").read_text())
        assert metrics["environment"]["precision"] == one["values"]["training.precision"]


def test_what_is_done_is_skipped_and_other_sweeps_are_refused(
    workspace: Workspace, swept: tuple[Path, Any]
) -> None:
    folder, found = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}
    assert json.loads(run("sweep", str(folder / "sweep.yaml"), "-o", str(folder), "--json").stdout) == found
    text = " ".join(run(*command(workspace, folder, *GRID)).stdout.split())
    assert "held-out training rows" in text and "best" in text and "best.yaml" in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")} == before
    other = run(*command(workspace, folder, "--try", "training.learning_rate=1e-6,1e-3"), code=2).stderr
    assert "is a sweep of something else: tries" in other.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing key tries"),
        (("--try", "training.learning_rat=1,2"), "Did you mean learning_rate"),
        (("--try", "training.learning_rate=-1:1"), "training.learning_rate: -1"),
        (("--try", "training.learning_rate=1:0"), "from low to high"),
        (("--try", "training.learning_rate=0:1:log"), "from above 0"),
        (("--try", "method.temperature=1,x"), "method.temperature: 'x' does not fit"),
        (("--try", "dataset.train_rows=10,20"), "all runs of a sweep share rows and teacher"),
        (("--try", "training.epochs"), "KEY=VALUES"),
        (("--try", "student=a", "--objectives", "speed"), "objectives"),
    ],
)
def test_what_cannot_be_tried(
    workspace: Workspace, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    said = run(*command(workspace, tmp_path / "out", *options), code=2).stderr
    assert message in " ".join(said.split())
    assert not (tmp_path / "out" / "runs").exists()


def test_runs_that_fail_are_told_and_tried_again(workspace: Workspace, tmp_path: Path) -> None:
    options = ("--try", "student=layers:2,layers:9")
    found = json.loads(run(*command(workspace, tmp_path / "out", *options, "--json")).stdout)
    assert [one["state"] for one in found["trials"]] == ["done", "failed"]
    assert "the teacher's last" in found["trials"][1]["error"]
    alone = run(*command(workspace, tmp_path / "none", "--try", "student=layers:9,layers:8"), code=1).stderr
    assert "No run" in alone and "the teacher's last" in alone


def test_a_run_below_the_median_is_pruned(workspace: Workspace, tmp_path: Path) -> None:
    """Its training ends at the evaluation that is below, and the sampler still learns from it."""
    more = (
        "--set",
        "training.epochs=2",
    )
    chosen = command(
        workspace, tmp_path / "out", "--try", "training.learning_rate=4e-4,3e-4,2e-4,1e-4,1", *more
    )
    found = json.loads(run(*chosen, "--json").stdout)
    assert [one["state"] for one in found["trials"]] == ["done"] * 4 + ["pruned"]
    log = (tmp_path / "out" / "runs" / "0004" / "log.jsonl").read_text()
    assert log.count('"validation"') < 2
    states = [trial.state for trial in open_study(tmp_path / "out", None).trials]
    assert states.count(optuna.trial.TrialState.PRUNED) == 1
    again = json.loads(run(*chosen, "--json").stdout)
    assert again == found


def test_a_range_is_drawn_and_several_objectives_have_a_front(workspace: Workspace, tmp_path: Path) -> None:
    options = ("--try", "student=layers:2,layers:1,2,3", "--try", "training.batch_size=8:32")
    more = ("--objectives", "quality,latency,size", "--trials", "2", "--split", "validation")
    found = json.loads(run(*command(workspace, tmp_path / "out", *options, *more, "--json")).stdout)
    assert [one["state"] for one in found["trials"]] == ["done"] * 2
    assert (found["split"], found["rows"]) == ("validation", 100)
    sizes: dict[str, set[Any]] = {}
    for one in found["trials"]:
        assert one["values"]["training.batch_size"] in range(8, 33)
        sizes.setdefault(one["values"]["student"], set()).add((one["latency"], one["size"]))
    assert all(len(measured) == 1 for measured in sizes.values())
    larger = json.loads(
        run(*command(workspace, tmp_path / "out", *options, *more[:3], "3", *more[4:], "--json")).stdout
    )
    assert larger["trials"][:2] == found["trials"] and len(larger["trials"]) == 3


def test_a_killed_sweep_goes_on_with_the_same_values(workspace: Workspace, tmp_path: Path) -> None:
    options = ("--try", "training.learning_rate=1e-4:1e-2:log", "--trials", "2", "--workers", "1")
    more = (
        "--set",
        "training.checkpoint_every=2",
        "--set",
        "training.epochs=8",
        "--set",
        "training.log_every=1",
    )
    whole = command(workspace, tmp_path / "out", *options, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "stillroom.cli", *whole],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    first = tmp_path / "out" / "runs" / "0000"
    end = time.monotonic() + 120
    while not list(first.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (first / "recipe.yaml").exists() and not (first / "metrics.json").exists()
    rate = Recipe.load(first / "recipe.yaml").training.learning_rate
    found = json.loads(run(*whole, "--json").stdout)
    assert found["trials"][0]["values"]["training.learning_rate"] == pytest.approx(rate, rel=1e-12)
    assert [one["state"] for one in found["trials"]] == ["done"] * 2
    other = found["trials"][1]["values"]["training.learning_rate"]
    assert other != pytest.approx(rate, rel=1e-6)


def _augmented(dataset: Dataset, source: list[int]) -> Dataset:
    from stillroom.data import augmented

    more = replace(make_rows(dataset.task, len(source), seed=9), source="more")
    train = augmented.join(dataset.splits["train"], more)
    return Dataset(dataset.task, {**dataset.splits, "train": train}, np.array(source))


def test_rows_that_are_held_out_are_not_trained_on_nor_made_others_of() -> None:
    plain = make_dataset(count=60)
    held = sweeping.hold_out(plain)
    texts = {name: held.splits[name].texts[0] for name in held.splits}
    assert (len(texts["train"]), len(texts["validation"])) == (54, 6)
    assert sorted(texts["train"] + texts["validation"]) == sorted(plain.splits["train"].texts[0])
    assert sweeping.hold_out(plain).splits["validation"].texts == held.splits["validation"].texts

    dataset = _augmented(plain, list(range(60)))
    found = sweeping.hold_out(dataset)
    assert found.splits["validation"].texts == held.splits["validation"].texts
    assert found.augmented == 54 and len(found.splits["train"]) == 108
    assert found.source_rows.tolist() == list(range(54))  # type: ignore[union-attr]
    before = dict(
        zip(dataset.splits["train"].texts[0][60:], dataset.splits["train"].texts[0][:60], strict=True)
    )
    train = found.splits["train"].texts[0]
    assert all(before[copy] == train[i] for i, copy in enumerate(train[54:]))
    train = replace(plain.splits["train"], unlabelled=np.arange(60) < 30)
    found = sweeping.hold_out(replace(plain, splits={**plain.splits, "train": train}))
    assert found.splits["validation"].unlabelled.tolist() == [False] * 3  # type: ignore[union-attr]
    with pytest.raises(WrongInput, match="too few"):
        sweeping.hold_out(make_dataset(count=18))


def test_a_text_that_recurs_is_on_one_side_alone() -> None:
    """Else every run of the sweep would be refused, as its validation rows are trained on."""
    plain = make_dataset(count=60)
    twice = plain.splits["train"].take(np.tile(np.arange(30), 2))
    found = sweeping.hold_out(replace(plain, splits={**plain.splits, "train": twice})).splits
    assert len(found["validation"]) == 6 and len(found["train"]) >= 60 - 2 * 6
    assert not set(found["train"].texts[0]) & set(found["validation"].texts[0])


def test_a_saved_sweep_is_read_again(tmp_path: Path) -> None:
    tries = {
        "training.learning_rate": "1e-5:1e-3:log",
        "training.epochs": "1:4",
        "method.layers": "[1,2],[3]",
    }
    chosen = Sweep.load(teacher="t", dataset="glue/cola", method="codir", tries=tries, trials=7)
    chosen.save(tmp_path / "sweep.yaml")
    assert Sweep.load(tmp_path / "sweep.yaml") == chosen
    recipe = chosen.recipe({"training.learning_rate": 1e-4, "student": "layers:2,4"})
    assert (recipe.training.learning_rate, recipe.student, recipe.method.name) == (
        1e-4,
        "layers:2,4",
        "codir",
    )
