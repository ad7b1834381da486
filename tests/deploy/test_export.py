"""An export is the model: in every family and form, without torch, whole or not there."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from exports import QUIET, Exported
from stillroom import RunFailed, WrongInput, durable, export
from stillroom.deploy import forms, gate, graph
from stillroom.deploy.export import LARGEST_DIFFERENCE
from stillroom.deploy.predictor import OnnxSession, Predictor
from stillroom.encoder import weights_hash
from tiny import FAMILIES, make_encoder, make_task, make_teacher

DOCS = Path(__file__).parents[2] / "docs" / "deploy.md"
TEXTS = ["the film is good", "a bad , bad plot and more", "", "never seen word"]
FUSED = ("bert", "roberta", "distilbert", "electra", "xlm-roberta")
"""Families whose attention onnxruntime knows."""

openvino: Any = None
if importlib.util.find_spec("openvino"):
    import openvino

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None, reason="the extra openvino is not installed"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_model_at_every_shape(family: str, tmp_path: Path) -> None:
    """A traced graph could hold the example's batch, length or mask."""
    encoder = make_encoder(family, layers=2)
    if family == "modernbert":
        # Windows narrower than the longest input, so that local attention is more than a name.
        encoder.config.local_attention = 8
    graph.write_onnx(encoder, tmp_path / "plain.onnx")
    fused = graph.optimise(tmp_path / "plain.onnx", tmp_path / "fused.onnx", encoder)
    for name in ("plain.onnx", "fused.onnx"):
        session = OnnxSession(tmp_path / name, 1)
        found = gate.parity(session, encoder, max_length=encoder.positions)
        assert found["relative"] < 1e-5
        assert found["shapes"] >= 36
    assert fused["SkipLayerNormalization"] >= 4
    # Its kernel is slow: it is written as a sum and a normalisation, which no onnxruntime fuses again.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "fused.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert kinds.count("Sum") == fused["SkipLayerNormalization"] and "SkipLayerNormalization" not in kinds
    assert fused["Gelu"] >= 2
    assert (fused.get("Attention") == 2) == (family in FUSED)


def test_parity_sees_another_model_and_a_mask_that_is_not_read(tmp_path: Path) -> None:
    encoder, other = make_encoder(), make_encoder(seed=1)
    graph.write_onnx(other, tmp_path / "other.onnx")
    assert gate.parity(OnnxSession(tmp_path / "other.onnx", 1), encoder, max_length=66)["relative"] > 0.01
    graph.write_onnx(encoder, tmp_path / "same.onnx")
    session = OnnxSession(tmp_path / "same.onnx", 1)

    class Unmasked:
        precision = "float32"

        def __call__(self, inputs: Any) -> np.ndarray:
            return session({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})

    assert gate.parity(Unmasked(), encoder, max_length=66)["relative"] > 1e-3


def test_exporting_leaves_the_encoder_as_it_was(tmp_path: Path) -> None:
    encoder = make_encoder()
    before = weights_hash(encoder.model), encoder.config._attn_implementation, encoder.model.training
    graph.write_onnx(encoder, tmp_path / "m.onnx")
    assert before == (
        weights_hash(encoder.model),
        encoder.config._attn_implementation,
        encoder.model.training,
    )


def test_an_export_holds_what_its_manifest_says(exported: Exported) -> None:
    folder, manifest = exported.folder, exported.manifest
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["forms"].keys() == {"onnx", "onnx-int8", "torch"} and not manifest["refused"]
    assert manifest["labels"] == ["negative", "positive"]
    assert manifest["source"]["weights_sha256"] == weights_hash(make_teacher().model)
    assert durable.damage(folder) is None
    assert not [path for path in folder.iterdir() if path.is_dir()]
    for name, form in manifest["forms"].items():
        assert form["bytes"] == forms.bytes_of(folder, name)
        for file, expected in form["sha256"].items():
            assert durable.sha256_of_file(folder / file) == expected
        assert form["drop"] == pytest.approx(0, abs=0.5)
        assert form["ms_per_row"] > 0
    fastest = min(manifest["forms"], key=lambda name: manifest["forms"][name]["ms_per_row"])
    assert Predictor.load(folder).form == manifest["fastest"] == fastest
    for package in ("onnx", "onnxruntime", "torch"):
        assert manifest["environment"][package]


def test_int8_holds_int8_weights(exported: Exported) -> None:
    model = onnx.load(exported.folder / "model.int8.onnx")
    large = [entry for entry in model.graph.initializer if np.prod(entry.dims) > 600]
    assert large and all(entry.data_type == onnx.TensorProto.INT8 for entry in large)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QAttention") == 4
    # Per layer: attention output and two of the feed-forward; then pooler and classifier.
    assert kinds.count("MatMulInteger") == 4 * 3 + 2


def test_forms_agree_with_transformers(exported: Exported) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=66, return_tensors="pt")
        expected = model(**inputs).logits.numpy()
    for form, tolerance in (("onnx", 1e-4), ("torch", 1e-4), ("onnx-int8", 1.0)):
        found = Predictor.load(exported.folder, form, threads=1).logits(TEXTS)
        assert np.abs(found - expected).max() < tolerance, form


def test_the_example_of_the_docs_needs_neither_torch_nor_stillroom(exported: Exported) -> None:
    """It runs in a process where importing either of them, or transformers, is an error."""
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code = found[1].replace("runs/student/deploy", str(exported.folder))
    assert str(exported.folder) in code and len(found[1].splitlines()) <= 32
    texts = ["a great film good", "a dull and very bad film"]
    code, count = re.subn(r"texts = \[.*\]", f"texts = {texts}", code)
    assert count == 1
    block = "import sys\nfor name in ('torch', 'stillroom', 'transformers'): sys.modules[name] = None\n"
    code = block + code + "\nprint(json.dumps(logits(texts).tolist()))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, logits = done.stdout.splitlines()
    assert lines == ["positive a great film good", "negative a dull and very bad film"]
    session = Predictor.load(exported.folder, "onnx-int8", threads=1)
    same = session.session(session.pad(session.encode(texts)))
    assert np.allclose(json.loads(logits), same, atol=1e-5)


@needs_openvino
@pytest.mark.slow
def test_openvino_forms(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.deploy.quantise.CALIBRATION_ROWS", 16)
    manifest = export(
        exported.model,
        tmp_path / "export",
        formats=["openvino", "openvino-int8"],
        dataset=str(exported.data),
        fixed_lengths=[32, 8, 32],
        console=QUIET,
    )
    assert manifest["forms"].keys() == {"openvino", "openvino-int8"}
    assert manifest["fixed_lengths"] == [8, 32]
    assert manifest["environment"]["openvino"] and manifest["environment"]["nncf"]
    expected = Predictor.load(exported.model).logits(TEXTS)
    found = Predictor.load(tmp_path / "export", "openvino", threads=1)
    # A tiny model of large weights: in bf16, where the processor has it, only the order holds.
    most = LARGEST_DIFFERENCE["float32"] if found.session.precision == "float32" else 0.5
    assert np.abs(found.logits(TEXTS) - expected).max() < most * np.abs(expected).max()
    int8 = Predictor.load(tmp_path / "export", "openvino-int8", threads=1)
    alone = np.concatenate([int8.logits([text]) for text in TEXTS])
    assert np.array_equal(int8.logits(TEXTS).argmax(1), alone.argmax(1))
    _widths_are_those_of_prepared_models(int8.session)
    # Tables and products in int8; the table of token types alone, of two rows, is not.
    model = openvino.Core().read_model(tmp_path / "export" / "openvino.int8.xml")
    large = [op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_data().size > 600]
    assert large and {str(op.get_element_type()) for op in large} <= {"<Type: 'int8_t'>"}


def _widths_are_those_of_prepared_models(session: Any) -> None:
    """Single rows go to the least fixed length that holds them, the rest to multiples of 16."""
    called: list[tuple[str, tuple[int, ...]]] = []

    def spy(name: str, model: Any) -> Any:
        def call(inputs: Any) -> Any:
            called.append((name, inputs["input_ids"].shape))
            assert inputs["attention_mask"].sum() == rows * length
            return model(inputs)

        return call

    session._free = spy("free", session._free)
    session._fixed = {width: spy("fixed", model) for width, model in session._fixed.items()}
    found = {}
    cases = {
        (1, 5): 8,
        (1, 8): 8,
        (1, 9): 32,
        (1, 33): 48,
        (2, 5): 16,
        (2, 16): 16,
        (1, 65): 66,
        (3, 66): 66,
    }
    for (rows, length), width in cases.items():
        ids = np.tile(np.arange(5, 5 + length) % 10 + 5, (rows, 1))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
        found[rows, length] = session(inputs)
        kind = "fixed" if width in (8, 32) else "free"
        assert called[-1] == (kind, (rows, width))
    # The same row, by a fixed model and by the free one.
    scale = np.abs(found[2, 5]).max()
    assert np.allclose(found[1, 5][0], found[2, 5][0], atol=0.05 * scale)


def test_regression_pairs_and_float_forms_without_data(tmp_path: Path) -> None:
    encoder = make_encoder("roberta", task=make_task("regression", pair=True))
    encoder.save(tmp_path / "model")
    manifest = export(tmp_path / "model", tmp_path / "export", formats="onnx", console=QUIET)
    assert manifest["dataset"] is None and "metrics" not in manifest["forms"]["onnx"]
    assert manifest["kind"] == "regression" and manifest["inputs"] == ["input_ids", "attention_mask"]
    pairs = [("the film", "a plot is good"), ("bad", "")]
    expected = Predictor.load(tmp_path / "model").logits(pairs)
    assert expected.shape == (2, 1)
    assert np.allclose(Predictor.load(tmp_path / "export", threads=1).logits(pairs), expected, atol=1e-5)


def test_a_form_that_is_another_model_is_never_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = graph.write_onnx
    monkeypatch.setattr(graph, "write_onnx", lambda encoder, path: real(make_encoder(layers=1), path))
    with pytest.raises(RunFailed, match="differ from torch's"):
        export(
            exported.model,
            tmp_path / "export",
            formats="onnx,torch",
            dataset=str(exported.data),
            console=QUIET,
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_wrong_input_is_named(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, *given: Any, **options: Any) -> None:
        with pytest.raises(WrongInput, match=match):
            export(*(given or (exported.model, tmp_path / "e")), console=QUIET, **options)

    refused("Did you mean onnx-int8", formats="onnx-int")
    refused("at least one format", formats="")
    refused("Give --dataset")
    refused("no run folder: give the folder", exported.model)
    refused("new or empty", exported.model, exported.folder, formats="onnx")
    refused("0 or more", max_drop=float("nan"))
    refused("with --vocabulary trim", text=["x.txt"])
    refused("with --vocabulary trim", pieces=1000)
    refused("found 4", embedding_bits=4, formats="onnx")
    refused("found 5", embedding_bits=5)
    refused("for OpenVINO forms", fixed_lengths=[16])
    refused("found none at", tmp_path / "nothing", tmp_path / "e", formats="onnx")
    (tmp_path / "empty").mkdir()
    refused("cannot be loaded", tmp_path / "empty", tmp_path / "e", formats="onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"pip install -e '.\[openvino\]'", formats="openvino")


def test_damaged_exports_are_refused(exported: Exported, tmp_path: Path) -> None:
    """Each file of a copy is cut short in turn; what is wrong and what to do is said."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported.folder, tmp_path / name))

    folder = copy("cut")
    with (folder / "model.onnx").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(WrongInput, match=r"model\.onnx is damaged: expected SHA-256"):
        Predictor.load(folder, "onnx")
    with pytest.raises(WrongInput, match="cut short"):
        OnnxSession(folder / "model.onnx")
    assert Predictor.load(folder, "onnx-int8", threads=1).form == "onnx-int8"
    with pytest.raises(WrongInput, match="holds no openvino; it holds onnx, onnx-int8, torch"):
        Predictor.load(folder, "openvino")
    with pytest.raises(WrongInput, match="Did you mean onnx"):
        Predictor.load(folder, "onxx")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WrongInput, match="cannot be read as a tokenizer"):
        Predictor.load(folder, "onnx-int8")
    for text in ("", "[]", "{}", '{"forms": {}}', '{"forms": {"onnx": {}}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(WrongInput, match=r"manifest\.json is damaged"):
            Predictor.load(folder)
    with pytest.raises(WrongInput, match="is no export, so it has no form onnx"):
        Predictor.load(exported.model, "onnx")
    with pytest.raises(WrongInput, match="cannot be loaded"):
        Predictor.load(tmp_path)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(WrongInput, match="no ONNX model"):
        OnnxSession(tmp_path / "text.onnx")
