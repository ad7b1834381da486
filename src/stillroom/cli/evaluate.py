"""`stillroom evaluate`: score models, and compare each with the first."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from stillroom.cli import frame
from stillroom.errors import WrongInput

EXAMPLES = frame.examples(
    "stillroom evaluate runs/teacher --dataset builtin/verdicts",
    "stillroom evaluate runs/teacher runs/student runs/student/control --dataset glue/sst2 --data-dir data",
    "stillroom evaluate runs/student --dataset glue/mnli --split validation_mismatched --json",
    "stillroom evaluate runs/mnli --dataset ood/scitail.parquet --labels "
    "0=entailment,1=neutral,contradiction=neutral",
    "stillroom evaluate runs/teacher runs/student --dataset glue/sst2 --robustness",
)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders or hub ids; a run folder means its student."),
    ],
    dataset: frame.Dataset,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The split to score. Default: validation; with --labels every row of a single file (all).",
            rich_help_panel=frame.DATA,
        ),
    ] = None,
    data_dir: frame.DataDir = None,
    given: frame.DataOverrides = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=CLASS,...",
            help="For data of another source: which class of the models a label counts as. Labels of the "
            "models can be mapped as well, to score three classes as two.",
            rich_help_panel=frame.DATA,
        ),
    ] = None,
    robustness: Annotated[
        bool,
        typer.Option(
            "--robustness",
            help="Score perturbed texts too: typos, case, order of words; at most 1,000 rows, seed 0.",
        ),
    ] = False,
    precision: Annotated[
        Literal["auto", "float32", "bf16"], typer.Option(help="Times are always those of float32.")
    ] = "auto",
    as_json: frame.AsJson = False,
) -> None:
    """Score models on a split; compare each with the first.

    A difference is metric minus the first model's metric, with a 95 % interval from a paired
    bootstrap. p is that of McNemar's exact test: how likely so uneven a split of the rows that only
    one of the two gets right would be, if both were equally good.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.evaluation.compare import evaluate

        data = frame.dataset_settings(dataset, data_dir, given)
        counts = split_labels(labels)
        # Of a file of another source no model has seen a row.
        default = "all" if counts and Path(data.name).expanduser().is_file() else "validation"
        return evaluate(
            models,
            data,
            split=split or default,
            labels=counts,
            robust=robustness,
            precision=precision,
            console=console,
        )

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found)


def split_labels(given: list[str] | None) -> dict[str, str] | None:
    """Return the class of each label that `--labels` names.

    Example:
        >>> split_labels(["0=entailment,1=neutral", "contradiction=neutral"])
        {'0': 'entailment', '1': 'neutral', 'contradiction': 'neutral'}
    """
    if not given:
        return None
    found: dict[str, str] = {}
    for part in ",".join(given).split(","):
        label, equals, name = (text.strip() for text in part.partition("="))
        if not (label and equals and name):
            raise WrongInput(f"Expected --labels LABEL=CLASS,LABEL=CLASS, found {part!r}.")
        if found.setdefault(label, name) != name:
            raise WrongInput(
                f"--labels maps {label} to {found[label]} and to {name}: leave out one of them."
            )
    return found


def _show(found: dict[str, Any]) -> None:
    names = list(found["models"][0]["metrics"])
    several = len(found["models"]) > 1
    tested = several and "mcnemar" in found["models"][1]["against_first"]
    columns = {"model": "left"}
    for name in names:
        columns[name] = "right"
        if several:
            columns[f"{name} difference"] = "right"
    table = frame.table(
        {**columns, **({"p": "right"} if tested else {}), **frame.COST_COLUMNS},
        title=f"{found['dataset']} {found['split']}, {found['rows']} rows ({' and '.join(found['text'])})",
    )
    for model in found["models"]:
        against = model.get("against_first")
        cells = [model["model"]]
        for name in names:
            cells.append(f"{model['metrics'][name]:.4f}")
            if several:
                cells.append(_difference(against["metrics"][name]) if against else "")
        if tested:
            cells.append(f"{against['mcnemar']['p']:.3g}" if against else "")
        table.add_row(*cells, *frame.cost_cells(model))
    frame.show(table)
    if "robustness" in found:
        _show_robustness(found["robustness"])


def _show_robustness(found: dict[str, Any]) -> None:
    models = list(found["values"]["as given"])
    columns = {"texts": "left", **dict.fromkeys(models, "right")}
    table = frame.table(columns, title=f"{found['metric']} on {found['rows']} rows")
    for title, values in found["values"].items():
        table.add_row(title, *(f"{values[name]:.4f}" for name in models))
    frame.show(table)


def _difference(found: dict[str, float]) -> str:
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
