"""Count the padding in the batches of GLUE's tasks but WNLI, as a share of all tokens.

    python benchmarks/padding.py --data-dir ../shared/data
    python benchmarks/padding.py --data-dir ../shared/data --rows 20000 --tasks cola sst2

Prints one JSON object: its commit and date, and for each task its rows, mean tokens, and the share of
padding in the first epoch's batches of 16 and 32 rows, in those of evaluation, and in batches of 32 that
are not sorted by length.
Nothing here depends on the machine. Ends with 1 where a training batch size has more than 5 %.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from rich.console import Console
from toys import machine
from transformers import AutoTokenizer

from stillroom import encoder
from stillroom.data import sources
from stillroom.data.batching import epoch_batches, padding_share, sequential_batches
from stillroom.data.tokens import tokenise
from stillroom.recipe import DatasetSettings

MOST = 0.05
BATCH_SIZES = (16, 32)
MAX_TOKENS = 8192


def shares(lengths: np.ndarray) -> dict[str, float]:
    """Return the share of padding for each way to make batches."""
    found = {}
    for size in BATCH_SIZES:
        batches = epoch_batches(lengths, seed=0, epoch=0, batch_size=size, max_tokens=MAX_TOKENS)
        found[f"batch_{size}"] = padding_share(lengths, batches)
    found["evaluation"] = padding_share(lengths, list(sequential_batches(lengths)))
    chance = np.random.Generator(np.random.Philox(0)).permutation(len(lengths))
    found["unsorted"] = padding_share(lengths, np.array_split(chance, -(-len(lengths) // 32)))
    return {name: round(value, 4) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds glue/<task>/train.parquet")
    parser.add_argument("--tasks", nargs="+", help="default: all that are there")
    parser.add_argument("--rows", type=int, help="use only so many training rows of each task")
    options = parser.parse_args()
    os.environ["STILLROOM_DATA"] = str(options.data_dir.absolute())
    console = Console(stderr=True)
    tasks = options.tasks or sorted(
        path.parent.name for path in options.data_dir.glob("glue/*/train.parquet")
    )
    tokenizer = AutoTokenizer.from_pretrained(encoder.locate("minilm-l6"))
    results = {}
    for task in tasks:
        rows = sources.load(DatasetSettings(name=f"glue/{task}", train_rows=options.rows)).splits["train"]
        tokens = tokenise(rows, tokenizer, max_length=128, console=console)
        mean = round(float(tokens.lengths.mean()), 1)
        results[task] = {"rows": len(tokens), "mean_tokens": mean, **shares(tokens.lengths)}
    print(json.dumps({"machine": machine(), **results}, indent=2))
    return int(any(found[f"batch_{size}"] > MOST for found in results.values() for size in BATCH_SIZES))


if __name__ == "__main__":
    raise SystemExit(main())
