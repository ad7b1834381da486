"""Students: from a size, from the teacher's layers, from a checkpoint."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from stillroom import encoder, student
from stillroom.encoder import Encoder, Needs, weights_hash
from stillroom.errors import WrongInput
from stillroom.student import Size, parse_layers, parse_size
from tiny import FAMILIES, make_batch_of, make_encoder, make_rows, make_task, save_encoder

TASK = make_task()
STATES = Needs(logits=True, hidden_states=frozenset({0, 1}))


def outputs_of(model: Encoder) -> Any:
    with torch.no_grad():
        return model(make_batch_of(make_rows(TASK, 6), model).student, STATES)


def block_of(model: Encoder, number: int) -> dict[str, torch.Tensor]:
    """Return the weights of block `number` (from 1)."""
    return dict(model.blocks()[1][number - 1].state_dict())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4x312", Size(4, 312, 12, 1200)),
        ("6x384", Size(6, 384, 6, 1536)),
        ("2x128", Size(2, 128, 2, 512)),
        ("12x768", Size(12, 768, 12, 3072)),
        # No heads of 64 fit 100: two heads of 50.
        ("1x100", Size(1, 100, 2, 400)),
        ("3x32", Size(3, 32, 1, 128)),
        ("2x24x3", Size(2, 24, 3, 96)),
        ("2x24x3x50", Size(2, 24, 3, 50)),
        ("4x312x6", Size(4, 312, 6, 1200)),
    ],
)
def test_sizes(text: str, size: Size) -> None:
    assert parse_size(text) == size


CHECKPOINTS = "minilm-l6|org/4x312|org/4x312-name|4x312-name|./4x|/4x|4by312|layers"
MISSPELT = "|x312|4x|4x312x|1x16x1x|4 x 312| 4x312|-4x312|4x31x1x9x1|4X312|4×312|4|2,4"
MISSPELT += "|layers:|layers:a|layers:1,2,|layers:1, 2|layers=1,2|Layer:1|layers :1"


@pytest.mark.parametrize("text", CHECKPOINTS.split("|"))
def test_names_of_checkpoints_are_neither(text: str) -> None:
    assert parse_size(text) is None and parse_layers(text) is None


@pytest.mark.parametrize("text", MISSPELT.split("|"))
def test_misspelt_sizes_and_layers_are_not_taken_for_checkpoints(text: str) -> None:
    for parse in (parse_size, parse_layers, student.require_checkpoint):
        with pytest.raises(WrongInput, match=rf"4x312.*layers:2,4,6.*found {re.escape(repr(text))}"):
            parse(text)


def test_a_folder_may_be_called_like_a_misspelt_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "4x", width=24)
    assert student.build("4x", make_encoder(layers=4), TASK, seed=0).width == 24


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0x16", "at least one layer"),
        ("2x0", "one unit"),
        ("2x24x5", "5 heads do not divide a width of 24.*2x24x1"),
        ("2x24x0", "0 heads"),
        ("2x24x2x0", "2 heads|FFN|ffn"),
    ],
)
def test_impossible_sizes_are_refused(text: str, match: str) -> None:
    with pytest.raises(WrongInput, match=match):
        parse_size(text)


def test_layers() -> None:
    assert parse_layers("layers:2,4,6") == (2, 4, 6)
    assert parse_layers("layers:12") == (12,)
    assert parse_layers("4x312") is None and parse_size("layers:2,4,6") is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(2, 4), (1, 3, 4), (4,)], ids=str)
def test_copies_exactly_those_layers_and_all_that_is_no_layer(family: str, layers: tuple[int, ...]) -> None:
    teacher = make_encoder(family, layers=4)
    made = student.build(f"layers:{','.join(map(str, layers))}", teacher, TASK, seed=0)
    assert made.depth == len(layers) == len(made.blocks()[1])
    for position, layer in enumerate(layers, start=1):
        found, want = block_of(made, position), block_of(teacher, layer)
        # ModernBERT's first block has no attention norm.
        assert found.keys() == want.keys() or (family, position) == ("modernbert", 1)
        for name, value in found.items():
            assert torch.equal(value, want[name]), (position, name)
        others = [block_of(teacher, other) for other in range(1, 5) if other != layer]
        assert all(any(not torch.equal(found[n], o[n]) for n in found if n in o) for o in others)
    prefix = made.blocks()[0]
    outside = {n: v for n, v in made.model.state_dict().items() if not n.startswith(f"{prefix}.")}
    assert any("classifier" in name for name in outside) and any("embed" in name for name in outside)
    for name, value in outside.items():
        assert torch.equal(value, teacher.model.state_dict()[name]), name
    assert torch.equal(outputs_of(made).hidden_states[0], outputs_of(teacher).hidden_states[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_teacher_itself(family: str) -> None:
    teacher = make_encoder(family, layers=3)
    made = student.build("layers:1,2,3", teacher, TASK, seed=0)
    assert weights_hash(made.model) == weights_hash(teacher.model)
    assert torch.equal(outputs_of(made).logits, outputs_of(teacher).logits)
    first = student.build("layers:1,3", teacher, TASK, seed=0)
    assert torch.equal(outputs_of(first).hidden_states[1], outputs_of(teacher).hidden_states[1])


def test_copied_weights_are_copies() -> None:
    """Shared storage would train the teacher along with the student."""
    teacher = make_encoder(layers=4)
    before = weights_hash(teacher.model)
    made = student.build("layers:2,4", teacher, TASK, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    made.tokenizer.add_tokens(["new"])
    made.config.id2label[0] = "changed"
    assert weights_hash(teacher.model) == before
    assert len(teacher.tokenizer) == len(made.tokenizer) - 1
    assert teacher.labels == TASK.labels
    assert teacher.depth == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_gives_that_size_in_the_teachers_family(family: str) -> None:
    teacher = make_encoder(family, layers=4, width=16)
    made = student.build("3x24x3x50", teacher, TASK, seed=0)
    assert type(made.model) is type(teacher.model)
    assert (made.depth, made.width, made.config.num_attention_heads) == (3, 24, 3)
    assert len(made.blocks()[1]) == 3
    shapes = [tuple(value.shape) for value in block_of(made, 2).values()]
    # ModernBERT's gated FFN has both halves in one matrix.
    assert ((50, 24) if family != "modernbert" else (100, 24)) in shapes
    found = outputs_of(made)
    assert found.hidden_states[1].shape[-1] == 24
    assert found.logits.shape == (6, 2) and torch.isfinite(found.logits).all()
    assert made.tokenizer is not teacher.tokenizer
    assert made.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()


def test_deeper_than_its_teacher() -> None:
    made = student.build("6x16x2", make_encoder("modernbert", layers=4), TASK, seed=0)
    assert made.depth == len(made.config.layer_types) == 6
    assert torch.isfinite(outputs_of(made).logits).all()


@pytest.mark.parametrize("family", ["modernbert"])
def test_kinds_of_attention_go_with_their_layers(family: str) -> None:
    """ModernBERT's blocks attend globally or locally: a copied block keeps its kind."""
    teacher = make_encoder(family, layers=4)
    kinds = list(teacher.config.layer_types)
    assert len(set(kinds)) == 2
    made = student.build("layers:2,4", teacher, TASK, seed=0)
    assert list(made.config.layer_types) == [kinds[1], kinds[3]]


def test_what_starts_at_random_starts_from_the_seed_alone() -> None:
    teacher = make_encoder(layers=4)
    hashes = []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(i)
        state = torch.get_rng_state()
        hashes.append(weights_hash(student.build("2x24", teacher, TASK, seed=seed).model))
        assert torch.equal(torch.get_rng_state(), state), "the caller's random state was moved"
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_head_fits_the_task(kind: Any) -> None:
    task = make_task(kind)
    made = student.build("2x24", make_encoder(layers=4, task=task), task, seed=0)
    assert outputs_of(made).logits.shape == (6, task.outputs)
    assert made.labels == (task.labels or ("score",))
    assert made.config.problem_type in ("regression", "multi_label_classification")


@pytest.mark.parametrize("layers", ["5", "0,2", "4,2", "2,2", "1,2,3,4,5"])
def test_layers_the_teacher_does_not_have_are_refused(layers: str) -> None:
    with pytest.raises(WrongInput, match=rf"layers:{layers}: expected rising layer numbers from 1 to 4"):
        student.build(f"layers:{layers}", make_encoder(layers=4), TASK, seed=0)


def test_a_checkpoint_gets_the_tasks_head(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "m", width=24)
    task = make_task("multi-label")
    made = student.build(str(folder), make_encoder(layers=4, task=task), task, seed=0)
    assert (made.width, made.labels) == (24, ("x", "y", "z"))
    again = student.build(str(folder), make_encoder(layers=4, task=task), task, seed=0)
    assert weights_hash(made.model) == weights_hash(again.model)
    other = student.build(str(folder), make_encoder(layers=4, task=task), task, seed=1)
    assert weights_hash(made.model) != weights_hash(other.model)


@pytest.mark.parametrize("text", ["./no-such-student", "layers:a", "4x", "4by312"])
def test_what_is_no_student_is_refused(text: str) -> None:
    with pytest.raises(WrongInput, match=re.escape(text)):
        student.build(text, make_encoder(layers=4), TASK, seed=0)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"memory.max": "2000000000\n"}, 2 * 10**9),
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/b/memory.max": "max\n", "a/memory.max": "3000000000\n"}, 3 * 10**9),
        ("0::/host/path", {"memory.max": "2000000000\n"}, 2 * 10**9),
        ("4:memory:/x\n0::/", {"memory/memory.limit_in_bytes": "1000000000\n"}, 10**9),
        ("4:memory:/x", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("3:cpu:/\n0::/", {"memory/memory.limit_in_bytes": "1000000000\n"}, None),
        (None, {"memory.max": "2000000000\n"}, None),
    ],
)
def test_a_containers_limit_counts_as_the_machines_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    limits: dict[str, str],
    expected: int | None,
) -> None:
    """A student too large for the container was begun, and killed by the system."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**7}.__getitem__)
    monkeypatch.setattr(student, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(student, "_OWN_CGROUP", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    for name, text in limits.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert student._memory() == (expected or 4096 * 10**7)


@pytest.mark.parametrize("size", ["2x20000", "9999999x16", "2x16x2x999999999"])
def test_a_student_beyond_the_machines_memory_is_refused_before_it_is_made(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would kill the process, and others beside it, without a word."""
    monkeypatch.setattr(student, "_memory", lambda: 24 * 10**9)
    monkeypatch.setattr(encoder, "fresh", lambda config, like: pytest.fail("made"))
    with pytest.raises(
        WrongInput, match="million parameters: .* GB, and this machine, or the container, has 24 GB"
    ):
        student.build(size, make_encoder(layers=4, width=24), make_task(), seed=0)


def test_a_family_that_has_no_number_of_layers_to_set_is_refused() -> None:
    config = AutoConfig.for_model("funnel")
    with pytest.raises(WrongInput, match="family funnel cannot be made with another number of layers"):
        student._set_depth(config, [0, 1])
