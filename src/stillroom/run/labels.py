"""Labels that a teacher gives to augmented rows."""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from stillroom.data.batching import Batch, pad, sequential_batches
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs
from stillroom.evaluation.metrics import predictions
from stillroom.recipe import Recipe
from stillroom.teacher.choose import choose
from stillroom.teacher.live import LiveTeacher


def label_augmented(
    dataset: Dataset,
    recipe: Recipe,
    teacher: Encoder,
    tokens: TokenisedRows,
    *,
    bf16: bool,
    console: Console,
) -> Dataset:
    """Return the data with the teacher's predictions as labels of the augmented rows.

    A class, a value, or the labels with a logit above 0. The teacher's logits are recorded where the
    recipe records anything, so that training and other runs read them back.

    Args:
        dataset: Its last `augmented` training rows are labelled.
        recipe: Says where the teacher is recorded.
        teacher: The model.
        tokens: The training rows as the teacher tokenises them.
        bf16: Whether it computes in bf16 autocast.
        console: Where progress goes.
    """
    train, count = dataset.splits["train"], dataset.augmented
    first = len(train) - count
    rows = replace(tokens, offsets=tokens.offsets[first:], lengths=tokens.lengths[first:])
    live = LiveTeacher(teacher, device=Accelerator().device, bf16=bf16)
    if recipe.teacher is None:
        raise ValueError("a recipe without a teacher labels no rows")
    stages, length = [Needs(logits=True)], recipe.dataset.max_length
    ask = choose(recipe.teacher, live, rows, stages, max_length=length, repeated=True, console=console)
    logits_NC = np.empty((count, dataset.task.outputs), dtype=np.float32)
    for index in sequential_batches(rows.lengths):
        inputs = pad(rows, index).to(Accelerator().device)
        batch = Batch(inputs, inputs, torch.empty(0), torch.from_numpy(index))
        logits_NC[index] = ask(batch, stages[0]).logits.cpu().numpy()
    said = predictions(logits_NC, dataset.task.kind).astype(train.labels.dtype)
    labels = np.concatenate([train.labels[:first], said])
    return replace(dataset, splits={**dataset.splits, "train": replace(train, labels=labels)})
