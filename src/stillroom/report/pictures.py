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
from importlib.resources import files
from typing import Any

import numpy as np

ROLES = ("ink", "soft", "line", "raised", "teacher", "control", "student", "export")
"""Roles of colours: each is a variable of the style sheet."""

FEW = 5
"""Fewest rows of a bin of confidence whose share of right answers is more than chance."""

_STAND_INS = {role: f"#0102{i:02x}" for i, role in enumerate(ROLES, start=1)}

_LINES = {
    "teacher": ("teacher", "-."),
    "control": ("control", "--"),
    "student": ("student", "-"),
    "training": ("student", "-"),
    "held out": ("control", "o--"),
}
"""By the name of a line in a curve its role, and how it is drawn."""


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
    from matplotlib.ticker import LogLocator

    with _figure(4.6, 3.4) as figure:
        axes = figure.add_subplot()
        for point in points:
            axes.plot(point.ms, point.value, "o", markersize=9, color=_STAND_INS[point.role])
        times, values = [point.ms for point in points], [point.value for point in points]
        if max(times) > 5 * min(times) > 0:
            axes.set_xscale("log")
            axes.set_xlim(min(times) / 1.6, max(times) * 1.6)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.set_xlim(0, max(times) * 1.25)
        room = max(max(values) - min(values), 0.5) * 0.35
        axes.set_ylim(min(values) - room, max(values) + room)
        axes.set_xlabel("milliseconds per text, one at a time (less is better)")
        axes.set_ylabel(f"{metric}{unit} (more is better)")
        _name_points(figure, axes, points)
        said = "; ".join(f"{p.name}: {p.value:.1f}{unit} at {p.ms:.2f} ms" for p in points)
        return _picture(figure, f"{metric} against time per text. {said}.", f"{metric} against time")


_BESIDE = (
    (0, 9, "center", "bottom"),
    (0, -10, "center", "top"),
    (10, 0, "left", "center"),
    (-10, 0, "right", "center"),
    (0, 24, "center", "bottom"),
    (0, -25, "center", "top"),
)
"""Places of a point's name in the order of preference: points to the right and up, and alignment."""


def _name_points(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Write each point's name beside it, in the first place where it meets no other name or point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    taken = []
    pixel = figure.dpi / 72
    for point in points:
        x, y = axes.transData.transform((point.ms, point.value))
        taken.append(Bbox.from_extents(x - 5 * pixel, y - 5 * pixel, x + 5 * pixel, y + 5 * pixel))
    for point in sorted(points, key=lambda point: (-point.value, point.ms)):
        tried: list[tuple[float, int, Any, Any]] = []
        for dx, dy, across, down in _BESIDE:
            name = axes.annotate(
                point.name,
                (point.ms, point.value),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=across,
                va=down,
                color=_STAND_INS[point.role],
                weight="bold",
                # A long name may reach over the edge; it must not squeeze the axes.
                in_layout=False,
            )
            box = name.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            tried.append((sum(box.overlaps(other) for other in taken) + outside, len(tried), name, box))
            if tried[-1][0] == 0:
                break
        _, _, kept, box = min(tried, key=lambda each: each[:2])
        for _, _, name, _ in tried:
            if name is not kept:
                name.remove()
        taken.append(box)


def curves(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    stages: Sequence[float] = (),
    *,
    markers: bool = False,
    across: str = "epoch",
    end: float | None = None,
) -> Picture:
    """Return one line per model over the epochs or steps, with a dotted line where a stage begins.

    With `end` the picture reaches from 0 to there, as others beside it do, wherever its lines begin.
    """
    with _figure(3.6, 2.5) as figure:
        axes = figure.add_subplot()
        for name, points in lines.items():
            role, form = _LINES[name]
            axes.plot(
                *zip(*points, strict=True),
                f"o{form}" if markers else form,
                color=_STAND_INS[role],
                linewidth=1.8,
                markersize=4,
                label=name,
            )
        for start in stages:
            axes.axvline(start, color=_STAND_INS["soft"], linewidth=1, linestyle=":")
        if end is not None:
            axes.set_xlim(-0.03 * end, 1.03 * end)
        axes.set_xlabel(across)
        axes.set_title(title, fontsize=11, color=_STAND_INS["ink"], loc="left", weight="bold")
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)
        return _picture(figure, f"{title} over the {across}s. {_from_to(lines)}.", title)


def layers(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """Return one line per layer over the steps, the deeper the stronger, for values from 0 to 1."""
    with _figure(3.6, 2.5) as figure:
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(lines.items(), start=1):
            axes.plot(
                *zip(*points, strict=True),
                "o-",
                color=_STAND_INS["student"],
                alpha=0.25 + 0.75 * place / len(lines),
                linewidth=1.8,
                markersize=4,
                label=name,
            )
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=11, color=_STAND_INS["ink"], loc="left", weight="bold")
        axes.legend(frameon=False, labelcolor=_STAND_INS["ink"], fontsize=8, loc="lower right", ncols=2)
        return _picture(figure, f"{title} over the steps. {_from_to(lines)}.", title)


def _from_to(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    return "; ".join(
        f"{name}: from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in lines.items()
    )


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]]) -> Picture:
    """Return a value with its interval for each name, from top to bottom, beside a line at zero."""
    with _figure(4.6, 0.9 + 0.3 * len(rows)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=_STAND_INS["control"], linewidth=1.2, linestyle="--")
        for place, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=_STAND_INS["student"], linewidth=1.8)
            axes.plot(value, place, "o", markersize=6, color=_STAND_INS["student"])
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(title)
        said = "; ".join(
            f"{name}: {value:+.1f}, {low:+.1f} to {high:+.1f}" for name, value, low, high in rows
        )
        return _picture(figure, f"{title}, with 95 % intervals. {said}.", title)


def reliability(
    name: str,
    confidence: Sequence[float],
    accuracy: Sequence[float],
    rows: Sequence[int],
    error: float,
    *,
    lowest: float,
) -> Picture:
    """Return the share of right answers against confidence; on the diagonal both are equal.

    Bins of fewer than `FEW` rows are hollow, and no line leads to them. Both axes begin at `lowest`, as
    those of the pictures beside it.
    """
    with _figure(3.0, 3.0) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_STAND_INS["soft"], linewidth=1, linestyle=":")
        bins = list(zip(confidence, accuracy, rows, strict=True))
        many = [each for each in bins if each[2] >= FEW]
        few = [each for each in bins if each[2] < FEW]
        axes.plot([c for c, _, _ in many], [a for _, a, _ in many], color=_STAND_INS[name], linewidth=1.2)
        for found, inside in ((many, _STAND_INS[name]), (few, "none")):
            sizes = [20 + 120 * count / max(rows) for _, _, count in found]
            edge = _STAND_INS[name if found is many else "soft"]
            places = [c for c, _, _ in found], [a for _, a, _ in found]
            axes.scatter(*places, s=sizes, facecolors=inside, edgecolors=edge)
        axes.set_xlim(lowest - 0.05, 1.05)
        axes.set_ylim(lowest - 0.05, 1.05)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right")
        axes.set_title(f"{name}: ECE {100 * error:.1f} %", fontsize=11, loc="left", weight="bold")
        said = "; ".join(f"confidence {c:.2f}: {a:.2f} right, {n} rows" for c, a, n in bins)
        return _picture(
            figure, f"Reliability of the {name}, error {100 * error:.1f} %. {said}.", f"Reliability, {name}"
        )


def heat(flows: Mapping[str, np.ndarray], caption: str, *, title: str | None) -> Picture:
    """Return how much flows from each student layer (rows) to each teacher layer (columns).

    One panel for each transport problem, by name. A square holds its share of all that flows, in per
    cent; the numbers outside are the sums of rows and columns, which are the masses of the layers.
    """
    rows, columns = np.shape(next(iter(flows.values())))
    beside = columns <= 7
    side = 0.44
    width, height = side * (columns + 1) + 0.7, side * (rows + 1) + 0.8
    across, down = (len(flows), 1) if beside else (1, len(flows))
    above = 0.35 if title else 0.12
    with _figure(width * across, height * down + above) as figure:
        panels = figure.subplots(down, across, squeeze=False).flat
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold", color=_STAND_INS["ink"])
        for axes, (name, flow) in zip(panels, flows.items(), strict=True):
            _squares(axes, name, flow)
        said = "; ".join(f"{name}: {_strongest(flow)}" for name, flow in flows.items())
        return _picture(figure, f"{caption}. {said}.", caption)


def _squares(axes: Any, name: str, flow_LM: np.ndarray) -> None:
    """Draw one transport problem: a square for each pair of layers, and the sums at the edges."""
    from matplotlib.patches import Rectangle

    rows, columns = flow_LM.shape
    share_LM = flow_LM / (flow_LM.sum() or 1.0)
    top = share_LM.max() or 1.0

    def number(x: float, y: float, value: float, role: str) -> None:
        text = f"{100 * value:.0f}" if value >= 0.005 else ""
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=9, color=_STAND_INS[role])

    for (i, j), share in np.ndenumerate(share_LM):
        strength = max(0.0, share) / top
        box = Rectangle((j + 0.52, i + 0.52), 0.96, 0.96, lw=0, color=_STAND_INS["student"])
        box.set_alpha(max(0.04, strength))
        axes.add_patch(box)
        number(j + 1, i + 1, share, "raised" if strength > 0.7 else "ink")
    for i, mass in enumerate(share_LM.sum(1)):
        number(columns + 1, i + 1, mass, "soft")
    for j, mass in enumerate(share_LM.sum(0)):
        number(j + 1, rows + 1, mass, "soft")
    axes.set_xlim(0.5, columns + 1.5)
    axes.set_ylim(rows + 1.5, 0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(1, columns + 1))
    axes.set_yticks(range(1, rows + 1))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("student layer")
    axes.set_title(name, fontsize=10, loc="left", weight="bold")


def _strongest(flow_LM: np.ndarray) -> str:
    """Return in words from which teacher layer each student layer learns most."""
    parts = []
    for i, row in enumerate(flow_LM):
        j = int(row.argmax())
        share = 100 * row[j] / (row.sum() or 1.0)
        parts.append(f"student layer {i + 1} most from teacher layer {j + 1} ({share:.0f} %)")
    return ", ".join(parts)


def alone(picture: Picture) -> str:
    """Return a picture as an SVG file of its own, in the page's light colours, on white."""
    style = files("stillroom.report").joinpath("page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+)", style[: style.index("}")]))
    svg = re.sub(r"var\(--(\w+)\)", lambda found: light[found[1]], picture.svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    root = f'<svg width="{size[1]}pt" height="{size[2]}pt" font-family="system-ui, sans-serif"'
    svg = svg.replace("<svg", root, 1)
    start = svg.index(">") + 1
    return f'{svg[:start]}\n<rect width="100%" height="100%" fill="{light["raised"]}"/>{svg[start:]}\n'


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """Yield a figure of inches, in which axes take the page's colours."""
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
        yield Figure(figsize=(width, height), layout="constrained")


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
