"""`stillroom evaluate`: score models, and compare each with the first."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom evaluate runs/teacher --dataset builtin/verdicts",
    "stillroom evaluate runs/teacher runs/student runs/student/control --dataset glue/sst2 --data-dir data",
    "stillroom evaluate runs/student --dataset glue/mnli --split validation_mismatched --json",
)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders or hub ids; a run folder means its student."),
    ],
    dataset: frame.Dataset,
    split: Annotated[
        str,
        typer.Option(metavar="NAME", help="The split to score.", rich_help_panel=frame.DATA),
    ] = "validation",
    data_dir: frame.DataDir = None,
    given: frame.DataOverrides = None,
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
        return evaluate(models, data, split=split, precision=precision, console=console)

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found)


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
        title=f"{found['dataset']} {found['split']}, {found['rows']} rows",
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


def _difference(found: dict[str, float]) -> str:
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
