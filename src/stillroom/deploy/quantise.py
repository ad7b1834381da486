"""Weights in int8: dynamic in ONNX, static in OpenVINO; each leaves out the parts it is told to.

A part is one operator with weights (a fused attention, a matrix product, an embedding table).
"""

import contextlib
import copy
import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.deploy.graph import quiet

Quantise = Callable[[Collection[str], Path], None]
"""Write the model with all parts but the named ones in int8 to a path."""

_SMALL_TABLE = 16
"""Tables of fewer rows (token types) stay in float32: there is nothing to save."""

CALIBRATION_ROWS = 128
"""Training rows from which OpenVINO's static int8 takes the range of activations."""


class OnnxInt8:
    """Dynamic int8 of a fused ONNX file: weights per output channel, tables per row.

    Activations are rounded to 8 bits over each batch when the model runs.
    """

    def __init__(self, source: Path):
        import onnx
        from onnxruntime.quantization.onnx_model import ONNXModel

        wrapped = ONNXModel(onnx.load(source))
        # Before the parts are named, since that renames them.
        wrapped.replace_gemm_with_matmul()
        self._model = wrapped.model
        for i, node in enumerate(self._model.graph.node):
            node.name = node.name or f"{node.op_type}_{i}"
        matrices = {entry.name for entry in self._model.graph.initializer if len(entry.dims) == 2}
        tables = {e.name for e in self._model.graph.initializer if e.dims[:1] and e.dims[0] >= _SMALL_TABLE}
        self._products = [
            node.name
            for node in self._model.graph.node
            if node.op_type in ("Attention", "MatMul") and node.input[1] in matrices
        ]
        self._tables = [
            node.name
            for node in self._model.graph.node
            if node.op_type == "Gather" and node.input[0] in matrices & tables
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
        for name in self._tables:
            if name not in left_out:
                _round_table(model, name)
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


def _round_table(model: Any, name: str) -> None:
    """Replace the gather of an embedding table by int8 rows times a scale for each row.

    `row = scale * int8` with `scale = max |row| / 127`: a rare word's small row keeps its digits
    beside a frequent word's large one, which one scale for the table would not allow.
    """
    from onnx import helper, numpy_helper

    nodes = model.graph.node
    at = next(i for i, node in enumerate(nodes) if node.name == name)
    node = nodes[at]
    table, ids = node.input[0], node.input[1]
    found = next(entry for entry in model.graph.initializer if entry.name == table)
    values = numpy_helper.to_array(found)
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    rounded = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    if not any(table in other.input for other in nodes if other.name != name):
        model.graph.initializer.remove(found)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(rounded, f"{name}_int8"),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
        ]
    )
    made = [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{name}_rows"], f"{name}_rows"),
        helper.make_node("Cast", [f"{name}_rows"], [f"{name}_float"], f"{name}_float", to=1),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{name}_scales"], f"{name}_scales"),
        helper.make_node("Mul", [f"{name}_float", f"{name}_scales"], [node.output[0]], f"{name}_mul"),
    ]
    nodes.remove(node)
    for offset, part in enumerate(made):
        nodes.insert(at + offset, part)


class OpenVinoInt8:
    """Static int8 of an OpenVINO model by NNCF: ranges of activations come from training rows."""

    def __init__(self, source: Path, rows: Sequence[Mapping[str, np.ndarray]]):
        import openvino

        self._source = source
        self._rows = list(rows)
        self._core = openvino.Core()
        self.parts = [
            op.get_friendly_name()
            for op in self._core.read_model(source).get_ordered_ops()
            if op.get_type_name() in ("MatMul", "Gather") and _has_weights(op)
        ]
        """Names of the parts, in the order in which they compute."""

    def __call__(self, left_out: Collection[str], target: Path) -> None:
        """Write the model with all parts but `left_out` in int8."""
        import openvino

        model = self._core.read_model(self._source)
        if set(left_out) < set(self.parts):
            # NNCF draws its bars on standard output.
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                nncf = _import_nncf()
                model = nncf.quantize(
                    model,
                    nncf.Dataset(self._rows),
                    subset_size=len(self._rows),
                    model_type=nncf.ModelType.TRANSFORMER,
                    ignored_scope=nncf.IgnoredScope(names=list(left_out)) if left_out else None,
                )
        openvino.save_model(model, target, compress_to_fp16=False)


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
