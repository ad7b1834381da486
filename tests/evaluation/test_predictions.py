"""The file of predictions: what goes in comes out, whatever the task."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom import WrongInput
from stillroom.data.tasks import Kind
from stillroom.evaluation.predictions import Predictions, load, save
from tiny import make_rows, make_task


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
@pytest.mark.parametrize("pair", [False, True])
def test_round_trip(tmp_path: Path, kind: Kind, pair: bool) -> None:
    task = make_task(kind, pair=pair)
    rows = make_rows(task, 10)
    rows.texts[0][3] = "<script>alert('ü')</script>\n\0"
    chance = np.random.default_rng(0)
    logits = {
        name: chance.standard_normal((10, task.outputs)).astype(np.float32)
        for name in ("teacher", "student")
    }
    path = tmp_path / "predictions.parquet"
    save(path, Predictions(task, rows, logits))
    found = load(path)
    assert found.task == task
    assert found.rows.texts == rows.texts
    assert found.rows.labels.dtype == rows.labels.dtype
    np.testing.assert_array_equal(found.rows.labels, rows.labels)
    assert list(found.logits) == ["teacher", "student"]
    for name, values in logits.items():
        np.testing.assert_array_equal(found.logits[name], values)
    columns = ["row", "texts", "label", "logits.teacher", "logits.student"]
    assert pq.read_table(path).column_names == columns


@pytest.mark.parametrize("content", [b"", b"PAR1 no", b"{}"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "predictions.parquet"
    path.write_bytes(content)
    with pytest.raises(WrongInput, match="--resume"):
        load(path)


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"row": [1]}), path)
    with pytest.raises(WrongInput, match=r"predictions\.parquet"):
        load(path)
