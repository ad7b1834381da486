"""A student that starts from its teacher: exact where nothing is lost, and what is lost is the least."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForMaskedLM
from workspace import write_data

from stillroom import Recipe, distill, methods, start, student
from stillroom.data.tasks import Dataset
from stillroom.encoder import Encoder, Needs, weights_hash
from stillroom.errors import WrongInput
from stillroom.provenance import RECIPE
from stillroom.recipe import MethodSettings
from stillroom.run.parts import context_of
from stillroom.start import folding
from stillroom.start.basis import principal_projection
from stillroom.start.families import FAMILIES
from stillroom.start.statistics import statistics
from stillroom.start.text import NORM_TOKENS, TOKENS, joined, sample
from tiny import make_batch_of, make_encoder, make_rows, make_task, make_teacher, make_tokens, save_encoder

TASK = make_task()
ROWS = make_rows(TASK, 64)
KNOWN = ("bert", "roberta", "distilbert")
QUIET = Console(quiet=True)


def made(text: str, teacher: Encoder, init: str = "pca", *, seed: int = 0) -> Encoder:
    return student.build(text, teacher, TASK, seed=seed, init=init, tokens=make_tokens(ROWS, teacher))


def run(model: Encoder, *states: int) -> Any:
    with torch.no_grad():
        needs = Needs(logits=True, hidden_states=frozenset(states))
        return model(make_batch_of(ROWS, model).student, needs)


def logits(model: Encoder) -> Tensor:
    found: Tensor = run(model).logits
    return found


def varied(teacher: Encoder) -> Encoder:
    """Return the teacher with norms and biases as training leaves them, not all ones and zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "embeddings" not in name:
                parameter.mul_(5)
    return teacher


def covariance(width: int = 12, seed: int = 0) -> Tensor:
    states = np.random.default_rng(seed).normal(size=(200, width)) * np.linspace(0.1, 3, width)
    return torch.from_numpy(
        np.cov(states @ np.random.default_rng(1).normal(size=(width, width)), rowvar=False)
    )


# The projection


@pytest.mark.parametrize("width", [2, 5, 11, 12])
def test_projection_is_an_orthonormal_basis_of_the_principal_directions(width: int) -> None:
    matrix = covariance()
    P = principal_projection(matrix, width)
    assert torch.allclose(P.T @ P, torch.eye(width, dtype=torch.float64), atol=1e-12)
    # The constant vector is kept as the constant vector, so that centring commutes with P.
    assert torch.allclose(
        P @ torch.full((width,), width**-0.5).double(), torch.full((12,), 12**-0.5).double()
    )
    centring = torch.eye(12).double() - 1 / 12
    variance = torch.linalg.eigvalsh(centring @ matrix @ centring)
    kept = (P.T @ centring @ matrix @ centring @ P).trace()
    assert kept.item() == pytest.approx(variance[-(width - 1) :].sum().item(), rel=1e-9)


def test_projection_is_the_identity_where_nothing_is_dropped() -> None:
    assert torch.equal(principal_projection(covariance(), 12), torch.eye(12, dtype=torch.float64))


def test_projection_is_the_nearest_to_the_axes() -> None:
    """No rotation of the basis that keeps the constant vector lies nearer to the axes it stands for."""
    matrix = covariance()
    P = principal_projection(matrix, 6)
    axes = P.square().sum(1).topk(6).indices.sort().values
    c = torch.full((6, 1), 6**-0.5, dtype=torch.float64)
    chance = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0):
        turn = scale * torch.randn(6, 6, generator=chance, dtype=torch.float64)
        skew = (turn - turn.T) / 2
        centred = torch.eye(6).double() - c @ c.T
        rotation = torch.linalg.matrix_exp(centred @ skew @ centred)
        assert P[axes].trace() >= (P @ rotation)[axes].trace()


# Exactness


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("layers", [4, 2])
def test_exact_where_the_widths_agree(family: str, layers: int) -> None:
    teacher = varied(make_encoder(family, layers=4))
    want = made("layers:1,2,3,4" if layers == 4 else "layers:2,4", teacher, "auto")
    for init in ("pca", "teacher"):
        assert weights_hash(made(f"{layers}x16x2x32", teacher, init).model) == weights_hash(want.model)
    assert weights_hash(made("layers:2,4", teacher).model) == weights_hash(
        made("layers:2,4", teacher, "auto").model
    )
    # The folding itself, which `build` has no need of here.
    folded = made(f"{layers}x16x2x32", teacher, "random", seed=3)
    kept = (1, 2, 3, 4) if layers == 4 else (2, 4)
    start.fold(teacher, folded, kept, make_tokens(ROWS, teacher))
    if layers == 4:
        # With a layer gone, the norms of what is left are fitted to the layers that were there.
        assert torch.allclose(logits(folded), logits(teacher), atol=1e-5)
    for name, value in folded.model.state_dict().items():
        if "norm" not in name.lower():
            assert torch.allclose(value, want.model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("family", KNOWN)
def test_exact_where_what_goes_writes_nothing_that_varies(family: str) -> None:
    """Half of the units write nothing, or the same in every state: a student without them is exact."""
    teacher = varied(make_encoder(family, layers=2))
    names = FAMILIES[family]
    with torch.no_grad():
        for block in teacher.blocks()[1]:
            into, out = block.get_submodule(names.ffn_in), block.get_submodule(names.ffn_out)
            out.weight[:, 1::4] = 0
            into.weight[3::4] = 0
            into.bias[3::4] = 0.5
            out.weight[:, 3::4] *= 1e-2
    found = made("2x16x2x16", teacher)
    assert found.model.state_dict().keys() == teacher.model.state_dict().keys()
    assert torch.allclose(logits(found), logits(teacher), atol=1e-5)
    first = found.blocks()[1][0].get_submodule(names.ffn_in).weight
    assert torch.allclose(first, teacher.blocks()[1][0].get_submodule(names.ffn_in).weight[::2])


def test_scores_are_exact_where_queries_and_keys_have_the_students_rank() -> None:
    chance = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(500, 3, generator=chance).double() @ torch.randn(3, 8, generator=chance).double()
        for _ in range(2)
    )
    A, B = folding._reduced_scores(q.T @ q / 500, torch.cov(k.T, correction=0), 3)
    centred = k - k.mean(0)
    assert torch.allclose((q @ A.T) @ (centred @ B.T).T / 3**0.5, q @ centred.T / 8**0.5, atol=1e-6)


def test_scores_lose_the_least() -> None:
    """The expected squared error over independent queries and keys is what Eckart-Young drops."""
    chance = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4000, 6, generator=chance).double() * torch.arange(1, 7) for _ in range(2))
    k = k - k.mean(0)
    query, key = q.T @ q / 4000, k.T @ k / 4000
    A, B = folding._reduced_scores(query, key, 4)
    error = torch.eye(6).double() / 6**0.5 - A.T @ B / 4**0.5
    singular = torch.linalg.svdvals(folding._root(query) @ folding._root(key)) / 6**0.5
    want = singular[4:].square().sum()
    assert (query @ error @ key @ error.T).trace().item() == pytest.approx(want.item(), rel=1e-9)


# Importance, norms, and what is left


@pytest.mark.parametrize("family", KNOWN)
def test_the_head_that_writes_most_is_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = principal_projection
    monkeypatch.setattr(folding, "principal_projection", lambda *a: seen.append(whole(*a)) or seen[-1])
    names = FAMILIES[family]
    for head in (0, 1):
        teacher = varied(make_encoder(family, layers=2))
        with torch.no_grad():
            for block in teacher.blocks()[1]:
                block.get_submodule(names.attention_out).weight[:, 8 * (1 - head) : 8 * (2 - head)] *= 1e-2
        found = made("2x8x1x32", teacher)
        old = teacher.blocks()[1][1].get_submodule(names.query).weight.double()
        new = found.blocks()[1][1].get_submodule(names.query).weight.double()
        assert torch.allclose(new, old[8 * head : 8 * (head + 1)] @ seen[-1], atol=1e-6)


def test_the_mean_of_what_goes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the mean state a kept head's query is the teacher's, and at the mean context what is written."""
    seen = []
    whole = principal_projection
    monkeypatch.setattr(folding, "principal_projection", lambda *a: seen.append(whole(*a)) or seen[-1])
    teacher = varied(make_encoder(layers=1))
    found = made("1x8x1x32", teacher)
    names, P = FAMILIES["bert"], seen[-1]
    stats = statistics(teacher, names, (1,), sample(make_tokens(ROWS, teacher), TOKENS))

    def layer(model: Encoder, name: str) -> tuple[Tensor, Tensor]:
        linear: Any = model.blocks()[1][0].get_submodule(getattr(names, name))
        return linear.weight.double(), linear.bias.double()

    (old, bias), (new, new_bias) = layer(teacher, "query"), layer(found, "query")
    mean = stats.embeddings.mean[0]
    head = 8 if torch.allclose(new, old[8:] @ P, atol=1e-6) else 0
    assert (P @ (P.T @ mean) - mean).norm() > 0.1
    assert torch.allclose(new @ (P.T @ mean) + new_bias, (old @ mean + bias)[head : head + 8], atol=1e-5)
    (old, bias), (new, new_bias) = layer(teacher, "attention_out"), layer(found, "attention_out")
    context = stats.blocks[0].context.mean
    want = P.T @ (old @ context.flatten() + bias)
    assert torch.allclose(new @ context[head // 8] + new_bias, want, atol=1e-5)


@pytest.mark.parametrize("family", KNOWN)
def test_states_follow_the_teachers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = principal_projection
    monkeypatch.setattr(folding, "principal_projection", lambda *a: seen.append(whole(*a)) or seen[-1])
    teacher = varied(make_encoder(family, layers=4, width=32))
    found = made("2x24x2x48", teacher)
    mask = make_batch_of(ROWS, teacher).student.attention_mask.bool()
    for mine, theirs in ((0, 0), (1, 2), (2, 4)):
        s = run(found, mine).hidden_states[mine][mask].double()
        goal = run(teacher, theirs).hidden_states[theirs][mask].double() @ seen[0]
        lost = (s - goal).square().sum() / (goal - goal.mean(0)).square().sum()
        assert lost < (0.2, 0.7, 0.9)[mine], mine


@pytest.mark.parametrize("name", ["lrc-bert", "angular-emd", "bert-emd", "tinybert", "distilbert", "pkd"])
def test_projections_of_a_folded_student_start_where_its_states_stand_for_the_teachers(name: str) -> None:
    teacher = make_encoder(task=TASK, layers=4, width=24)
    folded = made("2x12", teacher)
    context = context_of(Dataset(TASK, {"train": ROWS}), folded, teacher)
    plan = methods.build(MethodSettings(name=name), context)
    matrices = [
        matrix
        for term in plan.terms.values()
        for key, parameter in term.named_parameters()
        if key.startswith("projection") and "bias" not in key
        for matrix in parameter.detach().reshape(-1, *parameter.shape[-2:])
    ]
    assert matrices
    for matrix in matrices:
        P = matrix if matrix.shape == (24, 12) else matrix.T
        # Word embeddings are folded by the basis alone.
        torch.testing.assert_close(teacher.words.detach() @ P, folded.words.detach())


def test_a_narrower_checkpoint_is_turned_nearest_to_its_teacher(tmp_path: Path) -> None:
    teacher = varied(make_encoder(task=TASK, layers=4, width=24))
    varied(made("2x12", teacher)).save(tmp_path)
    loaded = student.build(str(tmp_path), teacher, TASK, seed=0, tokens=make_tokens(ROWS, teacher))
    batch = make_batch_of(ROWS, teacher).student
    mask = batch.attention_mask.bool()

    def unit(model: Encoder, *places: int) -> Tensor:
        with torch.no_grad():
            states = model(batch, Needs(hidden_states=frozenset(places))).hidden_states
        return torch.stack([states[i][mask] / states[i][mask].norm(dim=-1, keepdim=True) for i in places])

    S, T, P = unit(loaded, 0, 1, 2), unit(teacher, 0, 2, 4), loaded.basis
    assert P is not None
    torch.testing.assert_close(P.T @ P, torch.eye(12), atol=1e-5, rtol=0)

    def distance(P: Tensor) -> float:
        return float((T - S @ P.T).square().sum())

    torch.manual_seed(0)
    for size in (1e-2, 1e-1, 1.0):
        for _ in range(5):
            Q, R = torch.linalg.qr(P + size * torch.randn(24, 12))
            assert distance(P) < distance(Q * R.diagonal().sign())


@pytest.mark.parametrize("case", ["as wide", "deeper", "no text", "reads less", "other tokens"])
def test_a_checkpoint_whose_states_cannot_be_compared_has_no_basis(tmp_path: Path, case: str) -> None:
    teacher = make_encoder(task=TASK, layers=2, width=24)
    width, layers = 24 if case == "as wide" else 12, 3 if case == "deeper" else 2
    family = "roberta" if case == "other tokens" else "bert"
    other = make_encoder(family, task=TASK, layers=layers, width=width)
    if case == "reads less":
        places: Any = other.model.get_submodule("bert.embeddings.position_embeddings")
        places.weight = torch.nn.Parameter(places.weight[:4].clone())
        other.config.max_position_embeddings = 4
    other.save(tmp_path)
    tokens = None if case == "no text" else make_tokens(ROWS, teacher)
    assert student.build(str(tmp_path), teacher, TASK, seed=0, tokens=tokens).basis is None


def test_norms_are_fitted_by_least_squares() -> None:
    """On the rows that they are fitted on, residuals have no mean, and nothing of the normalised state."""
    teacher = varied(make_encoder(layers=2, width=32))
    tokens = make_tokens(ROWS, teacher)
    seen: list[Tensor] = []
    whole = principal_projection
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "principal_projection", lambda *a: seen.append(whole(*a)) or seen[-1])
        found = student.build("2x24x2x48", teacher, TASK, seed=0, init="pca", tokens=tokens)
    inputs = joined(sample(tokens, NORM_TOKENS))
    mask = inputs.attention_mask.bool()
    assert len(mask) == len(ROWS)
    with torch.no_grad():
        for layer in (0, 1, 2):
            needs = Needs(hidden_states=frozenset({layer}))
            s, t = (model(inputs, needs).hidden_states[layer][mask].double() for model in (found, teacher))
            rest = s - t @ seen[0]
            assert rest.mean(0).abs().max() < 1e-5
            scale = s.std(0) * rest.std(0)
            assert (((s - s.mean(0)) * rest).mean(0) / scale).abs().max() < 1e-3


def masked_lm(family: str, *, width: int = 24) -> Encoder:
    like = make_encoder(family, layers=2, width=width)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForMaskedLM.from_config(like.config).eval()
    return varied(Encoder(model, like.tokenizer, "masked-lm"))


@pytest.mark.parametrize("family", KNOWN)
def test_a_masked_lm_head_is_folded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact without a narrower width; else the logits' mean is kept, and most of what varies in them."""
    seen = []
    whole = principal_projection
    monkeypatch.setattr(folding, "principal_projection", lambda *a: seen.append(whole(*a)) or seen[-1])
    teacher = masked_lm(family)
    tokens = make_tokens(ROWS, teacher)
    same = student.build("2x24x2x48", teacher, None, seed=0, init="random")
    start.fold(teacher, same, (1, 2), tokens)
    assert torch.allclose(logits(same), logits(teacher), atol=1e-4)
    folded = student.build("2x20x2x48", teacher, None, seed=0, init="pca", tokens=tokens)
    rest = student.build("2x20x2x48", teacher, None, seed=0, init="random")
    start.fold(teacher, rest, (1, 2), tokens)
    for name in FAMILIES[family].masked_lm:
        fresh = student.build("2x20x2x48", teacher, None, seed=1, init="random").model.get_submodule(name)
        rest.model.get_submodule(name).load_state_dict(fresh.state_dict())
    mask = make_batch_of(ROWS, teacher).student.attention_mask.bool()
    goal, found, without = (logits(model)[mask].double() for model in (teacher, folded, rest))
    assert torch.allclose(found.mean(0), goal.mean(0), atol=1e-3)

    def lost(logits_nV: Tensor) -> float:
        varies = (goal - goal.mean(0)).square().sum()
        return ((logits_nV - goal).square().sum() / varies).item()

    assert lost(found) < 0.5 < 2 < lost(without)
    # At the mean state the linear layer gives what the teacher's does.
    names, P = FAMILIES[family], seen[-1]
    stats = statistics(teacher, names, (1, 2), sample(tokens, TOKENS))
    mean = stats.blocks[-1].state.mean[0]
    old, new = (model.model.get_submodule(names.masked_lm[0]).double() for model in (teacher, folded))
    assert torch.allclose(new(P.T @ mean), P.T @ old(mean), atol=1e-5)


def test_a_student_of_a_trained_teacher_starts_above_chance() -> None:
    """Half of the width still solves the toy task without a step of training."""
    teacher = make_teacher()
    rows = make_rows(TASK, 96, seed=9)

    def accuracy(model: Encoder) -> float:
        with torch.no_grad():
            found = model(make_batch_of(rows, model).student, Needs(logits=True)).logits.argmax(1)
        return (found.numpy() == rows.labels).mean()

    found = student.build("4x16x2x32", teacher, TASK, seed=0, init="pca", tokens=make_tokens(ROWS, teacher))
    assert accuracy(teacher) > 0.95
    assert accuracy(found) > 0.8


# Seeds, and what is refused


def test_seeds() -> None:
    teacher = varied(make_encoder(layers=4, width=24))
    before, state = weights_hash(teacher.model), torch.get_rng_state()
    hashes = {
        init: [weights_hash(made("2x16x2x32", teacher, init, seed=seed).model) for seed in (0, 0, 1)]
        for init in ("pca", "random", "auto")
    }
    assert len(set(hashes["pca"])) == 1
    assert hashes["pca"] == hashes["auto"]
    assert hashes["random"][0] == hashes["random"][1] != hashes["random"][2]
    assert weights_hash(teacher.model) == before and torch.equal(torch.get_rng_state(), state)
    assert made("2x16x2x32", teacher).words.device.type == "cpu"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("2x16x2x32", "pca"),
        ("4x24x2x48", "pca"),
        ("layers:2,4", "teacher"),
        ("5x16x2x32", "random"),
        ("2x32x4x48", "random"),
        ("2x24x4x48", "random"),
        ("2x16x1x32", "random"),
        ("2x16x2x64", "random"),
        ("somewhere/else", "auto"),
    ],
)
def test_auto_folds_what_can_be_folded(text: str, start: str) -> None:
    teacher = make_encoder(layers=4, width=24)
    assert student.resolve_start(text, teacher, "auto") == start
    assert student.resolve_start(text, teacher, "random") == "random"
    if start != "auto":
        # What is chosen can be built, and is what stands there.
        assert weights_hash(made(text, teacher, "auto").model) == weights_hash(
            made(text, teacher, start).model
        )


@pytest.mark.parametrize("family", ["electra", "modernbert", "deberta-v2", "mpnet"])
def test_auto_is_random_where_the_family_cannot_be_folded(family: str) -> None:
    assert student.resolve_start("2x8x2x16", make_encoder(family, layers=4), "auto") == "random"


def test_layers_can_start_at_random() -> None:
    teacher = make_encoder(layers=4)
    found = made("layers:2,4", teacher, "random")
    assert (found.depth, found.width, found.heads) == (2, 16, 2)
    assert not torch.equal(found.words, teacher.words)


def test_a_checkpoint_as_start_brings_its_weights_and_no_head(tmp_path: Path) -> None:
    teacher = make_encoder(layers=4, width=24)
    place = save_encoder(tmp_path / "m", width=16, seed=7, task=make_task("multi-label"))
    found = made("2x16x2x32", teacher, str(place))
    want = make_encoder(width=16, seed=7)
    body = {n: v for n, v in want.model.state_dict().items() if n.startswith("bert.")}
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in body.items())
    assert logits(found).shape == (64, 2) and found.labels == TASK.labels
    again, other = (made("2x16x2x32", teacher, str(place), seed=seed) for seed in (0, 1))
    assert weights_hash(found.model) == weights_hash(again.model) != weights_hash(other.model)


@pytest.mark.parametrize(
    ("text", "init", "match"),
    [
        ("2x16", "teacher", "needs the teacher's width.*24x2x48.*16x1x64.*init=pca"),
        ("2x24x3", "teacher", "24x2x48.*24x3x96"),
        ("5x24x2x48", "teacher", "5 layers, more than the teacher's 4"),
        ("2x32", "pca", "32 width .the teacher 24.*init=random"),
        ("2x24x4x48", "pca", "4 heads .the teacher 2"),
        ("2x16x1", "pca", "16 units in a head .the teacher 12"),
        ("2x16x2x64", "pca", "64 FFN units .the teacher 48"),
        ("5x16x2x32", "pca", "5 layers, more than"),
        ("layers:5", "pca", "rising layer numbers from 1 to 4"),
        ("2x16", "pac", "init should be random, teacher, pca or a checkpoint: pac"),
        ("2x16", "./nothing", "init should be .*no.* ./nothing"),
    ],
)
def test_starts_that_cannot_be_are_refused(text: str, init: str, match: str) -> None:
    with pytest.raises(WrongInput, match=match):
        made(text, make_encoder(layers=4, width=24), init)


@pytest.mark.parametrize("family", ["electra", "modernbert", "deberta-v2", "mpnet"])
def test_families_whose_weights_are_not_known_are_refused(family: str) -> None:
    with pytest.raises(WrongInput, match=f"init=pca folds .*bert.* is a {family}.*layers:2,4,6"):
        made("2x8x2x16", make_encoder(family, layers=4))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = make_encoder(layers=4, width=24)
    other = save_encoder(tmp_path / "m", width=16)
    with pytest.raises(WrongInput, match=r"2x24x2x48 \(layers.*found a bert of 2x16x2x32"):
        made("2x24x2x48", teacher, str(other))
    with pytest.raises(WrongInput, match="is a checkpoint and starts from its own weights.*init=pca"):
        made(str(other), teacher)
    family = save_encoder(tmp_path / "r", family="distilbert", width=16)
    with pytest.raises(WrongInput, match="should be a bert"):
        made("2x16x2x32", teacher, str(family))
    words = make_encoder(width=16)
    words.tokenizer.add_tokens(["unheard"])
    words.save(tmp_path / "w")
    with pytest.raises(WrongInput, match="tokenizer of .* is not the teacher's"):
        made("2x16x2x32", teacher, str(tmp_path / "w"))


# Runs


def test_a_resolved_recipe_gives_the_same_student_again_and_after_a_kill(tmp_path: Path) -> None:
    make_teacher().save(tmp_path / "teacher")
    settings = ["epochs=0.5", "batch_size=32", "checkpoint_every=2", "precision=float32"]
    recipe = Recipe.load(
        teacher=str(tmp_path / "teacher"),
        dataset=str(write_data(tmp_path / "rows")),
        student="2x16x2x32",
        method="kd",
        overrides=[f"training.{text}" for text in settings],
    )
    distill(recipe, tmp_path / "a", console=QUIET)
    again = Recipe.load(tmp_path / "a" / RECIPE)
    assert (recipe.init, again.init) == ("auto", "pca")
    distill(again, tmp_path / "b", console=QUIET)
    student_file = "student/model.safetensors"
    want = (tmp_path / "a" / student_file).read_bytes()
    assert (tmp_path / "b" / student_file).read_bytes() == want
    max((tmp_path / "b" / "checkpoints").iterdir()).rename(tmp_path / "gone")
    (tmp_path / "b" / student_file).unlink()
    distill(None, tmp_path / "b", resume=True, console=QUIET)
    assert (tmp_path / "b" / student_file).read_bytes() == want
