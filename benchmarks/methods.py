"""Time a training step of every method beside plain distillation.

    python benchmarks/methods.py --data-dir ../shared/data
    python benchmarks/methods.py --methods kd+hidden,codir --json

Teacher 12x768, live, and student 4x312 with random weights, a generator of minilm-l6's size, in bf16
where training is, batches of 32 rows with the token lengths of SST-2's training rows (--data-dir), else
of builtin/verdicts. A step is the teacher's pass, the student's, the backward pass and the optimiser's
update, on the same batches for each method: of its last stage, and of its first one where it has two;
where there is a generator, its own step too, of which there is one to ten of the student's. The methods
take turns, a step each, in an order that is drawn anew in each round, so that a machine whose speed
changes slows them all alike. Printed are the median of the seconds, the quartiles, and the ratio to `kd`
and to `kd+hidden`: its median over rounds, with the teacher's pass and (`student's part`) without it.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import toys
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stillroom import generator, methods
from stillroom.data import sources
from stillroom.data.batching import Batch, epoch_batches, make_batch
from stillroom.data.tasks import Dataset
from stillroom.data.tokens import TokenisedRows, tokenise
from stillroom.encoder import MINILM, Encoder, Needs, Outputs, describe_task, locate
from stillroom.methods.base import Context, Plan, Stage, Term
from stillroom.recipe import DatasetSettings, MethodSettings
from stillroom.teacher.live import LiveTeacher
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller
from stillroom.training.loop import use_bf16

TEACHER, STUDENT = (12, 768, 12), (4, 312, 12)
TINY = (4, 48, 4), (2, 24, 4)


@dataclass(frozen=True)
class Variant:
    """A method with options; whether all hidden states are read beside it, or TinyBERT's map stands in."""

    method: str
    options: dict[str, object] = field(default_factory=dict)
    reads_hidden_states: bool = False
    fixed_map: bool = False
    stage: int = -1
    generator_step: bool = False


PASS = "teacher's pass"
VARIANTS = {
    **{
        f"{name}, stage 1": Variant(name, stage=0)
        for name in ("lrc-bert", "angular-emd", "tinybert", "minilm", "minilmv2")
    },
    **{f"{name}, generator's step": Variant(name, generator_step=True) for name in ("cilda", "mate-kd")},
    "kd": Variant("kd"),
    "kd+hidden": Variant("kd", reads_hidden_states=True),
    "codir official": Variant("codir", {"loss": "nce_official", "pooling": "cls"}),
    "codir symmetric": Variant("codir", {"direction": "symmetric"}),
    "bert-emd fixed map": Variant("bert-emd", fixed_map=True),
}
"""Beside every registered method with its defaults."""


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
    """Return what can be measured, by name. A mixture is what a recipe makes of it."""
    return {**{name: Variant(name) for name in methods.METHODS if name != "mixture"}, **VARIANTS}


def model_of(size: tuple[int, int, int], tokenizer: object, dataset: Dataset) -> Encoder:
    """Return a random BERT of (layers, width, heads)."""
    layers, width, heads = size
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    config = AutoConfig.for_model("bert", **sizes, intermediate_size=4 * width)
    describe_task(config, dataset.task)
    return Encoder(AutoModelForSequenceClassification.from_config(config).float(), tokenizer)


def plan_of(variant: Variant, context: Context) -> Plan:
    needed = "generator" in methods.METHODS[variant.method].settings.model_fields
    options = {**variant.options, **({"generator": MINILM} if needed else {})}
    plan = methods.build(MethodSettings(name=variant.method, **options), context)
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
    variant: Variant, context: Context, student: Encoder, teacher: LiveTeacher, *, bf16: bool
) -> tuple[Callable[[Batch], None], bool]:
    """Return a function that takes one training step of a method, and whether the teacher runs in it."""
    plan = plan_of(variant, context)
    distiller = Distiller(student, plan, bf16=bf16)
    distiller.to(teacher.encoder.words.device).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5, fused=True)
    stage, writer = plan.stages[variant.stage], None
    if plan.augmentation is not None:
        made = generator.load(MINILM, fresh_head=True)
        writer = Augmenter(plan, made, teacher, distiller, seed=0, bf16=bf16)

    def step(batch: Batch) -> None:
        positions = writer.draw(batch.to(torch.device("cpu")), 0) if writer else None
        if writer and positions is not None and variant.generator_step:
            writer.objective(batch, positions).total.backward()
            writer.step(1e-5, 1.0, max_norm=1.0)
        else:
            augmented = (
                writer.augment(batch, positions, stage) if writer and positions is not None else None
            )
            found = teacher(batch, plan.teacher_needs(stage))
            distiller(batch, found, stage, augmented).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            distiller.after_step(stage)
        if batch.labels.is_cuda:
            torch.cuda.synchronize()

    return step, plan.teacher_needs(stage) != Needs()


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


def summary(seconds: dict[str, list[float]], taught: set[str]) -> dict[str, dict[str, float]]:
    """Return median, quartiles and ratios to the sides that are compared with, for each method.

    Args:
        seconds: By method, those of each round; and those of the teacher's pass alone.
        taught: The methods in whose step the teacher runs once, as it does alone.
    """
    alone = seconds.pop(PASS)
    rest = {
        name: [a - b * (name in taught) for a, b in zip(own, alone, strict=True)]
        for name, own in seconds.items()
    }
    found = {PASS: {"seconds": statistics.median(alone)}}
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(own, n=4)
        found[name] = {"seconds": median, "lower_quartile": low, "upper_quartile": high}
        for side in ("kd", "kd+hidden"):
            if side in seconds:
                for what, parts in (("", seconds), (", student's part", rest)):
                    ratios = [a / b for a, b in zip(parts[name], parts[side], strict=True)]
                    found[name][f"times {side}{what}"] = statistics.median(ratios)
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
    bf16 = use_bf16("auto")
    teacher = LiveTeacher(model_of(teacher_size, tokenizer, dataset), device=device, bf16=bf16)
    count = options.rounds + options.warmup
    order = epoch_batches(tokens.lengths, seed=0, epoch=0, batch_size=options.batch_size, max_tokens=8192)
    full = [index for index in order if len(index) == options.batch_size][:count]
    batches = [make_batch(index, rows, tokens).to(device) for index in full]

    def teach(batch: Batch) -> None:
        teacher(batch, Needs(logits=True))

    steps: dict[str, Callable[[Batch], None]] = {PASS: teach}
    taught = set()
    for name in chosen:
        student = model_of(student_size, tokenizer, dataset)
        kind, classes = dataset.task.kind, dataset.task.outputs
        context = Context.of(
            student, teacher.encoder, kind=kind, classes=classes, rows=len(rows), labels=rows.labels
        )
        steps[name], runs = stepper(known[name], context, student, teacher, bf16=bf16)
        if runs:
            taught.add(name)
    found = summary(measure(steps, batches, options.warmup), taught)
    machine = toys.machine() | {"threads": torch.get_num_threads()}
    settings = {
        "precision": "bf16" if bf16 else "float32",
        "data": dataset.task.name,
        "tokens per row": round(float(np.mean([tokens.lengths[index].mean() for index in full])), 1),
        "rounds": len(batches) - options.warmup,
    }
    if options.json:
        print(json.dumps({"methods": found, "machine": machine, **settings}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in (machine | settings).items()))
    for name, row in found.items():
        print(f"{name:24}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
