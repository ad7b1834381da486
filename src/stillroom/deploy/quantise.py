"""Weights in int8: dynamic in ONNX, static in OpenVINO; each leaves out the parts it is told to.

A part is one operator with weights (a fused attention, a matrix product, an embedding table).
"""

import contextlib
import copy
import io
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.deploy.graph import quiet

_SMALL_TABLE = 16
"""Tables of fewer rows (token types) stay in float32: there is nothing to save."""

_BLOCK = 16
"""Values of a word's embedding that share a scale in 4 bits."""

_CHUNK = 4096
"""Rows of a table that are rounded at once, which bounds the memory."""

CALIBRATION_ROWS = 128
"""Training rows from which OpenVINO's static int8 takes the range of activations."""


class OnnxInt8:
    """Dynamic int8 of a fused ONNX file: weights per output channel, tables per row.

    Activations are rounded to 8 bits over each batch when the model runs.

    Args:
        source: The fused file, in float32.
        embedding_bits: 8, or 4 for the word embeddings (see `_round_blocks`); left out, they get 8.
    """

    def __init__(self, source: Path, embedding_bits: int = 8):
        import onnx
        from onnxruntime.quantization.onnx_model import ONNXModel

        wrapped = ONNXModel(onnx.load(source))
        # Before the parts are named, since that renames them.
        wrapped.replace_gemm_with_matmul()
        self._model = wrapped.model
        self._tables = _name_tables(self._model)
        # Tables that are rounded to 4 bits.
        self._words = [
            node.name
            for node in self._model.graph.node
            if embedding_bits == 4 and node.name in self._tables and node.input[1] == "input_ids"
        ]
        matrices = {entry.name for entry in self._model.graph.initializer if len(entry.dims) == 2}
        self._products = [
            node.name
            for node in self._model.graph.node
            if node.op_type in ("Attention", "MatMul") and node.input[1] in matrices
        ]

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in the order in which they compute."""
        return [*self._tables, *self._products]

    def __call__(self, left_out: Collection[str], target: Path) -> None:
        """Write the model with all parts but `left_out` in int8."""
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = copy.deepcopy(self._model)
        rounded = [name for name in self._tables if name not in left_out or name in self._words]
        _round_tables(model, rounded, [name for name in self._words if name not in left_out])
        chosen = [name for name in self._products if name not in left_out]
        if not chosen:
            onnx.save(model, target)
            return
        with quiet():
            quantize_dynamic(
                model,
                target,
                op_types_to_quantize=["MatMul", "Attention"],
                nodes_to_quantize=chosen,
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )


class OpenVinoInt8:
    """Static int8 of a plain ONNX file for OpenVINO: tables per row as in `OnnxInt8`, products by NNCF.

    The ranges of activations come from training rows. The tables are rounded here, since OpenVINO would
    unfold NNCF's into float32 when it loads them, once for each model.
    """

    def __init__(self, source: Path, rows: Sequence[Mapping[str, np.ndarray]]):
        import onnx

        self._model = onnx.load(source)
        self._rows = list(rows)
        self._tables = _name_tables(self._model)
        self._products = [
            op.get_friendly_name()
            for op in self._read(()).get_ordered_ops()
            if op.get_type_name() == "MatMul" and _has_weights(op)
        ]

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in the order in which they compute."""
        return [*self._tables, *self._products]

    def _read(self, rounded: Collection[str]) -> Any:
        """Return the OpenVINO model with some tables in int8."""
        import openvino

        model = copy.deepcopy(self._model)
        _round_tables(model, rounded)
        return openvino.Core().read_model(model.SerializeToString())

    def __call__(self, left_out: Collection[str], target: Path) -> None:
        """Write the model with all parts but `left_out` in int8."""
        import openvino

        model = self._read([name for name in self._tables if name not in left_out])
        spared = [name for name in self._products if name in left_out]
        if len(spared) < len(self._products):
            # NNCF draws its bars on standard output.
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                nncf = _import_nncf()
                model = nncf.quantize(
                    model,
                    nncf.Dataset(self._rows),
                    subset_size=len(self._rows),
                    model_type=nncf.ModelType.TRANSFORMER,
                    ignored_scope=nncf.IgnoredScope(names=spared, types=["Gather"]),
                )
        openvino.save_model(model, target, compress_to_fp16=False)


def _name_tables(model: Any) -> list[str]:
    """Give every operator of an ONNX model a name, and return those that look rows up in a table."""
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    tables = {e.name for e in model.graph.initializer if len(e.dims) == 2 and e.dims[0] >= _SMALL_TABLE}
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]


def _round_tables(model: Any, names: Collection[str], rough: Collection[str] = ()) -> None:
    """Round the tables that these operators of an ONNX model read: to 8 bits, the `rough` ones to 4."""
    for name in names:
        nodes = model.graph.node
        at = next(i for i, node in enumerate(nodes) if node.name == name)
        node = nodes[at]
        found = next(entry for entry in model.graph.initializer if entry.name == node.input[0])
        made, tensors = (_round_blocks if name in rough else _round_rows)(node, found)
        if not any(node.input[0] in other.input for other in nodes if other.name != name):
            model.graph.initializer.remove(found)
        model.graph.initializer.extend(tensors)
        nodes.remove(node)
        for offset, part in enumerate(made):
            nodes.insert(at + offset, part)


def _round_rows(node: Any, table: Any) -> tuple[list[Any], list[Any]]:
    """Return operators and tensors that look up int8 rows times a scale for each row.

    `row = scale * int8` with `scale = max |row| / 127`: a rare word's small row keeps its digits
    beside a frequent word's large one, which one scale for the table would not allow.
    """
    from onnx import helper, numpy_helper

    name, ids = node.name, node.input[1]
    values = numpy_helper.to_array(table)
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    rounded = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    tensors = [
        numpy_helper.from_array(rounded, f"{name}_int8"),
        numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
    ]
    return [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{name}_rows"], f"{name}_rows"),
        helper.make_node("Cast", [f"{name}_rows"], [f"{name}_float"], f"{name}_float", to=1),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{name}_scales"], f"{name}_scales"),
        helper.make_node("Mul", [f"{name}_float", f"{name}_scales"], [node.output[0]], f"{name}_mul"),
    ], tensors


def _round_blocks(node: Any, table: Any) -> tuple[list[Any], list[Any]]:
    """Return operators and tensors that look up rows in 4 bits, by onnxruntime's GatherBlockQuantized.

    `block = scale * int4`, with a float16 scale for 16 values: 5 bits for a value in all.
    """
    from onnx import TensorProto, helper, numpy_helper

    name, values = node.name, numpy_helper.to_array(table)
    rows, width = values.shape
    blocks = np.zeros((rows, -(-width // _BLOCK), _BLOCK), np.float32)
    blocks.reshape(rows, -1)[:, :width] = values
    found = [_fit_blocks(blocks[start : start + _CHUNK]) for start in range(0, rows, _CHUNK)]
    scale, rounded = (np.concatenate(parts) for parts in zip(*found, strict=True))
    flat = rounded.reshape(rows, -1)[:, :width].reshape(-1)
    flat = np.append(flat, np.zeros(flat.size % 2, np.int8)).view(np.uint8) & 15
    # Two to a byte, the first in the low bits.
    packed = (flat[0::2] | (flat[1::2] << 4)).tobytes()
    tensors = [
        helper.make_tensor(f"{name}_int4", TensorProto.INT4, (rows, width), packed, raw=True),
        numpy_helper.from_array(scale, f"{name}_scale"),
    ]
    look_up = helper.make_node(
        "GatherBlockQuantized",
        [f"{name}_int4", node.input[1], f"{name}_scale"],
        [f"{name}_half"],
        f"{name}_half",
        domain="com.microsoft",
        block_size=_BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    return [
        look_up,
        helper.make_node("Cast", [f"{name}_half"], [node.output[0]], f"{name}_float", to=1),
    ], tensors


def _fit_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float16 scale and the int4 values of blocks `(..., 16)` with the least squared error.

    The scale that makes the largest value -8 leaves none out and has coarse steps; a smaller one cuts that
    value and rounds the others less. Ten are tried, the one that makes it 7 among them.
    """
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)
    # A block of zeros gets a scale that float16 can hold.
    least = 16 * np.finfo(np.float16).smallest_subnormal
    largest[np.abs(largest) < least] = least
    best = (np.full(largest.shape, np.inf), largest, blocks)
    for share in np.linspace(0.7, 8 / 7, 10, dtype=np.float32):
        scale = (largest / -8 * share).astype(np.float16)
        rounded = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7)
        error = ((rounded * scale - blocks) ** 2).sum(axis=-1, keepdims=True)
        better = error < best[0]
        best = (
            np.where(better, error, best[0]),
            np.where(better, scale, best[1]),
            np.where(better, rounded, best[2]),
        )
    return best[1][..., 0].astype(np.float16), best[2].astype(np.int8)


def write_openvino(onnx: Path, target: Path) -> None:
    """Write a plain ONNX file as an OpenVINO model in float32."""
    import openvino

    # Not openvino.convert_model, which reports its use over the network.
    openvino.save_model(openvino.Core().read_model(onnx), target, compress_to_fp16=False)


def _has_weights(op: Any) -> bool:
    """Return whether an operator reads a constant of two dimensions."""
    kinds = [op.input_value(i).get_node() for i in range(op.get_input_size())]
    return any(node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2 for node in kinds)


def _import_nncf() -> Any:
    """Import NNCF so that it reports nothing over the network, which it would by default."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import nncf
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
    return nncf
