"""The student's model card: `README.md` with the metadata that the Hugging Face hub reads."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stillroom.encoder import MINILM, MINILM_HUB
from stillroom.errors import WrongInput
from stillroom.provenance import RECIPE
from stillroom.recipe import read_yaml
from stillroom.report.sources import Pretrained, Run

README = "README.md"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_METRICS = {"mcc": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}


def text_of(run: Run) -> str:
    """Return the card: metadata, what the student is, its numbers, how to load it, and its limits."""
    return f"---\n{data_of(run).to_yaml()}\n---\n\n{_prose(run)}"


def data_of(run: Run) -> ModelCardData:
    """Return the metadata. Licence and base model are those that the teacher states, if it does."""
    dataset = run.recipe["dataset"]["name"]
    collection, _, task = dataset.partition("/")
    of_glue = collection == "glue" and bool(task)
    source = "nyu-mll/glue" if of_glue else _plain(Path(dataset).name)
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=source,
            dataset_name=dataset if of_glue else source,
            dataset_config=task if of_glue else None,
            dataset_split="validation",
            metric_type=_HUB_METRICS.get(name, name),
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in run.metrics["student"]["metrics"].items()
    ]
    return ModelCardData(
        base_model=_base_model(_teacher(run)),
        datasets=[source] if of_glue else None,
        eval_results=results,
        library_name="transformers",
        license=_license(_teacher(run)),
        metrics=[result.metric_type for result in results],
        model_name=run.folder.resolve().name,
        pipeline_tag="text-classification",
        tags=["knowledge-distillation", "stillroom"],
    )


def _prose(run: Run) -> str:
    metrics, metric, recipe = run.metrics, run.metrics["metric"], run.recipe
    rows = []
    for name in run.models:
        found = metrics[name]
        kept = metrics["teacher"]["metrics"][metric] if "teacher" in metrics else 0.0
        share = f"{100 * found['metrics'][metric] / kept:.1f} %" if kept > 0 else "-"
        values = " | ".join(f"{value:.4f}" for value in found["metrics"].values())
        rows.append(
            f"| {name} | {values} | {share} | {found['parameters'] / 1e6:.1f} "
            f"| {found['bytes'] / 1e6:.1f} |"
        )
    names = list(metrics["student"]["metrics"])
    header = f"| model | {' | '.join(names)} | {metric} kept | M parameters | MB |"
    rule = "|---" * (len(names) + 4) + "|"
    place = _teacher(run)
    source = "soft labels of a file" if place is None else f"a larger one, `{_plain(place.name)}`"
    selected = recipe.get("training", {}).get("select") == "best"
    validation = f" ({len(run.kept.rows):,} rows)" if run.kept else ""
    score = run.kept is not None and run.kept.task.kind == "regression"
    pair = run.kept is not None and len(run.kept.task.text) == 2
    given = '"a first text", "and a second"' if pair else '"a text"'
    answer = "logits[0, 0].item()" if score else "model.config.id2label[logits.argmax(-1).item()]"
    if run.kept is not None and run.kept.task.kind == "multi-label":
        answer = "[model.config.id2label[i] for i, x in enumerate(logits[0]) if x > 0]"
    kind = "gives a text a score" if score else "puts a label on a text"
    return "\n".join(
        [
            f"# {_plain(run.folder.resolve().name)}",
            "",
            f"A small encoder that {kind}. It was distilled with Stillroom from {source}, by the method "
            f"{recipe['method']['name']} on `{_plain(recipe['dataset']['name'])}`.",
            "",
            "## What it keeps",
            "",
            header,
            rule,
            *rows,
            "",
            f"On the validation split{validation}, one seed ({recipe.get('training', {}).get('seed', 0)}). "
            + ("The student was selected on these same rows. " if selected else "")
            + (
                "The control is the same model, trained without a teacher."
                if "control" in metrics
                else "How much the teacher added is not known: the run had no control."
            ),
            "",
            "## How to load it",
            "",
            "```python",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            'model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
            f'logits = model(**tokenizer({given}, return_tensors="pt", truncation=True)).logits',
            f"print({answer})",
            "```",
            "",
            "## Limits",
            "",
            "It was measured on one validation split only. Texts of another kind, language or length may "
            "fare worse, and it inherits the faults of its teacher and of the data. Check it on your own "
            "texts first.",
            "",
            _licence(_teacher(run)),
            "",
        ]
    )


def text_of_start(run: Pretrained) -> str:
    """Return the card of a student that was distilled on raw text, for no task yet."""
    teacher = Path(run.recipe["teacher"])
    before, after = run.metrics["held_out"]["before"], run.metrics["held_out"]["after"]
    masked_lm = "perplexity" in after
    data = ModelCardData(
        base_model=_base_model(teacher),
        library_name="transformers",
        license=_license(teacher),
        model_name=run.folder.resolve().name,
        pipeline_tag="fill-mask" if masked_lm else "feature-extraction",
        tags=["knowledge-distillation", "stillroom"],
    )
    auto = "AutoModelForMaskedLM" if masked_lm else "AutoModel"
    lines = [
        f"# {_plain(run.folder.resolve().name)}",
        "",
        f"A small encoder of {run.metrics['student']['parameters'] / 1e6:.1f} M parameters, distilled with "
        f"Stillroom from `{_plain(teacher.name)}` on raw text by the method "
        f"{run.recipe['method']['name']}. It solves no task yet: fine-tune it, or distil a task into it.",
        "",
        "## How closely it follows its teacher",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {key.replace('_', ' ')} | {before[key]:.4g} | {value:.4g} |" for key, value in after.items()),
        "",
        f"On {run.metrics['text']['held_out']:,} held-out sequences of the same text, one seed "
        f"({run.recipe['training']['seed']}), after {run.metrics['train']['tokens']:,} tokens. Match i "
        "is the linear CKA of layer i with the teacher's layer at the same share of the depth; 0 is the "
        "embedding output.",
        "",
        "## How to load it",
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Limits",
        "",
        "It inherits the faults of its teacher and of the text, and was measured on that text alone.",
        "",
        _licence(teacher),
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)


def _licence(teacher: Path | None) -> str:
    if _license(teacher):
        return "Licence: that of the teacher."
    return "Licence: the teacher states none; find out before you share this model."


def _license(teacher: Path | None) -> str | None:
    stated = _teacher_card(teacher).get("license")
    return stated if isinstance(stated, str) else None


def _base_model(teacher: Path | None) -> str | None:
    """Return a hub id: the teacher, or what it was fine-tuned from; None if none is known."""
    if teacher is None:
        return None
    if str(teacher) == MINILM:
        return MINILM_HUB
    if not teacher.is_dir():
        return str(teacher) if _HUB_ID.fullmatch(str(teacher)) else None
    stated = _teacher_card(teacher).get("base_model")
    if stated is None and (teacher / RECIPE).is_file():
        try:
            stated = read_yaml(teacher / RECIPE).get("model")
        except WrongInput:
            return None
    if stated == MINILM:
        return MINILM_HUB
    known = isinstance(stated, str) and _HUB_ID.fullmatch(stated) and not Path(stated).exists()
    return str(stated) if known else None


def _teacher(run: Run) -> Path | None:
    """Return where the teacher is, None where soft labels alone taught."""
    given = run.recipe.get("teacher")
    return Path(given["name"]) if given else None


def _teacher_card(teacher: Path | None) -> dict[str, Any]:
    path = None if teacher is None else teacher / README
    if path is None or not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:
        # Somebody else's file, in whatever state: a card that cannot be read states nothing.
        return {}


def _plain(text: str) -> str:
    """Return a name without what Markdown or HTML would read as markup."""
    return re.sub(r"[^\w./ -]", "", text)
