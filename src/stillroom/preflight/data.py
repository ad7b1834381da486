"""Checks of the rows: labels, texts, repeats, lengths and batches."""

import numpy as np

from stillroom.data.batching import epoch_batches, padding_share
from stillroom.data.sources import HELD_OUT
from stillroom.data.tasks import Rows, Task
from stillroom.preflight.base import SPLITS, Report, Run, listed, row_numbers, shortened
from stillroom.training.schedule import Schedule

MOST_BLANK = 0.1
"""Above this share of rows with a blank text, the text column is taken to be the wrong one."""

MOST_REPEATED = 0.1
"""Above this share of validation rows that are also training rows, the score would be a lie.

Real sets have some: 1.5 % of CoLA's validation rows."""

SOME_TRUNCATED, MANY_TRUNCATED = 0.01, 0.2
"""Shares of truncated rows from which the warning comes, and from which it is strong."""


def labels(run: Run, report: Report) -> None:
    """Labels are there, valid, and differ between rows."""
    task = run.dataset.task
    report.found["rows"] = {name: len(rows) for name, rows in run.dataset.splits.items()}
    report.found["labels"] = {}
    sound = [_labels_of_split(name, rows, task, report) for name, rows in run.splits()]
    if all(sound) and task.kind == "classification":
        _missing_classes(run, report)
    if all(sound) and task.kind == "multi-label":
        _constant_labels(run, report)


def _labels_of_split(name: str, rows: Rows, task: Task, report: Report) -> bool:
    where = f"{name} ({rows.source})"
    if len(rows) < 2:
        report.error(f"{where} has {len(rows)} row(s), expected at least 2. Give more rows.")
        return False
    values = np.asarray(rows.labels, dtype=np.float64).reshape(len(rows), -1)
    wrong = ~np.isfinite(values)
    expected = "a number for every row"
    if not wrong.any() and task.kind == "classification":
        wrong = (values < 0) | (values >= task.outputs) | (values != np.floor(values))
        expected = f"a class number from 0 to {task.outputs - 1}, for {listed(task.labels)}"
    elif not wrong.any() and task.kind == "multi-label":
        wrong = (values != 0) & (values != 1)
        expected = f"0 or 1 for each of {listed(task.labels)}"
    if wrong.any():
        index = np.flatnonzero(wrong.any(1))
        report.error(
            f"Labels of {where}: expected {expected}, found {values[wrong][0]:g} "
            f"({row_numbers(index)}; {len(index)} in all). Correct or remove these rows."
        )
        return False
    if (values == values[0]).all():
        remedy = f"Check the column {task.label!r} (dataset.label) and the split."
        if HELD_OUT in rows.source:
            remedy = (
                "Every tenth row of the file was held out as validation: shuffle the file, or give other "
                "rows, such as --set dataset.validation=dev.csv."
            )
        report.error(
            f"All {len(rows)} labels of {where} are the same ({_label_name(values[0], task)}), expected "
            f"at least two different ones. {remedy}"
        )
        return False
    report.found["labels"][name] = _summary(values, task)
    return True


def _label_name(value: np.ndarray, task: Task) -> str:
    if task.kind == "classification":
        return task.labels[int(value[0])]
    return listed([f"{number:g}" for number in value]) if task.kind == "multi-label" else f"{value[0]:g}"


def _summary(values: np.ndarray, task: Task) -> dict[str, float]:
    if task.kind == "regression":
        return {"least": float(values.min()), "mean": float(values.mean()), "most": float(values.max())}
    if task.kind == "classification":
        values = values == np.arange(task.outputs)
    return dict(zip(task.labels, map(int, values.sum(0)), strict=True))


def _missing_classes(run: Run, report: Report) -> None:
    counts = report.found["labels"]
    lost = {name: {label for label, count in counts[name].items() if not count} for name in SPLITS}
    order = run.dataset.task.labels
    unseen = [label for label in order if label in lost["train"] - lost["validation"]]
    if unseen:
        report.error(
            f"The classes {listed(unseen)} are in validation but not in train, so they cannot be "
            "learned. Give training rows of each (check dataset.train_rows), or drop their rows."
        )
    other = [label for label in order if label in lost["train"] & lost["validation"]]
    if other:
        report.warn(f"No row has the classes {listed(other)}; check dataset.labels.")
    untested = [label for label in order if label in lost["validation"] - lost["train"]]
    if untested:
        report.warn(f"Validation has no row of {listed(untested)}: its score says nothing of them.")


def _constant_labels(run: Run, report: Report) -> None:
    for name, rows in run.splits():
        count = report.found["labels"][name]
        constant = [label for label in count if count[label] in (0, len(rows))]
        if constant:
            report.warn(f"In {name}, {listed(constant)} are the same for every row.")


def blank_texts(run: Run, report: Report) -> None:
    """Texts are not empty; an empty one of a pair counts."""
    for name, rows in run.splits():
        blank = [i for i in range(len(rows)) if any(not column[i].strip() for column in rows.texts)]
        if not blank:
            continue
        share = len(blank) / len(rows)
        columns = " and ".join(repr(column) for column in run.dataset.task.text)
        text = (
            f"{len(blank)} of the {len(rows)} rows of {name} ({rows.source}) have an empty text "
            f"({row_numbers(blank)})"
        )
        if share > MOST_BLANK:
            report.error(
                f"{text}, expected at most {MOST_BLANK:.0%}. Check that {columns} are the text "
                "columns (dataset.text), or remove these rows."
            )
        else:
            report.warn(f"{text}; nothing can be learned from them.")


def repeated_rows(run: Run, report: Report) -> None:
    """Validation rows are not training rows, and equal training rows have equal labels."""
    train, validation = (rows for _, rows in run.splits())
    if run.dataset.augmented:
        # Copies of a row may well have other labels than the row.
        train = train.take(np.arange(len(train) - run.dataset.augmented))
    first: dict[int, object] = {}
    conflicts = set()
    for key, label in zip(train.text_keys(), train.labels.tolist(), strict=True):
        if first.setdefault(key, label) != label:
            conflicts.add(key)
    # The same text rated twice gets two close scores: no contradiction.
    if conflicts and run.dataset.task.kind != "regression":
        example = next(i for i, key in enumerate(train.text_keys()) if key in conflicts)
        report.warn(
            f"{len(conflicts)} text(s) of train occur with different labels, such as "
            f"{_example(train, example)} (row {example + 1})."
        )
    again = [i for i, key in enumerate(validation.text_keys()) if key in first]
    report.found["validation_rows_in_train"] = len(again)
    if again:
        share = len(again) / len(validation)
        text = (
            f"{len(again)} of the {len(validation)} validation rows ({share:.1%}) are also in train, "
            f"such as {_example(validation, again[0])} (row {again[0] + 1})"
        )
        if share > MOST_REPEATED:
            report.error(
                f"{text}, expected at most {MOST_REPEATED:.0%}: the score would tell what was "
                "memorised. Remove them from train, or give another validation file "
                "(dataset.validation)."
            )
        else:
            report.warn(f"{text}; the score may be a little too good.")


def augmented_rows(run: Run, report: Report) -> None:
    """No augmented row is a validation row."""
    count, train = run.dataset.augmented, run.dataset.splits["train"]
    if not count:
        return
    report.found["augmented_rows"] = count
    rows = train.take(np.arange(len(train) - count, len(train)))
    validation = set(run.dataset.splits["validation"].text_keys())
    again = [i for i, key in enumerate(rows.text_keys()) if key in validation]
    if again:
        report.error(
            f"{len(again)} of the {count} augmented rows are validation rows, expected none, such as "
            f"{_example(rows, again[0])} (row {again[0] + 1}): the score would tell what was memorised. "
            "Write them again with `stillroom augment`, which leaves out rows of this validation split."
        )


def _example(rows: Rows, index: int) -> str:
    return " | ".join(shortened(column[index]) for column in rows.texts)


def truncation(run: Run, report: Report) -> None:
    """Rows fit into the maximal length, and the maximal length into the models."""
    report.found["truncated"] = {}
    limit = min(model.positions for _, model in run.models())
    for who, model in run.models():
        if who == "teacher" and run.tokens.alike:
            continue
        splits = run.tokens.teacher if who == "teacher" else run.tokens.student
        shares = {name: splits[name].truncated / max(1, len(splits[name])) for name in SPLITS}
        report.found["truncated"][who] = shares
        most = max(shares.values())
        cut_by_model = model.positions < run.max_length
        if most <= SOME_TRUNCATED and not (cut_by_model and most > 0):
            continue
        listing = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
        cut = min(run.max_length, model.positions)
        text = f"{listing} are longer than {cut} tokens and lose their end."
        if most > MANY_TRUNCATED:
            text = f"More than {MANY_TRUNCATED:.0%} of the rows do not fit: {text}"
        if run.max_length < limit:
            remedy = f"Raise dataset.max_length (the models read up to {limit} tokens; now {cut})."
        else:
            remedy = f"The {who} reads at most {model.positions} tokens: shorten the texts."
        report.warn(f"{text} {remedy}")


def batches(run: Run, report: Report) -> None:
    """Every step of the run has batches that hold as many rows as its terms need."""
    settings, lengths = run.training, run.tokens.student["train"].lengths
    if not len(lengths):
        return
    schedule = Schedule(lengths, run.plan, settings)
    starts: dict[int, int] = {}
    for step, group in enumerate(schedule.from_step(0)):
        number, stage = schedule.stage(step)
        starts.setdefault(number, step)
        raised = run.plan.augmentation.weights if run.plan.augmentation else ()
        computed = (*stage.weights, *stage.augmented, *raised)
        needed = {name: run.plan.terms[name].least_rows for name in computed}
        name = max(needed, key=lambda term: needed[term])
        small = next((rows for rows in group if len(rows) < needed[name]), None)
        if small is not None:
            report.error(_too_small(run, step, name, needed[name], small))
            break
    else:
        empty = [i for i in range(1, len(run.plan.stages) + 1) if i not in starts]
        if empty:
            report.warn(
                f"Stage {', '.join(map(str, empty))} of {len(run.plan.stages)} gets none of the "
                f"{schedule.steps} step(s). Train for more epochs (training.epochs)."
            )
    report.found["steps"] = schedule.steps
    report.found["stage_starts"] = {str(number): step for number, step in starts.items()}
    first = epoch_batches(
        lengths,
        seed=settings.seed,
        epoch=0,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
    )
    report.found["padding"] = padding_share(lengths, first)


def _too_small(run: Run, step: int, name: str, least: int, rows: np.ndarray) -> str:
    settings, lengths = run.training, run.tokens.student["train"].lengths
    longest = int(lengths[rows].max())
    text = (
        f"{name} needs at least {least} rows in every batch, found {len(rows)} in a batch of step "
        f"{step + 1} ({row_numbers(rows)} of train). "
    )
    if least * longest > settings.max_tokens:
        return text + (
            f"{least} rows of {longest} tokens do not fit training.max_tokens={settings.max_tokens}: "
            f"raise it to {least * longest} or more, or lower dataset.max_length."
        )
    return text + (
        f"training.batch_size={settings.batch_size} leaves such batches of the {len(lengths)} rows: "
        f"set it to {max(least + 1, settings.batch_size + 1)} or more."
    )
