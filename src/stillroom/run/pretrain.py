"""Task-agnostic distillation: raw text in, a student out that any task can start from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from stillroom import durable, encoder, methods, preflight, processes, student
from stillroom.data import packed
from stillroom.data.batching import Batch, make_batch
from stillroom.data.packed import Packed
from stillroom.data.tasks import Dataset, Rows, Task
from stillroom.data.tokens import Tokens, fingerprint
from stillroom.encoder import Encoder
from stillroom.errors import WrongInput
from stillroom.evaluation import cost
from stillroom.evaluation.held_out import follow
from stillroom.methods.base import Context, Plan
from stillroom.provenance import METRICS, STUDENT, environment, hashes_of
from stillroom.recipe import PretrainRecipe
from stillroom.report import page
from stillroom.run import opening
from stillroom.run.parts import training_figures
from stillroom.teacher.live import LiveTeacher
from stillroom.training.loop import Job, train, use_bf16
from stillroom.training.masked_lm import Hiding

_HELD_OUT_ROWS = 64
"""Sequences in a batch of the evaluation."""


def pretrain(
    recipe: PretrainRecipe | None,
    output: str | Path | None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Distil a pretrained encoder on raw text: make a start for students of any task.

    Processes that were launched together (`accelerate launch`, `torchrun`) make one run; the folder is one
    that all of them see.

    Args:
        recipe: What to do; None with `resume`, which reads the run's own recipe.
        output: The run folder: new or empty, or with `resume` the run to continue. Its `student` is what
            `Recipe(init=...)`, `student=...` and `from_pretrained` load; `report.html` shows the run. None
            for a dry run.
        resume: Go on from the newest sound checkpoint, to the same student bit for bit.
        dry_run: Only check everything that can be checked before the first step; all text is read.
        console: Where progress goes; standard error by default.

    Returns:
        What `metrics.json` holds: `text`, `held_out` before and after (`evaluation.held_out.follow`),
        sizes of teacher and student, `train` and `environment`; with `dry_run` what the checks found.

    Raises:
        WrongInput: If anything about recipe, text, models or folder is not as expected.
        RunFailed: If training cannot go on.

    Example:
        >>> recipe = PretrainRecipe.load(teacher="minilm-l6", text={"files": ["corpus"]})
        >>> metrics = pretrain(recipe, "runs/pretrained")  # doctest: +SKIP
    """
    processes.start()
    console, folder = processes.console(console), Path(output or "")
    asked = opening.asked(recipe, PretrainRecipe, folder, resolve, resume=resume)
    kept_in = None if output is None else folder
    with opening.held(kept_in, resume=resume, dry_run=dry_run):
        parts = processes.main_first(lambda: _Parts.of(asked, console))
        checked = processes.on_main(
            lambda: preflight.check_pretraining(parts.to_check(asked, kept_in), console)
        )
        checked = {"text": parts.facts(), **checked}
        if dry_run:
            return checked
        recipe = processes.on_main(lambda: parts.start(asked, folder, console, resume=resume))
        parts.teacher.to(Accelerator().device)
        parts.student.to(Accelerator().device)
        before = processes.on_main(lambda: parts.evaluate(parts.student))
        job = parts.job(recipe, folder)
        trained = train(job, console, recipe.model_dump(mode="json"))

        def finish() -> dict[str, Any]:
            after = parts.evaluate(parts.student)
            parts.student.save(folder / STUDENT)
            metrics = {
                "text": parts.facts(),
                "held_out": {"before": before, "after": after},
                **{
                    name: dict(
                        zip(("parameters", "non_embedding_parameters"), cost.parameters(model), strict=True)
                    )
                    for name, model in (("teacher", parts.teacher), ("student", parts.student))
                },
                "train": training_figures(trained),
                "environment": environment(bf16=parts.bf16),
            }
            durable.write_json(folder / METRICS, metrics)
            page.write(folder)
            return metrics

        return processes.on_main(finish)


def resolve(recipe: PretrainRecipe) -> PretrainRecipe:
    """Return the recipe with the method's options spelt out."""
    methods.pretrainer(recipe.method.name)
    return recipe.model_copy(update={"method": methods.spelt_out(recipe.method)})


@dataclass(frozen=True)
class _Parts:
    """What a run needs, loaded."""

    teacher: Encoder
    student: Encoder
    plan: Plan
    text: Packed
    hide: Hiding | None
    bf16: bool
    init: str
    """How the student starts, spelt out."""

    @classmethod
    def of(cls, recipe: PretrainRecipe, console: Console) -> Self:
        """Return teacher, student and text of a recipe, or raise `WrongInput` where they do not fit."""
        method = methods.pretrainer(recipe.method.name)
        # A pooler that the checkpoint lacks starts at random, and is part of what the run starts from.
        torch.manual_seed(recipe.training.seed)
        try:
            teacher = encoder.load_body(recipe.teacher, head="masked-lm" if method.masked_lm else "none")
        except encoder.NoMaskedLMHead as error:
            others = [m.name for m in methods.METHODS.values() if m.pretrain and not m.masked_lm]
            raise WrongInput(
                f"{method.name} guesses hidden words. {error} Make a teacher that has one: stillroom "
                f"generator --model {recipe.teacher} --text FILES -o DIR; or use a method that needs none: "
                f"{', '.join(others)}."
            ) from error
        _require_fit(recipe, teacher)
        text = packed.pack(recipe.text, teacher.tokenizer, console)
        init = student.resolve_start(recipe.student, teacher, recipe.init)
        if init == "pca":
            teacher.to(Accelerator().device)
        made = student.build(
            recipe.student,
            teacher,
            None,
            seed=recipe.training.seed,
            init=init,
            tokens=text.train,
        )
        if not recipe.dropout:
            # The modules alone: the configuration, which is saved, stays what it is.
            for module in made.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if fingerprint(made.tokenizer) != fingerprint(teacher.tokenizer):
            raise WrongInput(
                f"The student {recipe.student} has another tokenizer than the teacher: the text is read "
                "once for both. Give a student with the teacher's tokenizer, or a size such as 4x312."
            )
        vocabulary, rows = len(teacher.tokenizer), len(text.train)
        context = Context.of(made, teacher, kind="classification", classes=vocabulary, rows=rows)
        torch.manual_seed(recipe.training.seed)
        plan = methods.build_pretraining(recipe.method, context)
        hide = Hiding(teacher.tokenizer, seed=recipe.training.seed) if method.masked_lm else None
        return cls(teacher, made, plan, text, hide, use_bf16(recipe.training.precision), init)

    def facts(self) -> dict[str, int]:
        """Return what the text came to."""
        return {
            "documents": self.text.documents,
            "tokens": self.text.tokens,
            "sequences": len(self.text.train),
            "held_out": len(self.text.held_out),
            "sequence_length": int(self.text.train.lengths[0]),
        }

    def rows(self) -> Rows:
        """Return the sequences as rows without text and labels."""
        count = len(self.text.train)
        texts: Any = (range(count),)
        return Rows("text", texts, np.broadcast_to(np.int64(0), (count,)))

    def to_check(self, recipe: PretrainRecipe, folder: Path | None) -> preflight.Run:
        """Return the run as the checks before the first step see it."""
        tokens = {"train": self.text.train, "validation": self.text.held_out}
        task = Task("text", "classification", ("text",), "label", (), ())
        return preflight.Run(
            Dataset(task, {"train": self.rows()}),
            recipe.text.sequence_length,
            recipe.training,
            self.student,
            self.teacher,
            self.plan,
            Tokens(tokens, tokens),
            folder,
            self.bf16,
            hide=self.hide,
        )

    def start(
        self, recipe: PretrainRecipe, folder: Path, console: Console, *, resume: bool
    ) -> PretrainRecipe:
        """Write down what the run starts from, or with `resume` check that it still is that."""
        inputs = {**hashes_of(self.teacher.model, "teacher"), "text": self.text.key}
        if self.init != "pca":
            inputs |= hashes_of(self.student.model, "student at the start")
        recipe = recipe.model_copy(update={"init": self.init})
        return opening.begin(recipe, folder, inputs, console, bf16=self.bf16, resume=resume)

    def job(self, recipe: PretrainRecipe, folder: Path) -> Job:
        """Return what the loop trains."""
        return Job(
            f"{recipe.method.name} ({folder.name})",
            self.student,
            self._live(),
            self.plan,
            self.rows(),
            self.text.train,
            self.text.train,
            recipe.training,
            self.bf16,
            self.evaluate,
            folder,
            hide=self.hide,
            any_word=True,
        )

    def evaluate(self, made: Encoder) -> dict[str, float]:
        """Return how far the student follows its teacher on the held-out sequences."""
        masked_lm = self.hide is not None
        return follow(made, self._live(), self.plan, self._batches(), bf16=self.bf16, masked_lm=masked_lm)

    def _live(self) -> LiveTeacher:
        return LiveTeacher(self.teacher, device=Accelerator().device, bf16=self.bf16)

    def _batches(self) -> Iterator[Batch]:
        tokens, device = self.text.held_out, Accelerator().device
        rows = Rows("held-out text", ([],), np.broadcast_to(np.int64(0), (len(tokens),)))
        hide: Callable[[Batch, int], Batch] = self.hide or (lambda batch, _: batch)
        index = np.arange(len(tokens))
        for part in np.array_split(index, -(-len(index) // _HELD_OUT_ROWS)):
            yield hide(make_batch(part, rows, tokens), -1).to(device)


def _require_fit(recipe: PretrainRecipe, teacher: Encoder) -> None:
    """Raise `WrongInput` unless the teacher can read such sequences of its own tokens."""
    length = recipe.text.sequence_length
    if length > teacher.positions:
        raise WrongInput(
            f"text.sequence_length should be at most {teacher.positions}, the positions of "
            f"{recipe.teacher}, found {length}."
        )
    if len(teacher.tokenizer) > len(teacher.words):
        raise WrongInput(
            f"The tokenizer of {recipe.teacher} has {len(teacher.tokenizer)} tokens, the model only "
            f"{len(teacher.words)}. Copy model and tokenizer from the same place."
        )
