"""An encoder as an ONNX graph with free batch and length, and its fusions for onnxruntime.

The exporter is torch's older one, which traces: the graphs of the newer one cost ten times the time, and
onnxruntime finds no attention in them. Attention is exported in its eager form, the only one that
onnxruntime knows.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.deploy.predictor import input_names
from stillroom.encoder import Encoder, attending
from stillroom.errors import WrongInput

OPSET = 17
"""The ONNX operator set of the exported graphs: the first with LayerNormalization."""

_MOST_BYTES = 2 * 10**9
"""What one ONNX file can hold (a limit of protobuf)."""


class _Logits(nn.Module):
    """An encoder's model that takes its inputs by position and returns the logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits `(B, C)`."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def write_onnx(encoder: Encoder, path: Path) -> None:
    """Write an encoder as plain ONNX, in float32, with free batch and length.

    Raises:
        WrongInput: If the weights do not fit one file, or torch cannot export the model.
    """
    model = encoder.model
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    if size > _MOST_BYTES:
        raise WrongInput(f"The model has {size / 1e9:.1f} GB of weights; an ONNX file holds at most 2 GB.")
    names = input_names(encoder.tokenizer)
    # Two rows of different length: a trace sees a mask that masks, and no axis of size one.
    ids = torch.full((2, 9), int(encoder.tokenizer.pad_token_id))
    ids[:, :5] = int(encoder.tokenizer.unk_token_id or 0)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    example = (ids, mask, torch.zeros_like(ids))[: len(names)]
    axes = {**{name: {0: "batch", 1: "length"} for name in names}, "logits": {0: "batch"}}
    training = model.training
    with attending(model, "eager"), quiet():
        try:
            torch.onnx.export(
                _Logits(model, names).eval(),
                example,
                path,
                input_names=list(names),
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        except (RuntimeError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
            raise WrongInput(
                f"{type(model).__name__} cannot be exported to ONNX by torch {torch.__version__}: "
                f"{str(error).strip().splitlines()[0]} Export it as torch."
            ) from error
        finally:
            model.train(training)


def optimise(source: Path, target: Path, encoder: Encoder) -> dict[str, int]:
    """Write `source` with onnxruntime's transformer fusions to `target`.

    Only fusions that hold on every processor are made here; onnxruntime makes the others when it
    loads the file. SkipLayerNormalization is found, and written as a Sum and a LayerNormalization: see
    `_split_skip_layer_norm`.

    Returns:
        How often each fusion was found, those that were.
    """
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    # Embeddings stay gathers of tables, which int8 shrinks row by row.
    options.enable_embed_layer_norm = False
    # A bias of its own joins the product before it in int8, and the gelu after it in float32, on loading.
    options.enable_bias_gelu = options.enable_bias_skip_layer_norm = False
    with quiet():
        fused = optimizer.optimize_model(
            str(source),
            model_type="bert",
            num_heads=int(encoder.config.num_attention_heads),
            hidden_size=encoder.width,
            optimization_options=options,
            opt_level=0,
        )
        counts = fused.get_fused_operator_statistics()
        _split_skip_layer_norm(fused.model)
        fused.save_model_to_file(str(target))
    return {name: int(count) for name, count in counts.items() if count}


def _split_skip_layer_norm(model: Any) -> None:
    """Replace each SkipLayerNormalization by a Sum and a LayerNormalization.

    Onnxruntime's kernel for CPUs adds up mean and square value by value, and takes several times as long as
    the two operators, whose kernels use vectors. A Sum, since onnxruntime would fuse an Add again.
    """
    from onnx import helper

    made: list[Any] = []
    for node in model.graph.node:
        if node.op_type != "SkipLayerNormalization":
            made.append(node)
            continue
        values, skip, *weights = node.input
        # Its fourth output is the sum, where something else reads that too.
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}_sum"
        (epsilon,) = (entry.f for entry in node.attribute if entry.name == "epsilon")
        made += [
            helper.make_node("Sum", [values, skip], [total], f"{node.name}_sum"),
            helper.make_node(
                "LayerNormalization",
                [total, *weights],
                [node.output[0]],
                f"{node.name}_norm",
                axis=-1,
                epsilon=epsilon,
            ),
        ]
    del model.graph.node[:]
    model.graph.node.extend(made)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what tracing and fusing say of themselves; the result is compared with torch."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
