"""Time a training step of every method that needs no generator beside plain distillation.

    python benchmarks/methods.py --data-dir ../shared/data
    python benchmarks/methods.py --methods kd+hidden,codir --json

Teacher 12x768 and student 4x312 with random weights, batches of 32 rows with the token lengths of
SST-2's training rows (--data-dir), else of builtin/verdicts. A step is the teacher's pass, the
student's, the backward pass and the optimiser's update, on the same batches for each method. The
methods take turns, a step each, in an order that is drawn anew in each round, so that a machine whose
speed changes slows them all alike. Printed are the median of the seconds, the quartiles, and the ratio
to `kd` and to `kd+hidden`: its median over rounds.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stillroom import methods
from stillroom.data import sources
from stillroom.data.batching import Batch, epoch_batches, make_batch
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, tokenise
from stillroom.encoder import MINILM, Encoder, Needs, Outputs, describe_task, locate
from stillroom.methods.base import Context, Plan, Stage, Term
from stillroom.recipe import DatasetSettings, MethodSettings
from stillroom.teacher.live import LiveTeacher
from stillroom.training.distiller import Distiller

TEACHER, STUDENT = (12, 768, 12), (4, 312, 12)
TINY = (4, 48, 4), (2, 24, 4)


@dataclass(frozen=True)
class Variant:
    """A method with options; whether all hidden states are read beside it, or TinyBERT's map stands in."""

    method: str
    options: dict[str, object] = field(default_factory=dict)
    reads_hidden_states: bool = False
    fixed_map: bool = False


VARIANTS = {
    "kd": Variant("kd"),
    "kd+hidden": Variant("kd", reads_hidden_states=True),
    "codir official": Variant("codir", {"loss": "nce_official", "pooling": "cls"}),
    "codir symmetric": Variant("codir", {"direction": "symmetric"}),
    "bert-emd fixed map": Variant("bert-emd", fixed_map=True),
    "minilmv2": Variant("minilmv2", {"relation_heads": 12}),
}
"""Beside every registered method with its defaults, or instead of them where those do not fit the sizes."""


class HiddenStatesRead(Term):
    """Nothing, computed from all hidden states: what reading them costs by itself."""

    def __init__(self, student_depth: int, teacher_depth: int):
        super().__init__()
        self.student_needs = Needs(hidden_states=frozenset(range(1, student_depth + 1)))
        self.teacher_needs = Needs(hidden_states=frozenset(range(1, teacher_depth + 1)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return zero."""
        return student.logits.new_zeros(())


def variants() -> dict[str, Variant]:
    """Return what can be measured, by name. Methods that need a generator are left out."""
    plain = [name for name, m in methods.METHODS.items() if "generator" not in m.settings.model_fields]
    return {**{name: Variant(name) for name in plain}, **VARIANTS}


def model_of(size: tuple[int, int, int], tokenizer: object, dataset: Dataset) -> Encoder:
    """Return a random BERT of (layers, width, heads)."""
    layers, width, heads = size
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    config = AutoConfig.for_model("bert", **sizes, intermediate_size=4 * width)
    describe_task(config, dataset.task)
    return Encoder(AutoModelForSequenceClassification.from_config(config).float(), tokenizer)


def plan_of(variant: Variant, context: Context) -> Plan:
    plan = methods.build(MethodSettings(name=variant.method, **variant.options), context)
    if variant.fixed_map:
        return with_fixed_map(plan, context)
    if not variant.reads_hidden_states:
        return plan
    read = HiddenStatesRead(context.student_depth, context.teacher_depth)
    stages = tuple(Stage(s.start, {**s.weights, "read": 0.0}, s.perturb) for s in plan.stages)
    return Plan({**plan.terms, "read": read}, stages, plan.perturbation)


def with_fixed_map(plan: Plan, context: Context) -> Plan:
    """Return BERT-EMD's losses on TinyBERT's pairs of layers: no transport, and autograd's own gradient."""
    pairs = methods.build(MethodSettings(name="tinybert"), context).terms
    (stage,) = plan.stages
    layers = {name: pairs[name] for name in ("attention", "hidden_states")}
    weights = {"soft": stage.weights["soft"], **dict.fromkeys(layers, stage.weights["layers"])}
    return Plan({"soft": plan.terms["soft"], **layers}, (Stage(0.0, weights),))


def stepper(
    variant: Variant, context: Context, student: Encoder, teacher: LiveTeacher
) -> Callable[[Batch], None]:
    """Return a function that takes one training step of a method's last stage."""
    plan = plan_of(variant, context)
    distiller = Distiller(student, plan, bf16=False)
    distiller.to(teacher.encoder.words.device).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5, fused=True)
    stage = plan.stages[-1]

    def step(batch: Batch) -> None:
        loss = distiller(batch, teacher(batch, plan.teacher_needs(stage)), stage)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step(stage)
        if batch.labels.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(
    steps: dict[str, Callable[[Batch], None]], batches: list[Batch], warmup: int
) -> dict[str, list[float]]:
    """Return the seconds of each method's step on each batch after the first ones."""
    chance = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name in chance.sample(list(steps), len(steps)):
            started = time.perf_counter()
            steps[name](batch)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, quartiles and ratios to the sides that are compared with, for each method."""
    found = {}
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(own, n=4)
        found[name] = {"seconds": median, "lower_quartile": low, "upper_quartile": high}
        for side in ("kd", "kd+hidden"):
            if side in seconds:
                ratios = [a / b for a, b in zip(own, seconds[side], strict=True)]
                found[name][f"times {side}"] = statistics.median(ratios)
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}


def data(data_dir: Path | None) -> tuple[Dataset, object, TokenisedRows]:
    name = "glue/sst2" if data_dir else "builtin/verdicts"
    dataset = sources.load(DatasetSettings(name=name, data_dir=data_dir))
    tokenizer = AutoTokenizer.from_pretrained(locate(MINILM))
    rows = dataset.splits["train"]
    return dataset, tokenizer, tokenise(rows, tokenizer, max_length=128, console=Console(stderr=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with glue/sst2; default: built-in data")
    parser.add_argument("--methods", help=f"some of: {', '.join(variants())}; separated by commas")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each method that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before them")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="4x48 to 2x24: whether it works, in seconds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    known = variants()
    chosen = options.methods.split(",") if options.methods else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, tokenizer, tokens = data(options.data_dir)
    rows = dataset.splits["train"]
    teacher_size, student_size = TINY if options.tiny else (TEACHER, STUDENT)
    teacher = LiveTeacher(model_of(teacher_size, tokenizer, dataset), device=device, bf16=False)
    count = options.rounds + options.warmup
    order = epoch_batches(tokens.lengths, seed=0, epoch=0, batch_size=options.batch_size, max_tokens=8192)
    full = [index for index in order if len(index) == options.batch_size][:count]
    batches = [make_batch(index, rows, tokens).to(device) for index in full]
    steps = {}
    for name in chosen:
        student = model_of(student_size, tokenizer, dataset)
        sizes = (student.depth, student.width, teacher.encoder.depth, teacher.encoder.width)
        context = Context(dataset.task.kind, dataset.task.outputs, len(rows), *sizes, rows.labels)
        steps[name] = stepper(known[name], context, student, teacher)
    found = summary(measure(steps, batches, options.warmup))
    machine = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "data": dataset.task.name,
        "tokens per row": round(float(np.mean([tokens.lengths[index].mean() for index in full])), 1),
        "rounds": len(batches) - options.warmup,
    }
    if options.json:
        print(json.dumps({"methods": found, **machine}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, row in found.items():
        print(f"{name:24}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
