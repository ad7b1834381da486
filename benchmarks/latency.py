"""Measure every form of a 4x312 student beside a 12x768 teacher: the table of docs/performance.md.

    python benchmarks/latency.py --work runs/latency --json > benchmarks/latency.json
    python benchmarks/latency.py --markdown          the table, from that file

Both models are BERT with random weights (seed 0) and the vocabulary of minilm-l6: what they compute does
not change how long it takes. Batch 1, length 128, two threads by default. The gate is open (--max-drop
100), since a random model has no metric to lose. The last row is OpenVINO's int8 exported once more, with
--fixed-lengths of that length.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from toys import machine
from transformers import AutoModelForSequenceClassification, BertConfig

from stillroom import bench, encoder, export
from stillroom.data.tasks import Task
from stillroom.deploy.forms import FILES
from stillroom.encoder import Encoder

RESULTS = Path(__file__).with_suffix(".json")
SIZES = {"12x768": (12, 768, 12, 3072), "4x312": (4, 312, 12, 1200)}
DATA = "builtin/verdicts"
FIXED = "fixed"


def make(name: str, folder: Path) -> None:
    """Save a BERT of one of the sizes, with random weights."""
    layers, width, heads, ffn = SIZES[name]
    task = Task(DATA, "classification", ("text",), "label", ("negative", "positive"), ("accuracy",))
    tokenizer = encoder.load("minilm-l6", task, fresh_head=True).tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=ffn,
    )
    encoder.describe_task(config, task)
    torch.manual_seed(0)
    Encoder(AutoModelForSequenceClassification.from_config(config).eval(), tokenizer).save(folder)


def measure(work: Path, formats: str, threads: int, batch: int, length: int) -> dict[str, Any]:
    for name in SIZES:
        if not (work / name).exists():
            make(name, work / name)
    if not (work / "export").exists():
        export(work / "4x312", work / "export", formats=formats, dataset=DATA, max_drop=100)
    if not (work / FIXED).exists():
        export(
            work / "4x312",
            work / FIXED,
            formats="openvino-int8",
            dataset=DATA,
            max_drop=100,
            fixed_lengths=[length],
        )
    models = [work / "12x768", work / "4x312", work / "export", work / FIXED]
    return bench(models, threads=[threads], batches=[batch], lengths=[length]) | {"machine": machine()}


def markdown(found: dict[str, Any]) -> str:
    """Return the table, and the goals with what was found."""
    place = found["environment"]
    rows = found["times"]
    lines = [
        f"{place['processor']}, {place['machine']}, torch {place['torch']}; "
        f"batch {rows[0]['batch']}, length {rows[0]['length']}, {rows[0]['threads']} threads.",
        "",
        "| model | form | precision | median, ms | p95, ms | times faster | MB | times smaller "
        "| peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, row in zip(found["models"], rows, strict=True):
        folder = Path(model["model"]).name
        name = folder if folder in SIZES else "4x312"
        peak = max(model["peak_bytes"].values())
        cells = (
            name,
            model["form"] + (f", length {row['length']} alone" if folder == FIXED else ""),
            model["precision"],
            f"{row['median_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            f"{row['faster']:.1f}",
            f"{model['bytes'] / 1e6:.1f}",
            f"{model['smaller']:.1f}",
            f"{peak / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    times = {row["form"]: row["median_ms"] for row in rows[2:] if Path(row["model"]).name != FIXED}
    best = max(row["faster"] for row in rows[2:])
    int8 = times["onnx"] / times["onnx-int8"]
    lines += [
        "",
        f"4x312 in torch: {rows[1]['faster']:.1f} times faster (goal 9.6). Best export: {best:.1f} (goal "
        f"80). onnx-int8 against onnx: {int8:.2f} (goal 1.8).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/latency"))
    parser.add_argument("--formats", default=",".join(name for name in FILES if name != "torch"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    parser.add_argument("--markdown", action="store_true", help=f"print the table of {RESULTS.name}")
    given = parser.parse_args()
    if given.markdown:
        print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    found = measure(given.work, given.formats, given.threads, given.batch, given.length)
    for model in [*found["models"], *found["times"]]:
        # Folders of whoever measured are nobody's business.
        model["model"] = Path(model["model"]).name
    print(json.dumps(found, indent=2) if given.json else markdown(found), file=sys.stdout)


if __name__ == "__main__":
    main()
