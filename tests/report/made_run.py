"""A finished run made by hand, in a moment: every part that a page can show, with hostile texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.data.tasks import Kind, Rows, Task
from stillroom.evaluation import predictions
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predictions import Predictions
from stillroom.recipe import PretrainRecipe, Recipe

HOSTILE = "</td><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> & $x_1$ «ü»"

_LABELS = {
    "classification": ("fine", "<script>window.hacked = 3</script>", "a & b"),
    "multi-label": ("one", "two", "<b>three</b>"),
    "regression": (),
}
_METRICS = {
    "classification": ("accuracy", "mcc"),
    "multi-label": ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
}


def _logits(task: Task, labels: np.ndarray, noise: float, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    if task.kind == "classification":
        clean = np.eye(task.outputs)[labels] * 4
    else:
        clean = labels.reshape(len(labels), -1) * 4 - 2
    return (clean + noise * chance.standard_normal(clean.shape)).astype(np.float32)


def make_run(
    folder: Path, *, kind: Kind = "classification", rows: int = 60, whole: bool = True, pair: bool = False
) -> Path:
    """Write a run folder.

    Args:
        folder: Where.
        kind: Of its task.
        rows: Of its validation split.
        whole: With control, robustness, a recorded flow and an export; else with none of them.
        pair: Whether the task has two texts.
    """
    text = ("premise", "hypothesis") if pair else ("text",)
    task = Task("toy", kind, text, "label", _LABELS[kind], _METRICS[kind])
    chance = np.random.default_rng(0)
    labels: Any
    if kind == "classification":
        labels = np.arange(rows) % 3
    elif kind == "multi-label":
        labels = (chance.random((rows, 3)) < 0.5).astype(np.float32)
    else:
        labels = chance.random(rows).astype(np.float32)
    texts = tuple([f"{i} {HOSTILE}" for i in range(rows)] for _ in text)
    noise = {"teacher": 0.5, "student": 3.0, "control": 4.0}
    if not whole:
        del noise["control"]
    logits = {name: _logits(task, labels, n, seed) for seed, (name, n) in enumerate(noise.items())}
    metrics: dict[str, Any] = {
        name: {
            "metrics": score(task, found, labels),
            "parameters": 20_000_000 if name == "teacher" else 10_000_000,
            "non_embedding_parameters": 8_000_000,
            "bytes": 80_000_000 if name == "teacher" else 40_000_000,
            "ms_per_example": 10.0 if name == "teacher" else 5.0,
        }
        for name, found in logits.items()
    }
    first = task.metrics[0]
    metrics["metric"] = first
    metrics["train"] = {
        "seconds": 12.0,
        "steps": 20,
        "examples": 320,
        "tokens": 3000,
        "examples_per_second": 26.7,
        "tokens_per_second": 250.0,
        "peak_rss_bytes": 900_000_000,
    }
    metrics["environment"] = {"machine": "a machine <i>", "threads": 2}
    log: list[dict[str, Any]] = []
    for step in range(1, 21):
        stage = 1 if step <= 10 else 2
        line = {"step": step, "stage": stage, "loss": 1 / step, "soft": 0.5 / step, "gradient_norm": 1.0}
        line |= {"epoch": step / 10, "learning_rate": 1e-4, "examples_per_second": 20.0}
        if whole:
            problem = {"emd": 0.5 / step, "flow": [[0.3, 0.1, 0.0], [0.0, 0.2, 0.4]]}
            problem |= {"student_masses": [0.4, 0.6], "teacher_masses": [0.3, 0.3, 0.4]}
            line["record"] = {"layers": {"hidden_states": problem}}
        log.append(line)
        if step % 10 == 0:
            log.append({"step": step, "epoch": step / 10, "validation": {first: 0.5 + step / 100}})
    folder.mkdir(parents=True)
    if whole:
        metrics["robustness"] = {
            "rows": rows,
            "metric": first,
            "values": {
                title: {name: 0.9 - 0.1 * i for name in logits}
                for i, title in enumerate(("as given", "typos in 1 of 10 words"))
            },
        }
        (folder / "control").mkdir()
        _write_log(folder / "control" / "log.jsonl", log)
        (folder / "deploy").mkdir()
        form = {"metrics": metrics["student"]["metrics"], "bytes": 10_000_000, "ms_per_row": 2.0}
        manifest = {"forms": {"onnx-int8": form}, "fastest": "onnx-int8", "refused": {}}
        (folder / "deploy" / "manifest.json").write_text(json.dumps(manifest))
    _write_log(folder / "log.jsonl", log)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    recipe = Recipe.load(teacher=f"runs/{HOSTILE}", dataset=f"data/{HOSTILE}", student="layers:2,4,6")
    recipe.save(folder / "recipe.yaml")
    (folder / "student").mkdir()
    predictions.save(
        folder / "predictions.parquet", Predictions(task, Rows("toy rows", texts, labels), logits)
    )
    return folder


def make_comparison(folder: Path, *, whole: bool = True) -> Path:
    """Write a comparison's folder: two methods, two seeds; `whole` with logs, settings and machine."""
    result = {"seeds": {"0": {"accuracy": 0.8}, "1": {"accuracy": 0.9}}, "mean": {"accuracy": 0.85}}
    result |= {"standard_deviation": {"accuracy": 0.07}, "kept": 0.944, "seconds": 10.0}
    against = {"accuracy": {"value": 0.02, "low": -0.01, "high": 0.05}}
    costs = {"parameters": 1_000_000, "ms_per_example": 2.0}
    kd = {**result, "mean": {"accuracy": 0.87}, "against_control": against}
    teacher = {**costs, "ms_per_example": 4.0, "metrics": {"accuracy": 0.9}}
    made: dict[str, dict[str, Any]] = {"none": result, "kd": kd}
    if whole:
        teacher["out_of_domain"] = {HOSTILE: {"accuracy": 0.7}}
        for name, value in (("none", 0.55), ("kd", 0.61)):
            made[name] = {**made[name], "out_of_domain": {HOSTILE: {"mean": {"accuracy": value}}}}
    found = {"dataset": HOSTILE, "rows": 100, "metric": "accuracy", "teacher": teacher}
    folder.mkdir(parents=True)
    if whole:
        made = {name: {**one, "folder": f"runs/s/{name}"} for name, one in made.items()}
        found["environment"] = {"machine": "a machine <i>", "threads": 2}
        (folder / "compare.yaml").write_text(f"teacher: '{HOSTILE[:5]}'\n")
        for name in made:
            for seed in (0, 1):
                lines: list[dict[str, Any]] = []
                for step in (1, 2, 3, 4):
                    stage = 1 if step < 3 else 2
                    line = {"step": step, "stage": stage, "epoch": step / 2, "loss": step + 2.0 * seed}
                    if name == "kd":
                        flow = [[0.5 + 0.5 * seed, 0.5 - 0.5 * seed]]
                        line["record"] = {"layers": {"hidden_states": {"emd": 1.0, "flow": flow}}}
                    lines += [
                        line,
                        {"step": step, "epoch": step / 2, "validation": {"accuracy": step / 10}},
                    ]
                place = folder / "runs" / "s" / name / str(seed)
                place.mkdir(parents=True)
                _write_log(place / "log.jsonl", lines)
    students = {HOSTILE: {**costs, "control": "none", "methods": made}}
    (folder / "compare.json").write_text(json.dumps({**found, "students": students}))
    return folder


def make_pretraining(folder: Path, *, masked_lm: bool = True) -> Path:
    """Write a run of `stillroom pretrain`: 40 steps of a student of two layers, evaluated four times."""

    def found(step: int) -> dict[str, float]:
        terms = {"loss": 2 / (1 + step), "hard": 5 - step / 20}
        return {
            **terms,
            **({"perplexity": 100.0 - step} if masked_lm else {}),
            **{f"match_{i}": 0.5 + step / 100 - i / 20 for i in range(3)},
        }

    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        line = {"step": step, "stage": 1, "loss": 3 / step, "hard": 1.0, "gradient_norm": 0.5}
        lines.append(line | {"epoch": step / 80, "learning_rate": 1e-4, "tokens_per_second": 100.0})
        if step % 10 == 0:
            lines.append({"step": step, "epoch": step / 80, "validation": found(step)})
    sizes = {"parameters": 20_000_000, "non_embedding_parameters": 8_000_000}
    metrics = {
        "text": {
            "documents": 1200,
            "tokens": 50_000,
            "sequences": 3000,
            "held_out": 64,
            "sequence_length": 16,
        },
        "held_out": {"before": found(0), "after": found(40)},
        "teacher": sizes,
        "student": {**sizes, "parameters": 10_000_000},
        "train": {
            "seconds": 12.0,
            "steps": 40,
            "examples": 1500,
            "tokens": 24_000,
            "examples_per_second": 125.0,
            "tokens_per_second": 2000.0,
            "peak_rss_bytes": 900_000_000,
        },
        "environment": {"machine": "a machine <i>", "threads": 2},
    }
    recipe = PretrainRecipe.load(
        teacher=f"models/{HOSTILE}",
        text={"files": [f"text/{HOSTILE}"]},
        method={"name": "distilbert"},
    )
    folder.mkdir(parents=True)
    (folder / "student").mkdir()
    _write_log(folder / "log.jsonl", lines)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    recipe.save(folder / "recipe.yaml")
    return folder


def _write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
