"""Predicting files: the same answers as torch, the same rows in the same order, clear refusals."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from exports import QUIET, Exported
from stillroom import WrongInput, encoder
from stillroom.cli import app
from stillroom.data import streams, tables
from stillroom.deploy.answers import answer
from stillroom.deploy.predict import predict
from stillroom.deploy.predictor import Predictor
from stillroom.evaluation.predict import predict_rows
from tiny import make_encoder, make_rows, make_task

NAMES = ["text", "id", "predicted", "probability_negative", "probability_positive"]


def texts(count: int) -> list[str]:
    found: list[str] = make_rows(make_task(), count, seed=4).texts[0]
    return found


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns in the format that the name says."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        with path.open("w", newline="") as stream:
            csv.writer(stream, delimiter=mark).writerows([list(columns), *(r.values() for r in rows)])
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def refused(source: Any, output: Path, model: Path, **options: Any) -> str:
    """Return why; nothing is left beside what was there."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(WrongInput) as caught:
        predict(model, source, output, **options)
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


ENDINGS = ("jsonl", "csv", "tsv", "parquet")


@pytest.mark.parametrize("out", ENDINGS)
@pytest.mark.parametrize("given", ENDINGS)
def test_rows_keep_their_order_and_get_the_answers_of_torch(
    exported: Exported, tmp_path: Path, given: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces, and a last one that is not full.
    monkeypatch.setattr(streams, "ROWS", 16)
    source = write(tmp_path / f"in.{given}", {"text": texts(45), "id": list(range(45))})
    found = predict(exported.folder, source, tmp_path / f"out.{out}", form="onnx", threads=1)
    rows = read(tmp_path / f"out.{out}")
    assert found["rows"] == len(rows) == 45 and found["cut"] == 0
    assert all(list(row) == NAMES for row in rows)
    assert [row["text"] for row in rows] == texts(45)
    assert [int(row["id"]) for row in rows] == list(range(45))
    toy = make_rows(make_task(), 45, seed=4)
    model = encoder.load(str(exported.model))
    logits = predict_rows(model, toy, max_length=66, bf16=False, console=QUIET).astype(float)
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert np.allclose([float(row["probability_positive"]) for row in rows], expected, atol=1e-4)
    assert [row["predicted"] == "positive" for row in rows] == list(expected > 0.5)


def test_lines_of_text_keep_empty_ones_and_long_ones_are_cut(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes("\ufeffa good film\r\n\n".encode() + b"good film " * 10_000 + b"\nbad")
    found = predict(exported.folder, source, tmp_path / "out.jsonl", form="onnx")
    rows = read(tmp_path / "out.jsonl")
    assert [row["text"][:11] for row in rows] == ["a good film", "", "good film g", "bad"]
    assert (found["rows"], found["cut"], found["max_length"]) == (4, 1, 66)
    whole, short = Predictor.load(exported.folder, "onnx").logits([rows[2]["text"], "good film " * 32])
    assert np.allclose(whole, short)


def test_pairs_are_read_by_usual_names_or_those_given(exported: Exported, tmp_path: Path) -> None:
    first, second = texts(9), texts(18)[9:]
    expected = answer(Predictor.load(exported.folder, "onnx"), list(zip(first, second, strict=True)))
    # Exports of before there were any do not name the columns that the model was trained on.
    folder = shutil.copytree(exported.folder, tmp_path / "older")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("text") == ["text"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    usual = write(tmp_path / "usual.csv", {"premise": first, "hypothesis": second})
    named = write(tmp_path / "named.parquet", {"b": second, "a": first})
    for source, text in ((usual, None), (named, ["a", "b"])):
        found = predict(folder, source, tmp_path / "out.jsonl", form="onnx", text=text)
        assert found["text"] == (text or ["premise", "hypothesis"])
        rows = read(tmp_path / "out.jsonl")
        assert np.allclose(
            [row["probability_positive"] for row in rows],
            [said.probabilities["positive"] for said in expected],
            atol=1e-4,
        )


def trained(folder: Path, text: list[str] | None, metrics: dict[str, Any], name: str = "d.csv") -> Path:
    """Return a run whose recipe asks for text columns and whose metrics say which were read."""
    make_encoder().save(folder / "student")
    dataset = {"name": name, "text": text}
    (folder / "recipe.yaml").write_text(json.dumps({"dataset": dataset}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("inside", [".", "student"])
def test_a_run_reads_the_columns_that_it_was_trained_on(tmp_path: Path, inside: str) -> None:
    """It would predict from another column, whose name is more usual, and say nothing."""
    source = write(tmp_path / "in.jsonl", {"text": texts(4), "review": texts(8)[4:]})
    asked = trained(tmp_path / "asked", ["review"], {})
    told = trained(tmp_path / "told", None, {"text": ["review"]})
    for model in (asked, told):
        found = predict(model / inside, source, tmp_path / "out.jsonl")
        assert found["text"] == ["review"]
    said = read(tmp_path / "out.jsonl")
    predict(told, source, tmp_path / "named.jsonl", text=["review"])
    assert said == read(tmp_path / "named.jsonl")
    # Where the file lacks them, a usual name of as many columns.
    other = write(tmp_path / "other.jsonl", {"question": texts(2), "sentence": texts(2)})
    assert predict(told, other, tmp_path / "out.jsonl")["text"] == ["sentence"]


def test_one_text_is_not_read_by_a_model_of_two_or_the_other_way_round(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", ["review"], {})
    two = trained(tmp_path / "two", None, {}, "glue/mnli")
    pairs = write(tmp_path / "pairs.jsonl", {"text1": texts(2), "text2": texts(2)})
    single = write(tmp_path / "single.jsonl", {"text": texts(2)})
    why = refused(pairs, tmp_path / "out.jsonl", one)
    assert why == (
        f"The model was trained on one text ('review'), and would read 'text1' and 'text2' of {pairs}. "
        "Name one column with --text, or give another model."
    )
    assert "two texts ('premise' and 'hypothesis')" in refused(single, tmp_path / "out.jsonl", two)
    assert "one text" in refused(pairs, tmp_path / "out.jsonl", one, text=["text2", "text1"])
    assert predict(one, pairs, tmp_path / "out.jsonl", text=["text2"])["text"] == ["text2"]


def test_pairs_for_a_model_of_which_nothing_is_known_are_a_warning(tmp_path: Path) -> None:
    make_encoder().save(tmp_path / "model")
    pairs = write(tmp_path / "pairs.jsonl", {"text1": texts(2), "text2": texts(2)})
    shown = io.StringIO()
    console = Console(file=shown, width=1000)
    predict(tmp_path / "model", pairs, tmp_path / "out.jsonl", text=["text1", "text2"], console=console)
    assert "Warning" not in shown.getvalue()
    predict(tmp_path / "model", pairs, tmp_path / "out.jsonl", console=console)
    assert "text1 and text2 are read as pairs" in shown.getvalue()


def test_scores_and_several_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"text": texts(5)})
    for kind in ("regression", "multi-label"):
        model = tmp_path / kind
        make_encoder(task=make_task(kind)).save(model)
        logits = Predictor.load(model).logits(texts(5)).astype(float)
        for ending in ("jsonl", "csv", "parquet"):
            predict(model, source, tmp_path / f"out.{ending}")
            rows = read(tmp_path / f"out.{ending}")
            if kind == "regression":
                assert list(rows[0]) == ["text", "predicted"]
                assert np.allclose([float(row["predicted"]) for row in rows], logits[:, 0], atol=1e-5)
                continue
            for row, values in zip(rows, 1 / (1 + np.exp(-logits)), strict=True):
                assert np.allclose([float(row[f"probability_{name}"]) for name in "xyz"], values, atol=1e-5)
                chosen = [name for name, value in zip("xyz", values, strict=True) if value >= 0.5]
                assert row["predicted"] == ("|".join(chosen) if ending == "csv" else chosen)


WRONG = {
    "latin.txt": (b"good\ncaf\xe9\n", "line 2: expected UTF-8 text, found the byte 0xe9"),
    "utf16.csv": ("text\ngood\n".encode("utf-16"), "line 1: expected UTF-8"),
    "empty.csv": (b"", "no rows"),
    "header.csv": (b"text,id\n", "no rows"),
    "columns.csv": (b"txet,id\ngood,1\n", "Did you mean txet"),
    "short.csv": (b"text,id\ngood\n", "expected 2 columns"),
    "quote.csv": (b'text,id\n"good,1\n', "Correct the quotes"),
    "twice.csv": (b"text,text\ngood,1\n", "occurs twice"),
    "taken.csv": (b"text,predicted\ngood,1\n", "Rename or drop it"),
    "cut.jsonl": (b'{"text": "good"}\n{"text": "go', "row 2 (line 2): expected JSON"),
    "list.jsonl": (b'["good"]\n', "expected an object"),
    "null.jsonl": (b'{"text": "good"}\n\n{"text": null}\n', "row 2 (line 3): expected text in 'text'"),
    "lacks.jsonl": (b'{"text": "good"}\n{"id": 1}\n', "row 2 (line 2): expected text in 'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "not valid Unicode"),
    "no.parquet": (b"PAR1 and nothing more", "truncated or damaged"),
    "what.docx": (b"good", "Cannot tell the format"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_with_the_place(exported: Exported, tmp_path: Path, name: str) -> None:
    content, expected = WRONG[name]
    (tmp_path / name).write_bytes(content)
    text = ["text"] if name == "columns.csv" else None
    assert expected in refused(tmp_path / name, tmp_path / "out.csv", exported.folder, text=text)


def test_a_truncated_parquet_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", {"text": texts(40)})
    source.write_bytes(source.read_bytes()[:-40])
    assert "truncated" in refused(source, tmp_path / "out.csv", exported.folder)
    # Sound at its end, damaged in the middle of the data: the rows before are not kept either.
    source = write(tmp_path / "in.parquet", {"text": texts(40)})
    data = bytearray(source.read_bytes())
    data[300:700] = bytes(400)
    source.write_bytes(data)
    assert "damaged" in refused(source, tmp_path / "out.csv", exported.folder)


def test_what_an_output_cannot_hold_is_refused(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good\\nfilm"}\n')
    assert "Write CSV" in refused(source, tmp_path / "out.tsv", exported.folder)
    predict(exported.folder, source, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0]["text"] == "good\nfilm"
    assert "Cannot tell the format" in refused(source, tmp_path / "out.xls", exported.folder)
    with pytest.raises(WrongInput, match="no folder"):
        predict(exported.folder, source, tmp_path / "no" / "out.csv")
    with pytest.raises(WrongInput, match="cannot be read"):
        predict(exported.folder, tmp_path / "no.csv", tmp_path / "out.csv")


def test_rows_that_differ_later_are_refused_where_columns_are_fixed(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "ROWS", 2)
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "n": 1}\n' * 2 + '{"text": "b", "n": "x", "more": 1}\n')
    assert "'more'" in refused(source, tmp_path / "out.csv", exported.folder)
    source.write_text('{"text": "a", "n": 1}\n' * 2 + '{"text": "b", "n": "x"}\n')
    assert "types of the first rows" in refused(source, tmp_path / "out.parquet", exported.folder)
    predict(exported.folder, source, tmp_path / "out.jsonl")
    assert [row["n"] for row in read(tmp_path / "out.jsonl")] == [1, 1, "x"]


def test_pieces_are_bounded_in_rows_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant memory: no piece holds more, however large the file."""
    monkeypatch.setattr(streams, "ROWS", 100)
    monkeypatch.setattr(streams, "CHARACTERS", 1000)
    source = tmp_path / "in.txt"
    source.write_text("a\n" * 250 + ("b" * 600 + "\n") * 5)
    with source.open("rb") as stream:
        found = [table.rows for table in streams.Stream(stream, "in", "txt").tables()]
    assert found[:2] == [100, 100] and sum(found) == 255
    assert max(found[3:]) <= 2
    parquet = write(tmp_path / "in.parquet", {"text": texts(250)})
    with parquet.open("rb") as stream:
        reader = streams.Stream(stream, "in", "parquet")
        sizes = [(table.rows, table.first) for table in reader.tables()]
        assert reader.done == 1
    assert max(rows for rows, _ in sizes) <= 100
    assert [first for _, first in sizes] == list(np.cumsum([0, *(rows for rows, _ in sizes)])[:-1])


@pytest.mark.parametrize(
    ("head", "separator"), [("", ","), ("\ufeff\ufeff", ","), ("\ufeffsep=;\n", ";"), ("sep=,\r\n", ",")]
)
def test_marks_of_other_programs_are_no_part_of_the_first_row(
    tmp_path: Path, head: str, separator: str
) -> None:
    source = tmp_path / "in.csv"
    source.write_text(head + "text,n\na,1\nb,2\n".replace(",", separator))
    with source.open("rb") as stream:
        (table,) = streams.Stream(stream, "in", "csv").tables()
    assert table.columns == {"text": ["a", "b"], "n": ["1", "2"]}
    assert table.lines == ([3, 4] if "sep" in head else [2, 3])


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_LINE", 1000)
    source = tmp_path / "in.txt"
    source.write_text("a" * 2000)
    with source.open("rb") as stream, pytest.raises(WrongInput, match="line 1"):
        list(streams.Stream(stream, "in", "txt").tables())
    source.write_text('text\n"' + "a\n" * 2000)
    with source.open("rb") as stream, pytest.raises(WrongInput, match="Correct the quotes"):
        list(streams.Stream(stream, "in", "csv").tables())


# The command


def test_standard_input_to_standard_output(exported: Exported) -> None:
    command = [sys.executable, "-m", "stillroom.cli", "predict", str(exported.folder), "--form", "onnx"]
    done = subprocess.run(command, input="a good film\n\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a good film", ""]
    assert "2 rows (text) with onnx" in done.stderr
    done = subprocess.run(
        [*command, "--format", "jsonl"], input="no", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input, row 1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_lines_end_as_they_do_for_training(tmp_path: Path, form: str, end: str) -> None:
    """Old spreadsheets end lines in a carriage return alone."""
    quoted = f'"a{end}b"' if form == "csv" else "a b"
    path = tmp_path / f"in.{form}"
    path.write_bytes(end.join(["text", "good", quoted, "bad", ""]).encode())
    table = tables.read(path)
    with path.open("rb") as stream:
        (piece,) = streams.Stream(stream, str(path), form).tables()
    assert list(piece.columns["text"]) == list(table.columns["text"])
    assert piece.rows == 3 and piece.lines == table.lines


def test_a_reader_that_leaves_is_no_traceback(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("a good film\n" * 5000)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "stillroom.cli", "predict", str(exported.folder), str(source)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write_end)
    assert done.returncode == 1
    assert done.stderr.strip() == "Error: Standard output was closed before all rows were written."


def test_the_command_writes_a_file_and_tells_of_it(exported: Exported, tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", {"text": texts(5)})
    command = ["predict", str(exported.folder), str(source), "-o", str(tmp_path / "out.csv")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"] == 5
    result = CliRunner().invoke(app, [*command, "--form", "onx"])
    assert result.exit_code == 2 and "Did you mean onnx" in result.stderr
    result = CliRunner().invoke(app, [*command[:3], "--json"])
    assert result.exit_code == 2 and "give -o" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_full_standard_output_is_no_traceback(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a good film\n")
    command = [sys.executable, "-m", "stillroom", "predict", str(exported.folder), str(tmp_path / "in.txt")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    why = "Error: Standard output could not be written (No space left on device) before"
    assert done.stderr.strip() == f"{why} all rows were written."
