"""What a generator writes into rows, and what teacher and student think of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from stillroom import generator, preflight
from stillroom.data.batching import make_batch
from stillroom.data.tasks import Task
from stillroom.encoder import Needs
from stillroom.errors import WrongInput
from stillroom.provenance import RECIPE, STUDENT
from stillroom.recipe import MethodSettings, Recipe
from stillroom.run.parts import Common, Parts
from stillroom.teacher.live import LiveTeacher
from stillroom.training import checkpoint
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller
from stillroom.training.loop import CHECKPOINTS


def recipe_of(
    folder: Path | None, overrides: list[str], *, generator_name: str | None, **given: str | None
) -> Recipe:
    """Return the recipe of a finished run, or of models and data that are named one by one.

    Args:
        folder: The run, or None.
        overrides: `a.b=c` each.
        generator_name: In place of the run's own generator; a run without one then counts as `mate-kd`.
        **given: `teacher`, `student` and `dataset` without a run.

    Raises:
        WrongInput: If there is no run there, or it has no generator and none is given.
    """
    if folder is not None:
        if not (folder / RECIPE).exists() or not (folder / STUDENT).is_dir():
            raise WrongInput(
                f"{folder} is no finished run: expected {RECIPE} and {STUDENT}/ in it. Give a folder that "
                "`stillroom distill` wrote, or --teacher, --student, --generator and --dataset."
            )
        recipe = Recipe.load(folder / RECIPE, overrides)
        recipe = recipe.model_copy(update={"student": str(folder), "init": "auto"})
    else:
        method = {"name": "mate-kd", "generator": generator_name}
        recipe = Recipe.load(None, overrides, method=method, **given)
    name = generator_name or recipe.method.options.get("generator")
    if not name:
        raise WrongInput(
            f"The method {recipe.method.name} of this run has no generator: give --generator, a masked "
            f"language model; {generator.REMEDY.format(model='ENCODER')}."
        )
    options = recipe.method.model_dump() if "generator" in recipe.method.options else {"name": "mate-kd"}
    return recipe.model_copy(update={"method": MethodSettings(**{**options, "generator": str(name)})})


def augment(
    recipe: Recipe, *, folder: Path | None, split: str, rows: int, draw: int, console: Console
) -> dict[str, Any]:
    """Return rows as they are, with masked words, and as the generator rewrites them.

    Args:
        recipe: See `recipe_of`. The student is a checkpoint.
        folder: A run whose newest checkpoint holds the generator's weights; None: as it was loaded.
        split: Where the rows come from.
        rows: How many, from the first on.
        draw: Number of the draw of masks and words: another one, other text.
        console: Where warnings go.

    Returns:
        `rows`, each with `original`, `masked`, `augmented`, `words` (old and new), and the
        probabilities (regression: the score) of `teacher` and `student` on both texts, of the student
        alone where soft labels of a file taught it; `generator` with the step its weights come from.

    Raises:
        WrongInput: If models and data do not go together.
    """
    common = Common.load(recipe, console)
    chosen = common.dataset.split(split)
    parts = Parts.of(recipe, common, console)
    if parts.generator is None or parts.plan.augmentation is None:
        raise ValueError("the recipe has no generator")
    preflight.check_augmentation(parts.to_check(recipe, folder or Path()), console)
    step = 0
    newest = None if folder is None else checkpoint.newest_sound(folder / CHECKPOINTS, console)
    if newest is not None and (newest / checkpoint.GENERATOR).exists():
        checkpoint.load_generator(parts.generator, newest)
        step = checkpoint.step_of(newest)
    device = Accelerator().device
    live = LiveTeacher(parts.teacher, device=device, bf16=parts.bf16)
    distiller = Distiller(parts.student, parts.plan, bf16=parts.bf16).to(device).eval()
    seed = recipe.training.seed
    augmenter = Augmenter(parts.plan, parts.generator, live, distiller, seed=seed, bf16=parts.bf16)
    index = np.arange(min(rows, len(chosen)))
    made = make_batch(index, chosen, parts.tokens.student[split], parts.tokens.teacher[split])
    torch.manual_seed(draw)
    positions = augmenter.draw(made, draw)
    batch = made.to(device)
    augmenter.generator.eval()
    with torch.no_grad():
        changed = augmenter.rewrite(batch, positions)
        models = [("student", parts.student, (batch.student, changed.student))]
        if parts.teaches:
            models.insert(0, ("teacher", parts.teacher, (batch.teacher, changed.teacher)))
        says = {
            who: [_says(model(inputs, Needs(logits=True)).logits, common.dataset.task) for inputs in texts]
            for who, model, texts in models
        }
    tokenizer = parts.student.tokenizer
    masked = torch.zeros_like(batch.student.input_ids)
    masked.view(-1)[positions] = 1
    shown = []
    for i, (old, new, hidden) in enumerate(
        zip(*(x.cpu() for x in (batch.student.input_ids, changed.student.input_ids, masked)), strict=True)
    ):
        at = hidden.nonzero()[:, 0].tolist()
        shown.append(
            {
                "row": i + 1,
                "original": _text(tokenizer, old, old),
                "masked": _text(tokenizer, old, old.masked_fill(hidden == 1, tokenizer.mask_token_id)),
                "augmented": _text(tokenizer, old, new),
                "words": [{"old": _word(tokenizer, old[j]), "new": _word(tokenizer, new[j])} for j in at],
                **{who: {"original": a[i], "augmented": b[i]} for who, (a, b) in says.items()},
            }
        )
    return {
        "dataset": common.dataset.task.name,
        "split": split,
        "kind": common.dataset.task.kind,
        "generator": {"name": parts.plan.augmentation.generator, "step": step},
        "rows": shown,
    }


def _says(logits_BC: Tensor, task: Task) -> list[dict[str, float]]:
    """Return what a model says of each row: a probability for each label, or a score."""
    logits_BC = logits_BC.float()
    if task.kind == "regression":
        return [{"score": value} for value in logits_BC[:, 0].tolist()]
    shares = logits_BC.softmax(-1) if task.kind == "classification" else logits_BC.sigmoid()
    return [dict(zip(task.labels, row, strict=True)) for row in shares.tolist()]


def _word(tokenizer: Any, token: Tensor) -> str:
    return str(tokenizer.decode([int(token)])).strip()


def _text(tokenizer: Any, original: Tensor, ids: Tensor) -> str:
    """Return a row's text without what frames it; the two texts of a pair have ` | ` between."""
    frame = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    frame |= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    pieces: list[list[int]] = [[]]
    for old, new in zip(original.tolist(), ids.tolist(), strict=True):
        if old not in frame:
            pieces[-1].append(new)
        elif pieces[-1]:
            pieces.append([])
    return " | ".join(tokenizer.decode(piece).strip() for piece in pieces if piece)
