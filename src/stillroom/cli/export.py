"""`stillroom export`: a model in the forms that serve it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from stillroom.cli import frame

EXAMPLES = frame.examples(
    "stillroom export runs/student",
    "stillroom export runs/student -o deploy --format onnx-int8 --vocabulary trim --max-drop 0.3",
    "stillroom export runs/student -o deploy --vocabulary trim --text reviews.txt --pieces 15000",
    "stillroom export runs/student -o deploy --format onnx-int8 --embedding-bits 4",
    "stillroom export runs/student -o deploy --format openvino-int8 --fixed-lengths 16,32,128",
    "stillroom export runs/teacher -o deploy --format openvino,openvino-int8 --dataset glue/sst2 --json",
)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder (its student), a model folder or a hub id.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for the export. Default: deploy in the run."
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option("--format", metavar="F,F", help="Of onnx, onnx-int8, openvino, openvino-int8, torch."),
    ] = "onnx,onnx-int8",
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="Most points of the task's metric that a form may lose.")
    ] = 0.5,
    vocabulary: Annotated[
        Literal["whole", "trim"],
        typer.Option(help="trim keeps only the pieces that the texts use, and an alphabet."),
    ] = "whole",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="With trim: text whose pieces are kept as well; may be repeated."
        ),
    ] = None,
    pieces: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With trim: most pieces to keep, the training text's before those of --text, the most "
            "frequent first.",
        ),
    ] = None,
    embedding_bits: Annotated[
        int, typer.Option(metavar="8|4", help="Bits of a word embedding's values in onnx-int8.")
    ] = 8,
    fixed_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="With OpenVINO: lengths for which a model of one text is prepared: faster, more memory.",
        ),
    ] = None,
    dataset: frame.OptionalDataset = None,
    data_dir: frame.DataDir = None,
    given: frame.DataOverrides = None,
    as_json: frame.AsJson = False,
) -> None:
    """Export a model to ONNX or OpenVINO, in float or int8, and prove that it is still the model.

    Every form is compared with torch on random inputs of many shapes, and scored on the validation split
    of the run's own data, or of --dataset. One point is 0.01 of the metric.
    """

    def work(console: Console) -> dict[str, Any]:
        from stillroom.deploy.export import export

        return export(
            model,
            output,
            formats=formats,
            dataset=frame.dataset_settings(dataset, data_dir, given, run=model),
            max_drop=max_drop,
            vocabulary=vocabulary,
            text=text or (),
            pieces=pieces,
            embedding_bits=embedding_bits,
            fixed_lengths=frame.numbers("--fixed-lengths", fixed_lengths) if fixed_lengths else (),
            console=console,
        )

    found = frame.execute(work, as_json=as_json)
    if not as_json:
        _show(found, output or Path(model) / "deploy")


def _show(found: dict[str, Any], folder: Path) -> None:
    scored = found["dataset"]
    metric = scored["metric"] if scored else None
    columns = {"form": "left", "logits within": "right"}
    if metric:
        columns |= {metric: "right", "points lost": "right"}
    table = frame.table(
        {**columns, "MB on disk": "right", "ms/row": "right", "left in float32": "left"},
        title=f"{scored['name']} {scored['split']}, {scored['rows']} rows" if scored else None,
    )
    if metric:
        table.add_row("model as it came", "", f"{found['source_metrics'][metric]:.4f}", "", "", "", "")
    for name, form in found["forms"].items():
        cells = [name, f"{form['parity']['relative']:.1e}"]
        if metric:
            cells += [f"{form['metrics'][metric]:.4f}", f"{form['drop']:+.2f}"]
        left = f"{len(form['left_out'])} of {form['parts']} parts" if form.get("left_out") else ""
        table.add_row(*cells, f"{form['bytes'] / 1e6:.1f}", f"{form['ms_per_row']:.2f}", left)
    notes = [f"Refused: {name}: {reason}" for name, reason in found["refused"].items()]
    trimmed = found["vocabulary"]
    if trimmed:
        covered = trimmed["coverage"]
        notes.append(
            f"Vocabulary: {trimmed['pieces']} of {trimmed['of']} pieces; covering {covered['tokens']:.2%} "
            f"of the validation tokens and leaving {covered['rows']:.1%} of its rows as they were."
        )
    lengths = ", ".join(map(str, found["fixed_lengths"]))
    frame.show(
        table,
        *notes,
        *([f"Fixed lengths, for single texts: {lengths}."] if lengths else []),
        f"Export: {folder} (fastest: {found['fastest']})",
        f"Numbers: {folder / 'manifest.json'}",
    )
