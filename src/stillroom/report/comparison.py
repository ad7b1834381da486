"""What a comparison's page says: every method of every student, over seeds, against its control."""

from collections.abc import Mapping
from typing import Any

from stillroom.report import facts, pictures
from stillroom.report.facts import Cell, Table
from stillroom.report.pictures import Picture, Point


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
            kept = result["retained"]
            rows.append(
                [
                    Cell(student, number=False),
                    Cell(method, number=False),
                    Cell(str(len(result["seeds"])), len(result["seeds"])),
                    Cell(f"{100 * mean:.1f}", mean),
                    Cell("–" if spread is None else f"{100 * spread:.1f}", spread or 0.0),
                    Cell("–" if kept is None else f"{100 * kept:.1f} %", kept or 0.0),
                    Cell(f"{100 * against['value']:+.1f}", against["value"]) if against else Cell("–", 0.0),
                    Cell(f"{100 * against['low']:+.1f} to {100 * against['high']:+.1f}", against["low"])
                    if against
                    else Cell("–", 0.0),
                    Cell(f"{costs['parameters'] / 1e6:.1f}", costs["parameters"]),
                    Cell(f"{costs['ms_per_example']:.2f}", costs["ms_per_example"]),
                ]
            )
    return Table(f"Each method over its seeds, on {found['rows']:,} validation rows", columns, rows, True)


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
