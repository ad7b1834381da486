"""Time Stillroom beside what would be used instead, on the same models and rows.

    pip install textbrewer==0.2.1.post1 tensorboardX      (not needed by anything else here)
    python benchmarks/peers.py --data-dir ../shared/data --work runs/peers
    python benchmarks/peers.py --data-dir ../shared/data --work runs/peers --json > benchmarks/peers.json
    python benchmarks/peers.py --data-dir ../shared/data --work /tmp/peers --rows 64 --rounds 1

Teacher 12x768, student 4x312; hidden states of four layers and soft labels; SST-2's first 2,000 training
rows, batches of 32, ten epochs, two threads. Sides, in turn and each in a fresh process:

- stillroom: lrc-bert in one stage, without hard labels or perturbation, so that it reads what the
  others read; the teacher is recorded, and recording counts. Timed in full for ten epochs and for three.
- fixed: TextBrewer with its hidden-state and soft-label losses, rows padded to 128 as its examples do.
- dynamic: the same, each batch padded to its longest row.
- trainer: transformers' Trainer with the same losses, padding as it does by default (dynamic).

An epoch of a peer costs what its next one costs, so one is timed and multiplied; with --peer-rows, one of
so many rows that are spread evenly over all. Each side runs on the GPU where there is one, and has the
precision that it has by default. Models start at random: time does not depend on weights. Ratios are of
medians over rounds; below 1, Stillroom is the slower one.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import (
    in_process,
    let_teacher_solve,
    machine,
    make_model,
    make_rows,
    recipe_overrides,
    training_seconds,
)

TEACHER = (12, 768, 12)
STUDENT = (4, 312, 12)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {1: 3, 2: 6, 3: 9, 4: 12}
"""Teacher layer of each student layer; 0 would be the embeddings."""
BATCH_SIZE = 32
TEMPERATURE = 4.0
THREADS = 2
SIDES = ("stillroom_10", "fixed", "stillroom_3", "dynamic", "trainer")


def stillroom(work: Path, epochs: int) -> float:
    """Return the seconds of a distillation with a recording made anew."""
    from stillroom import Recipe, distill

    with tempfile.TemporaryDirectory(dir=work) as folder:
        overrides = recipe_overrides(
            work / "rows",
            teacher__name=str(work / "teacher"),
            teacher__cache=f"{folder}/recording",
            student=str(work / "student"),
            training__epochs=epochs,
            training__batch_size=BATCH_SIZE,
            training__evaluate_every=epochs,
            method__name="lrc-bert",
            method__switch=0,
            method__gamma=0,
            method__perturbation="off",
            method__temperature=TEMPERATURE,
            method__layer_map=list(LAYERS.values()),
        )
        return training_seconds(distill(Recipe.load(None, overrides), f"{folder}/run"))


def models(work: Path) -> tuple[nn.Module, nn.Module]:
    from transformers import AutoModelForSequenceClassification

    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(work / name) for name in ("teacher", "student")
    )
    return teacher.eval().requires_grad_(False).to(DEVICE), student.train().to(DEVICE)


def tokenised(work: Path, count: int, **padding: Any) -> tuple[Any, Any]:
    """Return the tokenizer and `count` rows, spread over all, as transformers' tools take them."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "student")
    rows = load_dataset("csv", data_files=str(work / "rows" / "train.csv"), split="train")
    rows = rows.select(range(0, len(rows), max(1, len(rows) // count))[:count])
    rows = rows.map(
        lambda chunk: tokenizer(chunk["sentence"], truncation=True, max_length=128, **padding), batched=True
    )
    return tokenizer, rows.rename_column("label", "labels").remove_columns(["sentence"])


def textbrewer(work: Path, count: int, *, fixed: bool) -> float:
    """Return the seconds of one epoch of TextBrewer."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
    from transformers import DataCollatorWithPadding

    tokenizer, rows = tokenised(work, count, **({"padding": "max_length"} if fixed else {}))
    collate = DataCollatorWithPadding(tokenizer)
    # TextBrewer hands a dict's values over by name; transformers' batch is none.
    loader = DataLoader(
        rows, batch_size=BATCH_SIZE, shuffle=True, collate_fn=lambda given: dict(collate(given))
    )
    teacher, student = models(work)

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        return {
            "logits": outputs.logits,
            "hidden": outputs.hidden_states,
            "inputs_mask": batch["attention_mask"],
        }

    matches = [
        {
            "layer_T": goal,
            "layer_S": layer,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1,
            "proj": ["linear", STUDENT[1], TEACHER[1]],
        }
        for layer, goal in LAYERS.items()
    ]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        distiller = GeneralDistiller(
            TrainingConfig(device=DEVICE, output_dir=folder),
            DistillationConfig(temperature=TEMPERATURE, intermediate_matches=matches),
            teacher,
            student,
            adaptor,
            adaptor,
        )
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        start = time.perf_counter()
        with distiller:
            distiller.train(optimizer, loader, num_epochs=1, max_grad_norm=1.0, output_hidden_states=True)
        finish()
        return time.perf_counter() - start


def trainer(work: Path, count: int) -> float:
    """Return the seconds of one epoch of a Trainer whose loss asks the teacher."""
    from transformers import Trainer, TrainingArguments

    tokenizer, rows = tokenised(work, count)
    teacher, student = models(work)
    student.projections = nn.ModuleList(nn.Linear(STUDENT[1], TEACHER[1]) for _ in LAYERS)

    def distillation_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            goal = teacher(**inputs, output_hidden_states=True)
        found = model(**inputs, output_hidden_states=True)
        s, t = (x.logits / TEMPERATURE for x in (found, goal))
        loss = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean") * TEMPERATURE**2
        real = inputs["attention_mask"].bool()
        for projection, (layer, other) in zip(model.projections, LAYERS.items(), strict=True):
            states = projection(found.hidden_states[layer])
            loss = loss + F.mse_loss(states[real], goal.hidden_states[other][real])
        return loss

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *others: Any, **more: Any) -> Tensor:
            return distillation_loss(model, inputs)

    with tempfile.TemporaryDirectory(dir=work) as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-4,
            save_strategy="no",
            report_to=[],
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        peer = Distilling(student, arguments, train_dataset=rows, processing_class=tokenizer)
        start = time.perf_counter()
        peer.train()
        finish()
        return time.perf_counter() - start


def finish() -> None:
    """Wait for what the GPU still has to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def one_side(side: str, work: Path, count: int) -> float:
    if side.startswith("stillroom"):
        return stillroom(work, int(side.split("_")[1]))
    return trainer(work, count) if side == "trainer" else textbrewer(work, count, fixed=side == "fixed")


def summary(seconds: dict[str, list[float]], rows: int, peer_rows: int) -> dict[str, object]:
    """Return seconds, rates and ratios; a peer's epoch counts as often as the run has epochs."""
    whole = {side: 1.0 if side.startswith("stillroom") else rows / peer_rows for side in seconds}
    middle = {side: statistics.median(found) * whole[side] for side, found in seconds.items()}
    ratios: dict[str, float] = {}
    for peer in ("fixed", "dynamic", "trainer"):
        ratios[f"ratio_{peer}"] = round(10 * middle[peer] / middle["stillroom_10"], 2)
        ratios[f"ratio_{peer}_3_epochs"] = round(3 * middle[peer] / middle["stillroom_3"], 2)
    epochs = {side: int(side.split("_")[1]) if "_" in side else 1 for side in SIDES}
    return {
        "machine": machine() | {"threads": THREADS},
        "rows": rows,
        "peer_rows": peer_rows,
        "rows_per_second": {side: round(rows * epochs[side] / middle[side], 2) for side in SIDES},
        "seconds": {side: [round(value, 2) for value in found] for side, found in seconds.items()},
        **ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds glue/sst2/train.parquet")
    parser.add_argument("--work", type=Path, required=True, help="for models, rows and what is measured")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument(
        "--peer-rows", type=int, help="rows of a peer's epoch, then multiplied; default: all"
    )
    parser.add_argument("--rounds", type=int, default=2, help="how often each side is timed")
    parser.add_argument("--json", action="store_true", help="print only the results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work, peer_rows = options.work.absolute(), min(options.peer_rows or options.rows, options.rows)
    if options.side:
        print(json.dumps(one_side(options.side, work, peer_rows)))
        return
    work.mkdir(parents=True, exist_ok=True)
    make_model(work / "teacher", *TEACHER)
    make_model(work / "student", *STUDENT)
    shutil.rmtree(work / "rows", ignore_errors=True)
    make_rows(work / "rows", options.data_dir, "sst2", options.rows)
    let_teacher_solve(work / "teacher", work / "rows")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            given = ["--data-dir", options.data_dir, "--work", work, "--rows", options.rows]
            given += ["--peer-rows", peer_rows, "--side", side]
            seconds[side].append(in_process(__file__, given, threads=THREADS))
            if not options.json:
                print(f"{side}: {seconds[side][-1]:.1f} s", flush=True)
    print(json.dumps(summary(seconds, options.rows, peer_rows), indent=2))


if __name__ == "__main__":
    main()
