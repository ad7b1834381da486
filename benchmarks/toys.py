"""What the timing benchmarks share: models of a given size, rows, and a process for each side.

Models start at random: what a step costs does not depend on what the weights are.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stillroom import encoder

VALIDATION = 64
"""Few rows to validate on: the benchmarks time training."""


def model_config(layers: int, width: int, heads: int) -> Any:
    """Return the configuration of a BERT with minilm-l6's vocabulary and two classes."""
    config = AutoConfig.from_pretrained(encoder.locate("minilm-l6"))
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, width, heads
    config.intermediate_size, config.num_labels = 4 * width, 2
    return config


def make_model(folder: Path, layers: int, width: int, heads: int) -> Path:
    """Save a random classifier with minilm-l6's tokenizer, unless it is there, and return its folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(model_config(layers, width, heads))
        encoder.Encoder(model, AutoTokenizer.from_pretrained(encoder.locate("minilm-l6"))).save(folder)
    return folder


def make_rows(folder: Path, data: Path, task: str, rows: int) -> Path:
    """Write the first rows of a GLUE task as train.csv and validation.csv, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data / "glue" / task / "train.parquet")
    table = table.drop_columns([name for name in table.column_names if name == "idx"])
    while len(table) < rows + VALIDATION:
        table = pa.concat_tables([table, table])
    pc.write_csv(table.slice(0, rows), folder / "train.csv")
    pc.write_csv(table.slice(rows, VALIDATION), folder / "validation.csv")
    return folder


def let_teacher_solve(teacher: Path, rows: Path) -> None:
    """Give the validation rows the teacher's own answers: a run refuses a teacher that guesses.

    The bias of its head is moved so that both classes occur equally often.
    """
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    table = pc.read_csv(rows / "validation.csv")
    texts = [table[name].to_pylist() for name in table.column_names if name != "label"]
    given = tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
        second = model(**given).logits.argmax(-1)
    encoder.Encoder(model, tokenizer).save(teacher)
    place = table.column_names.index("label")
    pc.write_csv(table.set_column(place, "label", pa.array(second.tolist())), rows / "validation.csv")


def recipe_overrides(rows: Path, **settings: object) -> list[str]:
    """Return a recipe's overrides for those rows; `__` in a name stands for the dot."""
    given = {"dataset__name": str(rows / "train.csv"), "dataset__validation": str(rows / "validation.csv")}
    return [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in (given | settings).items()]


def training_seconds(metrics: dict[str, Any]) -> float:
    """Return what training took, with the recording of the teacher where there was one."""
    train = metrics["train"]
    return float(train["seconds"] + (train.get("teacher") or {}).get("recording_seconds", 0.0))


def in_process(script: str, arguments: list[object], *, threads: int) -> Any:
    """Run a script of ours in a fresh process with so many threads; return the JSON of its last line."""
    variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """Return the short hash of what is checked out, with `+` if tracked files differ; None outside git."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return None
    # A measurement is written over the figures of the last one, which the shell has emptied by then.
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/*.json").returncode
    return head.stdout.strip() + "+" * bool(changed) if head.returncode == 0 else None


# At the start: a commit that is made while something is measured is not what was measured.
COMMIT = commit()


def machine() -> dict[str, object]:
    """Return where, when and of which commit a measurement was made."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":")[1].strip() if lines else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": COMMIT,
        "load_at_end": os.getloadavg()[0],
    }
