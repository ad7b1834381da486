"""What a task-agnostic distillation's page says: the text, how closely the student follows, speed."""

import shlex

from stillroom.report import facts, pictures
from stillroom.report.facts import Cell, Table
from stillroom.report.pictures import Picture
from stillroom.report.sources import Pretrained

_MATCH = "match_"
"""How the names of the matches of layers begin, the layer's number follows."""


def headline(run: Pretrained) -> str:
    """Return what training changed on held-out text."""
    before, after = run.metrics["held_out"]["before"], run.metrics["held_out"]["after"]
    last = [key for key in after if key.startswith(_MATCH)][-1]
    return (
        f"In {run.metrics['train']['steps']:,} steps the loss on unseen text went from "
        f"{before['loss']:.3g} to {after['loss']:.3g}, the match of the last layer with the teacher’s "
        f"from {before[last]:.2f} to {after[last]:.2f}."
    )


def caution(run: Pretrained) -> str:
    """Return what the sentence does not say: what a start is worth, whose text was held out, seeds."""
    return (
        "The student is a start and solves no task yet: what it is worth shows in students distilled from "
        f"it. The {run.metrics['text']['held_out']:,} held-out sequences are of the same files as the "
        "others; text of another kind may be followed less closely. "
        f"One seed ({run.recipe['training']['seed']})."
    )


def held_out(run: Pretrained) -> Table:
    """Return everything that was measured on held-out text, before and after."""
    before, after = run.metrics["held_out"]["before"], run.metrics["held_out"]["after"]
    columns = [("measured", False), ("before", True), ("after", True)]
    rows = [
        [Cell(_named(key), number=False), Cell(f"{before[key]:.4g}"), Cell(f"{value:.4g}")]
        for key, value in after.items()
    ]
    count = run.metrics["text"]["held_out"]
    return Table(f"The student on {count:,} held-out sequences", columns, rows)


def curves(run: Pretrained) -> list[Picture]:
    """Return the course of loss, terms, perplexity, match of layers, and gradient norm, by step."""
    before = run.metrics["held_out"]["before"]

    def course(key: str) -> list[tuple[float, float]]:
        steps = [(line["step"], line["validation"]) for line in run.log if "validation" in line]
        return [(0, before[key]), *((step, found[key]) for step, found in steps if key in found)]

    matches = [key for key in before if key.startswith(_MATCH)]
    drawn = []
    for key in (*(key for key in before if key not in matches), "gradient_norm"):
        trained = [(line["step"], line[key]) for line in run.log if key in line]
        lines = {"training": facts.thin(trained)} if trained else {}
        if key in before:
            lines["held out"] = course(key)
        if lines:
            drawn.append(pictures.curves(_named(key), lines, across="step"))
    lines = {_named(key).removeprefix("match of "): course(key) for key in matches}
    return [*drawn, pictures.layers("match of layers (linear CKA)", lines)]


def terms(run: Pretrained) -> list[tuple[str, str]]:
    """Return what each term of the loss does."""
    return facts.terms(run.recipe["method"]["name"], run.metrics["held_out"]["before"])


def text(run: Pretrained) -> Table:
    """Return what was read, and what it came to."""
    found, took = run.metrics["text"], run.metrics["train"]
    passes = took["examples"] / found["sequences"]
    values = {
        "files": ", ".join(run.recipe["text"]["files"]),
        "documents": f"{found['documents']:,}",
        "tokens": f"{found['tokens']:,}",
        "sequences": f"{found['sequences']:,} of {found['sequence_length']:,} tokens to train on",
        "held out": f"{found['held_out']:,} sequences",
        "read in training": f"{took['tokens']:,} tokens, {passes:.3g} passes over the text",
    }
    return facts.pairs("What was read", values)


def models(run: Pretrained) -> Table:
    """Return the sizes of teacher and student."""
    columns = [("model", False), ("parameters", True), ("without embeddings", True)]
    keys = ("parameters", "non_embedding_parameters")
    rows = [
        [Cell(name, number=False), *(Cell(f"{run.metrics[name][key] / 1e6:.1f} M") for key in keys)]
        for name in ("teacher", "student")
    ]
    return Table("The models", columns, rows)


def commands(run: Pretrained) -> list[tuple[str, str]]:
    """Return what to type to use the student, to repeat the run, and to see its page again."""
    folder = shlex.quote(str(run.folder))
    recipe = shlex.quote(f"{run.folder}/recipe.yaml")
    return [
        (
            "A student for a task that starts from this one",
            f"stillroom distill --teacher T --dataset D --student {folder} -o RUN",
        ),
        ("The same start again", f"stillroom pretrain {recipe} -o NEW-FOLDER"),
        ("This page again", f"stillroom report {folder}"),
    ]


def environment(run: Pretrained) -> Table:
    """Return what training took, machine and versions."""
    took = run.metrics["train"]
    values = {
        "training": f"{took['seconds']:,.0f} s, {took['steps']:,} steps",
        "speed": f"{took['tokens_per_second']:,.0f} tokens per second",
        "peak memory": f"{took['peak_rss_bytes'] / 1e6:,.0f} MB",
    }
    return facts.machine({**values, **run.metrics.get("environment", {})})


def _named(key: str) -> str:
    """Return how the page names what the log holds under a key."""
    layer = key.removeprefix(_MATCH)
    if layer == key:
        return key.replace("_", " ")
    return "match of embeddings" if layer == "0" else f"match of layer {layer}"
