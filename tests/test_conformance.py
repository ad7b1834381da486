"""What every method must do: one row per registered method and set of options.

A new method needs a row here and no new test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Encoder, Needs, Outputs, weights_hash
from stillroom.errors import WrongInput
from stillroom.methods import METHODS
from stillroom.methods.base import Context, Stage
from stillroom.ops.prediction import soft_cross_entropy, soft_label_loss
from stillroom.training import checkpoint
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller
from stillroom.training.loop import Job, train
from tiny import make_batch_of, make_job

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Row:
    """A method with options, and what is known not to hold for it."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    no_head: bool = False
    """The classification head is never trained: no term reads the logits."""
    refuses: tuple[str, ...] = ()
    """Kinds of labels that it refuses."""
    padding_counts: bool = False
    """Padding changes its loss, as an official code's does."""
    attention: bool = False
    """It reads attention, so it refuses the families that do not show theirs."""

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method}({options})".replace(" ", "")


BANK = {"negatives": "bank", "bank_negatives": 4}
NO_CLASSES = ("regression", "multi-label")
GENERATOR = {"generator": "tiny", "n_generator": 1, "n_student": 1, "generator_learning_rate": 1e-3}
FEW = {"bank_negatives": 3, "dimension": 8}
"""Tiny data sets leave few rows of another label."""
LABELLED = ("multi-label",)
MIXED = {
    "stages": [
        {"terms": {"lrc-bert:cos_nce": 1.0, "rail-kd:layers": 0.5}, "perturb": True},
        {"start": 0.5, "terms": {"bert-emd:soft": 1.0, "kd:hard": 1.0, "distilbert:cosine": 1.0}},
    ],
    "options": {"lrc-bert": {"vector": "cls"}, "rail-kd": {"redraw": 1, "projection_size": 8}},
    "input": "lrc-bert",
}
GENERATED = {
    "stages": [{"terms": {"kd:hard": 1.0, "pkd:first_tokens": 1.0}, "augmented": {"cilda:soft": 1.0}}],
    "options": {"cilda": GENERATOR},
    "input": "cilda",
}


def emd(**options: Any) -> Row:
    masked = options.get("padding") == "masked"
    return Row("bert-emd", {"beta": 1.0, **options}, attention=True, padding_counts=not masked)


TABLE = [
    Row("none"),
    Row("kd"),
    Row("kd", {"soft_weight": 1.0, "temperature": 1.0}),
    Row("lrc-bert"),
    Row("lrc-bert", {"vector": "cls", "projection": "shared"}),
    Row("lrc-bert", {"vector": "mean", "perturbation": "second"}),
    Row("lrc-bert", {"perturbation_norm": "token", "epsilon": 0.1, "layer_map": (1, 4)}),
    Row("lrc-bert", {"label_aware": True}, refuses=NO_CLASSES),
    Row("lrc-bert", {"label_aware": True, "vector": "cls"}, refuses=NO_CLASSES),
    Row("lrc-bert", {"vector": "cls", **BANK}),
    Row("lrc-bert", {"vector": "mean", "label_aware": True, **BANK}, refuses=NO_CLASSES),
    Row("lrc-bert", {"switch": 0.0, "perturbation": "off"}),
    Row("lrc-bert", {"switch": 1.0}, no_head=True),
    Row("lrc-bert", {"alpha": 0.0}),
    Row("lrc-bert", {"beta": 0.0}),
    Row("lrc-bert", {"gamma": 0.0}),
    Row("lrc-bert", {"beta": 0.0, "gamma": 0.0, "switch": 1.0}, no_head=True),
    Row("mate-kd", GENERATOR),
    Row("mate-kd", {**GENERATOR, "adv_div": "ce", "student_mode": "train", "masks": "fixed"}),
    Row("cilda", GENERATOR),
    Row("cilda", {**GENERATOR, "objective": "M4", "projections": "adv", "anchor": "student"}),
    Row("cilda", {**GENERATOR, "objective": "minILD", "pooling": "mean", "anchor": "symmetric"}),
    Row("cilda", {**GENERATOR, "projections": "frozen", "alpha2": True, "mask_probability": 0.5}),
    Row("cilda", {**GENERATOR, "teacher_layers": "random", "a1": 0.0, "projection_size": 8}),
    Row("cilda", {**GENERATOR, "a2": 0.0}),
    Row("codir", FEW, refuses=LABELLED),
    Row("codir", {"pooling": "cls", "teacher_layers": "every_other", **FEW}, refuses=LABELLED),
    Row("codir", {"pooling": "unmasked_mean", **FEW}, refuses=LABELLED, padding_counts=True),
    Row("codir", {"loss": "nce_official", **FEW}, refuses=LABELLED),
    Row("codir", {"direction": "teacher_anchor", "negatives": "any", "alpha1": 0.0, **FEW}),
    Row("codir", {"direction": "symmetric", "regression": 0.5, **FEW}, refuses=LABELLED),
    emd(),
    emd(padding="masked", beta=0.01, theta=0.1),
    emd(mass_rule="A1", coupling="separate", floor=1e-3),
    emd(mass_rule="A2", mass_temperature=5.0),
    emd(update_masses=False),
    emd(alpha=0.5, temperature=3.0, reduction="per_sample"),
    emd(alpha=0.0, padding="masked"),
    Row("angular-emd"),
    Row("angular-emd", {"mass_rule": "A1", "perturbation": "second", "beta": 0.0}),
    Row("angular-emd", {"mass_rule": "A2", "mass_temperature": 5.0, "gamma": 0.0, "floor": 1e-3}),
    Row("angular-emd", {"update_masses": False, "switch": 0.0, "perturbation": "off"}),
    Row("pkd"),
    Row("distilbert"),
    Row("rail-kd", {"redraw": 1, "projection_size": 8}),
    Row("rail-kd", {"form": "tkc002", "pooling": "unmasked_mean"}, padding_counts=True),
    Row("tinybert", attention=True, padding_counts=True),
    Row("tinybert", {"padding": "masked", "switch": 0.6}, attention=True),
    Row("minilm", {"switch": 0.6}, attention=True),
    Row("minilmv2", {"relation_heads": 8, "teacher_layer": 3, "soft_weight": 0.5}, attention=True),
    Row("mixture", MIXED),
    Row("mixture", GENERATED),
    Row("cilda", {**GENERATOR, "masks": "fixed", "adv_div": "ce", "student_mode": "train"}),
    Row("angular-emd", {"perturbation_norm": "token"}),
    Row("pkd", {"layer_map": "last", "normalise": False, "reduction": "sum"}),
    Row("rail-kd", {"layer_map": "uniform", "embedding": True, "final": True, "pooling": "cls"}),
    Row("rail-kd", {"reduction": "sum"}),
    Row("tinybert", {"regression_target": "teacher"}, attention=True, padding_counts=True),
    Row("minilm", {"soft_weight": 0.5}, attention=True),
    Row("minilmv2", attention=True),
]
FAMILY_ROWS = [
    Row("none"),
    Row("kd"),
    Row("lrc-bert"),
    Row("lrc-bert", {"vector": "mean", **BANK}),
    Row("cilda", GENERATOR),
    Row("codir", FEW),
    emd(padding="masked"),
    Row("minilm", {"switch": 0.6}, attention=True),
]
NO_ATTENTION = ("mpnet", "deberta-v2")
FAMILIES = ("roberta", "distilbert", "electra", "modernbert", "mpnet", "deberta-v2", "xlm-roberta")

PAIRED = [(row, name) for name in FAMILIES for row in FAMILY_ROWS]
REFUSED = [(row, name) for row, name in PAIRED if row.attention and name in NO_ATTENTION]
EVERY = [(row, "bert") for row in TABLE] + [pair for pair in PAIRED if pair not in REFUSED]
every_row = pytest.mark.parametrize(("row", "family"), EVERY, ids=str)
bert_rows = pytest.mark.parametrize("row", TABLE, ids=str)


def job_of(folder: Path, row: Row, family: str = "bert", **given: Any) -> Job:
    return make_job(folder, method=row.method, options=row.options, family=family, **given)


def distiller_of(job: Job) -> tuple[Distiller, Batch]:
    """Return the distiller without dropout, and a batch of all rows."""
    return Distiller(job.student, job.plan, bf16=False).eval(), make_batch_of(job.rows, job.student)


def augmenter_of(job: Job, distiller: Distiller) -> Augmenter | None:
    if job.generator is None:
        return None
    return Augmenter(job.plan, job.generator, job.live_teacher, distiller, seed=0, bf16=False)


def loss_of(job: Job, distiller: Distiller, batch: Batch, stage: Stage) -> torch.Tensor:
    teacher = job.teacher and job.teacher(batch, job.plan.teacher_needs(stage))
    # Negatives and words that are drawn are drawn alike.
    torch.manual_seed(0)
    augmenter = augmenter_of(job, distiller)
    augmented = augmenter and augmenter.augment(batch, augmenter.draw(batch, 0), stage)
    return distiller(batch, teacher, stage, augmented).total


def test_every_method_has_a_row() -> None:
    assert {row.method for row in TABLE} == set(METHODS)


def choices(annotation: Any) -> set[Any]:
    """Return the values that an option names: those of its `Literal`, true and false."""
    if annotation is bool:
        return {True, False}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(choices, get_args(annotation)))


@pytest.mark.parametrize("name", METHODS)
def test_every_choice_of_every_option_has_a_row(name: str) -> None:
    rows = [row.options for row in TABLE if row.method == name]
    for option, field_ in METHODS[name].settings.model_fields.items():
        tried = {str(row.get(option, field_.default)) for row in rows}
        assert {str(choice) for choice in choices(field_.annotation)} <= tried, option


SoftLoss = Callable[..., torch.Tensor]
over_classes: SoftLoss = partial(soft_cross_entropy, mean_over_classes=True)


def unscaled(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return TinyBERT's, without the factor T squared."""
    return over_classes(student, teacher, temperature=temperature) / temperature**2


TEMPERATURES: dict[str, tuple[float, SoftLoss]] = {
    "kd": (2.0, soft_label_loss),
    "lrc-bert": (1.1, soft_label_loss),
    "codir": (2.0, soft_label_loss),
    "bert-emd": (1.0, over_classes),
    "angular-emd": (1.1, soft_label_loss),
    "pkd": (10.0, soft_label_loss),
    "distilbert": (2.0, soft_label_loss),
    "rail-kd": (10.0, soft_label_loss),
    "tinybert": (1.0, unscaled),
    "minilm": (2.0, soft_label_loss),
    "minilmv2": (2.0, soft_label_loss),
}
"""T of the soft labels by default, as the method's card has it, and their loss."""


def test_every_method_with_a_temperature_is_in_the_table() -> None:
    fields = {name: METHODS[name].settings.model_fields for name in METHODS}
    assert {name for name in METHODS if "temperature" in fields[name]} == set(TEMPERATURES)


@pytest.mark.parametrize("name", TEMPERATURES)
@pytest.mark.parametrize("temperature", [None, 3.0], ids=["default", "3"])
def test_soft_labels_are_taken_at_the_temperature_that_is_set(name: str, temperature: float | None) -> None:
    """Lost on its way to the term, T = 10 would be 1, and the loss another by a factor near 100."""
    method, (default, loss) = METHODS[name], TEMPERATURES[name]
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if "soft_weight" in method.settings.model_fields:
        options["soft_weight"] = 0.5  # MiniLM's have none by default.
    context = Context("classification", 3, 300, 2, 16, 4, 24, labels=np.arange(300) % 3)
    logits = 2 * torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = map(Outputs, logits)
    inputs = Inputs(torch.zeros(5, 1), torch.ones(5, 1), None)
    batch = Batch(inputs, inputs, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    builds = [method.build, method.pretrain] if method.masked_lm else [method.build]
    for build in builds:
        found = build(method.settings(**options), context).terms["soft"](student, teacher, batch)
        want = loss(student.logits, teacher.logits, temperature=temperature or default)
        assert found.item() == pytest.approx(want.item(), rel=1e-12)


@every_row
def test_one_step_moves_the_student_and_not_the_teacher(tmp_path: Path, row: Row, family: str) -> None:
    # A generator step comes first, where there is a generator.
    steps = 2 if "generator" in str(row.options) else 1
    job = job_of(tmp_path, row, family, count=8, epochs=steps, evaluate_every=steps)
    teacher = job.teacher and weights_hash(job.teacher.module)
    before = {name: value.clone() for name, value in job.student.model.state_dict().items()}
    stage, rule = job.plan.stages[0], job.plan.augmentation
    names = {*stage.weights, *stage.augmented, *(rule.weights if rule else ())}
    own = [p for name in names for p in job.plan.terms[name].parameters()]
    own_before = [p.detach().clone() for p in own]
    assert train(job, QUIET).steps == steps
    # A projection that no optimiser knows stays at its random start (BERT-gang's did).
    assert not any(torch.equal(p.detach(), old) for p, old in zip(own, own_before, strict=True))
    after = job.student.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in after.values())
    if job.teacher is not None:
        assert weights_hash(job.teacher.module) == teacher
        assert all(p.grad is None for p in job.teacher.module.parameters())


@pytest.mark.parametrize(("row", "family"), REFUSED, ids=str)
def test_a_family_that_does_not_show_its_attention_is_refused_with_a_reason(
    tmp_path: Path, row: Row, family: str
) -> None:
    with pytest.raises(WrongInput, match="not through transformers' attention interface"):
        train(job_of(tmp_path, row, family, count=8, epochs=1), QUIET)


def is_head(model: Encoder, name: str) -> bool:
    """Whether a weight comes after the last hidden state: the classifier, and a pooler before it."""
    return not name.startswith(f"{model.model.base_model_prefix}.") or ".pooler." in name


@every_row
def test_every_trainable_parameter_gets_a_gradient_over_the_stages(
    tmp_path: Path, row: Row, family: str
) -> None:
    job = job_of(tmp_path, row, family)
    distiller, batch = distiller_of(job)
    reached: dict[str, int] = {}
    for number, stage in enumerate(job.plan.stages):
        distiller.zero_grad()
        loss_of(job, distiller, batch, stage).backward()
        for name, parameter in distiller.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                reached.setdefault(name, number)
    augmenter = augmenter_of(job, distiller)
    if augmenter is not None:
        distiller.zero_grad()
        augmenter.objective(batch, augmenter.draw(batch, 0)).total.backward()
        assert all(bool(p.grad.any()) for p in augmenter.trained.values())
        reached |= {name: 0 for name in augmenter.trained if name.startswith("terms.")}
    parameters = dict(distiller.named_parameters())
    assert all(p.requires_grad for p in parameters.values())
    prefix = "student.model."
    heads = {n for n in parameters if n.startswith(prefix) and is_head(job.student, n[len(prefix) :])}
    assert heads
    assert parameters.keys() - reached.keys() == (heads if row.no_head else set())
    if not row.no_head:
        assert {reached[name] for name in heads} == {len(job.plan.stages) - 1}


@every_row
def test_same_seed_gives_the_same_loss(tmp_path: Path, row: Row, family: str) -> None:
    losses = []
    for _ in range(2):
        job = job_of(tmp_path, row, family)
        distiller, batch = distiller_of(job)
        losses.append([loss_of(job, distiller, batch, stage).item() for stage in job.plan.stages])
    assert losses[0] == losses[1]
    assert all(np.isfinite(losses[0])) and min(losses[0]) > 0


def with_other_padding(inputs: Inputs) -> Inputs:
    """Return the inputs with other tokens where the mask is 0, and with three columns more of them."""
    ids, mask, types = (
        None if x is None else torch.nn.functional.pad(x, (0, 3))
        for x in (inputs.input_ids, inputs.attention_mask, inputs.token_type_ids)
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(5, 20, ids.shape, generator=generator)
    return Inputs(torch.where(mask == 1, ids, noise), mask, types)


@every_row
def test_content_of_padding_changes_nothing(tmp_path: Path, row: Row, family: str) -> None:
    losses = []
    for padding in (False, True):
        job = job_of(tmp_path, row, family)
        distiller, batch = distiller_of(job)
        if padding:
            inputs = with_other_padding(batch.student)
            batch = replace(batch, student=inputs, teacher=inputs)
        losses.append([loss_of(job, distiller, batch, stage).item() for stage in job.plan.stages])
    # Losses near zero are differences of numbers near one.
    assert (losses[0] == pytest.approx(losses[1], rel=2e-4, abs=1e-6)) is not row.padding_counts


@bert_rows
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_every_kind_of_task_runs_or_is_refused_with_a_reason(
    tmp_path: Path, row: Row, kind: Any, pair: bool
) -> None:
    given = {"kind": kind, "pair": pair, "count": 16, "epochs": 2, "checkpoint_every": 1000}
    if kind in row.refuses:
        with pytest.raises(WrongInput, match=f"method\\..* {kind}"):
            job_of(tmp_path, row, **given)
        return
    job = job_of(tmp_path, row, **given)
    assert train(job, QUIET).steps == 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    stages = {line["stage"] for line in lines if "loss" in line}
    assert stages == set(range(1, len(job.plan.stages) + 1))


@every_row
def test_saved_student_is_a_plain_model_of_the_same_logits(tmp_path: Path, row: Row, family: str) -> None:
    job = job_of(tmp_path, row, family, count=8, epochs=1)
    train(job, QUIET)
    plain_names = set(job.student.model.state_dict())
    job.student.save(tmp_path / "student")
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == plain_names
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    inputs = make_batch_of(job.rows, job.student).student
    with torch.no_grad():
        want = job.student(inputs, Needs(logits=True)).logits
        found = Encoder(loaded.eval(), job.student.tokenizer)(inputs, Needs(logits=True)).logits
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def stop_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = [calls]

    def stopper(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return found

    return stopper


@bert_rows
def test_stop_and_resume_is_the_uninterrupted_run(
    tmp_path: Path, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"count": 16, "epochs": 2, "checkpoint_every": 1}
    whole = job_of(tmp_path / "whole", row, **given)
    train(whole, QUIET)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", stop_after(checkpoint.save, 3))
        train(job_of(tmp_path / "parts", row, **given), QUIET)
    rest = job_of(tmp_path / "parts", row, **given)
    train(rest, QUIET)
    assert weights_hash(rest.student.model) == weights_hash(whole.student.model)
    if whole.generator is not None:
        assert weights_hash(rest.generator.model) == weights_hash(whole.generator.model)
