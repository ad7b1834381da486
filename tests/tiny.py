"""Tiny random encoders of many families and toy rows, made in a moment and without a download."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from stillroom import methods
from stillroom.data.batching import Batch, Inputs, make_batch
from stillroom.data.tasks import Dataset, Kind, Rows, Task
from stillroom.data.tokens import TokenisedRows, tokenise
from stillroom.encoder import Encoder, Needs, describe_task
from stillroom.generator import Generator
from stillroom.methods.base import Context, Plan
from stillroom.ops.prediction import hard_label_loss
from stillroom.recipe import MethodSettings, TrainingSettings
from stillroom.teacher.live import LiveTeacher
from stillroom.training.log import LOG
from stillroom.training.loop import Job, Trained, train

WORDS = (
    "the a film was is not never good great fine bad poor dull and but very quite it plot actor "
    "scene music man woman dog cat saw liked hated today here there"
).split()

FAMILIES = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "deberta-v2",
    "xlm-roberta",
    "mpnet",
    "modernbert",
)

_NAMES = {"classification": ("negative", "positive"), "regression": (), "multi-label": ("x", "y", "z")}
_METRICS = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "multi-label": ("f1", "accuracy"),
}


def make_task(kind: Kind = "classification", *, pair: bool = False) -> Task:
    """Return a toy task: two classes, a score, or three labels."""
    text = ("first", "second") if pair else ("text",)
    return Task("toy", kind, text, "label", _NAMES[kind], _METRICS[kind])


def make_rows(task: Task, count: int = 48, *, seed: int = 0) -> Rows:
    """Return rows of 2 to 12 words whose label follows from the words `good` and `bad`."""
    chance = np.random.default_rng(seed)
    columns: list[list[str]] = [[] for _ in task.text]
    labels: list[Any] = []
    for i in range(count):
        good = i % 2
        for column in columns:
            words = list(chance.choice(WORDS[:8], size=chance.integers(1, 12)))
            column.append(" ".join([*words, "good" if good else "bad"]))
        if task.kind == "classification":
            labels.append(good)
        elif task.kind == "regression":
            labels.append(good + 0.1 * chance.standard_normal())
        else:
            labels.append([good, 1 - good, i % 3 == 0])
    dtype = np.int64 if task.kind == "classification" else np.float32
    return Rows("toy rows", tuple(columns), np.asarray(labels, dtype=dtype))


def make_dataset(kind: Kind = "classification", *, pair: bool = False, count: int = 48) -> Dataset:
    """Return a toy data set with a training and a validation split that share no seed."""
    task = make_task(kind, pair=pair)
    rows = {"train": make_rows(task, count, seed=0), "validation": make_rows(task, 24, seed=1)}
    return Dataset(task, rows)


def make_tokenizer(*, types: bool = True, extra_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with BERT's special tokens; ids of pad, cls, sep: 0, 2, 3."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *extra_words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names if types else [n for n in names if n != "token_type_ids"],
    )


def make_encoder(
    family: str = "bert", *, layers: int = 2, width: int = 16, task: Task | None = None, seed: int = 0
) -> Encoder:
    """Return a tiny random encoder of a family, in evaluation mode."""
    task = task or make_task()
    tokenizer = make_tokenizer(types=family in ("bert", "electra", "deberta-v2"))
    config = AutoConfig.for_model(family)
    config.num_hidden_layers = layers
    config.num_attention_heads = 2
    config.hidden_size = width
    setattr(config, "hidden_dim" if family == "distilbert" else "intermediate_size", 2 * width)
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 66
    config.type_vocab_size = 2 if family in ("bert", "electra", "deberta-v2") else 1
    config.pad_token_id = 0
    for name in ("bos_token_id", "cls_token_id"):
        setattr(config, name, 2)
    for name in ("eos_token_id", "sep_token_id"):
        setattr(config, name, 3)
    if family == "electra":
        config.embedding_size = width
    if family == "deberta-v2":
        config.relative_attention, config.position_buckets = True, 16
        config.max_relative_positions, config.pos_att_type = -1, ["p2c", "c2p"]
        config.pooler_hidden_size = width
    if family == "modernbert":
        config.layer_types = config.layer_types[:layers]
    describe_task(config, task)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    return Encoder(model.float().eval(), tokenizer)


def make_generator(family: str = "bert", *, width: int = 16, seed: int = 2) -> Generator:
    """Return a tiny random masked language model that shares the encoders' vocabulary."""
    like = make_encoder(family, layers=1, width=width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(like.config)
    return Generator(model.float().eval(), like.tokenizer)


def inputs_for(model: Encoder, count: int = 6, *, pair: bool = False) -> Inputs:
    """Return some rows as an encoder reads them."""
    return make_batch_of(make_rows(make_task(pair=pair), count), model).student


def logits_of(model: Encoder, inputs: Inputs) -> torch.Tensor:
    """Return an encoder's logits, without a gradient."""
    with torch.no_grad():
        return model(inputs, Needs(logits=True)).logits


def save_encoder(folder: Path, **options: Any) -> Path:
    """Save a tiny encoder and return its folder."""
    make_encoder(**options).save(folder)
    return folder


def make_tokens(rows: Rows, encoder: Encoder, *, max_length: int = 32) -> TokenisedRows:
    """Return the rows as the encoder tokenises them."""
    return tokenise(rows, encoder.tokenizer, max_length=max_length, console=Console(quiet=True))


def make_batch_of(rows: Rows, encoder: Encoder) -> Batch:
    """Return all rows in one batch, teacher and student reading the same tokens."""
    return make_batch(np.arange(len(rows)), rows, make_tokens(rows, encoder))


def make_plan(
    student: Encoder,
    teacher: Encoder,
    task: Task,
    rows: int | Rows,
    *,
    method: str = "lrc-bert",
    seed: int = 0,
    **options: Any,
) -> Plan:
    """Return a method's plan for these two; its projections start from `seed`."""
    count, labels = (rows, None) if isinstance(rows, int) else (len(rows), rows.labels)
    context = Context.of(student, teacher, kind=task.kind, classes=task.outputs, rows=count, labels=labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return methods.build(MethodSettings(name=method, **options), context)


def make_job(
    folder: Path,
    *,
    method: str = "lrc-bert",
    options: Mapping[str, Any] | None = None,
    kind: Kind = "classification",
    pair: bool = False,
    family: str = "bert",
    count: int = 48,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
    **settings: Any,
) -> Job:
    """Return a tiny distillation, made anew: 4 teacher layers of width 24, 2 student layers of 16.

    Args:
        folder: The run's folder.
        method: Its name.
        options: The method's.
        kind: Of the toy task.
        pair: Whether its rows are pairs.
        family: Of teacher and student.
        count: Training rows.
        evaluate: By default the minus of the mean squared logit: anything but constant.
        **settings: `TrainingSettings`; by default six steps an epoch, logged each.
    """
    task = make_task(kind, pair=pair)
    rows = make_rows(task, count)
    student = make_encoder(family, task=task)
    teacher = make_encoder(family, task=task, layers=4, width=24, seed=1)
    tokens = make_tokens(rows, student)

    live = LiveTeacher(teacher, device=torch.device("cpu"), bf16=False)
    plan = make_plan(student, teacher, task, rows, method=method, **(options or {}))

    def score(encoder: Encoder) -> dict[str, float]:
        with torch.no_grad():
            logits = encoder.eval()(make_batch_of(rows, encoder).student, Needs(logits=True)).logits
        return {"score": -logits.square().mean().item()}

    chosen: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "log_every": 1,
        "checkpoint_every": 3,
    }
    return Job(
        "tiny",
        student,
        None if method == "none" else live,
        plan,
        rows,
        tokens,
        tokens,
        TrainingSettings(**{**chosen, **settings}),
        False,
        evaluate or score,
        folder,
        None if plan.augmentation is None else make_generator(family),
        live,
    )


@functools.cache
def _teacher_weights(kind: Kind, pair: bool, order: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    task = make_task(kind, pair=pair)
    rows = make_rows(task, 96, seed=2)
    if order is not None:
        rows = replace(rows, labels=np.asarray(order)[rows.labels])
    teacher = make_encoder(task=task, layers=4, width=24, seed=1)
    batch = make_batch_of(rows, teacher)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(60):
        logits = teacher(batch.student, Needs(logits=True)).logits
        hard_label_loss(logits, batch.labels, kind=kind).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.model.state_dict()


def make_teacher(
    kind: Kind = "classification", *, pair: bool = False, order: tuple[int, ...] | None = None
) -> Encoder:
    """Return a BERT of 4 layers of width 24 that solves the toy task. Trained once, in a second.

    Args:
        kind: Of the toy task.
        pair: Whether its rows are pairs.
        order: The number that the teacher gives to each class, where that is not the data's.
    """
    teacher = make_encoder(task=make_task(kind, pair=pair), layers=4, width=24)
    teacher.model.load_state_dict(_teacher_weights(kind, pair, order))
    return teacher


def run_job(job: Job) -> Trained:
    """Train a job without a word."""
    return train(job, Console(quiet=True))


def log_of(job: Job) -> list[dict[str, Any]]:
    """Return the lines of a job's log."""
    return [json.loads(line) for line in (job.folder / LOG).read_text().splitlines()]


def steps_of(job: Job) -> list[dict[str, Any]]:
    """Return its lines of training steps."""
    return [line for line in log_of(job) if "loss" in line]
