"""Augmented rows: masks, straight-through words, phases, and who is moved by which step."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, weights_hash
from stillroom.methods.base import Augmentation
from stillroom.training import augmentation, checkpoint
from stillroom.training.augmentation import (
    Augmenter,
    gumbel_like,
    masked_positions,
    mixed_words,
    with_words,
)
from stillroom.training.distiller import Distiller
from stillroom.training.loop import Job, train
from tiny import FAMILIES, make_batch_of, make_generator, make_job

GOLDEN = {
    example["name"]: example
    for example in json.loads((Path(__file__).parents[1] / "golden/cilda.json").read_text())["examples"]
}
D2, D5 = GOLDEN["D2_gumbel_mix"], GOLDEN["D5_schedule"]


def rule(**given: Any) -> Augmentation:
    chosen: dict[str, Any] = {
        "generator": "tiny",
        "weights": {"soft": 1.0},
        "mask_probability": 0.3,
        "masks": "fresh",
        "generator_steps": 10,
        "student_steps": 100,
        "learning_rate": 5e-7,
        "student_mode": "eval",
    }
    return Augmentation(**{**chosen, **given})


def mixed_naively(ids: Tensor, mask: Tensor, scores: Tensor, table: Tensor) -> Tensor:
    """Return the mixed embeddings by the formula: a one-hot of every position, a product, a blend."""
    soft = torch.softmax(scores, -1)
    onehot = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft.dtype)
    straight = (onehot - soft).detach() + soft
    m = mask[..., None]
    return m * (straight @ table) + (1 - m) * table[ids]


def test_golden_gumbel_and_mixing() -> None:
    inputs, want = D2["inputs"], D2["expected"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(inputs["gumbel"], dtype=torch.float64)
    table = torch.tensor(inputs["embedding"], dtype=torch.float64)
    ids, mask = torch.tensor([inputs["ids"]]), torch.tensor(inputs["mask"])
    positions = mask.nonzero()[:, 0]
    scores = logits + noise
    assert scores.softmax(-1).tolist() == [pytest.approx(row, abs=1e-9) for row in want["soft"]]
    assert scores.argmax(-1).tolist() == want["argmax"]
    mixed = mixed_words(ids, positions, scores[positions], table)
    assert mixed[0].tolist() == want["mixed"]
    (gradient,) = torch.autograd.grad(mixed.sum(), logits)
    for found, row in zip(gradient, want["grad_sum_of_mixed"], strict=True):
        assert found.tolist() == pytest.approx(row, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_words_and_their_gradient_are_the_formula(seed: int) -> None:
    """The table is read once instead of multiplied by one-hots; a gradient to a wrong row trains noise."""
    torch.manual_seed(seed)
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (3, 4))
    mask = (torch.rand(3, 4) < 0.5).double()
    scores = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    short = table.detach()[:9]
    want = mask[..., None] * mixed_naively(ids.clamp(max=8), mask, scores, short)
    want = want + (1 - mask[..., None]) * table.detach()[ids]
    positions = mask.flatten().nonzero()[:, 0]
    found = mixed_words(ids, positions, scores.flatten(0, 1)[positions], table)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    goals = [torch.autograd.grad((x * weight).sum(), scores)[0] for x in (want, found)]
    assert goals[0].abs().max() > 0.01
    torch.testing.assert_close(goals[1], goals[0], rtol=1e-12, atol=1e-12)
    # Words that are not masked are the table's rows to the last bit.
    kept = mask == 0
    assert torch.equal(found[kept], table.detach()[ids][kept])
    # In a generator step the tables stand still.
    assert not torch.autograd.grad((found * weight).sum(), table, allow_unused=True)[0]


def test_the_soft_path_passes_gradcheck() -> None:
    """The gradient of the straight-through words is that of softmax times table."""
    torch.manual_seed(0)
    table = torch.randn(7, 3, dtype=torch.float64)
    scores = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 4, 3, dtype=torch.float64)
    positions = torch.tensor([1, 3])
    mixed = mixed_words(torch.zeros(1, 4, dtype=torch.long), positions, scores, table)
    (found,) = torch.autograd.grad((mixed * weight).sum(), scores)
    soft = (scores.softmax(-1) @ table * weight[0, positions]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(soft, scores)[0], rtol=1e-12, atol=1e-12)


def test_gumbel_noise_draws_words_by_their_probability() -> None:
    """argmax(logits + noise) is a draw from softmax(logits): the Gumbel-max theorem."""
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).expand(200_000, 3)
    drawn = (logits + gumbel_like(logits)).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    # Three standard errors of a share near one half are 0.0034.
    assert share.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.004)


def test_golden_schedule() -> None:
    expected, parameters = D5["expected"], D5["parameters"]
    phases = rule(generator_steps=parameters["n_generator"], student_steps=parameters["n_student"])
    found = ["G" if phases.moves_generator(step) else "S" for step in D5["inputs"]["steps"]]
    assert found == expected["phases"]
    count = sum(phases.moves_generator(step) for step in range(1100))
    assert [count, 1100 - count] == expected["G_S_in_1100_steps"]
    for rows, want in zip(D5["inputs"]["train_sizes"], expected["G_S_in_first_epoch"], strict=True):
        steps = -(-rows // parameters["batch_size"])
        count = sum(phases.moves_generator(step) for step in range(steps))
        assert [count, steps - count] == want


SPECIAL = frozenset({0, 1, 2, 3, 4})


def make_inputs(rows: int = 40, width: int = 30) -> Inputs:
    ids = torch.randint(5, 30, (rows, width))
    lengths = torch.randint(4, width + 1, (rows, 1))
    mask = (torch.arange(width) < lengths).long()
    ids[:, 0], ids = 2, torch.where(mask == 1, ids, 0)
    ids[torch.arange(rows), lengths[:, 0] - 1] = 3
    return Inputs(ids, mask, None)


def masked(inputs: Inputs, rows: Tensor | None = None, **given: Any) -> Tensor:
    """Return the mask, `(B, S)`."""
    rows = torch.arange(len(inputs.input_ids)) if rows is None else rows
    chosen = {"special": SPECIAL, "probability": 0.3, "seed": 0, "draw": 0, **given}
    flat = torch.zeros(inputs.input_ids.numel(), dtype=torch.bool)
    flat[masked_positions(inputs, rows, **chosen)] = True
    return flat.view_as(inputs.input_ids)


def test_special_tokens_and_padding_are_never_masked() -> None:
    torch.manual_seed(0)
    inputs = make_inputs()
    # Padding may hold a word's id: the mask decides.
    noisy = Inputs(inputs.input_ids + 9 * (1 - inputs.attention_mask), inputs.attention_mask, None)
    words = (inputs.attention_mask == 1) & ~torch.isin(inputs.input_ids, torch.tensor(list(SPECIAL)))
    for draw in range(20):
        assert not (masked(noisy, draw=draw) & ~words).any()
    assert torch.equal(masked(inputs, probability=1.0), words)
    assert not masked(inputs, probability=0.0).any()


def test_each_word_is_masked_with_the_given_probability() -> None:
    torch.manual_seed(0)
    inputs = make_inputs()
    words = int(masked(inputs, probability=1.0).sum())
    found = sum(int(masked(inputs, draw=draw).sum()) for draw in range(100))
    # Four standard errors of 0.3 over about 66,000 draws.
    assert found / (100 * words) == pytest.approx(0.3, abs=0.008)


def test_masks_are_the_rows_own() -> None:
    """A mask that hung on the batch would change with batch size, order, or padding."""
    torch.manual_seed(0)
    inputs = make_inputs()
    whole = masked(inputs)
    part = Inputs(inputs.input_ids[5:9, :25], inputs.attention_mask[5:9, :25], None)
    assert torch.equal(masked(part, torch.arange(5, 9)), whole[5:9, :25])
    assert torch.equal(masked(inputs), whole)
    for other in ({"draw": 1}, {"seed": 1}):
        assert not torch.equal(masked(inputs, **other), whole)


def test_with_words_changes_what_it_is_told_to() -> None:
    inputs = make_inputs(rows=3, width=6)
    before = copy.deepcopy(inputs)
    changed = with_words(inputs, torch.tensor([1, 8]), torch.tensor([7, 9]))
    assert (changed.input_ids[0, 1], changed.input_ids[1, 2]) == (7, 9)
    assert torch.equal(inputs.input_ids, before.input_ids)
    flat = np.delete(changed.input_ids.numpy().ravel(), [1, 8])
    assert np.array_equal(flat, np.delete(before.input_ids.numpy().ravel(), [1, 8]))
    assert changed.attention_mask is inputs.attention_mask


QUIET = Console(quiet=True)
OPTIONS = {"generator": "tiny", "n_generator": 2, "n_student": 3, "generator_learning_rate": 1e-3}


def job_of(
    folder: Path, *, method: str = "cilda", family: str = "bert", options: Any = None, **given: Any
) -> Job:
    return make_job(folder, method=method, options={**OPTIONS, **(options or {})}, family=family, **given)


def parts_of(job: Job) -> tuple[Distiller, Augmenter, Batch]:
    """Return the distiller without dropout, its augmenter, and a batch of all rows."""
    distiller = Distiller(job.student, job.plan, bf16=False).eval()
    augmenter = Augmenter(job.plan, job.generator, job.live_teacher, distiller, seed=0, bf16=False)
    return distiller, augmenter, make_batch_of(job.rows, job.student)


def hashes(job: Job) -> tuple[str, str, str]:
    """Return the SHA-256 of teacher, student and generator."""
    return tuple(weights_hash(m) for m in (job.live_teacher.module, job.student.model, job.generator.model))


def test_each_step_moves_its_own_player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator changes in generator steps only, the student in student steps only, the teacher never.

    Over an epoch boundary (six steps) and in two cycles of five.
    """
    job = job_of(tmp_path, checkpoint_every=1, select="last")
    seen = [hashes(job)]
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (seen.append(hashes(job)), save(*a, **k)))
    assert train(job, QUIET).steps == 12
    assert len(seen) == 13
    for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        moved = [x != y for x, y in zip(before, after, strict=True)]
        assert moved == ([False, False, True] if step % 5 < 2 else [False, True, False]), step


def test_the_phase_survives_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that began anew would give the generator two more steps after each restart."""
    monkeypatch.setattr(checkpoint, "save", stop_after_four(checkpoint.save))
    with pytest.raises(KeyboardInterrupt):
        train(job_of(tmp_path, checkpoint_every=1), QUIET)
    train(job_of(tmp_path, checkpoint_every=1), QUIET)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert ["objective" in line for line in steps] == [(i % 5) < 2 for i in range(12)]
    assert all(
        {"generator_soft", "generator_contrast"} <= set(line) for line in steps if "objective" in line
    )
    assert all({"soft", "hard", "augmented_soft"} <= set(line) for line in steps if "loss" in line)


def stop_after_four(save: Any) -> Any:
    calls = []

    def stopper(*args: Any, **kwargs: Any) -> Any:
        found = save(*args, **kwargs)
        calls.append(found)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return found

    return stopper


@pytest.mark.parametrize("family", FAMILIES)
def test_words_in_place_of_ids_compute_the_same(family: str) -> None:
    """A family that skipped its position embeddings for given words would see another text."""
    job = job_of(Path(), family=family, count=8)
    _, _, batch = parts_of(job)
    for model in (job.student, job.live_teacher.encoder):
        needs = Needs(logits=True, hidden_states=frozenset({0, 2}))
        want = model(batch.student, needs)
        found = model(batch.student, needs, words=model.words[batch.student.input_ids])
        real = batch.student.attention_mask[..., None]
        torch.testing.assert_close(found.logits, want.logits)
        for i in (0, 2):
            torch.testing.assert_close(found.hidden_states[i] * real, want.hidden_states[i] * real)


@pytest.mark.parametrize("family", FAMILIES)
def test_generator_computes_its_head_at_chosen_positions_alone(family: str) -> None:
    generator = make_generator(family)
    job = job_of(Path(), family=family, count=8)
    inputs = make_batch_of(job.rows, job.student).student
    types = {} if inputs.token_type_ids is None else {"token_type_ids": inputs.token_type_ids}
    want = generator.model(inputs.input_ids, attention_mask=inputs.attention_mask, **types).logits
    positions = torch.tensor([1, 2, inputs.input_ids.shape[1] + 1])
    torch.testing.assert_close(generator.guess(inputs, positions), want.flatten(0, 1)[positions])
    assert generator.guess(inputs, positions[:0]).shape == (0, want.shape[-1])
    # The hook is gone: all positions again.
    assert generator.model(inputs.input_ids).logits.shape == want.shape


def objective_of(augmenter: Augmenter, batch: Batch, noise: int = 0) -> Tensor:
    torch.manual_seed(noise)
    augmenter.generator.eval()
    return augmenter.objective(batch, augmenter.draw(batch, 0)).total


def sharpen(job: Job) -> None:
    """Make matrices larger: models that start at random hardly react to another word."""
    with torch.no_grad():
        for model in (job.student, job.live_teacher.encoder, job.generator):
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8.0)


@pytest.mark.parametrize(
    ("method", "options"),
    [("cilda", {"projections": "frozen"}), ("cilda", {"projections": "adv"}), ("mate-kd", {})],
)
def test_a_small_generator_step_raises_its_objective(
    tmp_path: Path, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fixed rows and noise. The straight-through gradient is not exact, so the words are made soft."""

    def softened(ids: Tensor, positions: Tensor, scores: Tensor, table: Tensor) -> Tensor:
        words = table.detach()[ids.flatten()]
        return words.index_copy(0, positions, scores.softmax(-1) @ table.detach()).view(*ids.shape, -1)

    monkeypatch.setattr(augmentation, "mixed_words", softened)
    job = job_of(tmp_path, method=method, options=options)
    sharpen(job)
    _, augmenter, batch = parts_of(job)
    # Dropout would be other noise in each pass.
    monkeypatch.setattr(augmenter.generator, "train", lambda mode=True: augmenter.generator)
    before = objective_of(augmenter, batch)
    before.backward()
    slope = sum(float(p.grad.abs().sum()) for p in augmenter.trained.values())
    # Adam's first step is the rate along each sign: to first order it gains the rate times this.
    augmenter.step(1e-3, 0.1, max_norm=1e9)
    gain = (objective_of(augmenter, batch) - before).item()
    assert gain > 0
    assert gain == pytest.approx(1e-4 * slope, rel=0.2)


def test_projections_lower_or_raise_the_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`min` moves the projections against the generator, `adv` with it."""
    found = {}
    for projections in ("min", "adv"):
        job = job_of(tmp_path, options={"projections": projections, "a1": 0.0})
        sharpen(job)
        _, augmenter, batch = parts_of(job)
        monkeypatch.setattr(augmenter.generator, "train", lambda mode=True, a=augmenter: a.generator)
        augmenter.generator.requires_grad_(False)
        before = objective_of(augmenter, batch)
        before.backward()
        augmenter.step(1e-3, 1.0, max_norm=1e9)
        found[projections] = (objective_of(augmenter, batch) - before).item()
    assert found["min"] < 0 < found["adv"]


def test_a_generator_step_gives_models_no_gradient_and_leaves_their_modes(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    distiller, augmenter, batch = parts_of(job)
    distiller.train()
    augmenter.objective(batch, augmenter.draw(batch, 0)).total.backward()
    assert all(p.grad is None for p in job.student.parameters())
    assert all(p.grad is None for p in job.live_teacher.module.parameters())
    assert all(p.requires_grad for p in job.student.parameters())
    assert job.student.training and not job.live_teacher.module.training


def test_the_student_has_dropout_in_generator_steps_only_if_told(tmp_path: Path) -> None:
    """MATE-KD's code keeps it; TKC002's evaluates the student."""
    for mode, training in (("eval", False), ("train", True)):
        job = job_of(tmp_path, options={"student_mode": mode})
        _, augmenter, batch = parts_of(job)
        seen: list[bool] = []
        job.student.model.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m.training))
        augmenter.objective(batch, augmenter.draw(batch, 0))
        assert seen == [training]
        assert augmenter.generator.training
        augmenter.augment(batch, augmenter.draw(batch, 0), job.plan.stages[0])
        assert augmenter.generator.training == training


def test_nothing_masked_leaves_rows_and_loss_and_gives_no_gradient(tmp_path: Path) -> None:
    """Short rows may have no masked word: then X' is X, and KD(X') is KD(X)."""
    job = job_of(tmp_path, method="mate-kd")
    distiller, augmenter, batch = parts_of(job)
    none, stage = torch.empty(0, dtype=torch.long), job.plan.stages[0]
    augmented = augmenter.augment(batch, none, stage)
    assert torch.equal(augmented.batch.student.input_ids, batch.student.input_ids)
    teacher = job.teacher(batch, job.plan.teacher_needs(stage))
    terms = distiller(batch, teacher, stage, augmented).terms
    assert terms["augmented_soft"].item() == terms["soft"].item()
    loss = augmenter.objective(batch, none)
    assert loss.terms["generator_soft"].item() == pytest.approx(terms["soft"].item(), rel=1e-5)
    loss.total.backward()
    assert not any(p.grad is not None and p.grad.any() for p in augmenter.generator.parameters())


def test_only_masked_words_are_rewritten_and_never_to_padding(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    _, augmenter, batch = parts_of(job)
    with torch.no_grad():
        # A generator that would like nothing better than padding.
        augmenter.generator.model.get_output_embeddings().bias[0] = 100.0
    changed = False
    for step in range(5):
        positions = augmenter.draw(batch, step)
        rows = augmenter.rewrite(batch, positions).student
        kept = torch.ones(batch.student.input_ids.numel(), dtype=torch.bool)
        kept[positions] = False
        old, new = batch.student.input_ids.flatten(), rows.input_ids.flatten()
        assert torch.equal(old[kept], new[kept])
        assert (new[positions] != 0).all()
        changed |= bool((old != new).any())
    assert changed


def test_fixed_masks_stay_and_fresh_ones_do_not(tmp_path: Path) -> None:
    for masks, same in (("fixed", True), ("fresh", False)):
        _, augmenter, batch = parts_of(job_of(tmp_path, options={"masks": masks}))
        first, later = augmenter.draw(batch, 3), augmenter.draw(batch, 40)
        assert torch.equal(first, later) == same


def test_the_generator_step_computes_at_the_words_that_are_drawn(tmp_path: Path) -> None:
    """What the student step trains on and what the generator step raises are the same texts."""
    job = job_of(tmp_path, method="mate-kd")
    distiller, augmenter, batch = parts_of(job)
    positions = augmenter.draw(batch, 0)
    seen: list[Tensor] = []
    job.student.model.base_model.embeddings.register_forward_hook(lambda m, g, out: seen.append(out))
    want = objective_of(augmenter, batch, noise=5)
    torch.manual_seed(5)
    changed = augmenter.rewrite(batch, positions)
    student = job.student(changed.student, Needs(logits=True))
    teacher = job.live_teacher(changed, Needs(logits=True))
    found = distiller.weigh(student, teacher, changed, {"soft": 1.0}).total
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(found, want)


def test_models_of_other_tables_share_the_vocabulary(tmp_path: Path) -> None:
    """A table padded to a round size has rows that no token has: a generator must not name them."""
    job = job_of(tmp_path)
    for model in (job.generator.model, job.live_teacher.encoder.model):
        model.resize_token_embeddings(64)
    _, augmenter, batch = parts_of(job)
    with torch.no_grad():
        augmenter.generator.model.get_output_embeddings().bias[50] = 100.0
    changed = augmenter.rewrite(batch, augmenter.draw(batch, 0))
    assert int(changed.student.input_ids.max()) < len(job.student.tokenizer)
    objective_of(augmenter, batch).backward()


def test_a_run_without_generator_or_live_teacher_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    for missing in ("generator", "live_teacher"):
        with pytest.raises(ValueError, match="generator and a live teacher"):
            train(replace(job, **{missing: None}), QUIET)


def test_student_and_teacher_may_have_other_token_types(tmp_path: Path) -> None:
    """BERT reads token types and DistilBERT none: each keeps its own on augmented rows."""
    job = job_of(tmp_path)
    _, augmenter, batch = parts_of(job)
    without = replace(batch.student, token_type_ids=None)
    changed = augmenter.rewrite(replace(batch, student=without), augmenter.draw(batch, 0))
    assert changed.student.token_type_ids is None
    assert changed.teacher.token_type_ids is batch.teacher.token_type_ids
    assert torch.equal(changed.student.input_ids, changed.teacher.input_ids)


def test_a_long_run_hands_the_generator_its_rate(tmp_path: Path) -> None:
    """The generator's rate has the shape of the student's; a rate that stays 0 would train nothing."""
    _, augmenter, batch = parts_of(job_of(tmp_path))
    objective_of(augmenter, batch).backward()
    augmenter.step(5e-4, 0.5, max_norm=1.0)
    rates = {group["maximize"]: group["lr"] for group in augmenter.optimizer.param_groups}
    # Projections are trained as terms are, at the student's rate.
    assert rates == {True: pytest.approx(0.5e-3), False: 5e-4}


def test_checkpoints_hold_the_generator_and_the_student_does_not(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    train(job, QUIET)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    other = make_generator(seed=9)
    checkpoint.load_generator(other, newest)
    assert weights_hash(other.model) == weights_hash(job.generator.model)
    job.student.save(tmp_path / "student")
    with safe_open(tmp_path / "student/model.safetensors", "pt") as file:
        assert not any(name.startswith(("cls.", "generator", "terms")) for name in file.keys())
