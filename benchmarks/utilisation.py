"""Measure which share of the machine's matrix-product rate training reaches, at QNLI's natural lengths.

    python benchmarks/utilisation.py --data-dir ../shared/data --work runs/utilisation
    python benchmarks/utilisation.py --data-dir ../shared/data --work /tmp/utilisation --rows 64 --rounds 1
    python benchmarks/utilisation.py --data-dir ../shared/data --work runs/utilisation --compile

Teacher 12x768, student 4x312, batches of 32 of QNLI's first rows, two threads. The share is

    operations of the products that the real tokens need / seconds / measured rate,

so that padding, optimiser, norms and reading count as waste. Measured:

- teacher: all rows through the teacher once, hidden states of four layers and logits.
- cached: an epoch of lrc-bert without perturbation whose teacher is read from a recording.
- perturbed: the same with perturbation, which adds a forward pass and the half of a backward pass that
  leads to the embeddings.

Of a run's second epoch, and of its first, in which products are compiled for every length there is.

The rate is that of the fastest of torch's own products, of square matrices and of such as a layer has, in
the precision that training has here (bf16 where the device computes it, else float32: the result says
which), measured before and after each figure. On a GPU where there is one.

With `--compile` something else: seconds of each of three cached epochs with `training.compile` and without,
in turns. The first epoch of the first compiled run has torch's cache of compiled code still to fill.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import DEVICE, LAYERS, STUDENT, TEACHER, finish
from rich.console import Console
from toys import in_process, let_teacher_solve, machine, make_model, make_rows, recipe_overrides

from stillroom.data.tokens import TokenisedRows

BATCH_SIZE = 32
THREADS = 2
SIDES = ("teacher", "cached", "perturbed")
COMPILE_SIDES = ("plain", "compiled")


def forward_operations(lengths: np.ndarray, layers: int, width: int) -> float:
    """Return the operations of a BERT's products on rows of such lengths, two for a multiply-add.

    Each token: 8 D^2 for queries, keys, values and output, 16 D^2 for the two of the feed-forward part;
    each pair of tokens of a row: 4 D for scores and their use. Pooler and head are left out.
    """
    return float(layers * (24 * width**2 * lengths.sum() + 4 * width * (lengths**2).sum()))


def operations(side: str, lengths: np.ndarray) -> float:
    """Return the operations of a side: backward costs twice the forward pass, once without weights."""
    if side == "teacher":
        return forward_operations(lengths, *TEACHER[:2])
    passes = {"cached": 3, "perturbed": 3 + 2}[side]
    projections = 2 * STUDENT[1] * TEACHER[1] * float(lengths.sum()) * len(LAYERS)
    return passes * (forward_operations(lengths, *STUDENT[:2]) + projections)


def product_rate(bf16: bool) -> float:
    """Return operations a second of the best of some products: square ones, and such as a layer has."""
    device, dtype = DEVICE, torch.bfloat16 if bf16 else torch.float32
    sizes = [(n, n, n) for n in (512, 1024, 2048, *((8192,) if device == "cuda" else ()))]
    rates = []
    for rows, inner, columns in [*sizes, (1024, 768, 3072), (1024, 312, 1248)]:
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        b = torch.randn(columns, inner, dtype=dtype, device=device).T
        for _ in range(8):
            finish()
            start = time.perf_counter()
            a @ b
            finish()
            rates.append(2 * rows * inner * columns / (time.perf_counter() - start))
    return max(rates)


def tokens_of(work: Path) -> TokenisedRows:
    """Return the training rows as both models tokenise them."""
    from stillroom import encoder
    from stillroom.data import sources
    from stillroom.data.tokens import tokenise
    from stillroom.recipe import DatasetSettings

    rows = work / "rows"
    given = DatasetSettings(name=str(rows / "train.csv"), validation=rows / "validation.csv")
    split = sources.load(given).splits["train"]
    return tokenise(
        split, encoder.load(str(work / "teacher")).tokenizer, max_length=128, console=Console(stderr=True)
    )


def teacher_pass(work: Path, bf16: bool) -> float:
    """Return the seconds of all rows through the teacher."""
    from stillroom import encoder
    from stillroom.data.batching import pad, sequential_batches
    from stillroom.encoder import Needs
    from stillroom.teacher.live import LiveTeacher

    tokens, device = tokens_of(work), torch.device(DEVICE)
    teacher = LiveTeacher(encoder.load(str(work / "teacher")), device=device, bf16=bf16)
    needs = Needs(logits=True, hidden_states=frozenset(LAYERS.values()))
    start = time.perf_counter()
    with torch.inference_mode():
        for rows in sequential_batches(tokens.lengths, batch_size=BATCH_SIZE):
            teacher.of_words(pad(tokens, rows).to(device), needs, None)
    finish()
    return time.perf_counter() - start


def cached_epochs(
    work: Path, epochs: int, *, perturbed: bool = False, compiled: bool = False
) -> list[float]:
    """Return the seconds of each epoch of a run on a recording that an earlier run has made."""
    from stillroom import Recipe, distill
    from stillroom.data.batching import epoch_batches

    lengths = tokens_of(work).lengths
    # One line of the log is then one epoch.
    steps = len(epoch_batches(lengths, seed=0, epoch=0, batch_size=BATCH_SIZE, max_tokens=8192))

    with tempfile.TemporaryDirectory(dir=work) as folder:
        overrides = recipe_overrides(
            work / "rows",
            teacher__name=str(work / "teacher"),
            teacher__cache=str(work / "recording"),
            student=str(work / "student"),
            training__epochs=epochs,
            training__batch_size=BATCH_SIZE,
            training__compile=compiled,
            training__log_every=steps,
            method__name="lrc-bert",
            method__switch=0,
            method__perturbation="both" if perturbed else "off",
            method__layer_map=list(LAYERS.values()),
        )
        distill(Recipe.load(None, overrides), f"{folder}/run")
        log = [json.loads(line) for line in Path(f"{folder}/run/log.jsonl").read_text().splitlines()]
        return [len(lengths) / line["examples_per_second"] for line in log if "loss" in line]


def one_side(side: str, work: Path) -> dict[str, object]:
    from stillroom.training.loop import use_bf16

    if side in COMPILE_SIDES:
        return {"seconds": cached_epochs(work, 3, compiled=side == "compiled")}
    bf16 = use_bf16("auto")
    before = product_rate(bf16)
    seconds = (
        [teacher_pass(work, bf16)]
        if side == "teacher"
        else cached_epochs(work, 2, perturbed=side == "perturbed")
    )
    rate = max(before, product_rate(bf16))
    done = operations(side, tokens_of(work).lengths)
    shares = [done / each / rate for each in seconds]
    return {"share": shares[-1], "first": shares[0], "seconds": seconds, "rate": rate, "bf16": bf16}


def middle(found: dict[str, list[dict[str, Any]]], name: str, sides: Sequence[str]) -> dict[str, float]:
    """Return the median over rounds of a figure of each side."""
    return {side: round(statistics.median(each[name] for each in found[side]), 3) for side in sides}


def compiling(given: list[object], rows: int, rounds: int) -> dict[str, object]:
    """Return the seconds of each epoch with and without compiled blocks, and what a later epoch gains."""
    seconds: dict[str, list[list[float]]] = {side: [] for side in COMPILE_SIDES}
    for _ in range(rounds):
        for side in COMPILE_SIDES:
            seconds[side].append(in_process(__file__, [*given, side], threads=THREADS)["seconds"])
    last = {side: [epochs[-1] for epochs in runs] for side, runs in seconds.items()}
    return {
        "machine": machine() | {"threads": THREADS},
        "rows": rows,
        "seconds": {side: [[round(s, 2) for s in run] for run in runs] for side, runs in seconds.items()},
        "plain_over_compiled": round(
            statistics.median(a / b for a, b in zip(last["plain"], last["compiled"], strict=True)), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds glue/qnli/train.parquet")
    parser.add_argument("--work", type=Path, required=True, help="for models, rows and recording")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--compile", action="store_true", help="time training.compile and nothing else")
    parser.add_argument("--side", choices=SIDES + COMPILE_SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work.absolute()
    if options.side:
        print(json.dumps(one_side(options.side, work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    make_model(work / "teacher", *TEACHER)
    make_model(work / "student", *STUDENT)
    for name in ("rows", "recording"):
        shutil.rmtree(work / name, ignore_errors=True)
    make_rows(work / "rows", options.data_dir, "qnli", options.rows)
    let_teacher_solve(work / "teacher", work / "rows")
    given = ["--data-dir", options.data_dir, "--work", work, "--side"]
    # The first run makes the recording that the others read.
    in_process(__file__, [*given, "cached"], threads=THREADS)
    if options.compile:
        print(json.dumps(compiling(given, options.rows, options.rounds), indent=2))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(in_process(__file__, [*given, side], threads=THREADS))
    results = {
        "machine": machine() | {"threads": THREADS},
        "rows": options.rows,
        "precision": "bf16" if found["teacher"][0]["bf16"] else "float32",
        "gigaops_per_second": round(max(x["rate"] for each in found.values() for x in each) / 1e9, 1),
        "share": middle(found, "share", SIDES),
        "share_of_first_epoch": middle(found, "first", SIDES[1:]),
        "shares": {side: [round(x["share"], 3) for x in found[side]] for side in SIDES},
        "seconds": {side: [[round(s, 2) for s in x["seconds"]] for x in found[side]] for side in SIDES},
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
