"""What a run needs, loaded: shared by all runs of a teacher on a data set, and of each run."""

import copy
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from rich.console import Console

from stillroom import encoder, generator, methods, preflight, processes, provenance, student
from stillroom.data import sources
from stillroom.data.soft_labels import logits_of
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, Tokens, fingerprint, tokenise
from stillroom.encoder import Encoder
from stillroom.evaluation.metrics import score
from stillroom.evaluation.predict import predict
from stillroom.generator import Generator
from stillroom.methods.base import Context, Plan
from stillroom.provenance import STUDENT
from stillroom.recipe import MethodSettings, Recipe
from stillroom.run import opening
from stillroom.run.labels import label_augmented
from stillroom.teacher import Teacher
from stillroom.teacher.choose import choose
from stillroom.teacher.given import GivenTeacher
from stillroom.teacher.live import LiveTeacher
from stillroom.training.loop import Job, Trained, train, use_bf16


@dataclass(frozen=True)
class Common:
    """What all runs of a teacher on a data set share, loaded once."""

    dataset: Dataset
    max_length: int
    teacher: Encoder
    """The model that teaches; without one the student's checkpoint, which says what it looks like."""
    teacher_tokens: dict[str, TokenisedRows]
    bf16: bool
    teaches: bool = True
    """Whether there is a teacher."""
    _tokens: dict[tuple[str, int], dict[str, TokenisedRows]] = field(default_factory=dict)
    _labelled: list[Dataset] = field(default_factory=list)
    _folded: dict[str, Encoder] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        console: Console,
        *,
        change: Callable[[Dataset], Dataset] | None = None,
    ) -> Self:
        """Return data and teacher of a recipe, or raise `WrongInput` where they do not fit.

        Args:
            recipe: Names both.
            console: Where progress goes.
            change: Is given the data, and returns what is used.
        """
        dataset = sources.load(recipe.dataset)
        dataset = dataset if change is None else change(dataset)
        if recipe.teacher is None:
            student.require_checkpoint(recipe.student)
            teacher = encoder.load(recipe.student, dataset.task, fresh_head=True)
        else:
            teacher = encoder.load(recipe.teacher.name)
            preflight.require_same_head(dataset.task, teacher)
        teacher.packed = recipe.training.packed == "auto"
        most = recipe.dataset.max_length
        tokens = tokens_of(dataset, teacher, most, console)
        made = cls(
            dataset, most, teacher, tokens, use_bf16(recipe.training.precision), recipe.teacher is not None
        )
        made._tokens[made._key(teacher)] = tokens
        return made

    def tokens(self, made: Encoder, console: Console) -> Tokens:
        """Return the splits as this student and the teacher tokenise them; nothing is done twice."""
        key = self._key(made)
        if key not in self._tokens:
            self._tokens[key] = tokens_of(self.dataset, made, self.max_length, console)
        return Tokens(self._tokens[key], self.teacher_tokens)

    def student(self, recipe: Recipe) -> Encoder:
        """Return a recipe's student, new. One that is folded has no seed: it is folded once."""
        tokens = self.teacher_tokens["train"]
        if recipe.init != "pca":
            return _student(recipe, self.teacher, self.dataset, tokens)
        if recipe.student not in self._folded:
            self._folded[recipe.student] = _student(recipe, self.teacher, self.dataset, tokens)
        return copy.deepcopy(self._folded[recipe.student])

    def labelled(self, recipe: Recipe, console: Console) -> "Common":
        """Return the same with the labels that the recipe gives to augmented rows, asking the teacher once.

        A run without a teacher keeps those of their source rows.
        """
        by_teacher = recipe.dataset.augmented_labels == "teacher" and recipe.method.name != "none"
        if not self.dataset.augmented or not by_teacher:
            return self
        if not self._labelled:
            tokens = self.teacher_tokens["train"]
            made = label_augmented(
                self.dataset, recipe, self.teacher, tokens, bf16=self.bf16, console=console
            )
            self._labelled.append(made)
        return replace(self, dataset=self._labelled[0])

    def _key(self, model: Encoder) -> tuple[str, int]:
        return fingerprint(model.tokenizer), min(self.max_length, model.positions)


@dataclass(frozen=True)
class Parts:
    """One run: what a recipe makes of what is shared."""

    dataset: Dataset
    teacher: Encoder
    student: Encoder
    plan: Plan
    tokens: Tokens
    bf16: bool
    init: str
    """How the student starts, spelt out."""
    generator: Generator | None = None
    teaches: bool = True
    """As of `Common`."""

    @classmethod
    def of(cls, recipe: Recipe, common: Common, console: Console) -> Self:
        """Return a new student and the method's plan, beside what is shared."""
        dataset, teacher = common.dataset, common.teacher
        recipe = recipe.model_copy(
            update={"init": student.resolve_start(recipe.student, teacher, recipe.init)}
        )
        made = common.student(recipe)
        torch.manual_seed(recipe.training.seed)
        plan = methods.build(recipe.method, context_of(dataset, made, teacher))
        tokens = common.tokens(made, console)
        writer = None if plan.augmentation is None else generator.load(plan.augmentation.generator)
        return cls(dataset, teacher, made, plan, tokens, common.bf16, recipe.init, writer, common.teaches)

    def labelled(self, recipe: Recipe, common: Common, console: Console) -> "Parts":
        """Return the run with the labels of augmented rows, made once the checks have passed."""
        with_labels = common.labelled(recipe, console)
        return self if with_labels is common else Parts.of(recipe, with_labels, console)

    def to_check(self, recipe: Recipe, folder: Path | None, *, repeated: bool = False) -> preflight.Run:
        """Return the run as the checks before the first step see it; `repeated` as for `train`."""
        return preflight.Run(
            self.dataset,
            recipe.dataset.max_length,
            recipe.training,
            self.student,
            self.teacher if self.teaches else None,
            self.plan,
            self.tokens,
            folder,
            self.bf16,
            recipe.control,
            self.generator,
            recording=recipe.teacher,
            repeated=_repeated(recipe, repeated),
        )

    def train(
        self,
        recipe: Recipe,
        folder: Path,
        console: Console,
        *,
        repeated: bool = False,
        watch: Callable[[dict[str, float]], None] | None = None,
    ) -> Trained:
        """Train the student in `folder` and save it there.

        Args:
            recipe: The run's.
            folder: Where it is kept.
            console: Where progress goes.
            repeated: Whether other runs read the teacher on the same rows.
            watch: Gets the metrics of each evaluation; what it raises ends the training.
        """
        live = self.live_teacher() if self.teaches else None
        # One process records it, the others then find it there.
        teacher = processes.main_first(
            lambda: self.chosen_teacher(recipe, live, console, repeated=repeated)
        )
        name = f"{recipe.method.name} ({folder.name})"
        evaluate = evaluator(self.dataset, self.tokens.student["validation"], self.bf16, watch)
        job = Job(
            name,
            self.student,
            teacher,
            self.plan,
            self.dataset.splits["train"],
            self.tokens.student["train"],
            self.tokens.teacher["train"],
            recipe.training,
            self.bf16,
            evaluate,
            folder,
            self.generator,
            live,
        )
        trained = train(job, console, recipe.model_dump(mode="json"))
        with processes.together():
            if processes.is_main():
                self.student.save(folder / STUDENT)
        return replace(trained, teacher=teacher.served())

    def live_teacher(self) -> LiveTeacher:
        """Return the teacher as the model itself."""
        return LiveTeacher(self.teacher, device=Accelerator().device, bf16=self.bf16)

    def chosen_teacher(
        self, recipe: Recipe, live: LiveTeacher | None, console: Console, *, repeated: bool
    ) -> Teacher:
        """Return the teacher that the recipe asks for on the training rows, recorded where it is to be.

        Soft labels of a file stand in for its logits.
        """
        stages, soft_NC = self.plan.teacher_needs_of_stages(), self.dataset.splits["train"].soft_labels
        if soft_NC is not None:
            stages = [replace(needs, logits=False) for needs in stages]
        model = None
        if live is not None and recipe.teacher is not None:
            model = choose(
                recipe.teacher,
                live,
                self.tokens.teacher["train"],
                stages,
                max_length=recipe.dataset.max_length,
                repeated=_repeated(recipe, repeated),
                console=console,
            )
        if soft_NC is not None:
            return GivenTeacher(logits_of(soft_NC, self.dataset.task.kind), model)
        assert model is not None
        return model

    def start(self, recipe: Recipe, folder: Path, console: Console, *, resume: bool) -> Recipe:
        """Return the recipe as `opening.begin` does."""
        # A folded start follows from teacher and rows, but its last bits from the machine as well.
        made = None if self.init == "pca" else self.student
        recipe = recipe.model_copy(update={"init": self.init})
        teacher = self.teacher if self.teaches else None
        inputs = provenance.inputs_of(self.dataset, teacher, made, self.tokens, self.generator)
        return opening.begin(recipe, folder, inputs, console, bf16=self.bf16, resume=resume)

    def control(self, recipe: Recipe) -> tuple[Recipe, "Parts"]:
        """Return the same run from hard labels alone, everything else equal."""
        alone = recipe.model_copy(update={"method": MethodSettings(name="none"), "control": False})
        made = _student(recipe, self.teacher, self.dataset, self.tokens.teacher["train"])
        plan = methods.build(alone.method, context_of(self.dataset, made, self.teacher))
        return alone, replace(self, student=made, plan=plan, generator=None)


def _repeated(recipe: Recipe, repeated: bool) -> bool:
    return repeated or recipe.training.epochs > 1


def _student(recipe: Recipe, teacher: Encoder, dataset: Dataset, tokens: TokenisedRows) -> Encoder:
    """Return a recipe's student, new, as it starts."""
    if recipe.init == "pca":
        # Folded where training is, whatever ran before.
        teacher.to(Accelerator().device)
    return student.build(
        recipe.student,
        teacher,
        dataset.task,
        seed=recipe.training.seed,
        init=recipe.init,
        tokens=tokens,
    )


def context_of(dataset: Dataset, made: Encoder, teacher: Encoder) -> Context:
    """Return what a method may know of the run."""
    task, rows = dataset.task, dataset.splits["train"]
    return Context.of(
        made, teacher, kind=task.kind, classes=task.outputs, rows=len(rows), labels=rows.labels
    )


def tokens_of(
    dataset: Dataset, model: Encoder, max_length: int, console: Console
) -> dict[str, TokenisedRows]:
    """Return every split as the model tokenises it."""
    most = min(max_length, model.positions)
    return {
        name: tokenise(rows, model.tokenizer, max_length=most, console=console)
        for name, rows in dataset.splits.items()
    }


def evaluator(
    dataset: Dataset,
    tokens: TokenisedRows,
    bf16: bool,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> Callable[[Encoder], dict[str, float]]:
    """Return what scores a model on the validation split; `watch` gets every score."""
    rows = dataset.splits["validation"]

    def evaluate(model: Encoder) -> dict[str, float]:
        metrics = score(dataset.task, predict(model, tokens, bf16=bf16), rows.labels)
        if watch is not None:
            watch(metrics)
        return metrics

    return evaluate


def training_figures(trained: Trained) -> dict[str, Any]:
    """Return what training took, as `metrics.json` shows it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": trained.seconds,
        "steps": trained.steps,
        "examples": trained.examples,
        "tokens": trained.tokens,
        "examples_per_second": trained.examples / trained.seconds,
        "tokens_per_second": trained.tokens / trained.seconds,
        "teacher": trained.teacher,
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": peak if sys.platform == "darwin" else 1024 * peak,
    }
