"""`stillroom generator`: make the masked language model that `cilda` and `mate-kd` rewrite words with."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom generator --model minilm-l6 --dataset builtin/verdicts -o runs/generator",
    "stillroom generator --model bert-base-uncased --text news.txt --text corpus -o runs/generator",
)


def generator(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the generator, new or empty.")
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="M", help="Encoder with the teacher's vocabulary: a folder, a hub id, or minilm-l6."
        ),
    ] = "minilm-l6",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text, JSONL, Parquet, CSV or TSV, or a folder of these; each line is a text. "
            "May be repeated.",
            rich_help_panel=frame.DATA,
        ),
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    given: frame.DataOverrides = None,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passes over the text.", rich_help_panel=frame.RUN)
    ] = 3,
    learning_rate: Annotated[
        float, typer.Option(min=0, metavar="R", help="Peak learning rate.", rich_help_panel=frame.RUN)
    ] = 1e-4,
    batch_size: Annotated[
        int, typer.Option(min=2, metavar="N", help="Texts in a batch.", rich_help_panel=frame.RUN)
    ] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            metavar="N",
            help="Texts are cut to so many tokens. Default: dataset.max_length, 128.",
            show_default=False,
            rich_help_panel=frame.RUN,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the run.", rich_help_panel=frame.RUN)
    ] = 0,
    as_json: frame.AsJson = False,
) -> None:
    """Make a generator: tie a masked-LM head to an encoder and train it on text.

    The text is that of files, or of a data set's training rows. Some of it is held out (every
    twentieth line, or the validation rows): perplexity is that of guessing 15 % of its words.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.run.generator import make, read_texts, rows_of
        from stillroom.training.masked_lm import Settings

        data = frame.dataset_settings(dataset, data_dir, given)
        if bool(text) == (data is not None):
            raise WrongInput("Expected text to train on: give --text FILE or --dataset D, one of the two.")
        if max_length is not None and data is not None and "max_length" in data.model_fields_set:
            raise WrongInput(
                "Expected one length, found --max-length and dataset.max_length: leave one out."
            )
        most = max_length or (Settings.max_length if data is None else data.max_length)
        settings = Settings(epochs, learning_rate, batch_size, most, seed)
        rows = read_texts(text) if text else rows_of(data)
        return make(model, rows, output, settings, console)

    found = frame.execute(
        work,
        as_json=as_json,
        stopped=lambda: f"Stopped. A generator's training cannot go on: remove {output} and start again.",
    )
    if as_json:
        return
    columns = {"": "left", "loss (nats)": "right", "perplexity": "right"}
    title = f"{found['rows']['held_out']} held-out texts, {found['steps']} steps, {found['seconds']:.0f} s"
    table = frame.table(columns, title=title)
    for when in ("before", "after"):
        table.add_row(when, f"{found['loss'][when]:.3f}", f"{found['perplexity'][when]:,.1f}")
    frame.show(
        table,
        f"Generator: {output}",
        "Next: stillroom distill --teacher DIR --dataset D --method cilda "
        f"--set method.generator={shlex.quote(str(output))} -o RUN",
    )
