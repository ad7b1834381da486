"""Score models on a split, and compare each with the first."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from sklearn.metrics import confusion_matrix

from stillroom import encoder
from stillroom.data import sources
from stillroom.data.columns import require_as_many
from stillroom.data.tasks import Rows, Task, plain
from stillroom.data.tokens import TokenisedRows, tokenise
from stillroom.data.trained import listed, text_of
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.evaluation import cost
from stillroom.evaluation.label_map import LabelMap
from stillroom.evaluation.metrics import functions_of, predictions, score
from stillroom.evaluation.predict import predict, predict_rows
from stillroom.evaluation.robustness import measure
from stillroom.evaluation.significance import RESAMPLED, mcnemar, paired_bootstrap
from stillroom.recipe import DatasetSettings, Precision, setting
from stillroom.training.loop import use_bf16


def evaluate(
    models: Sequence[str | Path],
    dataset: DatasetSettings | str,
    *,
    split: str = "validation",
    labels: Mapping[str, str] | None = None,
    robust: bool = False,
    precision: Precision = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Score models on a split, and compare each with the first on the same rows.

    Args:
        models: Folders, hub ids or run folders; a run folder means its student.
        dataset: The data, or only its name.
        split: Which split is scored; no other is read. `all`: every row of a single file.
        labels: For data of another source than the models': which class each label counts as, of the
            data or of the models, where it is not the one of its name (`LabelMap`). By the class of the
            predicted label, models of three classes are scored on sets of two, and the other way round.
        robust: Score perturbed texts as well: typos, case, order of words (`robustness`), with seed 0.
        precision: `bf16` autocast, `float32`, or `auto`: bf16 where the device computes it fast.
            Times are always those of float32.
        console: Where progress goes; standard error by default.

    Returns:
        `dataset`, `split`, `rows`, `text` (its columns), `metric` (the one that counts) and `models`:
        for each its `metrics`, `parameters`, `non_embedding_parameters`, `bytes`, `ms_per_example` at
        batch 1, for classes the `confusion` counts (row: label, column: prediction), and from the second
        model on `against_first`: per metric the difference with its 95 % interval from a paired
        bootstrap, and for classes McNemar's exact test. With `labels`, what each `counts_as`; with
        `robust`, `robustness`: the first metric by perturbation and model.

    Raises:
        WrongInput: If a model or the data is not as expected, or their labels do not agree.

    Example:
        >>> found = evaluate(["runs/teacher", "runs/sst2"], "glue/sst2")  # doctest: +SKIP
        >>> found["models"][1]["against_first"]["metrics"]["accuracy"]  # doctest: +SKIP
        {'value': -0.011, 'low': -0.023, 'high': 0.001}
    """
    console = console or Console(stderr=True)
    if not models:
        raise WrongInput("Expected at least one model to evaluate, found none.")
    settings = sources.settings_of(dataset)
    names = [str(model) for model in models]
    bf16 = use_bf16(precision)
    data = sources.load(settings, splits=(split,))
    rows, task = data.split(split), data.task
    _require_same_text(names, settings, task, console)
    loaded: list[tuple[Encoder, TokenisedRows]] = []
    maps: list[LabelMap | None] = []
    for name in names:
        model = encoder.load(name)
        maps.append(None if labels is None else label_map(name, labels, task, model))
        if labels is None:
            require_same_labels(name, model, task, console)
        most = min(settings.max_length, model.positions)
        tokens = tokenise(rows, model.tokenizer, max_length=most, console=console)
        loaded.append((model.to(Accelerator().device), tokens))

    if maps[0] is not None:
        _require_same_classes(names, maps)
        task, rows = maps[0].task(task), maps[0].rows(rows)
    times = cost.milliseconds(loaded, bf16=False)
    entries: list[dict[str, Any]] = []
    said: list[np.ndarray] = []
    kept: dict[str, np.ndarray] = {}
    for name, (model, tokens), counts, ms in zip(names, loaded, maps, times, strict=True):
        with console.status(f"Scoring {name} on {len(rows)} rows"):
            logits = _counted(predict(model, tokens, bf16=bf16), counts)
        entry = {"model": name, "metrics": score(task, logits, rows.labels)}
        entry |= cost.of(model, encoder.locate(name), ms)
        said.append(predictions(logits, task.kind))
        kept[name] = logits
        if task.kind == "classification":
            every = range(task.outputs)
            entry["confusion"] = confusion_matrix(rows.labels, said[-1], labels=every).tolist()
        if entries:
            entry["against_first"] = _compare(task, rows, said[0], said[-1])
        entries.append(entry)
    found = {
        "dataset": settings.name,
        "split": split,
        "rows": len(rows),
        "text": list(task.text),
        "labels": list(task.labels),
        "metric": task.metrics[0],
        "models": entries,
    }
    if maps[0] is not None:
        found["counts_as"] = {
            "data": _names(data.task.labels, maps[0].data, task.labels),
            "models": {
                name: _names(model.labels, counts.model, task.labels)
                for name, (model, _), counts in zip(names, loaded, maps, strict=True)
                if counts is not None
            },
        }
    if robust:
        says = {
            name: functools.partial(_says, model, counts, settings.max_length, bf16, console)
            for name, (model, _), counts in zip(names, loaded, maps, strict=True)
        }
        found["robustness"] = measure(task, rows, kept, says)
    return found


def _require_same_text(
    names: Sequence[str], settings: DatasetSettings, task: Task, console: Console
) -> None:
    """Raise `WrongInput` if a model of one text would read two, or the other way round.

    Other columns than it was trained on are a warning, where neither the user nor the data named them.
    """
    for name in names:
        trained = text_of(name)
        require_as_many(settings.name, task.text, trained, "--set dataset.text")
        if trained in (None, task.text) or settings.text is not None or sources.has_own_columns(settings):
            continue
        console.print(
            f"Warning: {name} was trained on {listed(trained)}, and {listed(task.text)} is read here. "
            f"Name columns with {setting('dataset.text', list(trained))}.",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def label_map(name: str, labels: Mapping[str, str], task: Task, model: Encoder) -> LabelMap:
    """Return what the labels of data and model count as, or raise `WrongInput`."""
    stated = model.config.problem_type
    if task.kind != "classification" or stated not in (None, encoder.PROBLEM_TYPES["classification"]):
        raise WrongInput(
            f"Labels can be mapped where data and models have classes: {task.name} is {task.kind}, {name} "
            f"is {stated or 'of classes'}. Leave out --labels."
        )
    return LabelMap.of(labels, task.labels, model.labels)


def _require_same_classes(names: Sequence[str], maps: Sequence[LabelMap | None]) -> None:
    """Raise `WrongInput` unless all models are scored on the same classes."""
    classes = [() if counts is None else counts.classes for counts in maps]
    for name, found in zip(names, classes, strict=True):
        if found != classes[0]:
            raise WrongInput(
                f"Expected models of the same classes in the same order: {names[0]} has "
                f"[{', '.join(classes[0])}], {name} has [{', '.join(found)}]. Map the labels of both."
            )


def _counted(logits: np.ndarray, counts: LabelMap | None) -> np.ndarray:
    return logits if counts is None else counts.logits(logits)


def _names(labels: Sequence[str], numbers: Sequence[int], classes: Sequence[str]) -> dict[str, str]:
    return {label: classes[number] for label, number in zip(labels, numbers, strict=True)}


def _says(
    model: Encoder, counts: LabelMap | None, max_length: int, bf16: bool, console: Console, rows: Rows
) -> np.ndarray:
    return _counted(predict_rows(model, rows, max_length=max_length, bf16=bf16, console=console), counts)


def require_same_labels(name: str, model: Encoder, task: Task, console: Console) -> None:
    """Raise `WrongInput` unless the model's head is one for the task's labels, in their order."""
    stated = model.config.problem_type
    if model.config.num_labels != task.outputs or stated not in (None, encoder.PROBLEM_TYPES[task.kind]):
        raise WrongInput(
            f"{task.name} is {task.kind} with {task.outputs} output(s) [{', '.join(task.labels)}]; "
            f"{name} is {stated or 'a model'} with {model.config.num_labels} "
            f"[{', '.join(model.labels)}]. Give a model that was fine-tuned on these labels, or check "
            "dataset.label, dataset.labels and dataset.kind."
        )
    ours, theirs = ([plain(label) for label in labels] for labels in (task.labels, model.labels))
    if task.kind == "regression" or ours == theirs:
        return
    orders = f"the data's labels are [{', '.join(task.labels)}], {name} has [{', '.join(model.labels)}]"
    if sorted(ours) == sorted(theirs):
        order = setting("dataset.labels", [str(label) for label in model.labels])
        raise WrongInput(
            f"Expected the same labels in the same order: {orders}. If its weights have its order, use "
            f"data whose labels are numbered so (for a file: {order}); if they have the data's, "
            "correct id2label in its config.json."
        )
    console.print(
        f"Warning: {orders}; they are taken to mean the same, in this order.",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _compare(task: Task, rows: Rows, first: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metrics": {
            name: asdict(paired_bootstrap(metric, first, other, rows.labels))
            for name, metric in functions_of(task, RESAMPLED).items()
        }
    }
    if task.kind == "classification":
        found["mcnemar"] = asdict(mcnemar(first == rows.labels, other == rows.labels))
    return found
