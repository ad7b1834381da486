"""The recorded teacher: what is read is what was computed, whatever order, kill, damage or neighbour."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from stillroom import durable
from stillroom.data.batching import Batch, Inputs, make_batch, pad, sequential_batches
from stillroom.data.tasks import Rows
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs
from stillroom.errors import RunFailed, WrongInput
from stillroom.recipe import TeacherSettings
from stillroom.teacher.cache import Cache, Origin, key_of, keys_of
from stillroom.teacher.choose import choose
from stillroom.teacher.live import LiveTeacher
from stillroom.teacher.recorded import RecordedTeacher, columns_of, needs_of, planned, record
from stillroom.training.loop import train
from test_conformance import TABLE, Row, job_of
from tiny import make_encoder, make_rows, make_task, make_tokenizer, make_tokens

QUIET = Console(quiet=True)
EVERYTHING = Needs(
    logits=True,
    hidden_states=frozenset({0, 2, 4}),
    embeddings=True,
    pooled_states=frozenset({("mean", 1), ("cls", 4)}),
    attention_scores=frozenset({1}),
    queries=frozenset({2}),
    keys=frozenset({2}),
    values=frozenset({3}),
)
STATES = Needs(logits=True, hidden_states=frozenset({2, 4}))
ROWS = make_rows(make_task(), 48)


def make_live(*, bf16: bool = False, seed: int = 1, family: str = "bert") -> LiveTeacher:
    teacher = make_encoder(family, layers=4, width=24, seed=seed)
    return LiveTeacher(teacher, device=torch.device("cpu"), bf16=bf16)


def cache_of(folder: Path, live: LiveTeacher, max_length: int = 32) -> Cache:
    return Cache(folder, Origin.of(live.encoder, max_length=max_length, bf16=live.bf16))


def recorded_in(
    folder: Path,
    live: LiveTeacher | None = None,
    *stages: Needs,
    tokens: TokenisedRows | None = None,
    **given: Any,
) -> RecordedTeacher:
    live = live or make_live()
    tokens = tokens or make_tokens(ROWS, live.encoder)
    options = {"max_bytes": 10**9, "console": QUIET, "shard_bytes": 5000, **given}
    return record(live, cache_of(folder, live), tokens, stages or (STATES,), **options)


def assert_same(found: Any, want: Any, mask: torch.Tensor, needs: Needs, **tolerance: float) -> None:
    """Compare every tensor on real tokens."""
    for column in columns_of(needs):
        ours, theirs = column.of(found), column.of(want)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32, column.name
        if column.field in ("logits", "pooled_states"):
            real = torch.ones_like(ours, dtype=torch.bool)
        elif column.field == "attention_scores":
            real = (mask[:, None, :, None] * mask[:, None, None, :]).bool().expand_as(ours)
        elif column.field in ("queries", "keys", "values"):
            real = mask[:, None, :, None].bool().expand_as(ours)
        else:
            real = mask[:, :, None].bool().expand_as(ours)
        torch.testing.assert_close(ours[real], theirs[real].float(), **tolerance)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_every_output_is_read_as_the_teacher_gives_it(tmp_path: Path, family: str) -> None:
    needs = replace(EVERYTHING, embeddings=family == "bert")
    live = make_live(family=family)
    teacher = recorded_in(tmp_path / "t", live, needs)
    tokens = make_tokens(ROWS, live.encoder)
    # Batches of mixed lengths, unlike those of the recording.
    for index in np.array_split(np.random.default_rng(0).permutation(len(ROWS)), 7):
        batch = make_batch(index, ROWS, tokens)
        assert_same(
            teacher(batch, needs),
            live(batch, needs),
            batch.teacher.attention_mask,
            needs,
            rtol=0,
            atol=0,
        )


def test_what_is_read_is_what_the_recording_computed_bit_for_bit(tmp_path: Path) -> None:
    live = make_live()
    tokens = make_tokens(ROWS, live.encoder)
    teacher = recorded_in(tmp_path / "t", live, EVERYTHING)
    order = np.asarray(sorted(range(len(ROWS)), key=keys_of(tokens).__getitem__))
    for rows in sequential_batches(tokens.lengths[order]):
        batch = make_batch(order[rows], ROWS, tokens)
        mask = batch.teacher.attention_mask
        assert_same(teacher(batch, EVERYTHING), live(batch, EVERYTHING), mask, EVERYTHING, rtol=0, atol=0)


def test_bf16_is_kept_in_half_the_bytes_and_logits_are_exact(tmp_path: Path) -> None:
    live = make_live(bf16=True)
    teacher = recorded_in(tmp_path / "bf16", live)
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    found, want, mask = teacher(batch, STATES), live(batch, STATES), batch.teacher.attention_mask.bool()
    for layer in (2, 4):
        rounded = want.hidden_states[layer].bfloat16().float()
        # The last bit of bf16 is 2**-8 of the value.
        torch.testing.assert_close(found.hidden_states[layer][mask], rounded[mask], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(found.logits, want.logits, rtol=2**-7, atol=2**-8)
    whole = recorded_in(tmp_path / "float32")
    assert teacher.served()["bytes"] < 0.7 * whole.served()["bytes"]


def test_padding_reads_as_zero_and_as_the_least_score(tmp_path: Path) -> None:
    teacher = recorded_in(tmp_path / "t", None, EVERYTHING)
    tokens = make_tokens(ROWS, make_live().encoder)
    batch = make_batch(np.arange(8), ROWS, tokens)
    found, padding = teacher(batch, EVERYTHING), batch.teacher.attention_mask == 0
    assert padding.any()
    assert (found.hidden_states[2][padding] == 0).all()
    hidden_keys = found.attention_scores[1].permute(0, 3, 1, 2)[padding]
    assert (hidden_keys == torch.finfo(torch.float32).min).all()


def test_rows_are_found_by_what_they_hold(tmp_path: Path) -> None:
    """Another order, or rows twice, as in another seed, subset or data set with the same sentences."""
    live = make_live()
    recorded_in(tmp_path / "t", live)
    order = np.random.default_rng(1).permutation(48)
    twice = np.concatenate([order, order[:10]])
    shuffled = Rows("r", tuple([column[i] for i in twice] for column in ROWS.texts), ROWS.labels[twice])
    tokens = make_tokens(shuffled, live.encoder)
    before = cache_of(tmp_path / "t", live).shards()
    teacher = recorded_in(tmp_path / "t", live, tokens=tokens)
    assert cache_of(tmp_path / "t", live).shards() == before
    batch = make_batch(np.arange(40, 58), shuffled, tokens)
    mask = batch.teacher.attention_mask
    assert_same(teacher(batch, STATES), live(batch, STATES), mask, STATES, rtol=1e-5, atol=1e-5)


def test_a_key_is_of_ids_and_types() -> None:
    ids = np.array([2, 5, 3], dtype=np.int64)
    assert key_of(ids, None) == key_of(ids.astype(np.int32), None)
    keys = {key_of(ids, None), key_of(ids[:2], None), key_of(ids, np.zeros(3)), key_of(ids, np.ones(3))}
    assert len(keys) == 4


def test_what_is_recorded_is_not_computed_again(tmp_path: Path) -> None:
    live = make_live()
    teacher = recorded_in(tmp_path / "t", live)
    live.module.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    batch = make_batch(np.arange(8), ROWS, make_tokens(ROWS, live.encoder))
    assert teacher(batch, Needs(logits=True)).hidden_states == {}
    assert set(teacher(batch, STATES).hidden_states) == {2, 4}
    assert teacher(batch, Needs()).logits.numel() == 0


def test_more_needs_add_only_what_is_missing(tmp_path: Path) -> None:
    live = make_live()
    recorded_in(tmp_path / "t", live, Needs(logits=True))
    first = set(cache_of(tmp_path / "t", live).shards())
    teacher = recorded_in(tmp_path / "t", live, STATES)
    assert first < set(cache_of(tmp_path / "t", live).shards())
    want = recorded_in(tmp_path / "whole", live, STATES)
    assert teacher.served()["bytes"] < 1.5 * want.served()["bytes"]
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    mask = batch.teacher.attention_mask
    assert_same(teacher(batch, STATES), want(batch, STATES), mask, STATES, rtol=0, atol=0)


def stop_after(function: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    left = [calls]

    def stopper(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise error
        left[0] -= 1
        return function(*args, **kwargs)

    return stopper


def test_a_recording_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = make_live()
    want = recorded_in(tmp_path / "whole", live)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Killed while the third shard is being written.
        patch.setattr(pa.ipc, "new_file", stop_after(pa.ipc.new_file, 2, KeyboardInterrupt()))
        recorded_in(tmp_path / "parts", live)
    finished = {path: path.stat().st_ino for path in cache_of(tmp_path / "parts", live).shards()}
    assert len(finished) == 2 < len(cache_of(tmp_path / "whole", live).shards())
    (tmp_path / "parts" / ".aside-x").mkdir()
    teacher = recorded_in(tmp_path / "parts", live)
    assert not (tmp_path / "parts" / ".aside-x").exists()
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    mask = batch.teacher.attention_mask
    assert_same(teacher(batch, STATES), want(batch, STATES), mask, STATES, rtol=0, atol=0)


def test_a_full_disk_fails_the_run_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="full"):
        patch.setattr(pa.ipc, "new_file", stop_after(pa.ipc.new_file, 1, full))
        recorded_in(tmp_path / "t")
    assert len(cache_of(tmp_path / "t", make_live()).shards()) == 1
    recorded_in(tmp_path / "t")


def flip_a_bit(shard: Path) -> None:
    damaged = bytearray((shard / "rows.arrow").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (shard / "rows.arrow").write_bytes(damaged)


def test_a_damaged_shard_is_found_and_recorded_again(tmp_path: Path) -> None:
    live = make_live()
    recorded_in(tmp_path / "t", live)
    flip_a_bit(cache_of(tmp_path / "t", live).shards()[1])
    said = io.StringIO()
    teacher = recorded_in(tmp_path / "t", live, console=Console(file=said, width=1000))
    assert "is damaged" in said.getvalue() and "recorded again" in said.getvalue()
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    mask = batch.teacher.attention_mask
    assert_same(teacher(batch, STATES), live(batch, STATES), mask, STATES, rtol=1e-5, atol=1e-5)


def test_a_sum_is_made_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_live()
    tokens = make_tokens(ROWS, live.encoder)
    recorded_in(tmp_path / "t", live)
    summed: list[Path] = []
    real = durable.damage
    monkeypatch.setattr(durable, "damage", lambda folder: summed.append(folder) or real(folder))
    recorded_in(tmp_path / "t", live, tokens=tokens)
    assert summed == []
    cache = cache_of(tmp_path / "t", live)
    shard = cache.shards()[1]
    # The same bytes at the same time: a copy may still be a bad one.
    (shard / "copy").write_bytes((shard / "rows.arrow").read_bytes())
    shutil.copystat(shard / "rows.arrow", shard / "copy")
    (shard / "copy").replace(shard / "rows.arrow")
    assert cache.open() == {} and summed == [shard]
    flip_a_bit(shard)
    assert set(cache.open()) == {shard}
    assert cache.missing("logits", keys_of(tokens))
    # It is not taken for sound because it was seen before.
    assert set(cache.open()) == {shard} and summed == 3 * [shard]


def test_readers_wait_for_nobody(tmp_path: Path) -> None:
    live = make_live()
    recorded_in(tmp_path / "t", live)
    said = io.StringIO()
    with cache_of(tmp_path / "t", live).writing(QUIET):
        # What is not written down by a reader now is so by the next.
        (tmp_path / "t/checked.json").unlink()
        teacher = recorded_in(tmp_path / "t", live, console=Console(file=said, width=1000))
        assert not (tmp_path / "t/checked.json").exists()
    assert "waiting" not in said.getvalue()
    recorded_in(tmp_path / "t", live)
    assert (tmp_path / "t/checked.json").exists()
    batch = make_batch(np.arange(8), ROWS, make_tokens(ROWS, live.encoder))
    assert teacher(batch, STATES).logits.shape == (8, 2)


@pytest.mark.parametrize("error", [PermissionError(), OSError(30, "Read-only"), RunFailed("full")])
def test_a_cache_that_cannot_be_written_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    live = make_live()
    want = recorded_in(tmp_path / "t", live)
    (tmp_path / "t/checked.json").unlink()
    monkeypatch.setattr(durable, "write_json", stop_after(durable.write_json, 0, error))
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    found, mask = recorded_in(tmp_path / "t", live)(batch, STATES), batch.teacher.attention_mask
    assert_same(found, want(batch, STATES), mask, STATES, rtol=0, atol=0)


def test_planning_writes_nothing(tmp_path: Path) -> None:
    live = make_live()
    tokens = make_tokens(ROWS, live.encoder)
    cache = cache_of(tmp_path / "t", live)
    cache.open(check=False)
    options = {"max_bytes": 10**9}
    plan = planned(live, cache, tokens, keys_of(tokens), [STATES], **options)
    assert not (tmp_path / "t").exists()
    # By hand: 2 logits, and 2 states of width 24 for each token, of rows that differ.
    different = {
        tuple(tokens.ids[o : o + n]): n for o, n in zip(tokens.offsets, tokens.lengths, strict=True)
    }
    assert plan.more == plan.total == 4 * (2 * len(different) + 2 * 24 * sum(different.values()))
    recorded_in(tmp_path / "t", live, Needs(logits=True))
    cache.open(check=False)
    plan = planned(live, cache, tokens, keys_of(tokens), [STATES], **options)
    assert plan.more == 4 * 2 * 24 * sum(different.values())
    assert plan.total == plan.more + cache.bytes
    assert [column.name for column in plan.lacking] == ["hidden_states.2", "hidden_states.4"]


def other_tokenizer(live: LiveTeacher) -> LiveTeacher:
    encoder = Encoder(live.encoder.model, make_tokenizer(extra_words=("more",)))
    return LiveTeacher(encoder, device=torch.device("cpu"), bf16=False)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("teacher", lambda: make_live(seed=2)),
        ("tokenizer", lambda: other_tokenizer(make_live())),
        ("precision", lambda: make_live(bf16=True)),
    ],
)
def test_the_cache_of_another_teacher_is_refused(
    tmp_path: Path, field: str, other: Callable[[], LiveTeacher]
) -> None:
    recorded_in(tmp_path / "t")
    mine = Origin.of(make_live().encoder, max_length=32, bf16=False)
    theirs = Origin.of(other().encoder, max_length=32, bf16=other().bf16)
    with pytest.raises(WrongInput) as error:
        recorded_in(tmp_path / "t", other())
    assert f"{field} {getattr(mine, field)}, not {getattr(theirs, field)}" in str(error.value)
    assert mine.folder != theirs.folder


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/thesis.txt").write_text("years of work")
    with pytest.raises(WrongInput, match="new or empty"):
        recorded_in(tmp_path / "t")


def changed(batch: Batch, row: int, length: int, token: int) -> Batch:
    """Return the batch with one token of one row replaced, and the row cut to a length."""
    inputs = Inputs(batch.teacher.input_ids.clone(), batch.teacher.attention_mask.clone(), None)
    inputs.input_ids[row, 1] = token
    inputs.input_ids[row, length:] = 0
    inputs.attention_mask[row, length:] = 0
    return replace(batch, teacher=inputs)


def test_a_batch_that_is_not_of_its_row_numbers_is_refused(tmp_path: Path) -> None:
    """Else rows that were rewritten would silently be taught the answers to what they were."""
    live = make_live()
    teacher = recorded_in(tmp_path / "t", live)
    tokens = make_tokens(ROWS, live.encoder)
    batch = make_batch(np.arange(8), ROWS, tokens)
    row = int(tokens.lengths[:8].argmax())
    length, token = int(tokens.lengths[row]), int(batch.teacher.input_ids[row, 1])
    teacher(changed(batch, row, length, token), STATES)
    longer = changed(batch, row, length, token)
    shortest = int(tokens.lengths[:8].argmin())
    longer.teacher.input_ids[shortest, tokens.lengths[shortest]] = token
    longer.teacher.attention_mask[shortest, tokens.lengths[shortest]] = 1
    wrong = (
        longer,
        changed(batch, row, length, token + 1),
        changed(batch, row, length - 1, token),
        replace(batch, row_ids=batch.row_ids.flip(0)),
        replace(batch, row_ids=batch.row_ids + len(ROWS)),
    )
    for other in wrong:
        with pytest.raises(WrongInput, match="not in the cache"):
            teacher(other, STATES)


def test_a_row_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    teacher = recorded_in(tmp_path / "t")
    other = make_rows(make_task(), 8, seed=9)
    batch = make_batch(np.arange(8), other, make_tokens(other, make_live().encoder))
    with pytest.raises(WrongInput, match=r"not in the cache .*tokenizer"):
        teacher(batch, STATES)


def test_what_does_not_fit_is_computed_live_and_said(tmp_path: Path) -> None:
    live = make_live()
    whole = recorded_in(tmp_path / "whole", live).served()["bytes"]
    said = io.StringIO()
    most = int(0.6 * whole)
    teacher = recorded_in(tmp_path / "less", live, max_bytes=most, console=Console(file=said, width=1000))
    assert [column.name for column in columns_of(needs_of(teacher.kept))] == ["logits", "hidden_states.2"]
    assert "hidden_states.4 computed live" in said.getvalue() and "MB" in said.getvalue()
    # Keys and offsets of rows come on top: 32 bytes each, and Arrow's frame for each shard.
    assert teacher.served()["bytes"] <= most + 2000 * len(cache_of(tmp_path / "less", live).shards())
    batch = make_batch(np.arange(48), ROWS, make_tokens(ROWS, live.encoder))
    mask = batch.teacher.attention_mask
    assert_same(teacher(batch, STATES), live(batch, STATES), mask, STATES, rtol=1e-5, atol=1e-5)
    nothing = recorded_in(tmp_path / "none", live, max_bytes=0)
    assert not nothing.kept
    assert_same(nothing(batch, STATES), live(batch, STATES), mask, STATES, rtol=0, atol=0)


SCRIPT = """
import sys
from pathlib import Path
from test_recorded import recorded_in
recorded_in(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_record_one_cache(tmp_path: Path) -> None:
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {folders!r}\n{SCRIPT}"
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c")]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    live = make_live()
    recorded_in(tmp_path / "alone", live)
    names = [[p.name for p in cache_of(tmp_path / at, live).shards()] for at in ("c", "alone")]
    assert names[0] == names[1]


# One row for each method, and those that read pooled states.
EACH = list({row.method: row for row in reversed(TABLE)}.values())
POOLED = [row for row in TABLE if {"cls", "mean", "unmasked_mean"} & {*map(str, row.options.values())}]


@pytest.mark.parametrize("row", [*EACH, *(row for row in POOLED if row not in EACH)], ids=str)
def test_the_student_of_a_recording_is_the_student_of_the_model(tmp_path: Path, row: Row) -> None:
    if row.method == "none":
        pytest.skip("learns from no teacher")
    given: dict[str, Any] = {"count": 24, "epochs": 2, "checkpoint_every": 1000}
    job = job_of(tmp_path / "live", row, **given)
    train(job, QUIET)
    again = job_of(tmp_path / "recorded", row, **given)
    assert isinstance(again.teacher, LiveTeacher)
    stages = again.plan.teacher_needs_of_stages()
    cache = cache_of(tmp_path / "recording", again.teacher)
    teacher = record(again.teacher, cache, again.teacher_tokens, stages, max_bytes=10**9, console=QUIET)
    if again.plan.augmentation is None and not any(needs.padding for needs in stages):
        # Rows that are augmented are recorded nowhere, nor is what counts padding.
        again.teacher.module.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    train(replace(again, teacher=teacher), QUIET)
    want = job.student.model.state_dict()
    for name, value in again.student.model.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("method", ["codir", "rail-kd"])
def test_rows_of_any_length_are_pooled_as_the_model_pools_them(tmp_path: Path, method: str) -> None:
    """The rows of the other tests have few lengths; these are 5 to 40 tokens long."""
    row = next(row for row in EACH if row.method == method)
    live = make_live()
    (needs,) = {*job_of(tmp_path / "job", row, count=24).plan.teacher_needs_of_stages()}
    assert {how for how, _ in needs.pooled_states} == {"mean"}
    words = " ".join(text for (text,) in zip(*ROWS.texts, strict=True)).split()
    texts = [" ".join(words[i : i + i + 3]) for i in range(36)]
    rows = Rows("made", (texts,), np.zeros(36, dtype=np.int64))
    tokens = make_tokens(rows, live.encoder, max_length=40)
    assert sorted(tokens.lengths.tolist()) == [*range(5, 41)]
    cache = cache_of(tmp_path / "t", live, max_length=40)
    teacher = record(live, cache, tokens, (needs,), max_bytes=10**9, console=QUIET)
    for seed in range(6):
        for index in np.array_split(np.random.default_rng(seed).permutation(36), 7):
            batch = make_batch(index, rows, tokens)
            mask = batch.teacher.attention_mask
            assert_same(teacher(batch, needs), live(batch, needs), mask, needs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options"), [("kd", {}), ("lrc-bert", {"perturbation": "off", "switch": 0.0}), ("pkd", {})]
)
def test_in_bf16_the_student_of_a_recording_is_that_of_the_model_but_for_rounding(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def trained(*, recorded: bool) -> torch.Tensor:
        """Return how far training moved the student's weights."""
        given: dict[str, Any] = {"count": 24, "epochs": 4, "checkpoint_every": 1000}
        job = job_of(tmp_path / str(recorded), Row(method, options), **given)
        assert isinstance(job.teacher, LiveTeacher)
        live = LiveTeacher(job.teacher.encoder, device=torch.device("cpu"), bf16=True)
        teacher: Any = live
        if recorded:
            stages, cache = job.plan.teacher_needs_of_stages(), cache_of(tmp_path / "recording", live)
            teacher = record(live, cache, job.teacher_tokens, stages, max_bytes=10**9, console=QUIET)
        before = [value.clone() for value in job.student.model.state_dict().values()]
        train(replace(job, teacher=teacher), QUIET)
        after = job.student.model.state_dict().values()
        return torch.cat([(a - b).flatten().float() for a, b in zip(after, before, strict=True)])

    want, found = trained(recorded=False), trained(recorded=True)
    assert (found - want).norm() < 0.02 * want.norm()


def test_auto_records_what_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "kept"))
    live = make_live()
    tokens = make_tokens(ROWS, live.encoder)

    def chosen(cache: str, needs: Needs = STATES, *, repeated: bool = True) -> str:
        settings = TeacherSettings(name="t", cache=cache)
        found = choose(settings, live, tokens, [needs], max_length=32, repeated=repeated, console=QUIET)
        return type(found).__name__

    assert chosen("auto", repeated=False) == "LiveTeacher"
    assert chosen("off") == "LiveTeacher"
    assert chosen("auto", Needs()) == "LiveTeacher"
    assert not (tmp_path / "kept/teacher").exists()
    assert chosen("auto") == "RecordedTeacher"
    assert len(list((tmp_path / "kept/teacher").iterdir())) == 1
    assert chosen(str(tmp_path / "mine"), repeated=False) == "RecordedTeacher"
    assert (tmp_path / "mine/origin.json").exists()


def test_needs_there_and_back() -> None:
    assert needs_of(columns_of(EVERYTHING)) == EVERYTHING
    # A field that is not known here would be silently not recorded and not computed.
    # `padding` names no output of its own.
    assert {column.field for column in columns_of(EVERYTHING)} == {*Needs.__dataclass_fields__} - {
        "padding"
    }


def test_what_counts_padding_is_computed_live(tmp_path: Path) -> None:
    said = io.StringIO()
    needs = STATES | Needs(padding=True)
    teacher = recorded_in(tmp_path / "t", make_live(), needs, console=Console(file=said, width=1000))
    assert {column.name for column in teacher.kept} == {"logits"}
    assert "hidden_states.2, hidden_states.4 computed live where padding counts in them" in said.getvalue()


def test_a_stage_that_counts_padding_leaves_the_others_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_live()
    counts_padding, other = STATES | Needs(padding=True), Needs(hidden_states=frozenset({2}))
    teacher = recorded_in(tmp_path / "t", live, counts_padding, other)
    assert {column.name for column in teacher.kept} == {"logits", "hidden_states.2"}
    batch = make_batch(np.arange(16), ROWS, make_tokens(ROWS, live.encoder))
    mask = batch.teacher.attention_mask
    assert 0 < int(mask.sum()) < mask.numel()
    read = teacher.read(batch, other)
    assert read is not None and teacher.read(batch, counts_padding) is None
    assert_same(read, live(batch, other), mask, other, rtol=0, atol=0)
    # States on padding, which a recording holds as 0, are the model's, which is told that they count.
    want, asked = live(batch, counts_padding), []
    call = LiveTeacher.__call__
    monkeypatch.setattr(LiveTeacher, "__call__", lambda *a: asked.append(a[2]) or call(*a))
    found = teacher(batch, counts_padding)
    teacher(batch, Needs(logits=True, padding=True))
    assert asked == [replace(counts_padding, logits=False), Needs()]
    for index in (2, 4):
        torch.testing.assert_close(found.hidden_states[index], want.hidden_states[index], rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_and_disk_hold_what_was_budgeted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory() -> int:
        """Return the bytes of this process that no file stands behind."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    live = LiveTeacher(make_encoder("bert", layers=4, width=192), device=torch.device("cpu"), bf16=False)
    rows = make_rows(make_task(), 4000)
    tokens = make_tokens(rows, live.encoder)
    needs = Needs(hidden_states=frozenset({0, 1, 2, 3, 4}))
    found: list[int] = []
    write = Cache.write

    def watched(*args: Any) -> None:
        found.append(memory())
        write(*args)

    monkeypatch.setattr(Cache, "write", watched)
    recorded_in(
        tmp_path / "warm", live, needs, tokens=make_tokens(make_rows(make_task(), 600), live.encoder)
    )
    before, found[:] = memory(), []
    most = 100 * 10**6
    teacher = recorded_in(tmp_path / "t", live, needs, tokens=tokens, max_bytes=most, shard_bytes=2 * 2**20)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "t").rglob("*") if file.is_file())
    assert 0.6 * most < on_disk < 1.02 * most
    # What the model computes and a few shards in the making, not the fifty shards on the disk.
    assert max(found) - before < on_disk / 3
    for batch in np.array_split(np.arange(len(rows)), 60):
        teacher(make_batch(batch, rows, tokens), needs_of(teacher.kept))
    assert memory() - before < on_disk / 3


def test_padding_of_a_batch_is_not_part_of_a_row() -> None:
    tokens = make_tokens(ROWS, make_live().encoder)
    inputs = pad(tokens, np.arange(4))
    length = int(inputs.attention_mask[0].sum())
    assert inputs.token_type_ids is not None
    found = key_of(inputs.input_ids[0, :length].numpy(), inputs.token_type_ids[0, :length].numpy())
    assert found == keys_of(tokens)[0]
