"""`stillroom finetune`: make a teacher."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom finetune --model minilm-l6 --dataset builtin/verdicts -o runs/teacher",
    "stillroom finetune --model bert-base-uncased --dataset glue/sst2 -o runs/sst2 --set training.epochs=2",
    "stillroom finetune --dataset reviews.csv -o runs/reviews --set dataset.label=stars --json",
)


def finetune(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder for the teacher, new or empty."),
    ],
    dataset: frame.Dataset,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="Pretrained encoder: a folder, a hub id, or minilm-l6 (the default)."
        ),
    ] = None,
    data_dir: frame.DataDir = None,
    given: frame.Overrides = None,
    seed: frame.Seed = None,
    as_json: frame.AsJson = False,
) -> None:
    """Fine-tune a pretrained encoder on a data set: make a teacher."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.recipe import FinetuneRecipe
        from stillroom.run.finetune import finetune

        changes = frame.overrides(given, data_dir=data_dir, seed=seed)
        recipe = FinetuneRecipe.load(overrides=changes, model=model, dataset=dataset)
        return finetune(recipe, output, console=console)

    found = frame.execute(
        work,
        as_json=as_json,
        together=True,
        stopped=lambda: f"Stopped. A teacher's training cannot go on: remove {output} and start again.",
    )
    if as_json:
        return
    made = found["model"]
    columns = {"": "left", **dict.fromkeys(made["metrics"], "right"), **frame.COST_COLUMNS}
    table = frame.table(columns)
    table.add_row(
        "teacher", *(f"{value:.4f}" for value in made["metrics"].values()), *frame.cost_cells(made)
    )
    folder, student = shlex.quote(str(output)), _student(output)
    frame.show(
        table,
        f"Teacher: {output}",
        f"Numbers: {output / 'metrics.json'}",
        f"Next: stillroom distill --teacher {folder} {frame.data_options(output)} --student {student} "
        "-o runs/student",
    )


def _student(folder: Path) -> str:
    """Return the student that docs/choose.md recommends: 4x312 where it can be folded, else layers.

    The layers are every second one, or the last one alone where their number is odd.
    """
    from stillroom import encoder
    from stillroom.student import resolve_start

    teacher = encoder.load(str(folder))
    depth = teacher.depth
    if (depth, teacher.width) != (4, 312) and resolve_start("4x312", teacher, "auto") == "pca":
        return "4x312"
    return f"layers:{depth if depth % 2 else ','.join(map(str, range(2, depth + 1, 2)))}"
