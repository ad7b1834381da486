r"""Measure how time and memory of a distillation grow with rows, row length and student layers.

    python benchmarks/scaling.py --data-dir ../shared/data --work runs/scaling
    python benchmarks/scaling.py --data-dir ../shared/data --work /tmp/scaling \
        --rows 64 128 --lengths 16 --layers 2

Plain distillation (kd) of one epoch, batches of 32 and two threads, from a random 4x128 teacher into
2x128 unless said otherwise: small models, so that what grows with the rows is not hidden behind products.

- rows: SST-2's training rows, 1k, 4k, 16k and 64k, repeated where there are too few.
- rows_of_one_length: as many rows, all of 16 tokens.
- lengths: 512 rows of exactly so many tokens.
- layers: students of so many layers of width 128.

For each point, in a fresh process: seconds of training, of the whole run, peak memory, and how many lengths
its batches have. Memory should not grow with the rows beyond the rows themselves. It does grow with the
lengths: on a CPU oneDNN, which torch multiplies with, keeps kernels for each shape that it has seen, 1,024
at most (ONEDNN_PRIMITIVE_CACHE_CAPACITY sets that), and more rows bring more lengths. Rows of one length
show what the rows themselves cost.
"""

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console
from toys import (
    in_process,
    let_teacher_solve,
    machine,
    make_model,
    make_rows,
    recipe_overrides,
    training_seconds,
)

from stillroom import Recipe, distill, encoder
from stillroom.data import sources
from stillroom.data.batching import epoch_batches
from stillroom.data.tokens import tokenise

THREADS = 2
BASE_LAYERS = 2
SPECIAL_TOKENS = 2


def point(work: Path, rows: Path, layers: int) -> dict[str, float]:
    """Return seconds and peak memory of one run in this process."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        overrides = recipe_overrides(
            rows,
            teacher__name=str(work / "teacher"),
            teacher__cache="off",
            student=f"{layers}x128",
            init="random",
            training__epochs=1,
            training__batch_size=32,
            method__name="kd",
        )
        start = time.perf_counter()
        recipe = Recipe.load(None, overrides)
        metrics = distill(recipe, f"{folder}/run")
        return {
            "training_seconds": round(training_seconds(metrics), 2),
            "run_seconds": round(time.perf_counter() - start, 2),
            "peak_rss_mb": round(metrics["train"]["peak_rss_bytes"] / 1e6),
            "batch_lengths": batch_lengths(recipe, str(work / "teacher")),
        }


def batch_lengths(recipe: Recipe, teacher: str) -> int:
    """Return how many padded lengths the batches of a run's epoch have."""
    split = sources.load(recipe.dataset).splits["train"]
    tokenizer = encoder.load(teacher).tokenizer
    tokens = tokenise(split, tokenizer, max_length=recipe.dataset.max_length, console=Console(stderr=True))
    given = recipe.training
    batches = epoch_batches(
        tokens.lengths,
        seed=given.seed,
        epoch=0,
        batch_size=given.batch_size,
        max_tokens=given.max_tokens,
    )
    return len({int(tokens.lengths[rows].max()) for rows in batches})


def rows_of_length(folder: Path, length: int, rows: int) -> Path:
    """Write rows of so many tokens, each word one; most say the label, so that a head can learn it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("validation", 64)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["sentence", "label"])
            for i in range(count):
                # Numbered, so that no row is there twice and none in both splits.
                words = [("good", "bad")[i >> bit & 1] for bit in range(min(10, length - SPECIAL_TOKENS))]
                words.append("movie" if name == "train" else "film")
                words += [("fine", "poor")[i % 2]] * (length - SPECIAL_TOKENS - len(words))
                writer.writerow([" ".join(words), i % 2])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds glue/sst2/train.parquet")
    parser.add_argument("--work", type=Path, required=True, help="for models and rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 4000, 16000, 64000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--point", nargs=2, metavar=("ROWS", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work.absolute()
    if options.point:
        print(json.dumps(point(work, Path(options.point[0]), int(options.point[1]))))
        return
    work.mkdir(parents=True, exist_ok=True)
    make_model(work / "teacher", 4, 128, 4)
    shutil.rmtree(work / "rows", ignore_errors=True)

    def measure(rows: Path, layers: int = BASE_LAYERS) -> dict[str, float]:
        let_teacher_solve(work / "teacher", rows)
        given = ["--data-dir", options.data_dir, "--work", work, "--point", rows, layers]
        return in_process(__file__, given, threads=THREADS)

    some = make_rows(work / "rows" / "some", options.data_dir, "sst2", min(options.rows))
    results = {
        "machine": machine() | {"threads": THREADS},
        "rows": {
            count: measure(make_rows(work / "rows" / str(count), options.data_dir, "sst2", count))
            for count in options.rows
        },
        "rows_of_one_length": {
            count: measure(rows_of_length(work / "rows" / f"one-length-{count}", 16, count))
            for count in options.rows
        },
        "lengths": {
            length: measure(rows_of_length(work / "rows" / f"length-{length}", length, 512))
            for length in options.lengths
        },
        "layers": {layers: measure(some, layers) for layers in options.layers},
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
