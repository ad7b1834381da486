"""Make a generator: tie a masked-LM head to an encoder and train it on text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from stillroom import durable, generator, preflight
from stillroom.data import packed, sources
from stillroom.data.tasks import Rows
from stillroom.data.tokens import tokenise
from stillroom.errors import RunFailed, WrongInput
from stillroom.provenance import METRICS
from stillroom.recipe import DatasetSettings, TextSettings
from stillroom.training import masked_lm
from stillroom.training.loop import use_bf16

_HELD_OUT = 20
"""Every so-manieth line of the user's text is held out."""


def read_texts(paths: Sequence[Path]) -> tuple[Rows, Rows]:
    """Return the lines of text, blank ones left out: to train on, and every twentieth held out.

    Args:
        paths: What `stillroom pretrain --text` takes: plain text, JSONL, Parquet, CSV, TSV, or folders.

    Raises:
        WrongInput: If a file is missing, empty, damaged or not UTF-8, or there are too few lines.
    """
    files = packed.files_of(TextSettings(files=tuple(paths)))
    texts = (piece for path in files for (piece, _), _ in packed.pieces(path, None))
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    held_out, rest = lines[::_HELD_OUT], [line for i, line in enumerate(lines) if i % _HELD_OUT]
    if not rest:
        raise WrongInput(
            f"Expected at least 2 lines of text in {', '.join(map(str, paths))}, found {len(lines)}. Give "
            "more text: each line is one to learn from."
        )
    where = ", ".join(map(str, paths))
    return _unlabelled(where, (rest,)), _unlabelled(where, (held_out,))


def make(
    model: str,
    text: tuple[Rows, Rows],
    output: Path,
    settings: masked_lm.Settings,
    console: Console,
) -> dict[str, Any]:
    """Train a masked language model that starts from an encoder, and write it to `output`.

    Args:
        model: A pretrained encoder, or a masked language model to train further.
        text: Rows to train on, and rows that are held out. Labels are not read.
        output: Folder, new or empty, for what `AutoModelForMaskedLM.from_pretrained` loads, and
            `metrics.json`.
        settings: How long and how fast.
        console: Where progress goes.

    Returns:
        What `metrics.json` holds: rows, steps, seconds, and loss (nats per guessed word) and
        perplexity on the held-out rows, before and after.

    Raises:
        WrongInput: If model or folder are not as expected.
        RunFailed: If a loss is not finite.
    """
    preflight.require_one_process()
    with durable.locked(output):
        durable.require_empty(output, "Give another folder, or remove this one.")
        torch.manual_seed(settings.seed)
        made = generator.load(model, fresh_head=True)
        most = min(settings.max_length, made.positions)
        train, held_out = (
            tokenise(rows, made.tokenizer, max_length=most, console=console) for rows in text
        )
        task = masked_lm.Guessing(made.to(Accelerator().device), seed=settings.seed, bf16=use_bf16("auto"))
        before = task.held_out_loss(held_out)
        steps, seconds = masked_lm.train(task, train, settings, console)
        after = task.held_out_loss(held_out)
        if not math.isfinite(after):
            raise RunFailed(f"The held-out loss is {after} after {steps} steps. Lower --learning-rate.")
        metrics = {
            "model": model,
            "rows": {"train": len(train), "held_out": len(held_out)},
            "steps": steps,
            "seconds": seconds,
            "loss": {"before": before, "after": after},
            "perplexity": {"before": math.exp(min(before, 700.0)), "after": math.exp(after)},
            "parameters": sum(p.numel() for p in made.parameters()),
        }
        made.eval()
        made.save_into(output)
        durable.write_json(output / METRICS, metrics)
    return metrics


def rows_of(dataset: DatasetSettings) -> tuple[Rows, Rows]:
    """Return a data set's training and validation rows, for text alone."""
    splits = sources.load(dataset).splits
    return splits["train"], splits["validation"]


def _unlabelled(source: str, texts: tuple[list[str], ...]) -> Rows:
    return Rows(source, texts, np.zeros(len(texts[0]), dtype=np.int64))
