"""Time a teacher's pass with and without padding, on a GPU with the kernel of variable-length attention.

    python benchmarks/packed.py
    python benchmarks/packed.py --rows 64 --rounds 1 --layers 2 --device cpu

A random BERT of 12x768 in bf16, hidden states of four layers and logits, rows sorted by length as in an
evaluation (so that little is padding) and in random order (so that much is). Lengths are drawn from a
log-normal distribution, median 45 tokens and at most 128, about those of QNLI: no data is needed. The two
sides take turns. A CPU has no such kernel: it goes row by row, which only shows that the script works.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from toys import machine
from transformers import AutoModelForSequenceClassification, BertConfig

from stillroom.data.batching import Inputs, Layout
from stillroom.encoder import Encoder, Needs

LONGEST = 128
SIDES = ("padded", "packed")


def batches(count: int, size: int, *, by_length: bool) -> list[Inputs]:
    """Return rows of random words in batches of one size, on the CPU, each with its layout."""
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(45), 0.4, count).astype(int), 4, LONGEST)
    made = []
    for group in np.split(np.sort(lengths) if by_length else lengths, range(size, count, size)):
        mask = torch.from_numpy((np.arange(group.max()) < group[:, None]).astype(np.int64))
        ids = torch.from_numpy(chance.integers(1000, 30000, mask.shape)) * mask
        made.append(Inputs(ids, mask, None, layout=Layout.of(mask)))
    return made


def seconds(model: Encoder, given: list[Inputs], device: torch.device, *, packed: bool) -> float:
    """Return the seconds of one pass over all batches, the transfers included."""
    model.packed = packed
    needs = Needs(logits=True, hidden_states=frozenset(range(model.depth, 0, -3)))
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for inputs in given:
            model(inputs.to(device), needs)
    finish()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=options.layers)
    model = Encoder(AutoModelForSequenceClassification.from_config(config).eval(), None).to(device)
    results = []
    for size in options.batch_sizes:
        for by_length in (True, False):
            given = batches(options.rows, size, by_length=by_length)
            for packed in (False, True):
                seconds(model, given[:4], device, packed=packed)
            found: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    found[side].append(seconds(model, given, device, packed=side == "packed"))
            tokens = sum(int(inputs.attention_mask.sum()) for inputs in given)
            padded = sum(inputs.attention_mask.numel() for inputs in given)
            results.append(
                {
                    "batch_size": size,
                    "order": "by length" if by_length else "random",
                    "padding": round(1 - tokens / padded, 3),
                    "seconds": {side: [round(s, 4) for s in found[side]] for side in SIDES},
                    "padded_over_packed": round(
                        statistics.median(a / b for a, b in zip(*found.values(), strict=True)), 3
                    ),
                }
            )
    print(json.dumps({"machine": machine(), "rows": options.rows, "results": results}, indent=2))


if __name__ == "__main__":
    main()
