"""`stillroom pretrain`: distil an encoder on raw text, as a start for students of any task."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame, opening

EXAMPLES = frame.examples(
    "stillroom pretrain --teacher minilm-l6 --text corpus --student 4x312 -o runs/pretrained",
    "stillroom pretrain --teacher bert-base-uncased --text a.txt --text b.parquet --method distilbert "
    "--set training.max_steps=10000 -o runs/pretrained",
    "stillroom pretrain --resume runs/pretrained",
)


def pretrain(
    recipe: opening.RecipeFile = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="Pretrained encoder: a folder, a hub id, or minilm-l6.",
            rich_help_panel=opening.WHAT,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text: .txt (an empty line ends a document), .jsonl, .parquet, .csv or .tsv, or a folder "
            "of these; may be repeated.",
            rich_help_panel=opening.WHAT,
        ),
    ] = None,
    student: opening.Student = None,
    init: opening.Init = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="minilm (the default), minilmv2, tinybert, lrc-bert; distilbert and codir, whose teacher "
            "needs a masked-LM head.",
            rich_help_panel=opening.WHAT,
        ),
    ] = None,
    output: opening.Output = None,
    given: frame.Overrides = None,
    seed: frame.Seed = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and read all text; train nothing. Needs no -o.",
            rich_help_panel=frame.RUN,
        ),
    ] = False,
    resume: opening.Resume = None,
    as_json: frame.AsJson = False,
) -> None:
    """Distil an encoder on raw text: make a start for students of any task.

    Text is packed into full sequences (--set text.sequence_length=128), once, and some of it held out. How
    long: --set training.epochs=1, or --set training.max_steps=N.
    """
    folder = resume or output or Path()
    fixed = {
        "RECIPE.yaml": recipe,
        "--teacher": teacher,
        "--text": text or None,
        "--student": student,
        "--init": init,
        "--method": method,
        "--output": output,
        "--set": given or None,
        "--seed": seed,
        "--dry-run": dry_run or None,
    }

    def work(console: Console) -> dict[str, Any]:
        from stillroom.recipe import PretrainRecipe
        from stillroom.run.pretrain import pretrain

        if resume is not None:
            opening.require_alone(fixed)
            return pretrain(None, folder, resume=True, console=console)
        opening.require_folder(output, dry_run=dry_run)
        # As an override, it leaves the rest of a recipe's section `text`.
        files = [f"text.files={json.dumps([str(path) for path in text])}"] if text else []
        loaded = PretrainRecipe.load(
            recipe,
            [*files, *frame.overrides(given, seed=seed)],
            teacher=teacher,
            student=student,
            init=init,
            method=method,
        )
        return pretrain(loaded, output, dry_run=dry_run, console=console)

    found = frame.execute(
        work, as_json=as_json, stopped=lambda: opening.how_to_go_on("pretrain", folder), together=True
    )
    if as_json:
        return
    if dry_run:
        opening.show_checks(found)
        return
    table = frame.table({"on held-out text": "left", "before": "right", "after": "right"})
    for name, after in found["held_out"]["after"].items():
        table.add_row(name.replace("_", " "), f"{found['held_out']['before'][name]:.4f}", f"{after:.4f}")
    took = found["train"]
    frame.show(
        table,
        f"{took['steps']} steps, {took['tokens'] / 1e6:.1f} M tokens in {took['seconds']:.0f} s: "
        f"{took['tokens_per_second']:,.0f} tokens/s",
        f"Student: {folder / 'student'}",
        f"Numbers: {folder / 'metrics.json'}",
        f"Report: {folder / 'report.html'}",
        f"Next: stillroom distill --teacher T --dataset D --student {shlex.quote(str(folder))} -o RUN",
    )
