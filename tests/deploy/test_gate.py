"""The gate: int8 that loses too much is saved by leaving parts out, or refused."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from exports import QUIET, Exported
from stillroom import RunFailed, export
from stillroom.deploy import gate
from stillroom.deploy.predictor import OnnxSession
from stillroom.deploy.quantise import OnnxInt8
from stillroom.encoder import Encoder
from tiny import make_encoder, make_rows, make_task, make_teacher, make_tokens


@dataclass
class FakeInt8:
    """Parts that each add an error to the second logit; what is written is the sum."""

    harm: Mapping[str, float]
    written: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        return list(self.harm)

    def __call__(self, left_out: Collection[str], target: Path) -> None:
        self.written.append(tuple(left_out))
        target.write_text(json.dumps(sum(v for k, v in self.harm.items() if k not in left_out)))


@dataclass
class FakeSession:
    """Right on every row as long as the error is below one."""

    error: float
    answers: Mapping[tuple[int, ...], int]
    precision: str = "float32"

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        labels = np.array([self.answers[tuple(ids[mask == 1])] for ids, mask in rows])
        return np.stack([1 - labels, labels + self.error], 1).astype(np.float32)


def fake_split() -> tuple[gate.Split, dict[tuple[int, ...], int]]:
    task = make_task()
    rows = make_rows(task, 40)
    tokens = make_tokens(rows, make_encoder())
    ids = [tokens.ids[o : o + n] for o, n in zip(tokens.offsets, tokens.lengths, strict=True)]
    answers = {tuple(map(int, row)): int(label) for row, label in zip(ids, rows.labels, strict=True)}
    return gate.Split(task, rows, tokens), answers


def pass_gate(harm: Mapping[str, float], target: Path, max_drop: float = 0.5) -> tuple[Any, FakeInt8]:
    split, answers = fake_split()
    int8 = FakeInt8(harm)

    def open_session(path: Path) -> FakeSession:
        return FakeSession(json.loads(path.read_text()), answers)

    scratch = target.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return gate.quantise(int8, target, scratch, open_session, split, 1.0, max_drop, QUIET), int8


def test_sound_int8_passes_at_once(tmp_path: Path) -> None:
    found, int8 = pass_gate({"a": 0.2, "b": 0.3}, tmp_path / "m")
    assert found.left_out == () and found.verdict.drop == 0.0
    assert int8.written == [()] and found.tried == ({"left_out": 0, "drop": 0.0},)


def test_the_most_harmful_parts_are_left_out_first_and_no_more_than_needed(tmp_path: Path) -> None:
    harm = {"a": 0.1, "worst": 5.0, "b": 0.2, "second": -2.0, "c": 0.1, "d": 0.05, "e": 1.5}
    found, int8 = pass_gate(harm, tmp_path / "m")
    # Without the worst the errors sum to -0.05: below one, so one part is enough.
    assert found.left_out == ("worst",)
    assert [entry["left_out"] for entry in found.tried] == [0, 1]
    # Half the rows (label 0) are wrong when everything is in int8.
    assert found.tried[0]["drop"] == 50.0 and found.tried[1]["drop"] == 0.0
    # What is on disk is what passed, and not what was last measured.
    assert json.loads((tmp_path / "m").read_text()) == pytest.approx(-0.05)
    assert int8.written[-1] == ("worst",)
    # Each part was measured alone, beside the exact model.
    alone = [set(harm) - set(left) for left in int8.written[1:-1]]
    assert alone == [set(), *({part} for part in harm)]


def test_what_cannot_be_saved_ends_after_a_bounded_number_of_tries(tmp_path: Path) -> None:
    found, int8 = pass_gate({str(i): 2.0 for i in range(40)}, tmp_path / "m")
    assert json.loads((tmp_path / "m").read_text()) == 2.0 * (40 - gate.MOST_LEFT_OUT[-1])
    assert not found.verdict.passes(0.5)
    assert [entry["left_out"] for entry in found.tried] == [0, *gate.MOST_LEFT_OUT]
    assert len(int8.written) == 1 + 41 + len(gate.MOST_LEFT_OUT)
    # At least one part is always in int8: a float model under an int8 name would be no export of int8.
    found, _ = pass_gate({"a": 5.0, "b": 5.0}, tmp_path / "m")
    assert found.left_out in (("a",), ("b",)) and not found.verdict.passes(0.5)


def test_logits_that_are_not_finite_do_not_pass(tmp_path: Path) -> None:
    found, _ = pass_gate({"a": float("inf"), "b": 0.1}, tmp_path / "m")
    assert found.tried[0]["drop"] is None and found.left_out == ("a",)
    assert not gate.Verdict({}, None).passes(100)


def test_the_limit_itself_passes() -> None:
    """0.94 to 0.935 is half a point, which floating point makes 0.49999999999999 or 0.5000000000001."""
    for goal, metric in ((0.94, 0.935), (0.3, 0.295), (0.705, 0.7)):
        assert gate.Verdict({}, 100 * (goal - metric)).passes(0.5)
        assert not gate.Verdict({}, 100 * (goal - metric) + 0.001).passes(0.5)


def with_outliers(teacher: Encoder, layers: int, factor: float = 1e5) -> Encoder:
    """Return the same function with one outlying attention value per layer, from the first on.

    One column of the value projection is multiplied by `factor` and the row of the output projection
    that reads it divided: exact in float, but one scale for all activations then rounds the rest to zero.
    """
    with torch.no_grad():
        for layer in teacher.model.bert.encoder.layer[:layers]:  # type: ignore[union-attr, index]
            value, output = layer.attention.self.value, layer.attention.output.dense
            value.weight[0] *= factor
            value.bias[0] *= factor
            output.weight[:, 0] /= factor
    return teacher


def outlying(folder: Path, layers: int) -> Path:
    with_outliers(make_teacher(), layers).save(folder)
    return folder


def test_the_outliers_change_nothing_in_float() -> None:
    rows = make_rows(make_task(), 40, seed=9)
    teacher = make_teacher()
    split = gate.Split(make_task(), rows, make_tokens(rows, teacher))
    before = gate.logits_of(gate.TorchSession(teacher), split.tokens)
    after = gate.logits_of(gate.TorchSession(with_outliers(teacher, 4)), split.tokens)
    assert np.allclose(before, after, atol=1e-3)


def test_int8_that_collapses_is_saved_by_leaving_parts_out(exported: Exported, tmp_path: Path) -> None:
    manifest = export(
        outlying(tmp_path / "model", 2),
        tmp_path / "export",
        formats="onnx-int8",
        dataset=str(exported.data),
        console=QUIET,
    )
    form = manifest["forms"]["onnx-int8"]
    assert form["tried"][0]["drop"] > 0.5 >= form["drop"]
    # One of the two may do; the two that were spoilt are the first to be left out.
    assert 1 <= len(form["left_out"]) <= 2 < form["parts"]
    assert all(re.search(r"layer\.[01]/attention/output", part) for part in form["left_out"])
    model = onnx.load(tmp_path / "export" / "model.int8.onnx")
    floats = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    assert set(form["left_out"]) <= floats
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)


def test_int8_that_cannot_be_saved_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_LEFT_OUT", ())
    model = outlying(tmp_path / "model", 4)
    manifest = export(
        model, tmp_path / "export", formats="onnx,onnx-int8", dataset=str(exported.data), console=QUIET
    )
    assert manifest["forms"].keys() == {"onnx"} and manifest["fastest"] == "onnx"
    assert "points, more than the 0.5 of --max-drop" in manifest["refused"]["onnx-int8"]
    assert not (tmp_path / "export" / "model.int8.onnx").exists()
    with pytest.raises(RunFailed, match="No form is left"):
        export(model, tmp_path / "alone", formats="onnx-int8", dataset=str(exported.data), console=QUIET)
    assert not (tmp_path / "alone").exists()
    # The user may accept it.
    manifest = export(
        model,
        tmp_path / "accepted",
        formats="onnx-int8",
        dataset=str(exported.data),
        max_drop=100,
        console=QUIET,
    )
    assert not manifest["refused"] and manifest["forms"]["onnx-int8"]["drop"] > 0.5


def test_embedding_tables_are_rounded_row_by_row(tmp_path: Path) -> None:
    """A row of tiny numbers beside one of large ones keeps its digits; a row of zeros stays zero."""
    chance = np.random.default_rng(0)
    table = chance.standard_normal((20, 8)).astype(np.float32)
    table[3] *= 1e-6
    table[4] *= 1e3
    table[5] = 0
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"], "look_up")],
        "tiny",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", 8])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    int8 = OnnxInt8(tmp_path / "m.onnx")
    assert int8.parts == ["look_up"]
    for left_out, exact in (((), False), (("look_up",), True)):
        int8(left_out, tmp_path / "int8.onnx")
        found = OnnxSession(tmp_path / "int8.onnx", 1)({"input_ids": np.arange(20)})
        # Rounding to 127 steps on each side is off by at most half a step of the row's own scale.
        step = np.abs(table).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - table) <= step * 0.5001).all()
        assert np.array_equal(found, table) == exact


@pytest.mark.parametrize("width", [64, 41])
def test_word_embeddings_in_four_bits(tmp_path: Path, width: int) -> None:
    """Blocks of 16 are rounded at least as well as by the scale that leaves no value out."""
    chance = np.random.default_rng(0)
    table = chance.standard_normal((300, width)).astype(np.float32)
    table[3] *= 1e-3
    table[4] *= 1e3
    table[5] = 0
    look_ups = [
        helper.make_node("Gather", ["words", "input_ids"], ["word"], "words"),
        helper.make_node("Gather", ["places", "place_ids"], ["place"], "places"),
        helper.make_node("Concat", ["word", "place"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        look_ups,
        "tiny",
        [
            helper.make_tensor_value_info(i, onnx.TensorProto.INT64, ["b"])
            for i in ("input_ids", "place_ids")
        ],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", 2 * width])],
        [numpy_helper.from_array(table, name) for name in ("words", "places")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    int8 = OnnxInt8(tmp_path / "m.onnx", 4)
    assert int8.parts == ["words", "places"]
    int8((), tmp_path / "int8.onnx")
    every = np.arange(300)
    found = OnnxSession(tmp_path / "int8.onnx", 1)({"input_ids": every, "place_ids": every})
    words, places = found[:, :width], found[:, width:]
    # Other tables stay in 8 bits.
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(places - table) <= step * 0.5001).all()
    for start in range(0, width, 16):
        block = table[:, start : start + 16].astype(np.float64)
        scale = np.maximum(np.abs(block).max(axis=1, keepdims=True) / 7, 1e-30)
        plain = ((np.rint(block / scale) * scale - block) ** 2).sum(axis=1)
        ours = ((words[:, start : start + 16] - block) ** 2).sum(axis=1)
        # Each within what float16 does to the scale, and together clearly better.
        assert (ours <= plain * 1.01 + 1e-12).all() and ours[6:].sum() < 0.85 * plain[6:].sum()
    assert not words[5].any() and not np.array_equal(words, table)
    sizes = {
        entry.name: len(entry.raw_data) for entry in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    # Words that are left out have 8 bits, places none.
    int8(["words", "places"], tmp_path / "int8.onnx")
    finer = OnnxSession(tmp_path / "int8.onnx", 1)({"input_ids": every, "place_ids": every})
    assert np.array_equal(finer[:, :width], places) and np.array_equal(finer[:, width:], table)
    assert sizes["words_int4"] == 150 * width and sizes["words_scale"] == 300 * 2 * -(-width // 16)
