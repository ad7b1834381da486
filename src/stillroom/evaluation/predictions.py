"""What each model of a run said of the validation split, kept beside the run as one Parquet file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from stillroom import durable
from stillroom.data.tasks import Rows, Task
from stillroom.errors import WrongInput

PREDICTIONS = "predictions.parquet"
"""Name of the file inside a run folder."""

_LOGITS = "logits."


@dataclass(frozen=True)
class Predictions:
    """A task, the rows of its validation split, and each model's logits `(N, C)` on them, float32."""

    task: Task
    rows: Rows
    logits: dict[str, np.ndarray]


def save(path: Path, kept: Predictions) -> None:
    """Replace `path` by a Parquet file that `load` and any other reader of Parquet understands.

    Columns: `row` (its number in the split), `texts` (one string per text column of the task),
    `label`, and for each model `logits.<model>`. The task stands in the file's metadata.

    Raises:
        RunFailed: If the disk is full.
    """
    columns = {
        "row": pa.array(range(len(kept.rows)), pa.int32()),
        "texts": pa.array(list(zip(*kept.rows.texts, strict=True)), pa.list_(pa.string())),
        "label": pa.array(kept.rows.labels.tolist()),
    }
    for name, logits in kept.logits.items():
        columns[_LOGITS + name] = pa.array(logits.tolist(), pa.list_(pa.float32()))
    about = {"task": json.dumps(asdict(kept.task)), "source": kept.rows.source}
    table = pa.table(columns).replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    durable.write_bytes(path, sink.getvalue().to_pybytes())


def load(path: Path) -> Predictions:
    """Return what `save` wrote.

    Raises:
        WrongInput: If the file cannot be read, or is not one that `save` wrote.
    """
    try:
        table = pq.read_table(path)
        about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        task = TypeAdapter(Task).validate_json(about["task"])
        texts = table["texts"].to_pylist()
        columns = tuple([row[i] for row in texts] for i in range(len(task.text)))
        dtype = np.int64 if task.kind == "classification" else np.float32
        labels = np.asarray(table["label"].to_pylist(), dtype=dtype)
        logits = {
            name.removeprefix(_LOGITS): np.asarray(table[name].to_pylist(), dtype=np.float32)
            for name in table.column_names
            if name.startswith(_LOGITS)
        }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        pa.ArrowException,
    ) as error:
        raise WrongInput(
            f"{path} cannot be read ({type(error).__name__}: {error}). It is written at the end of "
            "a run: remove it, and make it again with stillroom distill --resume RUN."
        ) from None
    return Predictions(task, Rows(about.get("source", str(path)), columns, labels), logits)
