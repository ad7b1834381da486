"""Time what a step pays to read its batch from the recorded teacher, and a run to open the cache.

    python benchmarks/recorded_teacher.py

Rows of random tokens with lengths like those of SST-2 (5 to 40), in a teacher of width 768 whose blocks are
thin, so that recording is quick: what is read does not depend on them. Each batch of 32 rows asks for
the logits and four hidden states. Printed is one JSON object for each precision: median milliseconds and
quartiles of a batch, megabytes per batch, and seconds to open the cache again.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from toys import machine
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stillroom.data.batching import epoch_batches, make_batch
from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import MINILM, Encoder, Needs, locate
from stillroom.teacher.cache import Cache, Origin
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.recorded import record

WIDTH, BATCH = 768, 32
NEEDS = Needs(logits=True, hidden_states=frozenset({1, 2, 3, 4}))


def main() -> None:
    """Print one JSON object for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", num_hidden_layers=4, hidden_size=WIDTH, num_attention_heads=12, intermediate_size=64
    )
    model = AutoModelForSequenceClassification.from_config(config)
    encoder = Encoder(model, AutoTokenizer.from_pretrained(locate(MINILM)))
    chance = np.random.default_rng(0)
    lengths = chance.integers(5, 41, given.rows)
    ids = chance.integers(1000, 30000, lengths.sum()).astype(np.int32)
    tokens = TokenisedRows(ids, np.zeros(len(ids), np.int8), np.cumsum(lengths) - lengths, lengths, 0, 0)
    rows = Rows("random", ([""] * given.rows,), np.zeros(given.rows, dtype=np.int64))
    quiet = Console(quiet=True)
    for bf16 in (False, True):
        live = LiveTeacher(encoder, device=torch.device("cpu"), bf16=bf16)
        origin = Origin.of(encoder, max_length=128, bf16=bf16)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "cache"
            record(live, Cache(folder, origin), tokens, [NEEDS], max_bytes=10**11, console=quiet)
            opened = record(live, Cache(folder, origin), tokens, [NEEDS], max_bytes=10**11, console=quiet)
            teacher = record(live, Cache(folder, origin), tokens, [NEEDS], max_bytes=10**11, console=quiet)
            found = []
            for epoch in range(given.epochs):
                batches = epoch_batches(lengths, seed=0, epoch=epoch, batch_size=BATCH, max_tokens=16384)
                for index in batches:
                    batch = make_batch(index, rows, tokens)
                    started = time.perf_counter()
                    teacher(batch, NEEDS)
                    found.append(1000 * (time.perf_counter() - started))
            served = teacher.served()
        low, middle, high = statistics.quantiles(found, n=4)
        figures = {
            "precision": origin.precision,
            "ms_per_batch": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "mb_per_batch": round(served["bytes"] * BATCH / given.rows / 1e6, 2),
            "open_first_seconds": round(opened.served()["recording_seconds"], 3),
            "open_again_seconds": round(served["recording_seconds"], 3),
            "cache_mb": round(served["bytes"] / 1e6, 1),
        }
        print(json.dumps(figures | {"machine": machine()}))


if __name__ == "__main__":
    main()
