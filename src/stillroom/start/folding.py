"""A narrow student's start from its teacher: principal directions of its states, folded into its weights.

The student's state is ``s = P^T h``: P holds the principal directions of the teacher's hidden states, one
basis for all layers, because they share the residual stream. What reads states gets ``W P``, what writes
them ``P^T W``. P maps the student's constant vector to the teacher's, so that the centring of LayerNorm is
exact; its scale is fitted. Heads and FFN units are kept by what they write; what those that go, and the
directions outside P, write or read on average, becomes part of a bias.

Shapes: n tokens, E teacher width, D student width, H heads, d size of a head, r size of a student's head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data.batching import Inputs
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs, ffn_width
from stillroom.errors import WrongInput
from stillroom.start.basis import principal_projection
from stillroom.start.families import FAMILIES, Names, embedding_norm, has, require_family
from stillroom.start.statistics import Block, Moments, Seen, hooks, statistics
from stillroom.start.text import NORM_TOKENS, TOKENS, joined, sample


def can_fold(teacher: Encoder, *, width: int, heads: int, ffn: int) -> bool:
    """Return whether a student of these widths can be folded from the teacher.

    Args:
        teacher: Whose family has to be known, and which no width may exceed.
        width: Of the student's hidden states.
        heads: Of its attention.
        ffn: Its FFN units.
    """
    return teacher.config.model_type in FAMILIES and not _wider(teacher, width, heads, ffn)


def fold(teacher: Encoder, student: Encoder, layers: Sequence[int], tokens: TokenisedRows) -> None:
    """Give the student, in place, what the teacher's layers hold in fewer dimensions.

    Exact but for: states outside P, of which the mean is kept; LayerNorm's scale, which is diagonal on
    other axes and divides by the norm inside P alone (fitted by least squares, layer after layer, on the
    student's own states); score and value ranks beyond the student's head size; heads and units that go.
    Where nothing is narrower, nothing is lost. The student remembers P as its `basis`.

    Args:
        teacher: Of a known family. Runs on the device it is on, in float32.
        student: Of the same family, on the same device, no wider in anything.
        layers: The teacher's, from 1, that the student's blocks stand for.
        tokens: Training text.

    Raises:
        WrongInput: If the family is not known, or the student is wider than its teacher.
    """
    require_family(teacher)
    _require_narrower(teacher, student)
    names = FAMILIES[teacher.config.model_type]
    seen = statistics(teacher, names, layers, sample(tokens, TOKENS))
    with torch.no_grad():
        P = principal_projection(seen.covariance(), student.width)
        _fold_weights(teacher, student, names, layers, seen, P)
        _fit_norms(teacher, student, names, layers, sample(tokens, NORM_TOKENS), P)
    student.basis = P.float().cpu()


def _require_narrower(teacher: Encoder, student: Encoder) -> None:
    wider = _wider(teacher, student.width, student.heads, ffn_width(student.config))
    if wider:
        raise WrongInput(
            f"init=pca keeps a part of the teacher, so the student cannot have more: found "
            f"{', '.join(wider)}. Give a smaller size as LAYERSxWIDTHxHEADSxFFN, or init=random."
        )


def _wider(teacher: Encoder, width: int, heads: int, ffn: int) -> list[str]:
    """Return what a student of these widths has more of than the teacher, as an error names it."""
    sizes = {
        "width": (width, teacher.width),
        "heads": (heads, teacher.heads),
        "units in a head": (width // heads, teacher.width // teacher.heads),
        "FFN units": (ffn, ffn_width(teacher.config)),
    }
    return [f"{n} {what} (the teacher {most})" for what, (n, most) in sizes.items() if n > most]


def _fold_weights(
    teacher: Encoder, student: Encoder, names: Names, layers: Sequence[int], seen: Seen, P: Tensor
) -> None:
    """Write everything but the fitted scales of the LayerNorms."""
    _fold_embeddings(teacher, student, P)
    before = seen.embeddings
    olds = [teacher.blocks()[1][layer - 1] for layer in layers]
    for new, old, block in zip(student.blocks()[1], olds, seen.blocks, strict=True):
        _fold_attention(new, old, names, student.heads, block, _outside(P, before), P)
        _fold_ffn(new, old, names, block, _outside(P, block.middle), P)
        for name in (names.attention_norm, names.ffn_norm):
            _fold_norm(new.get_submodule(name), old.get_submodule(name), P)
        before = block.state
    if has(teacher, names.head):
        _fold_head(teacher, student, names, seen.head, _outside(P, before), P)
    if has(teacher, names.masked_lm):
        _fold_masked_lm(teacher, student, names, seen.masked_lm, _outside(P, before), P)


def _fold_embeddings(teacher: Encoder, student: Encoder, P: Tensor) -> None:
    new: Any = student.model.base_model
    old: Any = teacher.model.base_model
    for name, table in new.embeddings.named_children():
        if isinstance(table, nn.Embedding):
            _set(table.weight, getattr(old.embeddings, name).weight.double() @ P)
    _fold_norm(embedding_norm(student), embedding_norm(teacher), P)


def _fold_attention(
    new: nn.Module, old: nn.Module, names: Names, heads: int, block: Block, outside: Tensor, P: Tensor
) -> None:
    """Keep the heads that write most; reduce scores and values to the student's head size."""
    out: Any = old.get_submodule(names.attention_out)
    H, d = block.context.mean.shape
    r = P.shape[1] // heads
    # What each head writes, (D, d) each.
    write = (P.T @ out.weight.double()).view(-1, H, d).transpose(0, 1)
    kept = _most(torch.einsum("hei,hij,hej->h", write, block.context.second, write), heads)
    turned: dict[str, list[Tensor]] = {"query": [], "key": [], "value": [], "out": []}
    written = torch.zeros_like(write[0, :, 0])
    for h in range(H):
        mean = write[h] @ block.context.mean[h]
        if h not in kept:
            written += mean
            continue
        if r == d:
            query = key = value = torch.eye(d, dtype=P.dtype, device=P.device)
            output = write[h]
        else:
            query, key = _reduced_scores(block.query.second[h], block.key.covariance[h], r)
            # The best approximation of what is written: L L^T W.
            output = torch.linalg.svd(write[h] @ _root(block.context.covariance[h]))[0][:, :r]
            value = output.T @ write[h]
            written += mean - output @ (output.T @ mean)
        for name, made in zip(turned, (query, key, value, output), strict=True):
            turned[name].append(made)
    for name in ("query", "key", "value"):
        linear: Any = old.get_submodule(getattr(names, name))
        W, b = linear.weight.double().view(H, d, -1), linear.bias.double().view(H, d)
        T = torch.stack(turned[name])
        made_in: Any = new.get_submodule(getattr(names, name))
        _set(made_in.weight, (T @ W[kept] @ P).flatten(0, 1))
        _set(made_in.bias, torch.einsum("hri,hi->hr", T, b[kept] + W[kept] @ outside).flatten())
    made_out: Any = new.get_submodule(names.attention_out)
    _set(made_out.weight, torch.cat(turned["out"], dim=1))
    _set(made_out.bias, P.T @ out.bias.double() + written)


def _reduced_scores(query_dd: Tensor, key_dd: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A and B, ``(r, d)`` each, so that ``(A q)^T (B k) / sqrt(r)`` is near ``q^T k / sqrt(d)``.

    The expected squared difference over independent queries and keys is least. Keys are centred: what a
    query has with their mean is the same for all keys, and the softmax does not see it.
    """
    q, k = _root(query_dd), _root(key_dd)
    U, S, W = torch.linalg.svd(q @ k)
    root = S[:r].sqrt()[:, None] * (r / query_dd.shape[0]) ** 0.25
    return root * U.T[:r] @ _inverse(q), root * W[:r] @ _inverse(k)


def _fold_ffn(
    new: nn.Module, old: nn.Module, names: Names, block: Block, outside: Tensor, P: Tensor
) -> None:
    """Keep the units that write most, in their order."""
    into: Any = old.get_submodule(names.ffn_in)
    out: Any = old.get_submodule(names.ffn_out)
    made_in: Any = new.get_submodule(names.ffn_in)
    made_out: Any = new.get_submodule(names.ffn_out)
    written = P.T @ out.weight.double()
    importance = block.units.second.flatten() * written.square().sum(0)
    kept = _most(importance, made_in.out_features)
    _read(made_in, into, kept, outside, P)
    _set(made_out.weight, written[:, kept])
    lost = block.units.mean.flatten().clone()
    lost[kept] = 0
    _set(made_out.bias, P.T @ out.bias.double() + written @ lost)


def _fold_head(
    teacher: Encoder, student: Encoder, names: Names, seen: Moments, outside: Tensor, P: Tensor
) -> None:
    """Keep the units of the classification head that its last layer reads most."""
    heads: Any = [[m.model.get_submodule(name) for name in names.head] for m in (teacher, student)]
    (dense, out), (made_dense, made_out) = heads
    W = out.weight.double()
    kept = _most(seen.second.flatten() * W.square().sum(0), P.shape[1])
    _read(made_dense, dense, kept, outside, P)
    lost = seen.mean.flatten().clone()
    lost[kept] = 0
    _set(made_out.weight, W[:, kept])
    _set(made_out.bias, out.bias.double() + W @ lost)


def _fold_masked_lm(
    teacher: Encoder, student: Encoder, names: Names, seen: Moments, outside: Tensor, P: Tensor
) -> None:
    """Write the layer that turns states into what is compared with each word; the words' table is tied.

    Its activation works by axis, and P's axes lie near to old ones.
    """
    parts: Any = [[m.model.get_submodule(name) for name in names.masked_lm] for m in (teacher, student)]
    (dense, norm), (made_dense, made_norm) = parts
    W = dense.weight.double()
    _set(made_dense.weight, P.T @ W @ P)
    _set(made_dense.bias, P.T @ (dense.bias.double() + W @ outside))
    _fold_norm(made_norm, norm, P)
    old, new = (model.model.get_output_embeddings() for model in (teacher, student))  # type: ignore[operator]
    _set(new.bias, old.bias.double() + old.weight.double() @ _outside(P, seen))


def _read(new: Any, old: Any, kept: Tensor, outside: Tensor, P: Tensor) -> None:
    """Write a linear layer that reads states: its kept units, and the mean of what is outside P."""
    W = old.weight.double()[kept]
    _set(new.weight, W @ P)
    _set(new.bias, old.bias.double()[kept] + W @ outside)


def _fold_norm(new: Any, old: Any, P: Tensor) -> None:
    """Write a LayerNorm's scale without its off-diagonal part, and its shift."""
    _set(new.weight, old.weight.double() @ P.square())
    _set(new.bias, old.bias.double() @ P)


def _fit_norms(
    teacher: Encoder,
    student: Encoder,
    names: Names,
    layers: Sequence[int],
    batches: Sequence[Inputs],
    P: Tensor,
) -> None:
    """Fit each LayerNorm's scale and shift so that the student's states are nearest to ``P^T h``.

    One pass over all batches at once: each LayerNorm is fitted on what the student, fitted so far, gives
    it, and what it then returns goes on to the next.
    """
    inputs = joined(batches).to(teacher.words.device)
    mask = inputs.attention_mask.bool()
    olds, news = _norms(teacher, names, layers), _norms(student, names, range(1, student.depth + 1))
    goals: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], found: Tensor) -> None:
            goals[place] = found[mask].double() @ P

        return hook

    def fit(place: int) -> Callable[..., Tensor]:
        def hook(norm: Any, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
            states = given[0].double()
            z = nn.functional.layer_norm(states, states.shape[-1:], eps=norm.eps)
            x, y = z[mask], goals.pop(place)
            x_mean, y_mean = x.mean(0), y.mean(0)
            variance = (x - x_mean).square().mean(0)
            slope = ((x - x_mean) * (y - y_mean)).mean(0) / variance
            # An axis on which nothing varies says nothing of its scale.
            slope = torch.where(variance > 1e-9, slope, norm.weight.double())
            _set(norm.weight, slope)
            _set(norm.bias, y_mean - slope * x_mean)
            fitted: Tensor = (z * norm.weight.double() + norm.bias.double()).to(found.dtype)
            return fitted

        return hook

    with hooks([(norm, keep(place)) for place, norm in enumerate(olds)]):
        teacher(inputs, Needs())
    with hooks([(norm, fit(place)) for place, norm in enumerate(news)]):
        student(inputs, Needs())


def _norms(model: Encoder, names: Names, layers: Sequence[int]) -> list[nn.Module]:
    """Return the LayerNorms in the order in which they are called."""
    blocks = [model.blocks()[1][layer - 1] for layer in layers]
    inner = [b.get_submodule(n) for b in blocks for n in (names.attention_norm, names.ffn_norm)]
    masked_lm = [model.model.get_submodule(names.masked_lm[1])] if has(model, names.masked_lm) else []
    return [embedding_norm(model), *inner, *masked_lm]


def _outside(P: Tensor, states: Moments) -> Tensor:
    """Return the mean state's part outside P, ``(E,)``: zero where P is the identity."""
    mean = states.mean[0]
    outside: Tensor = mean - P @ (P.T @ mean)
    return outside


def _most(importance: Tensor, count: int) -> Tensor:
    """Return the places of the `count` greatest values, rising."""
    return importance.topk(count).indices.sort().values


def _root(matrix_dd: Tensor) -> Tensor:
    """Return the symmetric root of a matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix_dd)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def _inverse(matrix_dd: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix: what varies by nothing but rounding stays out."""
    inverse: Tensor = torch.linalg.pinv(matrix_dd, rtol=1e-6, hermitian=True)
    return inverse


def _set(parameter: Any, value: Tensor) -> None:
    assert parameter.shape == value.shape
    parameter.copy_(value)
