"""From texts to logits: order, padding, truncation, and no torch where none is needed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from exports import Exported
from stillroom import encoder
from stillroom.deploy.predictor import Predictor
from stillroom.evaluation.predict import predict_rows
from tiny import make_rows, make_task


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_logits_are_those_of_evaluation_in_the_order_of_the_texts(exported: Exported, form: str) -> None:
    rows = make_rows(make_task(), 70, seed=5)
    expected = predict_rows(
        encoder.load(str(exported.model)), rows, max_length=66, bf16=False, console=Console(quiet=True)
    )
    predictor = Predictor.load(exported.folder, form, threads=1)
    for batch_size in (1, 7, 100):
        assert np.allclose(predictor.logits(rows.texts[0], batch_size=batch_size), expected, atol=1e-4)


def test_long_texts_are_cut_and_no_texts_are_no_rows(exported: Exported) -> None:
    predictor = Predictor.load(exported.folder, "onnx", threads=1)
    long = "good film " * 10_000
    (row,) = predictor.encode([long])
    assert len(row.ids) == predictor.max_length == 66
    # The end is kept: [SEP] closes every row.
    assert row.ids[-1] == 3
    assert np.allclose(predictor.logits([long]), predictor.logits([" ".join(["good film"] * 32)]))
    assert predictor.logits([]).shape == (0, 2)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_texts_can_be_cut_shorter_but_not_longer_than_the_model_reads(
    exported: Exported, form: str
) -> None:
    predictor = Predictor.load(exported.folder, form, threads=1)
    for most, length in ((1000, 66), (8, 8)):
        predictor.cut_to(most)
        (row,) = predictor.encode(["good film " * 100])
        assert len(row.ids) == predictor.max_length == length and row.ids[-1] == 3


def test_a_run_means_its_export_and_a_folder_its_model(exported: Exported, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(exported.model)
    assert Predictor.load(run).form == "torch"
    (run / "deploy").symlink_to(exported.folder)
    assert Predictor.load(run, "onnx", threads=1).form == "onnx"


def test_serving_onnx_does_not_import_torch(exported: Exported) -> None:
    """Torch takes seconds to import and 200 MB of memory."""
    code = (
        "import sys; from stillroom.deploy.predictor import Predictor\n"
        f"Predictor.load({str(exported.folder)!r}, 'onnx-int8').logits(['a good film'])\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
