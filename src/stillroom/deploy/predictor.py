"""A model in any form, from texts to logits. The one class that predicting and serving need.

Torch is imported only for a model in torch's own form.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from tokenizers import Tokenizer

from stillroom.data.trained import as_columns, text_of
from stillroom.deploy import forms
from stillroom.errors import WrongInput

Texts = Sequence[str] | Sequence[tuple[str, str]]

_STEP = 16
"""Lengths are padded to a multiple of this where each shape has to be prepared."""

_TORCH_LENGTH = 512
"""Tokens to which texts are cut where a model states no limit of its own."""


class Session(Protocol):
    """A loaded model: int64 arrays `(B, S)` by input name to float32 logits `(B, C)`."""

    @property
    def precision(self) -> str:
        """The type in which it computes what is not in int8."""
        ...

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of a padded batch."""
        ...


class OnnxSession:
    """An ONNX file in onnxruntime, on the CPU."""

    precision = "float32"

    def __init__(self, path: Path, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # Threads that spin between two calls take the processor from whoever else computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # onnxruntime raises one class per status, none of which is public.
        except Exception as error:
            raise WrongInput(
                f"{path} cannot be loaded by onnxruntime: {_first_line(error)} The file is damaged or cut "
                "short, or is no ONNX model. Copy or export the model again."
            ) from None
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of a padded batch."""
        found = self._session.run(["logits"], {name: inputs[name] for name in self._names})
        return np.asarray(found[0], dtype=np.float32)


class OpenVinoSession:
    """An OpenVINO model, on the CPU. `precision` is what OpenVINO chose for this processor.

    The model takes any batch and length, but OpenVINO prepares itself for each shape that it meets, which
    takes several times as long as a run, and keeps what it prepared. So lengths are padded to a multiple of
    16. A model of a fixed length is faster still, and is prepared when it is loaded.

    Args:
        path: The `.xml` file.
        threads: How many it computes with. Default: OpenVINO's choice.
        fixed_lengths: Lengths for which a model of one row is prepared beside the free one. A single row is
            padded to the least of them that holds it, if any does.
        pad_id: The token to pad with. It is masked.
        max_length: The longest input that the model takes. Default: nothing is padded beyond its batch.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        *,
        fixed_lengths: Sequence[int] = (),
        pad_id: int = 0,
        max_length: int = 0,
    ):
        forms.require_openvino()
        import openvino

        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = openvino.Core().read_model(path)
            self._names = [entry.get_any_name() for entry in model.inputs]
            self._free = openvino.compile_model(model, "CPU", options)
            self._fixed = {}
            for length in fixed_lengths:
                model.reshape({name: [1, length] for name in self._names})
                self._fixed[length] = openvino.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise WrongInput(
                f"{path} cannot be loaded by OpenVINO: {_first_line(error)} The file is damaged or cut "
                "short, or is no OpenVINO model. Copy or export the model again."
            ) from None
        self._pad_id = pad_id
        self._most = max_length
        kind = self._free.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = {"f32": "float32", "f16": "float16"}.get(kind, kind)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of a padded batch."""
        rows, length = inputs["input_ids"].shape
        fitting = [fixed for fixed in self._fixed if fixed >= length] if rows == 1 else []
        model = self._fixed[min(fitting)] if fitting else self._free
        rounded = -(-length // _STEP) * _STEP
        width = min(fitting) if fitting else max(length, min(rounded, self._most))
        given = {name: inputs[name] for name in self._names}
        if width > length:
            wider = [(0, 0), (0, width - length)]
            given = {
                name: np.pad(values, wider, constant_values=self._pad_id if name == "input_ids" else 0)
                for name, values in given.items()
            }
        return np.array(model(given)[0], dtype=np.float32)


class TorchSession:
    """An `Encoder` on the CPU, as `from_pretrained` loads it (with sdpa attention)."""

    precision = "float32"

    def __init__(self, encoder: Any, threads: int | None = None):
        import torch

        if threads:
            # Of the process, not of this session: torch knows no other.
            torch.set_num_threads(threads)
        self._encoder = encoder

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of a padded batch."""
        import torch

        from stillroom.data.batching import Inputs
        from stillroom.encoder import Needs

        arrays = {name: torch.from_numpy(value) for name, value in inputs.items()}
        given = Inputs(arrays["input_ids"], arrays["attention_mask"], arrays.get("token_type_ids"))
        with torch.inference_mode():
            return np.asarray(self._encoder(given, Needs(logits=True)).logits.float().numpy())


def open_form(
    folder: Path,
    form: str,
    threads: int | None = None,
    *,
    fixed_lengths: Sequence[int] = (),
    pad_id: int = 0,
    max_length: int = 0,
) -> Session:
    """Return a session of one form in an export folder; the last three are for `OpenVinoSession`."""
    path = folder / forms.FILES[form][0]
    if form == "torch":
        from stillroom import encoder

        return TorchSession(encoder.load(str(folder)), threads)
    if form.startswith("onnx"):
        return OnnxSession(path, threads)
    return OpenVinoSession(path, threads, fixed_lengths=fixed_lengths, pad_id=pad_id, max_length=max_length)


class Predictor:
    """A model with its tokenizer: texts in, logits out.

    Attributes:
        form: Which form was loaded.
        labels: Label names in the order of the logits.
        kind: `classification`, `regression` or `multi-label`; None where the model does not say.
        max_length: Tokens to which texts are cut.
        inputs: Names of the arrays that the session takes.
        pad_id: The id of padding.
        text: The text columns that it was trained on; None where that is not known.
        session: Runs one padded batch.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        form: str,
        inputs: Sequence[str],
        labels: Sequence[str],
        kind: str | None,
        max_length: int,
        pad_id: int,
        text: tuple[str, ...] | None = None,
    ):
        self.session = session
        self.form = form
        self.labels = tuple(labels)
        self.kind = kind
        self.max_length = max_length
        self._tokenizer = tokenizer
        self.inputs = tuple(inputs)
        self.pad_id = pad_id
        self.text = text

    @classmethod
    def load(cls, model: str | Path, form: str | None = None, *, threads: int | None = None) -> Self:
        """Load a model: an export, a run (its export, else its student), a folder or a hub id.

        Args:
            model: Where it is.
            form: One of an export's forms. Default: the fastest, as measured when it was exported.
            threads: How many the model computes with. Default: the library's own choice.

        Raises:
            WrongInput: If nothing is there, it is damaged, or it lacks the form.
        """
        folder = Path(model)
        inside = folder / forms.DEPLOY
        if not forms.is_export(folder) and forms.is_export(inside):
            folder = inside
        if not forms.is_export(folder):
            return cls._from_torch(str(model), form, threads)
        manifest = forms.read_manifest(folder)
        chosen = forms.choose(folder, manifest, form)
        return cls(
            open_form(
                folder,
                chosen,
                threads,
                # Exports of before there were any have none.
                fixed_lengths=manifest.get("fixed_lengths", ()),
                pad_id=manifest["pad_id"],
                max_length=manifest["max_length"],
            ),
            _read_tokenizer(folder / forms.TOKENIZER, manifest["max_length"]),
            form=chosen,
            inputs=manifest["inputs"],
            labels=manifest["labels"],
            kind=manifest["kind"],
            max_length=manifest["max_length"],
            pad_id=manifest["pad_id"],
            # Nor do they name columns.
            text=as_columns(manifest.get("text")) or text_of(folder),
        )

    @classmethod
    def _from_torch(cls, model: str, form: str | None, threads: int | None) -> Self:
        if form not in (None, "torch"):
            raise WrongInput(
                f"{model} is no export, so it has no form {form}. Make it with stillroom export."
            )
        from stillroom import encoder

        loaded = encoder.load(model)
        most = min(loaded.positions, _TORCH_LENGTH)
        return cls(
            TorchSession(loaded, threads),
            own_tokenizer(loaded.tokenizer, most),
            form="torch",
            inputs=input_names(loaded.tokenizer),
            labels=loaded.labels,
            kind=encoder.kind_of(loaded.config),
            max_length=most,
            pad_id=loaded.tokenizer.pad_token_id,
            text=text_of(model),
        )

    def logits(self, texts: Texts, *, batch_size: int = 32) -> np.ndarray:
        """Return the logits of texts, or of pairs of texts, in their order.

        Texts of similar length share a batch. A model in dynamic int8 rounds by the largest value
        of its batch, so that there a text's logits move a little with its company.

        Args:
            texts: Strings, or tuples of two.
            batch_size: Most texts in a batch.

        Returns:
            float32, shape `(N, C)`.
        """
        return self.logits_of(self.encode(texts), batch_size=batch_size)

    def logits_of(self, rows: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """Return the logits `(N, C)` of encoded texts, in their order, as `logits` does."""
        logits = np.zeros((len(rows), max(1, len(self.labels))), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits[batch] = self.session(self.pad([rows[row] for row in batch]))
        return logits

    @property
    def vocabulary_size(self) -> int:
        """Number of ids that the tokenizer can make."""
        return int(self._tokenizer.get_vocab_size())

    def cut_to(self, most: int) -> None:
        """Cut texts to this many tokens from here on, where the model reads more."""
        self.max_length = min(self.max_length, most)
        _cut(self._tokenizer, self.max_length)

    def encode(self, texts: Texts) -> list[Any]:
        """Return the tokens of texts as `tokenizers` gives them, cut to `max_length`, unpadded."""
        return list(self._tokenizer.encode_batch_fast(list(texts)))

    def pad(self, rows: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return encoded texts as the padded batch that the session takes."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        batch = {name: np.zeros(shape, dtype=np.int64) for name in self.inputs}
        batch["input_ids"][:] = self.pad_id
        for i, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][i, :length] = row.ids
            batch["attention_mask"][i, :length] = 1
            if "token_type_ids" in batch:
                batch["token_type_ids"][i, :length] = row.type_ids
        return batch


def input_names(tokenizer: Any) -> tuple[str, ...]:
    """Return the model inputs that a Hugging Face tokenizer makes, in a fixed order."""
    every = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(name for name in every if name in (*tokenizer.model_input_names, *every[:2]))


def own_tokenizer(tokenizer: Any, max_length: int) -> Tokenizer:
    """Return the Rust tokenizer inside a fast Hugging Face one: cuts to `max_length`, pads not."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    return backend


def _read_tokenizer(path: Path, max_length: int) -> Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises plain Exception, and a missing file is one of them.
    except Exception as error:
        raise WrongInput(
            f"{path} cannot be read as a tokenizer: {_first_line(error)} Copy or export the model again."
        ) from None
    tokenizer.no_padding()
    _cut(tokenizer, max_length)
    return tokenizer


def _cut(tokenizer: Tokenizer, max_length: int) -> None:
    """Cut to `max_length` in the tokenizer's own direction."""
    direction = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.enable_truncation(max_length, direction=direction)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
