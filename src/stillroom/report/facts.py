"""What a run's page says: every number computed, named and ready to be shown.

Parts for which the run has nothing are None or empty; the page leaves their section out.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from stillroom.evaluation.metrics import functions_of, predictions
from stillroom.evaluation.significance import RESAMPLED, mcnemar, paired_bootstrap
from stillroom.methods import METHODS
from stillroom.report import flow, pictures
from stillroom.report.pictures import Picture, Point
from stillroom.report.sources import Run

POINTS = 200
"""Most points of a curve; longer ones show means of neighbours."""

_AUGMENTED = "augmented_"
"""How a log names a term on augmented rows: this, and the term's name."""

_NOT_TERMS = {
    "step",
    "objective",
    "stage",
    "epoch",
    "loss",
    "gradient_norm",
    "learning_rate",
    "examples_per_second",
    "tokens_per_second",
    "validation",
    "record",
}


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, and what it is sorted by."""

    text: str
    value: float | str | None = None
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of each row names the row."""

    caption: str
    columns: list[tuple[str, bool]]
    """Name, and whether it holds numbers."""
    rows: list[list[Cell]]
    sortable: bool = False


def unit(metric: str) -> str:
    """Return what follows a metric's value times 100: per cent for shares, nothing for correlations."""
    return " %" if metric in ("accuracy", "f1") else ""


def headline(run: Run) -> str:
    """Return the one sentence to remember: what was kept, how much faster, and without a teacher."""
    metrics, metric = run.metrics, run.metrics["metric"]
    found = metrics["student"]["metrics"][metric]
    if "teacher" not in metrics:
        return (
            f"The student, taught by soft labels of a file, has {metric} {100 * found:.1f}{unit(metric)}."
        )
    goal = metrics["teacher"]["metrics"][metric]
    speed = metrics["teacher"]["ms_per_example"] / metrics["student"]["ms_per_example"]
    exported = ""
    if run.export is not None and run.export["forms"]:
        ms, form = min((made["ms_per_row"], name) for name, made in run.export["forms"].items())
        exported = f"; exported ({form}) {metrics['teacher']['ms_per_example'] / ms:.1f} times"
    control = metrics.get("control", {}).get("metrics", {}).get(metric)
    if not goal > 0:
        return (
            f"The teacher’s {metric} is {100 * goal:.1f}, so there was nothing to keep; the student’s is "
            f"{100 * found:.1f}, at {speed:.1f} times the speed{exported}."
        )
    kept = f"{100 * found / goal:.1f} % of the teacher’s {metric}"
    text = f"The student keeps {kept} at {speed:.1f} times its speed{exported}"
    if control is None:
        return f"{text}."
    return f"{text}; without a teacher it would have kept {100 * control / goal:.1f} %."


def caution(run: Run, tests: Sequence["Test"]) -> str:
    """Return what the sentence does not say: rows, seeds, selection, and what chance would do."""
    recipe, training = run.recipe, run.recipe.get("training", {})
    parts = []
    against = next((t for t in tests if (t.a, t.b) == ("control", "student")), None)
    if against is not None and against.first:
        sure = not against.low <= 0 <= against.high
        meaning = (
            "more than chance in the choice of rows explains"
            if sure
            else "which chance in the choice of rows can explain"
        )
        parts.append(
            f"Student minus control: {signed(against.value)} points (95 % interval {signed(against.low)} "
            f"to {signed(against.high)}), {meaning}."
        )
    rows = f" on {len(run.kept.rows):,} validation rows" if run.kept else ""
    parts.append(
        f"One seed ({training.get('seed', 0)}){rows} of {recipe['dataset']['name']}: other seeds would "
        "differ, by how much only more runs can tell."
    )
    if training.get("select") == "best":
        parts.append(
            "The student was selected on these same rows, so its figure is a little too good; "
            "training.select=last has no such advantage."
        )
    return " ".join(parts)


@dataclass(frozen=True)
class Test:
    """Metric of b minus metric of a, in points, on the same rows."""

    a: str
    b: str
    metric: str
    first: bool
    value: float
    low: float
    high: float
    p: float | None


def tests(run: Run) -> list[Test]:
    """Return the differences between the models with their 95 % intervals."""
    if run.kept is None:
        return []
    task, labels = run.kept.task, run.kept.rows.labels
    said = {name: predictions(logits, task.kind) for name, logits in run.kept.logits.items()}
    found = []
    for a, b in (("control", "student"), ("teacher", "student"), ("teacher", "control")):
        if a not in said or b not in said:
            continue
        p = None
        if task.kind == "classification":
            p = mcnemar(said[a] == labels, said[b] == labels).p
        for i, (metric, function) in enumerate(functions_of(task, RESAMPLED).items()):
            d = paired_bootstrap(function, said[a], said[b], labels)
            low, high = 100 * d.low, 100 * d.high
            found.append(Test(a, b, metric, i == 0, 100 * d.value, low, high, p if i == 0 else None))
    return found


def tests_table(found: Sequence[Test]) -> Table | None:
    """Return the differences as a table."""
    if not found:
        return None
    several = any(test.p is not None for test in found)
    columns = [("difference", False), ("metric", False), ("points", True), ("95 % interval", True)]
    rows = []
    for test in found:
        row = [
            Cell(f"{test.b} − {test.a}", number=False),
            Cell(test.metric, number=False),
            Cell(signed(test.value)),
            Cell(f"{signed(test.low)} to {signed(test.high)}"),
        ]
        if several:
            row.append(Cell("" if test.p is None else _p(test.p)))
        rows.append(row)
    caption = (
        "Differences between models on the same rows, with intervals from a paired bootstrap over the rows"
    )
    if several:
        columns.append(("p (McNemar)", True))
        caption += "; p is how often chance alone would make two models differ as much"
    return Table(caption, columns, rows)


def costs(run: Run) -> tuple[Table, Picture]:
    """Return the table of all models and exports, and the picture of quality against time.

    What a phone shows without scrolling stands first: what is kept, the speed, the size.
    """
    metrics, metric = run.metrics, run.metrics["metric"]
    # Without a teacher the first model there is stands in for it.
    first = metrics[run.models[0]]
    goal = metrics["teacher"]["metrics"][metric] if "teacher" in metrics else 0.0
    speed = first["ms_per_example"]
    others = [name for name in first["metrics"] if name != metric]
    columns = [("model", False)]
    if goal > 0:
        columns.append((f"{metric} kept", True))
    columns += [("speed", True), ("MB on disk", True), (f"{metric}{unit(metric)}", True)]
    columns += [("ms per text", True), *((f"{name}{unit(name)}", True) for name in others)]
    columns.append(("parameters", True))
    rows, points = [], []

    def add(
        name: str, role: str, found: Mapping[str, float], count: int | None, size: int, ms: float
    ) -> None:
        def value(name: str) -> Cell:
            return Cell(f"{100 * found[name]:.1f}", found[name]) if name in found else Cell("–")

        row = [Cell(name, number=False)]
        if goal > 0:
            row.append(Cell(f"{100 * found[metric] / goal:.1f} %" if metric in found else "–"))
        row += [Cell(f"{speed / ms:.1f} ×", speed / ms), Cell(f"{size / 1e6:.1f}", size), value(metric)]
        row += [Cell(f"{ms:.2f}", ms), *map(value, others)]
        row.append(Cell("–" if count is None else f"{count / 1e6:.1f} M", count))
        rows.append(row)
        if metric in found:
            points.append(Point(name, role, ms, 100 * found[metric]))

    for name in run.models:
        model = metrics[name]
        add(
            name,
            name,
            model["metrics"],
            model["parameters"],
            model["bytes"],
            model["ms_per_example"],
        )
    for name, form in (run.export or {}).get("forms", {}).items():
        add(
            f"student, {name}",
            "export",
            form.get("metrics") or {},
            None,
            form["bytes"],
            form["ms_per_row"],
        )
    caption = "What each model gets right and what it costs"
    return Table(caption, columns, rows), pictures.quality(points, metric, unit(metric))


def terms(method: str, logged: Iterable[str]) -> list[tuple[str, str]]:
    """Return what each term of a method does, for the terms that a log names.

    Example:
        >>> terms("pkd", ["first_tokens", "other"])
        [('first_tokens', 'brings each layer’s state of the first token to that of a teacher layer')]
    """
    # A control learns from hard labels, whatever the method.
    known = {**METHODS["none"].terms, **(METHODS[method].terms if method in METHODS else {})}
    found = []
    for name in logged:
        what = known.get(name.removeprefix(_AUGMENTED))
        if what is not None:
            found.append((name, f"{what}, on augmented rows" if name.startswith(_AUGMENTED) else what))
    return found


@dataclass(frozen=True)
class Training:
    """How a run trained."""

    pictures: list[Picture]
    """The metric, and each term."""
    terms: list[tuple[str, str]]
    """What each term does."""
    norm: Picture | None
    """The norm of the gradient."""
    table: Table
    """What each stage began and ended with."""


def curves(run: Run) -> Training | None:
    """Return the training curves of every term, and the table of each stage's first and last values."""
    steps = {
        name: [line for line in log if "validation" not in line]
        for name, log in (("control", run.control_log), ("student", run.log))
    }
    if not steps["student"]:
        return None
    names = dict.fromkeys(
        key
        for lines in (steps["student"], steps["control"])
        for line in lines
        for key, value in line.items()
        if key not in _NOT_TERMS and isinstance(value, int | float)
    )
    starts = stage_starts(steps["student"])
    end = max(line["epoch"] for found in steps.values() for line in found)
    drawn, norm = [], None
    metric = run.metrics["metric"]
    evaluations = {
        name: [
            (line["epoch"], 100 * line["validation"][metric])
            for line in log
            if metric in line.get("validation", {})
        ]
        for name, log in (("control", run.control_log), ("student", run.log))
    }
    evaluations = {name: points for name, points in evaluations.items() if points}
    if evaluations:
        title = f"validation {metric}{unit(metric)}"
        drawn.append(pictures.curves(title, evaluations, starts, markers=True, end=end))
    columns = [("term", False), ("model", False), ("stage", True), ("first", True), ("last", True)]
    rows = []
    for term in (*names, "gradient_norm"):
        lines = {
            name: [(line["epoch"], line[term]) for line in found if term in line]
            for name, found in steps.items()
        }
        lines = {name: thin(points) for name, points in lines.items() if points}
        if not lines:
            continue
        title = "gradient norm" if term == "gradient_norm" else term
        picture = pictures.curves(title, lines, starts, end=end)
        if term == "gradient_norm":
            norm = picture
        else:
            drawn.append(picture)
        for name in lines:
            stages: dict[int, list[float]] = {}
            for line in steps[name]:
                if term in line:
                    stages.setdefault(line["stage"], []).append(line[term])
            for stage, values in stages.items():
                rows.append(
                    [
                        Cell(title, number=False),
                        Cell(name, number=False),
                        Cell(str(stage)),
                        Cell(f"{values[0]:.4g}"),
                        Cell(f"{values[-1]:.4g}"),
                    ]
                )
    table = Table("Each term when a stage begins and ends, as logged", columns, rows)
    return Training(drawn, terms(run.recipe["method"]["name"], names), norm, table)


def flows(run: Run) -> list[tuple[Picture, Table]]:
    """Return every flow between layers that a term recorded: for each problem a picture and a table."""
    shown = []
    for term, found in flow.of_log(run.log).items():
        for problem, mean in found.items():
            columns = [("student layer", False), *((str(j + 1), True) for j in range(mean.flow.shape[1]))]
            columns.append(("mass", True))
            rows = [
                [Cell(str(i), number=False), *(Cell(f"{value:.3f}") for value in (*row, row.sum()))]
                for i, row in enumerate(mean.flow, start=1)
            ]
            masses = [Cell(f"{mass:.3f}") for mass in mean.flow.sum(0)]
            rows.append([Cell("mass", number=False), *masses, Cell("")])
            caption = (
                f"{problem}: mean flow of {mean.steps:,} logged steps; columns are teacher layers; "
                f"EMD {mean.first:.4g} at the first, {mean.last:.4g} at the last"
            )
            drawn = flow.picture({problem: mean}, f"Layer flow of the term {term}")
            shown.append((drawn, Table(caption, columns, rows)))
    return shown


def robustness(run: Run) -> Table | None:
    """Return the metric on texts as given and on perturbed ones, with what each loses."""
    found = run.metrics.get("robustness")
    if not found:
        return None
    metric = found["metric"]
    names = [name for name in run.models if name in found["values"]["as given"]]
    columns = [("texts", False)]
    for name in names:
        columns += [(f"{name}{unit(metric)}", True), ("change in points", True)]
    rows = []
    for title, values in found["values"].items():
        row = [Cell(title, number=False)]
        for name in names:
            change = 100 * (values[name] - found["values"]["as given"][name])
            row.append(Cell(f"{100 * values[name]:.1f}"))
            row.append(Cell("–" if title == "as given" else signed(change)))
        rows.append(row)
    return Table(f"{metric} on {found['rows']:,} validation rows, perturbed with seed 0", columns, rows)


def environment(run: Run) -> Table:
    """Return machine, versions and what training took."""
    training = run.metrics.get("train", {})
    took = {}
    if training:
        took = {
            "training": f"{training['seconds']:,.0f} s, {training['steps']:,} steps",
            "speed": f"{training['examples_per_second']:,.0f} rows per second",
            "peak memory": f"{training['peak_rss_bytes'] / 1e6:,.0f} MB",
        }
    return machine({**took, **run.metrics.get("environment", {})})


def machine(values: Mapping[str, Any]) -> Table:
    """Return machine, versions and the like as a table."""
    return pairs("Where and how this was computed", values)


def pairs(caption: str, values: Mapping[str, Any]) -> Table:
    """Return a table of names and values."""
    rows = [[Cell(str(key), number=False), Cell(str(value), number=False)] for key, value in values.items()]
    return Table(caption, [("what", False), ("value", False)], rows)


def commands(run: Run) -> list[tuple[str, str]]:
    """Return what to type to use the student, to repeat the run, and to see its page again."""
    folder = shlex.quote(str(run.folder))
    recipe = shlex.quote(f"{run.folder}/recipe.yaml")
    return [
        ("The student in a form that is small and fast", f"stillroom export {folder}"),
        ("What the student says of texts in a file", f"stillroom predict {folder} FILE.csv -o OUT.csv"),
        ("The student as a server that answers over HTTP", f"stillroom serve {folder}"),
        ("The same student again", f"stillroom distill {recipe} -o NEW-FOLDER"),
        ("With another seed", f"stillroom distill {recipe} --seed 1 -o NEW-FOLDER"),
        ("This page again", f"stillroom report {folder}"),
    ]


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def stage_starts(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the epoch after which each stage but the first was logged first."""
    starts = []
    for before, after in zip(lines, lines[1:], strict=False):
        if before["stage"] != after["stage"]:
            starts.append(float(before["epoch"]))
    return starts


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `POINTS` points: means of neighbours where there are more."""
    if len(points) <= POINTS:
        return list(points)
    return [tuple(group.mean(0).tolist()) for group in np.array_split(np.asarray(points), POINTS)]


def signed(value: float) -> str:
    """Return a difference with its sign, one that is no hyphen."""
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
