"""What a comparison's page says: every method of every student, over seeds, against its control."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stillroom.report import facts, flow, pictures
from stillroom.report.facts import Cell, Table
from stillroom.report.pictures import Picture, Point
from stillroom.report.sources import COMPARISON, Compared


def table(found: Mapping[str, Any]) -> Table:
    """Return mean, spread, share kept and difference to the control of every method and student."""
    metric = found["metric"]
    sign = facts.unit(metric)
    columns = [("student", False), ("method", False), ("seeds", True), (f"mean {metric}{sign}", True)]
    columns += [("standard deviation", True), (f"{metric} kept", True), ("minus control, points", True)]
    columns += [("95 % interval", True), ("M parameters", True), ("ms per text", True)]
    rows = []
    for student, costs in found["students"].items():
        for method, result in costs["methods"].items():
            mean = result["mean"][metric]
            # One seed has none.
            spread = (result["standard_deviation"] or {}).get(metric)
            against = result.get("against_control", {}).get(metric)
            kept = result["kept"]
            rows.append(
                [
                    Cell(student, number=False),
                    Cell(method, number=False),
                    Cell(str(len(result["seeds"])), len(result["seeds"])),
                    Cell(f"{100 * mean:.1f}", mean),
                    Cell("–" if spread is None else f"{100 * spread:.1f}", spread or 0.0),
                    Cell("–" if kept is None else f"{100 * kept:.1f} %", kept or 0.0),
                    Cell(facts.signed(100 * against["value"]), against["value"])
                    if against
                    else Cell("–", 0.0),
                    Cell(
                        " to ".join(facts.signed(100 * against[key]) for key in ("low", "high")),
                        against["low"],
                    )
                    if against
                    else Cell("–", 0.0),
                    Cell(f"{costs['parameters'] / 1e6:.1f}", costs["parameters"]),
                    Cell(f"{costs['ms_per_example']:.2f}", costs["ms_per_example"]),
                ]
            )
    return Table(f"Each method over its seeds, on {found['rows']:,} validation rows", columns, rows, True)


def out_of_domain(found: Mapping[str, Any]) -> Table | None:
    """Return the means on sets of other sources; None where there are none."""
    # Comparisons of before there were any have no key for them.
    others = found["teacher"].get("out_of_domain", {})
    heads = [(name, next(iter(metrics))) for name, metrics in others.items()]
    if not heads:
        return None
    columns = [("student", False), ("method", False)]
    columns += [(f"{name}, {metric}{facts.unit(metric)}", True) for name, metric in heads]
    entries = [("teacher", "", others)]
    entries += [
        (student, method, {name: other["mean"] for name, other in result["out_of_domain"].items()})
        for student, costs in found["students"].items()
        for method, result in costs["methods"].items()
    ]
    rows = [
        [Cell(student, number=False), Cell(method, number=False)]
        + [Cell(f"{100 * values[name][metric]:.1f}", values[name][metric]) for name, metric in heads]
        for student, method, values in entries
    ]
    return Table("Means over the seeds on sets of other sources", columns, rows, True)


def differences(found: Mapping[str, Any]) -> Picture | None:
    """Return what each method gains over the control, with its 95 % interval; None without a control."""
    several = len(found["students"]) > 1
    rows = [
        (
            f"{method}, {student}" if several else method,
            *(100 * against[key] for key in ("value", "low", "high")),
        )
        for student, costs in found["students"].items()
        for method, result in costs["methods"].items()
        if (against := result.get("against_control", {}).get(found["metric"]))
    ]
    return pictures.intervals(f"{found['metric']} minus the control's, points", rows) if rows else None


def picture(found: Mapping[str, Any]) -> Picture:
    """Return the best method of each student, and the teacher, against time."""
    metric, teacher = found["metric"], found["teacher"]
    points = [Point("teacher", "teacher", teacher["ms_per_example"], 100 * teacher["metrics"][metric])]
    for student, costs in found["students"].items():
        best = max(result["mean"][metric] for result in costs["methods"].values())
        points.append(Point(student, "student", costs["ms_per_example"], 100 * best))
    return pictures.quality(points, metric, facts.unit(metric))


def headline(found: Mapping[str, Any]) -> str:
    """Return which student and method keep most."""
    metric = found["metric"]
    mean, method, student = max(
        (result["mean"][metric], method, student)
        for student, costs in found["students"].items()
        for method, result in costs["methods"].items()
    )
    sign = facts.unit(metric)
    return (
        f"{method} with student {student} has the best mean {metric}: {100 * mean:.1f}{sign}, "
        f"teacher {100 * found['teacher']['metrics'][metric]:.1f}{sign}."
    )


def curves(compared: Compared) -> list[Picture]:
    """Return how each method of each student trained: the metric beside the control's, and its loss."""
    metric = compared.found["metric"]
    several = len(compared.found["students"]) > 1
    drawn = []
    for student, costs in compared.found["students"].items():
        alone = costs.get("control")
        control = _over_seeds(compared.logs.get((student, alone), []), "validation", metric)
        for method in costs["methods"]:
            logs = compared.logs.get((student, method), [])
            name = f"{method}, {student}" if several else method
            starts = facts.stage_starts([line for line in logs[0] if "stage" in line]) if logs else []
            values = _over_seeds(logs, "validation", metric)
            if len(values) > 1:
                lines = {"control": control} if control and method != alone else {}
                title = f"{name}: {metric}{facts.unit(metric)}"
                drawn.append(pictures.curves(title, lines | {"student": values}, starts, markers=True))
            losses = _over_seeds(logs, "loss")
            if len(losses) > 1:
                drawn.append(pictures.curves(f"{name}: loss", {"student": facts.thin(losses)}, starts))
    return drawn


def _over_seeds(
    logs: Sequence[Sequence[Mapping[str, Any]]], key: str, metric: str | None = None
) -> list[tuple[float, float]]:
    """Return epoch and mean over the seeds of what lines hold, in hundredths for a metric."""
    found: dict[float, list[float]] = {}
    for log in logs:
        for line in log:
            value = line.get(key) if metric is None else line.get(key, {}).get(metric)
            if value is not None:
                found.setdefault(line["epoch"], []).append(value if metric is None else 100 * value)
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(found.items())]


def flows(compared: Compared) -> list[Picture]:
    """Return the layer flow of every method that recorded one, mean over its seeds."""
    return list(_flows(compared))


def _flows(compared: Compared) -> Iterator[Picture]:
    for (student, method), logs in compared.logs.items():
        found = flow.over_runs([terms for log in logs if (terms := flow.of_log(log))])
        for term, problems in found.items():
            caption = f"Layer flow of {method} with student {student}, term {term}"
            for problem, mean in problems.items():
                yield flow.picture({problem: mean}, caption, title=f"{method}, {student}")


def commands(compared: Compared) -> list[tuple[str, str]]:
    """Return what to type to repeat the comparison, and to see its page again."""
    folder = str(compared.folder)
    again = [("This page again", f"stillroom report {shlex.quote(folder)}")]
    if compared.settings is None:
        return again
    settings = shlex.quote(f"{folder}/{COMPARISON}")
    return [("The same comparison again", f"stillroom compare {settings} -o NEW-FOLDER"), *again]


def environment(compared: Compared) -> Table:
    """Return machine and versions, and what the trainings took."""
    took = {}
    for student, costs in compared.found["students"].items():
        seconds = sum(one["seconds"] * len(one["seeds"]) for one in costs["methods"].values())
        runs = sum(len(one["seeds"]) for one in costs["methods"].values())
        took[f"training, {student}"] = f"{runs:,} runs, {seconds:,.0f} s together"
    return facts.machine({**took, **compared.found.get("environment", {})})
