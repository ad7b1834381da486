"""A narrow student's start from its teacher: principal directions of its states, folded into its weights.

The student's state is ``s = P^T h``: P holds the principal directions of the teacher's hidden states, one
basis for all layers, because they share the residual stream. What reads states gets ``W P``, what writes
them ``P^T W``. P maps the student's constant vector to the teacher's, so that the centring of LayerNorm is
exact; its scale is fitted. Heads and FFN units are kept by what they write; what those that go, and the
directions outside P, write or read on average, becomes part of a bias.

Shapes: n tokens, E teacher width, D student width, H heads, d size of a head, r size of a student's head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.data.batching import Inputs, pad
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs, ffn_width
from stillroom.errors import WrongInput

TOKENS, NORM_TOKENS = 8_192, 4_096
"""About how many tokens of the training text the statistics see, and the LayerNorms are fitted on."""

_ROWS = 32
"""Rows in a batch of the statistics."""


@dataclass(frozen=True)
class _Names:
    """What a family calls the parts of a block, and two of each head.

    Of a classification head both layers, of a masked-LM head the linear layer and the LayerNorm.
    """

    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str
    head: tuple[str, str]
    masked_lm: tuple[str, str]


_BERT_BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_ROBERTA = _Names(
    *_BERT_BLOCK,
    head=("classifier.dense", "classifier.out_proj"),
    masked_lm=("lm_head.dense", "lm_head.layer_norm"),
)
_FAMILIES = {
    "bert": _Names(
        *_BERT_BLOCK,
        head=("bert.pooler.dense", "classifier"),
        masked_lm=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _Names(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
        head=("pre_classifier", "classifier"),
        masked_lm=("vocab_transform", "vocab_layer_norm"),
    ),
}


def require_family(teacher: Encoder) -> None:
    """Raise `WrongInput` unless the parts of the teacher's blocks are known."""
    family = teacher.config.model_type
    if family not in _FAMILIES:
        raise WrongInput(
            f"init=pca folds the weights of {', '.join(_FAMILIES)}, and the teacher is a {family}: which "
            "of its weights read and write the hidden states is not known. Use init=random, or copy "
            "layers with layers:2,4,6."
        )


def can_fold(teacher: Encoder, *, width: int, heads: int, ffn: int) -> bool:
    """Return whether a student of these widths can be folded from the teacher.

    Args:
        teacher: Whose family has to be known, and which no width may exceed.
        width: Of the student's hidden states.
        heads: Of its attention.
        ffn: Its FFN units.
    """
    return teacher.config.model_type in _FAMILIES and not _wider(teacher, width, heads, ffn)


def sample(tokens: TokenisedRows, budget: int) -> list[Inputs]:
    """Return batches of about `budget` tokens, of rows spread evenly over the text.

    Args:
        tokens: The rows.
        budget: Tokens in all, padding not counted.

    Returns:
        Padded batches of at most 32 rows, in the order of the text, on the CPU.

    Example:
        >>> ids, lengths = np.arange(12, dtype=np.int32), np.full(4, 3)
        >>> tokens = TokenisedRows(ids, None, 3 * np.arange(4), lengths, pad_id=0, truncated=0)
        >>> [batch.input_ids.tolist() for batch in sample(tokens, 6)]
        [[[0, 1, 2], [9, 10, 11]]]
    """
    rows = max(1, min(len(tokens), round(budget / float(tokens.lengths.mean()))))
    index = np.linspace(0, len(tokens) - 1, rows).astype(np.int64)
    return [pad(tokens, part) for part in np.array_split(index, -(-rows // _ROWS))]


def principal_projection(covariance_EE: Tensor, width: int) -> Tensor:
    """Return P, an orthonormal basis of the directions in which states vary most, ``(E, D)``.

    The first direction is the constant one, so that LayerNorm's centring commutes with P: the others
    are the leading eigenvectors of the covariance of centred states. Of all bases of that space which map
    the constant vector to the constant vector, P is the one nearest to the D axes that the space holds most
    of (orthogonal Procrustes): LayerNorm scales by axis.

    Args:
        covariance_EE: Of the teacher's hidden states, float64.
        width: D, at most E.

    Returns:
        Float64, ``P^T P = 1`` to rounding; the identity where D is E.

    Example:
        >>> P = principal_projection(torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0])).double(), 3)
        >>> bool(((P.T @ P) - torch.eye(3)).abs().max() < 1e-12)
        True
    """
    E = len(covariance_EE)
    if width == E:
        return torch.eye(E, dtype=torch.float64, device=covariance_EE.device)
    one = covariance_EE.new_full((E, 1), E**-0.5)
    centring = torch.eye(E, dtype=torch.float64, device=one.device) - one @ one.T
    # Ascending: the constant direction, with eigenvalue 0, is among the first.
    V = torch.linalg.eigh(centring @ covariance_EE @ centring)[1][:, E - width + 1 :]
    V = torch.linalg.qr(centring @ V)[0]
    share_E = (one.square() + V.square().sum(1, keepdim=True)).flatten()
    axes = share_E.topk(width).indices.sort().values
    c = one.new_full((width, 1), width**-0.5)
    # A basis of what is orthogonal to c.
    C = torch.linalg.qr(torch.cat([c, torch.eye(width, dtype=c.dtype, device=c.device)], 1))[0][:, 1:]
    U, _, W = torch.linalg.svd(V[axes].T @ C, full_matrices=False)
    P: Tensor = one @ c.T + V @ (U @ W) @ C.T
    return P


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
    names = _FAMILIES[teacher.config.model_type]
    seen = _statistics(teacher, names, layers, sample(tokens, TOKENS))
    with torch.no_grad():
        P = principal_projection(seen.covariance(), student.width)
        _fold_weights(teacher, student, names, layers, seen, P)
        _fit_norms(teacher, student, names, layers, sample(tokens, NORM_TOKENS), P)
    student.basis = P.float().cpu()


def align(teacher: Encoder, student: Encoder, layers: Sequence[int], tokens: TokenisedRows) -> Tensor:
    """Return P that turns the student's hidden states nearest to the teacher's, ``(E, D)`` float32.

    ``P = argmin sum |t - P s|^2`` over orthonormal columns (orthogonal Procrustes): ``U W^T`` of the
    singular value decomposition ``U diag W^T`` of ``sum t s^T``. The sums go over tokens, the embedding
    output and the mapped layers, with t and s scaled to length 1. It has no seed.

    Args:
        teacher: Of width E.
        student: Of width D, at most E, with the teacher's tokenizer, on the same device.
        layers: The teacher's, from 1, that the student's blocks stand for.
        tokens: Training text.
    """
    inputs = _joined(sample(tokens, NORM_TOKENS)).to(teacher.words.device)
    with torch.no_grad():
        s_PnD = _directions(student, inputs, range(student.depth + 1))
        t_PnE = _directions(teacher, inputs, (0, *layers))
    U, _, W = torch.linalg.svd(torch.einsum("pne,pnd->ed", t_PnE, s_PnD), full_matrices=False)
    P: Tensor = U @ W
    return P.float().cpu()


def _directions(model: Encoder, inputs: Inputs, places: Sequence[int]) -> Tensor:
    """Return the hidden states of real tokens, of length 1, ``(places, n, width)``."""
    states = model(inputs, Needs(hidden_states=frozenset(places))).hidden_states
    mask_BS = inputs.attention_mask.bool()
    found = torch.stack([states[place][mask_BS] for place in places]).double()
    return nn.functional.normalize(found, dim=-1)


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


class _Moments:
    """Mean and second moment of vectors in groups, ``(n, G, d)``, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._outer: Any = 0.0

    def add(self, vectors_nGd: Tensor) -> None:
        vectors = vectors_nGd.double()
        self.count += len(vectors)
        self._sum = self._sum + vectors.sum(0)
        by_group = vectors.transpose(0, 1)
        outer = by_group.mT @ by_group if by_group.shape[2] > 1 else vectors.square().sum(0)[..., None]
        self._outer = self._outer + outer

    @property
    def mean(self) -> Tensor:
        """``(G, d)``."""
        mean: Tensor = self._sum / self.count
        return mean

    @property
    def second(self) -> Tensor:
        """``E[v v^T]``, ``(G, d, d)``."""
        second: Tensor = self._outer / self.count
        return second

    @property
    def covariance(self) -> Tensor:
        """``(G, d, d)``."""
        return self.second - self.mean[:, :, None] * self.mean[:, None]


@dataclass(frozen=True)
class _Block:
    """What was seen of a block: by head queries, keys and what is summed up, units, and two states."""

    query: _Moments
    key: _Moments
    context: _Moments
    units: _Moments
    middle: _Moments
    state: _Moments


@dataclass(frozen=True)
class _Seen:
    """What was seen of a teacher."""

    embeddings: _Moments
    blocks: tuple[_Block, ...]
    head: _Moments
    masked_lm: _Moments

    def covariance(self) -> Tensor:
        """Return the covariance of hidden states, in which those of each place count alike."""
        states = [self.embeddings, *(m for block in self.blocks for m in (block.middle, block.state))]
        each = torch.stack([moments.covariance[0] for moments in states])
        return (each / each.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-30)).mean(0)


def _statistics(teacher: Encoder, names: _Names, layers: Sequence[int], batches: Sequence[Inputs]) -> _Seen:
    """Run the teacher and note what is needed of real tokens."""
    H = teacher.heads
    each = tuple(_Block(*(_Moments() for _ in range(6))) for _ in layers)
    seen = _Seen(_Moments(), each, _Moments(), _Moments())
    mask = torch.empty(0, dtype=torch.bool)

    def note(moments: _Moments, groups: int, *, output: bool) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            vectors = (found if output else given[0])[mask]
            moments.add(vectors.view(len(vectors), groups or vectors.shape[-1], -1))

        return hook

    blocks = _blocks(teacher)
    wanted: list[tuple[nn.Module, Callable[..., None]]] = []
    for layer, block in zip(layers, seen.blocks, strict=True):
        for name, moments, groups, output in (
            (names.query, block.query, H, True),
            (names.key, block.key, H, True),
            (names.attention_out, block.context, H, False),
            (names.ffn_out, block.units, 0, False),
            (names.attention_norm, block.middle, 1, True),
            (names.ffn_norm, block.state, 1, True),
        ):
            wanted.append((blocks[layer - 1].get_submodule(name), note(moments, groups, output=output)))
    wanted.append((_embedding_norm(teacher), note(seen.embeddings, 1, output=True)))
    if _has(teacher, names.masked_lm):
        norm = teacher.model.get_submodule(names.masked_lm[1])
        wanted.append((norm, note(seen.masked_lm, 1, output=True)))
    if _has(teacher, names.head):

        def note_head(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.head.add(given[0][..., None])

        out = teacher.model.get_submodule(names.head[1])
        handle = out.register_forward_pre_hook(note_head)
    else:
        handle = None
    device = teacher.words.device
    with _hooks(wanted), torch.no_grad():
        for inputs in batches:
            mask = inputs.attention_mask.to(device).bool()
            teacher(inputs.to(device), Needs())
    if handle is not None:
        handle.remove()
    return seen


def _fold_weights(
    teacher: Encoder, student: Encoder, names: _Names, layers: Sequence[int], seen: _Seen, P: Tensor
) -> None:
    """Write everything but the fitted scales of the LayerNorms."""
    _fold_embeddings(teacher, student, P)
    before = seen.embeddings
    blocks = zip(_blocks(student), (_blocks(teacher)[i - 1] for i in layers), seen.blocks, strict=True)
    for new, old, block in blocks:
        _fold_attention(new, old, names, student.heads, block, _outside(P, before), P)
        _fold_ffn(new, old, names, block, _outside(P, block.middle), P)
        for name in (names.attention_norm, names.ffn_norm):
            _fold_norm(new.get_submodule(name), old.get_submodule(name), P)
        before = block.state
    if _has(teacher, names.head):
        _fold_head(teacher, student, names, seen.head, _outside(P, before), P)
    if _has(teacher, names.masked_lm):
        _fold_masked_lm(teacher, student, names, seen.masked_lm, _outside(P, before), P)


def _fold_embeddings(teacher: Encoder, student: Encoder, P: Tensor) -> None:
    new: Any = student.model.base_model
    old: Any = teacher.model.base_model
    for name, table in new.embeddings.named_children():
        if isinstance(table, nn.Embedding):
            _set(table.weight, getattr(old.embeddings, name).weight.double() @ P)
    _fold_norm(_embedding_norm(student), _embedding_norm(teacher), P)


def _fold_attention(
    new: nn.Module, old: nn.Module, names: _Names, heads: int, block: _Block, outside: Tensor, P: Tensor
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
    new: nn.Module, old: nn.Module, names: _Names, block: _Block, outside: Tensor, P: Tensor
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
    teacher: Encoder, student: Encoder, names: _Names, seen: _Moments, outside: Tensor, P: Tensor
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
    teacher: Encoder, student: Encoder, names: _Names, seen: _Moments, outside: Tensor, P: Tensor
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
    names: _Names,
    layers: Sequence[int],
    batches: Sequence[Inputs],
    P: Tensor,
) -> None:
    """Fit each LayerNorm's scale and shift so that the student's states are nearest to ``P^T h``.

    One pass over all batches at once: each LayerNorm is fitted on what the student, fitted so far, gives
    it, and what it then returns goes on to the next.
    """
    inputs = _joined(batches).to(teacher.words.device)
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

    with _hooks([(norm, keep(place)) for place, norm in enumerate(olds)]):
        teacher(inputs, Needs())
    with _hooks([(norm, fit(place)) for place, norm in enumerate(news)]):
        student(inputs, Needs())


def _norms(model: Encoder, names: _Names, layers: Sequence[int]) -> list[nn.Module]:
    """Return the LayerNorms in the order in which they are called."""
    blocks = [_blocks(model)[layer - 1] for layer in layers]
    inner = [b.get_submodule(n) for b in blocks for n in (names.attention_norm, names.ffn_norm)]
    masked_lm = [model.model.get_submodule(names.masked_lm[1])] if _has(model, names.masked_lm) else []
    return [_embedding_norm(model), *inner, *masked_lm]


def _joined(batches: Sequence[Inputs]) -> Inputs:
    """Return all rows in one batch, padded on the right."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def all_of(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is None:
            return None
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    ids, mask = all_of("input_ids"), all_of("attention_mask")
    assert ids is not None and mask is not None
    return Inputs(ids, mask, all_of("token_type_ids"))


def _outside(P: Tensor, states: _Moments) -> Tensor:
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


def _blocks(model: Encoder) -> nn.ModuleList:
    return model.blocks()[1]


def _embedding_norm(model: Encoder) -> nn.Module:
    body: Any = model.model.base_model
    norm: nn.Module = body.embeddings.LayerNorm
    return norm


def _has(model: Encoder, parts: tuple[str, str]) -> bool:
    inside = dict(model.model.named_modules())
    return all(name in inside for name in parts)


@contextmanager
def _hooks(wanted: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
