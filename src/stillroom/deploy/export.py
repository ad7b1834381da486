"""Write a model in the forms that serve it, each checked against torch and measured."""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from stillroom import durable, encoder
from stillroom.data import sources
from stillroom.data.tasks import Dataset, Rows
from stillroom.data.tokens import tokenise
from stillroom.data.trained import text_of
from stillroom.deploy import forms, gate, graph, quantise
from stillroom.deploy.predictor import (
    OnnxSession,
    OpenVinoSession,
    Session,
    TorchSession,
    input_names,
    open_form,
    own_tokenizer,
)
from stillroom.deploy.vocabulary import coverage, piece_counts, read_texts, texts_of, trim, with_room
from stillroom.encoder import Encoder, quiet, weights_hash
from stillroom.errors import RunFailed, WrongInput
from stillroom.evaluation.compare import require_same_labels
from stillroom.provenance import RECIPE, STUDENT, environment
from stillroom.recipe import DatasetSettings, read_yaml, validate

VALIDATION = "validation"

LARGEST_DIFFERENCE = {"float32": 1e-3, "bf16": 0.1, "float16": 0.02}
"""By computing precision, the most that a form in float may differ from torch, as a share of the
largest logit."""

_TIMED_ROWS = 50
_WARMUP = 5


def export(
    model: str | Path,
    output: str | Path | None = None,
    *,
    formats: str | Sequence[str] = ("onnx", "onnx-int8"),
    dataset: DatasetSettings | str | None = None,
    max_drop: float = 0.5,
    vocabulary: Literal["whole", "trim"] = "whole",
    text: Sequence[str | Path] = (),
    pieces: int | None = None,
    embedding_bits: int = 8,
    fixed_lengths: Sequence[int] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a model in other forms, with tokenizer, configuration and a manifest of what was measured.

    Every form computes the logits of many random inputs beside torch, and is scored on the validation
    split. A form in float that differs from torch is an error. A form in int8 that loses more than
    `max_drop` points is tried with its most harmful parts left in float32, and is left out of the
    export if that does not help.

    Args:
        model: A run folder (its student), a model folder, or a hub id.
        output: Folder for the export: new or empty. Default: `deploy` in the run folder.
        formats: Of `onnx`, `onnx-int8`, `openvino`, `openvino-int8`, `torch`.
        dataset: The data to score on. Default: that of the recipe in the model's folder. Without
            any, float forms are compared with torch only.
        max_drop: Most points of the task's first metric (1 point = 0.01) that a form may lose
            against the model as it came, trimmed or not.
        vocabulary: `trim` keeps only the pieces that the training split and `text` use, and an alphabet.
        text: With `trim`: text files in UTF-8 whose pieces are kept as well.
        pieces: With `trim`: the most pieces to keep. Those of the training split come first, then those of
            `text`, of each the most frequent first.
        embedding_bits: Bits of a word embedding's values in `onnx-int8`: 8, or 4 in blocks of 16.
        fixed_lengths: With an OpenVINO form: lengths for which a model of one row is prepared when the
            export is loaded. A single text is padded to the least of them that holds it.
        console: Where progress goes; standard error by default.

    Returns:
        What `manifest.json` holds.

    Raises:
        WrongInput: If model, data, formats or folder are not as expected.
        RunFailed: If a form in float differs from torch, if trimming loses too much, or no form is left.

    Example:
        >>> found = export("runs/sst2", formats="onnx,onnx-int8")  # doctest: +SKIP
        >>> found["fastest"]  # doctest: +SKIP
        'onnx-int8'
    """
    console = console or Console(stderr=True)
    names = forms.parse(formats)
    if not max_drop >= 0:
        raise WrongInput(f"Expected max_drop in points, 0 or more, found {max_drop}.")
    if (text or pieces is not None) and vocabulary != "trim":
        raise WrongInput("--text and --pieces say which pieces are kept: give them with --vocabulary trim.")
    if embedding_bits not in (4, 8) or (embedding_bits == 4 and "onnx-int8" not in names):
        raise WrongInput(
            f"Expected embedding bits of 8, or of 4 with the format onnx-int8, found {embedding_bits}."
        )
    if fixed_lengths and not any(name.startswith("openvino") for name in names):
        raise WrongInput("Fixed lengths are for OpenVINO forms: give --format openvino,openvino-int8.")
    folder = _folder(model, output)
    settings = _settings(model, dataset)
    if settings is None and (vocabulary == "trim" or any("int8" in name for name in names)):
        raise WrongInput(
            "What int8 or a trimmed vocabulary loses is measured on the validation split: expected a data "
            f"set, and found no {RECIPE} in {model} that names one. Give --dataset."
        )
    durable.require_empty(folder, "Give another folder with -o, or remove this one.")
    work = _Work.load(str(model), settings, max_drop, embedding_bits, fixed_lengths, console)
    if vocabulary == "trim":
        work = work.trimmed([Path(path) for path in text], pieces)
    with durable.new_folder(folder) as aside:
        manifest = work.write(names, aside)
        durable.write_json(aside / forms.MANIFEST, manifest)
    return manifest


@dataclass(frozen=True)
class _Work:
    """A model to export, with the data that its forms are scored on."""

    name: str
    source_hash: str
    encoder: Encoder
    settings: DatasetSettings | None
    dataset: Dataset | None
    split: gate.Split | None
    max_length: int
    goal: float | None
    """What the model as it came scores in the first metric."""
    source: dict[str, float]
    """All that it scores."""
    max_drop: float
    trimmed_to: dict[str, Any] | None
    embedding_bits: int
    fixed_lengths: tuple[int, ...]
    console: Console

    @classmethod
    def load(
        cls,
        name: str,
        settings: DatasetSettings | None,
        max_drop: float,
        embedding_bits: int,
        fixed_lengths: Sequence[int],
        console: Console,
    ) -> "_Work":
        model = encoder.load(name)
        most = min(settings.max_length if settings else 512, model.positions)
        wrong = [length for length in fixed_lengths if not 1 < length <= most]
        if wrong:
            raise WrongInput(f"Expected fixed lengths from 2 to {most} tokens, found {wrong[0]}.")
        dataset = split = goal = None
        found: dict[str, float] = {}
        if settings is not None:
            # Augmented rows are no text that people typed: nothing is measured on them.
            settings = settings.model_copy(update={"augmented": None})
            dataset = sources.load(settings, splits=("train", VALIDATION))
            require_same_labels(name, model, dataset.task, console)
            rows = dataset.split(VALIDATION)
            tokens = tokenise(rows, model.tokenizer, max_length=most, console=console)
            split = gate.Split(dataset.task, rows, tokens)
            with console.status(f"Scoring {name} on {len(rows)} rows"):
                found = gate.judge(TorchSession(model), split, 0.0).metrics
            if not found:
                raise WrongInput(f"The logits of {name} are not finite: its weights are damaged.")
            goal = found[dataset.task.metrics[0]]
        return cls(
            name,
            weights_hash(model.model),
            model,
            settings,
            dataset,
            split,
            most,
            goal,
            found,
            max_drop,
            None,
            embedding_bits,
            tuple(sorted(set(fixed_lengths))),
            console,
        )

    def trimmed(self, paths: Sequence[Path], pieces: int | None) -> "_Work":
        """Return the same with a smaller vocabulary, which has to pass the gate itself."""
        assert self.dataset is not None and self.split is not None and self.goal is not None
        whole = self.encoder
        corpora = [
            piece_counts(whole.tokenizer, texts)
            for texts in (texts_of(self._training_text()), read_texts(paths))
        ]
        smaller = trim(
            whole, set().union(*corpora) if pieces is None else with_room(whole, corpora, pieces)
        )
        tokens = tokenise(
            self.split.rows, smaller.tokenizer, max_length=self.max_length, console=self.console
        )
        split = gate.Split(self.split.task, self.split.rows, tokens)
        verdict = gate.judge(TorchSession(smaller), split, self.goal)
        if not verdict.passes(self.max_drop):
            raise RunFailed(
                f"Trimming the vocabulary loses {verdict.drop:.2f} points on the validation split, more "
                f"than the {self.max_drop:g} of --max-drop. Give more text with --text, keep more "
                "--pieces, or leave the vocabulary whole."
            )
        table = smaller.model.get_input_embeddings()  # type: ignore[operator]
        before = whole.model.get_input_embeddings()  # type: ignore[operator]
        found = {
            "pieces": int(table.num_embeddings),
            "of": int(before.num_embeddings),
            "corpus": ["training split", *map(str, paths)],
            "coverage": asdict(coverage(self.split.tokens, tokens, smaller, whole)),
            "metrics": verdict.metrics,
            "drop": verdict.drop,
        }
        return replace(self, encoder=smaller, split=split, trimmed_to=found)

    def _training_text(self) -> Rows:
        """Return the training split with all of its rows, also those that the run did not train on."""
        assert self.settings is not None
        every = self.settings.model_copy(update={"train_rows": None})
        return sources.load(every, splits=("train",)).split("train")

    def write(self, names: Sequence[str], aside: Path) -> dict[str, Any]:
        """Write all forms that pass into `aside`, and return the manifest."""
        _write_shared(self.encoder, aside, self.max_length)
        entries: dict[str, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        sessions: dict[str, Session] = {}
        scratch = aside / ".scratch"
        scratch.mkdir()
        for name in names:
            with self.console.status(f"Making {name}"):
                made = _MAKERS[name](self, aside, scratch)
                entry, reason, session = self._check(name, aside, made)
            if reason is not None:
                refused[name] = reason
                self.console.print(f"Warning: {name} is refused: {reason}", style="yellow", markup=False)
                for file in forms.FILES[name]:
                    (aside / file).unlink(missing_ok=True)
                continue
            entries[name] = entry
            sessions[name] = session
        shutil.rmtree(scratch)
        if not entries:
            raise RunFailed(
                "No form is left to export. "
                + " ".join(f"{name}: {reason}" for name, reason in refused.items())
            )
        for name, ms in zip(sessions, self._time(list(sessions.values())), strict=True):
            entries[name] |= {"ms_per_row": ms, "bytes": forms.bytes_of(aside, name)}
        return {
            "source": {"name": self.name, "weights_sha256": self.source_hash},
            "kind": encoder.kind_of(self.encoder.config),
            "labels": list(self.encoder.labels),
            "inputs": list(input_names(self.encoder.tokenizer)),
            "max_length": self.max_length,
            "pad_id": int(self.encoder.tokenizer.pad_token_id),
            "text": self._text(),
            "fixed_lengths": list(self.fixed_lengths),
            "dataset": self._data(),
            "max_drop": self.max_drop,
            "source_metrics": self.source,
            "vocabulary": self.trimmed_to,
            "forms": entries,
            "refused": refused,
            "fastest": min(entries, key=lambda name: float(entries[name]["ms_per_row"])),
            "environment": environment(bf16=False) | _versions(names),
        }

    def _text(self) -> list[str] | None:
        """Return the text columns that the model was trained on, else those that it is scored on."""
        found = text_of(self.name) or (self.split.task.text if self.split else None)
        return None if found is None else list(found)

    def _data(self) -> dict[str, Any] | None:
        if self.settings is None or self.split is None:
            return None
        task = self.split.task
        rows = len(self.split.rows)
        return {"name": self.settings.name, "split": VALIDATION, "rows": rows, "metric": task.metrics[0]}

    def _check(
        self, name: str, aside: Path, made: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None, Session]:
        """Return a form's manifest entry, why it is refused (or None), and its session."""
        session = open_form(
            aside,
            name,
            torch.get_num_threads(),
            fixed_lengths=self.fixed_lengths,
            pad_id=int(self.encoder.tokenizer.pad_token_id),
            max_length=self.max_length,
        )
        precision = "int8" if "int8" in name else session.precision
        found = gate.parity(session, self.encoder, max_length=self.max_length)
        entry: dict[str, Any] = {"precision": precision, **made, "parity": found}
        entry["sha256"] = {
            file: durable.sha256_of_file(aside / file)
            for file in forms.FILES[name]
            if (aside / file).exists()
        }
        # Rounded forms are judged by the metric below, where there is data to measure it on.
        if precision == "float32" or (precision != "int8" and self.split is None):
            most = LARGEST_DIFFERENCE[precision]
            if not found["relative"] <= most:
                raise RunFailed(
                    f"The logits of {name} differ from torch's by up to {found['largest']:.3g} "
                    f"({found['relative']:.2%} of the largest): it is not the same model, and nothing was "
                    f"written. Leave {name} out of --format."
                )
        if self.split is None or self.goal is None:
            return entry, None, session
        verdict = gate.judge(session, self.split, self.goal)
        entry |= {"metrics": verdict.metrics, "drop": verdict.drop}
        if verdict.passes(self.max_drop):
            return entry, None, session
        lost = (
            "its logits are not finite"
            if verdict.drop is None
            else f"it loses {verdict.drop:.2f} points, more than the {self.max_drop:g} of --max-drop"
        )
        tries = len(made.get("tried", ()))
        left = f", also with {made['tried'][-1]['left_out']} parts left in float32" if tries > 1 else ""
        return entry, f"{lost}{left}.", session

    def _time(self, sessions: Sequence[Session]) -> list[float]:
        """Return each form's median milliseconds per row at batch 1; the forms take turns."""
        inputs = self.inputs(_TIMED_ROWS)
        times: list[list[float]] = [[] for _ in sessions]
        for turn, row in enumerate([*inputs[:_WARMUP], *inputs]):
            for session, kept in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session(row)
                if turn >= min(_WARMUP, len(inputs)):
                    kept.append(1000 * (time.perf_counter() - start))
        return [statistics.median(kept) for kept in times]

    def inputs(self, rows: int, split: str = VALIDATION) -> list[dict[str, np.ndarray]]:
        """Return single rows of the data, or of random tokens where there is none."""
        names = input_names(self.encoder.tokenizer)
        if self.split is None or self.dataset is None:
            ids = np.full(
                (1, min(32, self.max_length)), self.encoder.tokenizer.pad_token_id, dtype=np.int64
            )
            made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
            return [{name: made[name] for name in names}] * rows
        tokens = self.split.tokens
        if split != VALIDATION:
            taken = self.dataset.split(split)
            chosen = np.linspace(0, len(taken) - 1, min(rows, len(taken))).astype(int)
            tokens = tokenise(
                taken.take(chosen), self.encoder.tokenizer, max_length=self.max_length, console=self.console
            )
        chosen = np.linspace(0, len(tokens) - 1, min(rows, len(tokens))).astype(int)
        return [gate.arrays(tokens, np.array([row])) for row in chosen]

    def quantised(
        self, int8: gate.Int8, target: Path, scratch: Path, open_session: Callable[[Path], Session]
    ) -> dict[str, Any]:
        """Write a model in int8 through the gate, and return what was tried."""
        assert self.split is not None and self.goal is not None
        found = gate.quantise(
            int8, target, scratch, open_session, self.split, self.goal, self.max_drop, self.console
        )
        return {"parts": len(int8.parts), "left_out": list(found.left_out), "tried": list(found.tried)}


def _onnx(work: _Work, aside: Path, scratch: Path) -> dict[str, Any]:
    fused, counts = _fused(work, scratch)
    shutil.copyfile(fused, aside / forms.FILES["onnx"][0])
    return {"opset": graph.OPSET, "fused": counts}


def _onnx_int8(work: _Work, aside: Path, scratch: Path) -> dict[str, Any]:
    fused, counts = _fused(work, scratch)
    target = aside / forms.FILES["onnx-int8"][0]
    int8 = quantise.OnnxInt8(fused, work.embedding_bits)
    found = work.quantised(int8, target, scratch, OnnxSession)
    return {
        "opset": graph.OPSET,
        "fused": counts,
        "embedding_bits": work.embedding_bits,
        **found,
    }


def _openvino(work: _Work, aside: Path, scratch: Path) -> dict[str, Any]:
    quantise.write_openvino(_plain(work, scratch), aside / forms.FILES["openvino"][0])
    return {"opset": graph.OPSET}


def _openvino_int8(work: _Work, aside: Path, scratch: Path) -> dict[str, Any]:
    rows = work.inputs(quantise.CALIBRATION_ROWS, "train")
    int8 = quantise.OpenVinoInt8(_plain(work, scratch), rows)
    target = aside / forms.FILES["openvino-int8"][0]
    found = work.quantised(int8, target, scratch, OpenVinoSession)
    return {"opset": graph.OPSET, **found}


def _torch(work: _Work, aside: Path, scratch: Path) -> dict[str, Any]:
    model: Any = work.encoder.model
    with quiet():
        model.save_pretrained(aside)
    return {}


_MAKERS: Mapping[str, Callable[[_Work, Path, Path], dict[str, Any]]] = {
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "openvino": _openvino,
    "openvino-int8": _openvino_int8,
    "torch": _torch,
}


def _plain(work: _Work, scratch: Path) -> Path:
    """Return the model as plain ONNX, made at the first call."""
    path = scratch / "plain.onnx"
    if not path.exists():
        graph.write_onnx(work.encoder, path)
    return path


def _fused(work: _Work, scratch: Path) -> tuple[Path, dict[str, int]]:
    """Return the model with onnxruntime's fusions, and how often each occurs."""
    path = scratch / "fused.onnx"
    return path, graph.optimise(_plain(work, scratch), path, work.encoder)


def _write_shared(model: Encoder, folder: Path, max_length: int) -> None:
    """Write configuration and tokenizer; the latter cuts and pads as the model needs it."""
    config: Any = model.config
    config.architectures = [type(model.model).__name__]
    with quiet():
        config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    backend = own_tokenizer(model.tokenizer, max_length)
    backend.enable_padding(pad_id=model.tokenizer.pad_token_id, pad_token=model.tokenizer.pad_token)
    backend.save(str(folder / forms.TOKENIZER))


def _folder(model: str | Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if not (Path(model) / RECIPE).is_file() or not (Path(model) / STUDENT).is_dir():
        raise WrongInput(f"{model} is no run folder: give the folder for the export with -o.")
    return Path(model) / forms.DEPLOY


def _settings(model: str | Path, given: DatasetSettings | str | None) -> DatasetSettings | None:
    """Return the data that is given, or that of the recipe in the model's folder."""
    if given is not None:
        return sources.settings_of(given)
    recipe = Path(model) / RECIPE
    if not recipe.is_file():
        return None
    found = read_yaml(recipe).get("dataset", {})
    return validate(DatasetSettings, {"name": found} if isinstance(found, str) else found, "dataset")


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the libraries that made these forms."""
    packages = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "openvino-int8": ("nncf",)}
    used = [p for name in names for key in packages if name.startswith(key) for p in packages[key]]
    return {package: version(package) for package in dict.fromkeys(used)}
