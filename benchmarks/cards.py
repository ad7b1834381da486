"""Write what was measured of each method into docs/methods/, from the figures in results.json.

    python benchmarks/cards.py

One line of each card, below its heading "Measured result".
"""

import json
import re
from pathlib import Path
from typing import Any

from results import METHODS, STUDENT, kept

from stillroom import methods

STUDENTS = {STUDENT: "three layers", "4x312 from pca": "4x312 folded from it"}
HEADING = "## Measured result\n\n"


def line(name: str, tasks: dict[str, Any]) -> str:
    """Return what students keep by a method and by none, over the seeds that both have on all tasks."""
    name = f"{name}, tensor norm" if f"{name}, tensor norm" in METHODS else name
    parts, steps = [], set()
    for student, title in STUDENTS.items():
        found, control = (
            [task["students"][student]["methods"].get(method) for task in tasks.values()]
            for method in (name, "none")
        )
        seeds = set.intersection(*(set(one["seeds"] if one else ()) for one in found + control))
        if not seeds:
            continue
        steps |= {one["steps"] for one in found}
        without = "" if name == "none" else f"{kept(tasks, control, seeds)[0]} without a teacher, "
        which = f"seed{'s' * (len(seeds) > 1)} {', '.join(sorted(seeds))}"
        parts.append(f"{kept(tasks, found, seeds)[0]} by {title} ({without}{which})")
    if not parts:
        return "Not measured by itself; the others are in [results](../results.md)."
    (count,) = steps
    return (
        f"Kept of a 6-layer teacher after {count} steps, as the mean over {len(tasks)} tasks of GLUE: "
        f"{'; '.join(parts)}. More in [results](../results.md)."
    )


def main() -> None:
    tasks = json.loads(Path(__file__).with_name("results.json").read_text())["tasks"]
    for name in methods.METHODS:
        card = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
        start, old, rest = re.split(rf"(?<={HEADING})(.*)", card.read_text(encoding="utf-8"), maxsplit=1)
        card.write_text(f"{start}{line(name, tasks)}{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
