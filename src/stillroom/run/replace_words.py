"""Augmented rows written to a file, or shown: training rows with words replaced, as TinyBERT has them."""

import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from stillroom import durable, generator
from stillroom.data import sources
from stillroom.data.augmented import ABOUT, SOURCE_ROW, fingerprint
from stillroom.data.tasks import Dataset, Rows
from stillroom.data.tokens import fingerprint as tokenizer_fingerprint
from stillroom.data.words import Vectors, read_synonyms
from stillroom.encoder import weights_hash
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings, Settings
from stillroom.training.loop import use_bf16
from stillroom.training.word_replacement import Sources, candidates_of, draw

COPIES = {"cola": 30, "mrpc": 30, "stsb": 30, "rte": 30, "sst2": 20, "qnli": 20, "mnli": 10, "qqp": 10}
"""N_a of TinyBERT's code by GLUE task; elsewhere 20."""

_PART = 256
"""Source rows of a part: what a kill loses at most."""

_PLAN = "plan.json"
_VERSION = 1


class Replacement(Settings):
    """How words are replaced; the numbers' defaults are those of TinyBERT's code."""

    generator: str | None = None
    """Masked language model that proposes for words of one token: a folder or a hub id."""
    vectors: Path | None = None
    """Word vectors in GloVe's text format, for the other words."""
    synonyms: Path | None = None
    """Table with `lemma` and `synonyms`, for words that neither knows."""
    copies: Annotated[int, Field(ge=1)] | None = None
    """N_a, draws for each text of a row. Default: by GLUE task (`COPIES`), else 20."""
    candidates: Annotated[int, Field(ge=1)] = 15
    """K, from which each replacement is drawn."""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.4
    """p_t, with which a word is replaced."""
    draw: Annotated[int, Field(ge=0)] = 0
    """Another number, other words."""

    def copies_for(self, dataset: str) -> int:
        """Return N_a for a data set."""
        return self.copies or COPIES.get(dataset.removeprefix("glue/"), 20)


def write(
    settings: DatasetSettings, how: Replacement, output: Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Write augmented rows of a training split to a Parquet file, to train on with `dataset.augmented`.

    Each text of a row is rewritten from its original, the other text of a pair stays as it is. The file
    has the text columns and `source_row`; rows as they are are not in it, and neither are copies that
    are validation rows. It is written in parts of 256 source rows beside it: after a kill the same call
    goes on with the part that it was at, to the same file.

    Args:
        settings: The data; with `train_rows` only those rows are augmented.
        how: Who proposes words, how many, how often.
        output: A `.parquet` file that is not there yet.
        console: Where progress goes; standard error by default.

    Returns:
        `output`, `dataset`, `rows` (source rows), `augmented` (rows written), `copies`, `words` that have
        candidates by who proposed them, and `seconds` of this call.

    Raises:
        WrongInput: If data or sources of words are not as expected, the file is there, or the parts
            beside it are of another call.
        RunFailed: If the disk is full. What is finished stays.
    """
    console = console or Console(stderr=True)
    started = time.perf_counter()
    if output.suffix.lower() != ".parquet":
        raise WrongInput(
            f"Augmented rows are written as Parquet: expected a name in .parquet, found {output}."
        )
    folder = output.with_name(output.name + ".parts")
    if output.exists() and not folder.exists():
        raise _in_the_way(output)
    dataset, index = _source_rows(settings)
    who, origin = _open(how)
    bf16 = use_bf16("auto")
    plan = {
        "version": _VERSION,
        "dataset": settings.name,
        "fingerprint": fingerprint(dataset.splits["train"]),
        "validation": fingerprint(dataset.splits["validation"]),
        "rows": len(index),
        "train_rows": settings.train_rows,
        **origin,
        "copies": how.copies_for(settings.name),
        "candidates": how.candidates,
        "probability": how.probability,
        "draw": how.draw,
        "precision": "bf16" if bf16 else "float32",
    }
    with durable.locked(folder):
        if output.exists():
            # Killed while it removed the parts: what it made of them is whole.
            written, words = _finished(output, plan)
            shutil.rmtree(folder)
            return _told(output, plan, written, words, started)
        _same_plan(folder, plan)
        avoid = frozenset(dataset.splits["validation"].text_keys())
        parts = [index[start : start + _PART] for start in range(0, len(index), _PART)]
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("Augmenting", total=len(index))
            for number, rows in enumerate(parts):
                place = _part(folder, number)
                if not place.exists():
                    made = _augmented(dataset, rows, who, how, avoid, bf16=bf16)
                    _write_part(place, dataset.task.text, made)
                bar.advance(task, len(rows))
        written, words = _join(output, folder, len(parts), plan)
    shutil.rmtree(folder)
    return _told(output, plan, written, words, started)


def show(
    settings: DatasetSettings, how: Replacement, *, split: str, rows: int, console: Console | None = None
) -> dict[str, Any]:
    """Return the first rows of a split, each with some of its augmented rows.

    Args:
        settings: The data.
        how: As for `write`.
        split: Where the rows come from.
        rows: How many.
        console: Where warnings go.

    Returns:
        `dataset`, `split`, and `rows`: each with `row` (from 1), `original` and `augmented`, texts of a
        pair with ` | ` between.

    Raises:
        WrongInput: As for `write`.
    """
    plain = settings.model_copy(update={"augmented": None})
    dataset = sources.load(plain, splits=(split,))
    chosen = dataset.split(split)
    who, _ = _open(how)
    index = np.arange(min(rows, len(chosen)))
    few = how.model_copy(update={"copies": how.copies or 3})
    one = Dataset(dataset.task, {"train": chosen})
    made = _augmented(one, index, who, few, frozenset(), bf16=use_bf16("auto"))
    return {
        "dataset": settings.name,
        "split": split,
        "rows": [
            {
                "row": i + 1,
                "original": " | ".join(column[i] for column in chosen.texts),
                "augmented": [
                    " | ".join(texts)
                    for texts, source in zip(made.texts, made.source, strict=True)
                    if source == i
                ],
            }
            for i in index.tolist()
        ],
    }


@dataclass(frozen=True)
class _Made:
    """Augmented rows, and which words had candidates by who proposed them."""

    texts: list[tuple[str, ...]]
    source: list[int]
    words: dict[str, int]


def _source_rows(settings: DatasetSettings) -> tuple[Dataset, np.ndarray]:
    """Return the data with its whole training split, and the numbers of the rows to augment."""
    every = settings.model_copy(update={"augmented": None, "train_rows": None})
    dataset = sources.load(every)
    count = len(dataset.splits["train"])
    drawn = sources.drawn_rows(count, settings.train_rows)
    return dataset, np.arange(count) if drawn is None else drawn


def _open(how: Replacement) -> tuple[Sources, dict[str, str | None]]:
    """Return who proposes words, and the hashes of what they are."""
    if how.generator is None and how.vectors is None and how.synonyms is None:
        raise WrongInput(
            "Expected who proposes words: --generator (a masked language model), --vectors (word vectors "
            f"in GloVe's text format) or --synonyms; {generator.REMEDY.format(model='ENCODER')}."
        )
    writer = vectors = synonyms = None
    origin: dict[str, str | None] = {"generator": None, "vectors": None, "synonyms": None}
    if how.vectors is not None:
        vectors = Vectors.read(how.vectors.expanduser())
        origin["vectors"] = durable.sha256_of_file(how.vectors.expanduser())
    if how.synonyms is not None:
        synonyms = read_synonyms(how.synonyms.expanduser())
        origin["synonyms"] = durable.sha256_of_file(how.synonyms.expanduser())
    if how.generator is not None:
        writer = generator.load(how.generator)
        origin["generator"] = f"{weights_hash(writer.model)} {tokenizer_fingerprint(writer.tokenizer)}"
        writer = writer.to(Accelerator().device)
    return Sources(writer, vectors, synonyms), origin


def _augmented(
    dataset: Dataset,
    index: np.ndarray,
    who: Sources,
    how: Replacement,
    avoid: frozenset[int],
    *,
    bf16: bool,
) -> _Made:
    """Return the augmented rows of some training rows, without those whose keys are to be avoided."""
    rows = dataset.splits["train"].take(index)
    copies = how.copies_for(dataset.task.name)
    words: Counter[str] = Counter()
    made: list[list[tuple[str, ...]]] = [[] for _ in index]
    for column, texts in enumerate(rows.texts):
        proposed = candidates_of(texts, who, count=how.candidates, bf16=bf16)
        for i, candidates in enumerate(proposed):
            words.update(one.source for one in candidates)
            original = tuple(other[i] for other in rows.texts)
            key = f"{how.draw} {index[i]} {column}"
            for text in draw(texts[i], candidates, copies=copies, probability=how.probability, key=key):
                made[i].append((*original[:column], text, *original[column + 1 :]))
    flat = [(texts, int(index[i])) for i, row in enumerate(made) for texts in row]
    keys = Rows("", _columns([texts for texts, _ in flat], len(rows.texts)), np.empty(0)).text_keys()
    kept = [pair for pair, key in zip(flat, keys, strict=True) if key not in avoid]
    return _Made([texts for texts, _ in kept], [source for _, source in kept], dict(words))


def _columns(rows: list[tuple[str, ...]], count: int) -> tuple[list[str], ...]:
    return tuple([row[i] for row in rows] for i in range(count))


def _same_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what is being made, or raise `WrongInput` if the parts are of something else."""
    durable.remove_leftovers(folder)
    path = folder / _PLAN
    if not path.exists():
        durable.write_json(path, plan)
        return
    before = durable.read_json(path)
    changed = [key for key in {**before, **plan} if before.get(key) != plan.get(key)]
    if changed:
        key = changed[0]
        raise WrongInput(
            f"{folder} holds parts that were made otherwise: {key} was {before.get(key)!r:.60}, now it is "
            f"{plan.get(key)!r:.60}. Run the same command as before to go on, or remove {folder}."
        )


def _told(
    output: Path, plan: dict[str, Any], written: int, words: dict[str, int], started: float
) -> dict[str, Any]:
    return {
        "output": str(output),
        "dataset": plan["dataset"],
        "rows": plan["rows"],
        "augmented": written,
        "copies": plan["copies"],
        "words": words,
        "seconds": time.perf_counter() - started,
    }


def _in_the_way(output: Path) -> WrongInput:
    return WrongInput(f"Expected a file that is not there yet, found {output}. Remove it, or name another.")


def _finished(output: Path, plan: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Return what `_join` did of a file that it wrote by this plan; any other raises `WrongInput`."""
    try:
        found = pq.read_metadata(output)
        about = json.loads((found.metadata or {})[ABOUT])
        words = about.pop("words")
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError):
        raise _in_the_way(output) from None
    if about != plan:
        raise _in_the_way(output)
    return found.num_rows, words


def _write_part(path: Path, columns: tuple[str, ...], made: _Made) -> None:
    texts = _columns(made.texts, len(columns))
    table = pa.table(
        {
            **{name: pa.array(column, pa.string()) for name, column in zip(columns, texts, strict=True)},
            SOURCE_ROW: pa.array(made.source, pa.int64()),
        }
    ).replace_schema_metadata({ABOUT: json.dumps({"words": made.words})})
    with durable.new_file(path) as stream:
        pq.write_table(table, stream, compression="zstd")


def _join(output: Path, folder: Path, count: int, plan: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Write the parts as one file, and return its rows and the words by who proposed them."""
    rows, words = 0, Counter[str]()
    for number in range(count):
        about = pq.read_schema(_part(folder, number)).metadata[ABOUT]
        words.update(json.loads(about)["words"])
    noted = {ABOUT: json.dumps({**plan, "words": words})}
    with durable.new_file(output) as stream:
        writer = None
        for number in range(count):
            table = pq.read_table(_part(folder, number)).replace_schema_metadata(noted)
            writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
            writer.write_table(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
    return rows, dict(words)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.parquet"
