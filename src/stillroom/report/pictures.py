"""Pictures as inline SVG whose colours are the page's own, so that they follow its light and dark.

matplotlib draws with one stand-in colour for each role; every stand-in then becomes a variable of the
page's style sheet. Text stays text, in the page's font.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

ROLES = ("ink", "soft", "line", "paper", "teacher", "control", "student", "export")
"""Roles of colours: each is a variable of the style sheet."""

_STAND_INS = {role: f"#0102{i:02x}" for i, role in enumerate(ROLES, start=1)}

_DASHES = {"teacher": "-.", "control": "--", "student": "-", "export": ":"}


@dataclass(frozen=True)
class Picture:
    """An SVG element with its text alternative inside, and a caption for everyone."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Point:
    """A model in the picture of quality against time."""

    name: str
    role: str
    ms: float
    value: float


def quality(points: Sequence[Point], metric: str, unit: str) -> Picture:
    """Return quality against milliseconds per text: up and to the left is better."""
    with _figure(5.6, 3.5) as (figure, axes):
        for i, point in enumerate(sorted(points, key=lambda point: (point.ms, point.value))):
            # Neighbours take turns above and below, so that their names do not meet.
            above = i % 2 == 1
            axes.plot(point.ms, point.value, "o", markersize=9, color=_STAND_INS[point.role])
            axes.annotate(
                point.name,
                (point.ms, point.value),
                xytext=(0, 9 if above else -10),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                color=_STAND_INS[point.role],
                weight="bold",
                # A long name may reach over the edge; it must not squeeze the axes.
                in_layout=False,
            )
        times, values = [point.ms for point in points], [point.value for point in points]
        if max(times) > 5 * min(times) > 0:
            axes.set_xscale("log")
            axes.set_xlim(min(times) / 1.6, max(times) * 1.6)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.set_xlim(0, max(times) * 1.25)
        room = max(max(values) - min(values), 0.5) * 0.35
        axes.set_ylim(min(values) - room, max(values) + room)
        axes.set_xlabel("milliseconds per text, one at a time (less is better)")
        axes.set_ylabel(f"{metric}{unit} (more is better)")
        said = "; ".join(f"{p.name}: {p.value:.1f}{unit} at {p.ms:.2f} ms" for p in points)
        return _picture(figure, f"{metric} against time per text. {said}.", f"{metric} against time")


def curves(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    stages: Sequence[float] = (),
    *,
    markers: bool = False,
) -> Picture:
    """Return one line per model over the epochs, with a dotted line where a stage begins."""
    with _figure(3.6, 2.5) as (figure, axes):
        for name, points in lines.items():
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                _DASHES[name],
                color=_STAND_INS[name],
                linewidth=1.8,
                marker="o" if markers else None,
                markersize=4,
                label=name,
            )
        for start in stages:
            axes.axvline(start, color=_STAND_INS["soft"], linewidth=1, linestyle=":")
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize=11, color=_STAND_INS["ink"], loc="left", weight="bold")
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)
        said = "; ".join(
            f"{name}: from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in lines.items()
        )
        return _picture(figure, f"{title} over the epochs. {said}.", title)


def reliability(
    name: str, confidence: Sequence[float], accuracy: Sequence[float], rows: Sequence[int], error: float
) -> Picture:
    """Return the share of right answers against confidence; on the diagonal both are equal."""
    with _figure(3.0, 3.0) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_STAND_INS["soft"], linewidth=1, linestyle=":")
        axes.plot(confidence, accuracy, color=_STAND_INS[name], linewidth=1.2)
        most = max(rows)
        sizes = [20 + 120 * count / most for count in rows]
        axes.scatter(confidence, accuracy, s=sizes, color=_STAND_INS[name])
        lowest = min(0.5, *confidence, *accuracy)
        axes.set_xlim(lowest - 0.05, 1.05)
        axes.set_ylim(lowest - 0.05, 1.05)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right")
        axes.set_title(f"{name}: ECE {100 * error:.1f} %", fontsize=11, loc="left", weight="bold")
        said = "; ".join(
            f"confidence {c:.2f}: {a:.2f} right, {n} rows"
            for c, a, n in zip(confidence, accuracy, rows, strict=True)
        )
        return _picture(
            figure, f"Reliability of the {name}, error {100 * error:.1f} %. {said}.", f"Reliability, {name}"
        )


def heat(title: str, matrix: Sequence[Sequence[float]]) -> Picture:
    """Return how much flows from each student layer (rows) to each teacher layer (columns)."""
    from matplotlib.patches import Rectangle

    rows, columns = len(matrix), len(matrix[0])
    top = max(max(row) for row in matrix) or 1.0
    with _figure(max(2.6, 0.45 * columns + 1.0), max(1.8, 0.45 * rows + 1.0)) as (figure, axes):
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                square = Rectangle(
                    (j + 0.5, i + 0.5), 1, 1, color=_STAND_INS["student"], alpha=max(0.0, value) / top, lw=0
                )
                axes.add_patch(square)
        axes.set_xlim(0.5, columns + 0.5)
        axes.set_ylim(rows + 0.5, 0.5)
        axes.set_xticks(range(1, columns + 1))
        axes.set_yticks(range(1, rows + 1))
        axes.grid(False)
        axes.set_xlabel("teacher layer")
        axes.set_ylabel("student layer")
        axes.set_title(title, fontsize=11, loc="left", weight="bold")
        return _picture(
            figure, f"{title}: flow from student to teacher layers; the table has the numbers.", title
        )


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure of inches in the page's colours, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "stillroom",
        # A class may be named $x$.
        "text.parse_math": False,
        "font.size": 10,
        "axes.edgecolor": _STAND_INS["soft"],
        "axes.labelcolor": _STAND_INS["soft"],
        "axes.titlecolor": _STAND_INS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _STAND_INS["line"],
        "grid.linewidth": 0.8,
        "xtick.color": _STAND_INS["soft"],
        "ytick.color": _STAND_INS["soft"],
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _picture(figure: Any, alternative: str, caption: str) -> Picture:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    # Ids have to differ between the pictures of a page.
    prefix = f"p{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    return Picture(_own(svg, prefix, alternative), caption)


def _own(svg: str, prefix: str, alternative: str) -> str:
    """Return matplotlib's file as an element of the page: its colours, its font, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for role, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    label = f'<svg role="img" aria-label="{escape(alternative)}" style="width: {1.3 * width:.0f}px"'
    return svg.replace("<svg", label, 1).strip()
