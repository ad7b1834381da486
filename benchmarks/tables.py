"""Write four tables of docs/performance.md from the figures of peers, utilisation, scaling and methods.

    python benchmarks/tables.py

Only rows: heads and the text around them stay. tests/test_performance_page.py tells where
that quotes another figure.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDES = {
    "stillroom_10": "Stillroom, ten epochs of",
    "stillroom_3": "Stillroom, three epochs of",
    "fixed": "TextBrewer 0.2.1.post1, padded to 128,",
    "dynamic": "TextBrewer, padded to the batch,",
    "trainer": "transformers' Trainer,",
}
POINTS = {"rows_of_one_length": "rows of 16 tokens each", "lengths": "tokens a row"}


def peers(found: dict[str, Any]) -> Iterator[str]:
    for side, name in SIDES.items():
        ours, rate = side.startswith("stillroom"), found["rows_per_second"][side]
        rows = found["rows" if ours else "peer_rows"]
        ratios = (found[f"ratio_{side}{epochs}"] for epochs in ("", "_3_epochs") if not ours)
        times = " | ".join(f"{ratio:.1f} times" for ratio in ratios) or "|"
        seconds = ", ".join(f"{one:.1f}" for one in found["seconds"][side])
        yield f"| {name} {rows:,} rows | {rate:.{0 if ours else 1}f} | {seconds} | {times} |"


def utilisation(found: dict[str, Any]) -> Iterator[str]:
    def share(side: str) -> str:
        rounds = ", ".join(f"{100 * one:.1f}" for one in found["shares"][side])
        return f"{100 * found['share'][side]:.1f} % ({rounds})"

    yield f"| the teacher's pass | 60 % | | {share('teacher')} |"
    for side, name in (("cached", "a recorded teacher"), ("perturbed", "LRC-BERT with perturbation")):
        first = f"{100 * found['share_of_first_epoch'][side]:.1f} %"
        yield f"| an epoch of {name} | 35 % | {share(side)} | {first} |"


def scaling(found: dict[str, Any]) -> Iterator[str]:
    for part in ("rows", *POINTS, "layers"):
        for value, one in found[part].items():
            cells = f"{one['training_seconds']:.2f} | {one['run_seconds']:.1f} | {one['peak_rss_mb']}"
            yield f"| {value} {POINTS.get(part, part)} | {cells} | {one['batch_lengths']} |"


def methods(found: dict[str, Any]) -> Iterator[str]:
    (name, alone), *others = found["methods"].items()
    yield f"| {name} | {1000 * alone['seconds']:.0f} | | | | | |"
    for name, one in others:
        middle, low, high, *times = one.values()
        quartiles = f"{1000 * low:.0f} to {1000 * high:.0f}"
        yield f"| `{name}` | {1000 * middle:.0f} | {quartiles} | {' | '.join(f'{x:.2f}' for x in times)} |"


SECTIONS = {
    "Training beside the peers": peers,
    "Share of the machine": utilisation,
    "Scaling": scaling,
    "Time per step by method": methods,
}


def written(page: str) -> str:
    """Return the page with the first table of each of these sections made anew."""
    for title, rows in SECTIONS.items():
        found = json.loads(Path(__file__).with_name(f"{rows.__name__}.json").read_text())
        start, old = re.search(rf"(## {title}\n[^#]+?\n\|[-|]+\n)((?:\|.+\n)+)", page).groups()
        page = page.replace(start + old, start + "".join(f"{row}\n" for row in rows(found)))
    return page


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "performance.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
