"""The figures of docs/performance.md, and what other pages quote of them, are those of benchmarks/."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def figures(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text())


def rows(title: str) -> list[list[str]]:
    """Return the cells below the heads of the first table of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    _, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    return [line.split(" | ") for line in lines]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_tables_are_what_the_scripts_write(script: Callable[[str], Any]) -> None:
    assert script("tables").written(PAGE) == PAGE
    assert f"\n\n{script('trim').markdown(figures('trim'))}\n\n" in PAGE
    _, latency, _ = script("latency").markdown(figures("latency")).split("\n\n")
    assert f"\n\n{latency}\n\n" in PAGE


def test_written_tables_hold_rounded_figures(script: Callable[[str], Any]) -> None:
    tables = script("tables")
    found: dict[str, Any] = {f"ratio_{side}": 22.17 for side in tables.SIDES}
    found |= {f"ratio_{side}_3_epochs": 0.94 for side in tables.SIDES}
    found |= {"rows": 2000, "peer_rows": 250, "rows_per_second": dict.fromkeys(tables.SIDES, 17.26)}
    first, *_, last = tables.peers(found | {"seconds": dict.fromkeys(tables.SIDES, [13.04, 9.96])})
    assert first == "| Stillroom, ten epochs of 2,000 rows | 17 | 13.0, 10.0 | | |"
    assert last == "| transformers' Trainer, 250 rows | 17.3 | 13.0, 10.0 | 22.2 times | 0.9 times |"
    share = {"teacher": 0.65, "cached": 0.348, "perturbed": 0.332}
    shares = {side: [0.34, 0.357] for side in share}
    *_, last = tables.utilisation({"share": share, "shares": shares, "share_of_first_epoch": share})
    assert last == "| an epoch of LRC-BERT with perturbation | 35 % | 33.2 % (34.0, 35.7) | 33.2 % |"
    point = {"training_seconds": 1.006, "run_seconds": 2.26, "peak_rss_mb": 700, "batch_lengths": 3}
    found = {"rows": {}, "rows_of_one_length": {}, "lengths": {"16": point}, "layers": {}}
    assert list(tables.scaling(found)) == ["| 16 tokens a row | 1.01 | 2.3 | 700 | 3 |"]
    step = {"seconds": 0.1376, "lower_quartile": 0.0918, "upper_quartile": 0.1987, "a": 1, "b": 2.026}
    assert list(tables.methods({"methods": {"teacher's pass": {"seconds": 0.0926}, "pkd": step}})) == [
        "| teacher's pass | 93 | | | | | |",
        "| `pkd` | 138 | 92 to 199 | 1.00 | 2.03 |",
    ]


def test_padding_table_is_the_committed_figures() -> None:
    found = {task: one for task, one in figures("padding").items() if task != "machine"}
    assert [name.lower().replace("-", "") for name, *_ in rows("Padding")] == list(found)
    for (_, *cells), one in zip(rows("Padding"), found.values(), strict=True):
        shares = [f"{100 * one[key]:.1f} %" for key in ("batch_16", "batch_32", "evaluation")]
        assert cells == [f"{one['rows']:,}", *shares, f"{100 * one['unsorted']:.0f} %"]


def test_load_table_is_the_committed_figures() -> None:
    found = figures("load")
    assert [name for name, *_ in rows("Serving under load")] == ["`onnx`", "`onnx-int8`"]
    for name, *cells in rows("Serving under load"):
        one = found[name.strip("`")]
        waiting = [f"{one[f'p{share}_ms']:.0f} ms" for share in (50, 95, 99)]
        bodies = "; ".join(f"{status}: {count:,}" for status, count in one["malformed"].items())
        assert one["up_afterwards"]
        counts = [str(one["lost"]), str(one["swapped"]), f"{bodies}; still up"]
        assert cells == [f"{one['requests_per_second']:.0f}", *waiting, *counts]


def training() -> Iterator[tuple[str, str]]:
    """Yield a page, and what it says of training in its text."""
    page, peers, scaling = "docs/performance.md", figures("peers"), figures("scaling")
    padding = [one for task, one in figures("padding").items() if task != "machine"]
    worst = max(one[key] for one in padding for key in ("batch_16", "batch_32"))
    yield page, f"the most is {100 * worst:.1f} %, of SST-2's short sentences"
    yield page, f"figures in `benchmarks/peers.json`, {peers['machine']['date']}"
    rate = {side: f"{each:.1f}" for side, each in peers["rows_per_second"].items()}
    ten, three = (f"{peers['rows_per_second'][f'stillroom_{epochs}']:.0f}" for epochs in (10, 3))
    yield "README.md", f"reads {ten} rows a second over ten epochs and {three} over three;"
    yield "README.md", f"{rate['dynamic']} with dynamic padding and {rate['fixed']} padded to 128"
    yield "README.md", f"transformers' Trainer {rate['trainer']}, all in float32"
    times = [f"{peers[f'ratio_{side}']:.0f}" for side in ("dynamic", "fixed", "trainer")]
    yield "README.md", "So {}, {} and {} times as many over ten epochs".format(*times)
    yield page, f"({figures('utilisation')['gigaops_per_second'] / 1000:.2f} T operations a second"
    least, *_, most = (f"{one['peak_rss_mb']} MB" for one in scaling["rows_of_one_length"].values())
    yield page, f"64,000 of one length take {most}, 1,000 take {least}, "
    growth = [
        (more["peak_rss_mb"] - less["peak_rss_mb"]) / (more["batch_lengths"] - less["batch_lengths"])
        for less, more in pairwise(scaling["rows"].values())
    ]
    yield page, f"by {min(growth):.0f} to {max(growth):.0f} MB each: oneDNN"
    yield page, f"figures in `benchmarks/scaling.json`, machine as above, {scaling['machine']['date']}"
    found = figures("methods")
    emd, fixed, codir = (found["methods"][name] for name in ("bert-emd", "bert-emd fixed map", "codir"))
    part = {to: f"times {to}, student's part" for to in ("kd", "kd+hidden")}
    yield (
        page,
        f"`bert-emd` takes {emd['seconds'] / fixed['seconds']:.2f} times the median of the same losses",
    )
    yield page, f"1.35), {emd[part['kd']] / fixed[part['kd']]:.2f} times in the student's part; `codir`"
    yield page, f"`codir` {codir['times kd+hidden']:.2f} times plain distillation with hidden states"
    yield page, f"1.15), {codir[part['kd+hidden']]:.2f} times in the student's part."
    yield page, f"({found['tokens per row']} tokens a row)"
    # Older figures do not tell their date.
    if "date" in found["machine"]:
        yield page, f"figures in `benchmarks/methods.json`, {found['machine']['date']}"


def deployment() -> Iterator[tuple[str, str]]:
    """Yield a page, and what it says of exports in its text."""
    page, latency, trim = "docs/performance.md", figures("latency"), figures("trim")
    ms = {f"{one['model']} {one['form']}": one["median_ms"] for one in latency["times"]}
    mb = {f"{one['model']} {one['form']}": one["bytes"] / 1e6 for one in latency["models"]}
    times = {name: ms["12x768 torch"] / one for name, one in ms.items()}
    yield page, f"9.6 times the 12x768 teacher, found {times['4x312 torch']:.1f};"
    yield page, f"the best export at least 80 times, found {max(times.values()):.1f} (`openvino-int8`"
    yield page, f"`--fixed-lengths 128`; {times['export openvino-int8']:.1f} without);"
    yield page, f"the same ONNX in float32, found {ms['export onnx'] / ms['export onnx-int8']:.2f}."
    teacher, student = f"{ms['12x768 torch']:.0f} ms", f"{ms['export onnx-int8']:.1f} ms"
    yield "README.md", f"takes {teacher} for 128 tokens on this machine, a 4x312 student in int8 {student}"
    yield "README.md", f"{student}, {times['export onnx-int8']:.0f} times less"
    yield "docs/choose.md", f"takes {student} for 128 tokens where a 12x768 teacher takes {teacher}"
    yield "docs/choose.md", f"{mb['export onnx-int8']:.0f} MB for {mb['12x768 torch']:.0f} "
    for text, said in (("news and books", " smaller, {}, {} and {} points"), ("reviews", ", one of three")):
        made = [one["forms"]["onnx-int8"] for one in trim["exports"][f"training text, then {text}, 4 bits"]]
        smaller = trim["teacher"]["bytes"] / max(one["bytes"] for one in made)
        yield page, f"{smaller:.2f} times{said}".format(*(f"{one['drop']:.2f}" for one in made))


@pytest.mark.parametrize(("page", "said"), [*training(), *deployment()])
def test_text_quotes_the_committed_figures(page: str, said: str) -> None:
    assert said in " ".join((ROOT / page).read_text(encoding="utf-8").split())
