"""Fine-tune an encoder: make a teacher."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stillroom import durable, encoder, methods, preflight, processes
from stillroom.data import sources
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, Tokens
from stillroom.encoder import Encoder
from stillroom.evaluation import cost
from stillroom.provenance import METRICS, RECIPE, environment
from stillroom.recipe import FinetuneRecipe, MethodSettings
from stillroom.run.parts import context_of, evaluator, tokens_of, training_figures
from stillroom.training.loop import CHECKPOINTS, Job, train, use_bf16


def finetune(
    recipe: FinetuneRecipe, output: str | Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune an encoder on a data set: make a teacher.

    Processes that were launched together (`accelerate launch`, `torchrun`) make one teacher.

    Args:
        recipe: The model, the data and the loop's settings.
        output: Folder for the teacher: new or empty. Holds what `from_pretrained` loads, with
            `recipe.yaml`, `metrics.json` and `training/log.jsonl`.
        console: Where progress goes; standard error by default.

    Returns:
        What `metrics.json` holds.

    Raises:
        WrongInput: If model, data or folder are not as expected.
        RunFailed: If training cannot go on.
    """
    processes.start()
    console, folder = processes.console(console), Path(output)

    def load() -> tuple[Dataset, Encoder, dict[str, TokenisedRows]]:
        dataset = sources.load(recipe.dataset)
        torch.manual_seed(recipe.training.seed)
        model = encoder.load(recipe.model, dataset.task, fresh_head=True)
        return dataset, model, tokens_of(dataset, model, recipe.dataset.max_length, console)

    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_main():
                held.enter_context(durable.locked(folder))
                durable.require_empty(folder, "Give another folder, or remove this one.")
        dataset, model, tokens = processes.main_first(load)
        bf16 = use_bf16(recipe.training.precision)
        plan = methods.build(MethodSettings(name="none"), context_of(dataset, model, model))
        to_check = preflight.Run(
            dataset,
            recipe.dataset.max_length,
            recipe.training,
            model,
            None,
            plan,
            Tokens(tokens, tokens),
            folder / "training",
            bf16,
        )
        processes.on_main(lambda: preflight.check(to_check, console))
        processes.on_main(lambda: recipe.save(folder / RECIPE))
        job = Job(
            "teacher",
            model,
            None,
            plan,
            dataset.splits["train"],
            tokens["train"],
            tokens["train"],
            recipe.training,
            bf16,
            evaluator(dataset, tokens["validation"], bf16),
            folder / "training",
        )
        trained = train(job, console, recipe.model_dump(mode="json"))

        def finish() -> dict[str, Any]:
            model.save_into(folder)
            shutil.rmtree(folder / "training" / CHECKPOINTS)
            ms = cost.milliseconds([(model, tokens["validation"])], bf16=False)
            found = evaluator(dataset, tokens["validation"], bf16)(model)
            metrics = {
                "model": {"metrics": found, **cost.of(model, folder, ms[0])},
                "text": list(dataset.task.text),
                "train": training_figures(trained),
                "environment": environment(bf16=bf16),
            }
            durable.write_json(folder / METRICS, metrics)
            return metrics

        return processes.on_main(finish)
