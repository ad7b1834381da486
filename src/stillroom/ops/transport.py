"""Optimal transport between layers: ground costs, the exact flow, and masses that learn from it.

Equations of BERT-EMD (Li et al. 2020, arXiv 2010.06133) as its authors' code has them;
`docs/methods/bert-emd.md` says which revision.

Shapes: L student layers, M teacher layers, P transport problems that are solved together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MassRule = Literal["A1", "A2", "B"]
"""How masses follow from unit costs: one softmax, two of them, or division."""

Array = NDArray[np.float64]


def squared_distances(student_L: Tensor, teacher_M: Tensor) -> Tensor:
    """Return ``|S_i - T_j|^2`` of every pair of layers, from one matrix product, without gradient.

    Args:
        student_L: One tensor per student layer, shape ``(L, ...)``.
        teacher_M: One tensor per teacher layer, of the same further shape.

    Returns:
        Shape ``(L, M)``, at least 0. In float32 the error is up to 3e-7 of ``|S_i|^2 + |T_j|^2``, less of
        large layers: what is left of two that are almost equal is rounding.

    Example:
        >>> squared_distances(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [4.0, 6.0]]))
        tensor([[ 4., 25.]])
    """
    s, t = student_L.detach().flatten(1), teacher_M.detach().flatten(1)
    s_L, t_M = _squared_lengths(s), _squared_lengths(t)
    squares_LM: Tensor = s_L[:, None] + t_M - 2 * _products(s, t)
    return squares_LM.clamp(min=0).to(s.dtype)


_PIECE = 4_096
"""Elements that are summed in float32: one sum over a whole layer of a million loses three digits more."""


def _pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(L, N)`` as pieces, ``(L, n, P)``, and what is left over, ``(L, N - n P)``: views."""
    end = x.shape[1] // _PIECE * _PIECE
    return x[:, :end].view(len(x), -1, _PIECE), x[:, end:]


def _squared_lengths(x: Tensor) -> Tensor:
    """Return the squared 2-norm of each row in float64."""
    whole, rest = (torch.linalg.vector_norm(part, dim=-1).double().square() for part in _pieces(x))
    squares: Tensor = whole.sum(1) + rest
    return squares


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x y^T`` in float64."""
    (x_whole, x_rest), (y_whole, y_rest) = _pieces(x), _pieces(y)
    whole = x_whole.transpose(0, 1) @ y_whole.permute(1, 2, 0)
    products: Tensor = whole.double().sum(0) + (x_rest @ y_rest.T).double()
    return products


def transport_cost(student_L: Tensor, teacher_M: Tensor, flow_LM: Tensor, squares_LM: Tensor) -> Tensor:
    """Return ``sum_ij F_ij |S_i - T_j|^2``, with its gradient in closed form.

    ``d / d S_i = 2 (sum_j F_ij S_i - sum_j F_ij T_j)``: one product. By the envelope theorem this is
    the gradient of the transport problem's value too, wherever its optimum is unique.

    Args:
        student_L: One tensor per student layer; gradients flow here only.
        teacher_M: One tensor per teacher layer, of the same further shape.
        flow_LM: The flow, a constant.
        squares_LM: `squared_distances` of the two.

    Returns:
        Scalar.

    Example:
        >>> s, t = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
        >>> cost = transport_cost(s, t, torch.ones(1, 1), squared_distances(s, t))
        >>> cost.backward()
        >>> cost.item(), s.grad.tolist()
        (4.0, [[0.0, 4.0]])
    """
    found = _TransportCost.apply(student_L, teacher_M, flow_LM, squares_LM)  # type: ignore[no-untyped-call]
    cost: Tensor = found
    return cost


class _TransportCost(torch.autograd.Function):
    """Keeps the two stacks and the flow; no pair of layers is ever written out."""

    @staticmethod
    def forward(
        ctx: Any, student_L: Tensor, teacher_M: Tensor, flow_LM: Tensor, squares_LM: Tensor
    ) -> Tensor:
        ctx.save_for_backward(student_L, teacher_M, flow_LM)
        return (flow_LM * squares_LM).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        student_L, teacher_M, flow_LM = ctx.saved_tensors
        s, t = student_L.flatten(1), teacher_M.flatten(1)
        flow_LM = 2 * gradient * flow_LM
        found = torch.addmm(flow_LM.sum(1, keepdim=True) * s, flow_LM, t, alpha=-1)
        return found.view_as(student_L), None, None, None


def exact_flow(cost_LM: Array, student_L: Array, teacher_M: Array) -> Array:
    """Return the flow of least cost between layers of given masses, in float64 on the host.

    ``min_F sum_ij F_ij D_ij`` with ``F >= 0``, ``sum_j F_ij = w_i`` and ``sum_i F_ij = w_j``, by the
    network simplex of POT: exact, no regularisation.

    Args:
        cost_LM: Finite ground costs D.
        student_L: Masses of the student's layers, above 0; scaled to sum to 1.
        teacher_M: Masses of the teacher's layers, likewise.

    Returns:
        Shape ``(L, M)``, sums to 1, with at most ``L + M - 1`` entries that are not 0.

    Raises:
        RuntimeError: If POT found no optimum.

    Example:
        >>> exact_flow(np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones(2), np.ones(2)).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    # POT imports half of scikit-learn, which no command but training should wait for.
    import ot

    flow, log = ot.emd(student_L / student_L.sum(), teacher_M / teacher_M.sum(), cost_LM, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT solved no transport problem of shape {cost_LM.shape}: {log['warning']}")
    return np.asarray(flow, dtype=np.float64)


def unit_costs(flow_LM: Array, cost_LM: Array, masses: Array, *, axis: int) -> Array:
    """Return ``u_k = sum_l F_kl D_kl / w_k``, what a layer's flow costs on average for a unit of its mass.

    Args:
        flow_LM: The flow, shape ``(L, M)``, float64 as all here.
        cost_LM: The ground costs, likewise.
        masses: Masses of the layers whose costs are wanted, shape ``(L,)`` or ``(M,)``, above 0.
        axis: The other side: 1 for the student's layers, 0 for the teacher's.

    Returns:
        Shape of `masses`.

    Example:
        >>> flow, cost = np.array([[0.5, 0.0], [0.25, 0.25]]), np.array([[1.0, 2.0], [2.0, 4.0]])
        >>> unit_costs(flow, cost, np.array([0.5, 0.5]), axis=1).tolist()
        [1.0, 3.0]
    """
    found: Array = (flow_LM * cost_LM).sum(axis) / masses
    return found


def raise_to_floor(values: Array, floor: float) -> tuple[Array, bool]:
    """Return ``max(values, floor * max(values))``, and whether that changed anything.

    Where all values are 0 they count as equal. Without it a layer that costs nothing would divide
    by zero, and the layer that fits best would be dropped.

    Args:
        values: At least 0, float64, shape ``(K,)``.
        floor: Share of the largest, 0 to 1.

    Returns:
        The same shape, and True where a value was raised.

    Example:
        >>> raise_to_floor(np.array([0.0, 0.5]), 0.1)
        (array([0.05, 0.5 ]), True)
    """
    most = values.max()
    if most <= 0:
        return np.ones_like(values), True
    return np.maximum(values, floor * most), bool((values < floor * most).any())


def masses_of(unit_cost_K: Array, *, rule: MassRule, temperature: float) -> Array:
    """Return new masses from unit costs above 0: cheap layers get more. They sum to 1.

    With ``r_k = sum_l u_l / u_k``: rule B is ``r / sum r``, rules A1 and A2 are
    ``softmax(r / T_emd)``. A2's second softmax comes after problems are averaged, so not here.

    Args:
        unit_cost_K: `unit_costs` of one side's layers, above 0, float64, shape ``(K,)``.
        rule: How they become masses.
        temperature: T_emd > 0, of rules A1 and A2.

    Returns:
        Shape ``(K,)``.

    Example:
        >>> masses_of(np.array([1.0, 3.0]), rule="B", temperature=1.0).tolist()
        [0.75, 0.25]
    """
    ratio = unit_cost_K.sum() / unit_cost_K
    return ratio / ratio.sum() if rule == "B" else _softmax(ratio / temperature)


def _softmax(x: Array) -> Array:
    exponential = np.exp(x - x.max(-1, keepdims=True))
    found: Array = exponential / exponential.sum(-1, keepdims=True)
    return found


@dataclass(frozen=True)
class MassUpdate:
    """How masses change after a step: a layer that is cheap to move gets more of the mass.

    Example:
        >>> update = MassUpdate("B", temperature=1.0, floor=1e-12, coupled=False)
        >>> even = np.array([[0.5, 0.5]])
        >>> flow, cost = np.array([[[0.5, 0.0], [0.0, 0.5]]]), np.array([[[1.0, 9.0], [9.0, 3.0]]])
        >>> student, teacher, floored = update(flow, cost, even, even)
        >>> student.tolist(), teacher.tolist(), floored
        ([[0.75, 0.25]], [[0.75, 0.25]], [False])
    """

    rule: MassRule
    temperature: float
    """T_emd of the rules A1 and A2."""
    floor: float
    """Least unit cost and least mass, relative to the largest."""
    coupled: bool
    """Whether all problems share the mean of their new masses."""

    def __call__(
        self, flow_PLM: Array, cost_PLM: Array, student_PL: Array, teacher_PM: Array
    ) -> tuple[Array, Array, list[bool]]:
        """Return the next masses of student and teacher, and for which problems the floor acted."""
        floored = [False] * len(flow_PLM)
        found: list[Array] = []
        for masses_PK, axis in ((student_PL, 1), (teacher_PM, 0)):
            each = []
            for p, (flow, cost, masses) in enumerate(zip(flow_PLM, cost_PLM, masses_PK, strict=True)):
                u, acted = raise_to_floor(unit_costs(flow, cost, masses, axis=axis), self.floor)
                floored[p] |= acted
                each.append(masses_of(u, rule=self.rule, temperature=self.temperature))
            new = np.stack(each)
            if self.coupled:
                new = np.broadcast_to(new.mean(0), new.shape)
            if self.rule == "A2":
                new = _softmax(new)
            # A sharp softmax gives masses of 0, from which the next step could not divide.
            raised = [raise_to_floor(row, self.floor) for row in new]
            floored = [old or acted for old, (_, acted) in zip(floored, raised, strict=True)]
            found.append(np.stack([row / row.sum() for row, _ in raised]))
        return found[0], found[1], floored


class LayerMasses(nn.Module):
    """The masses of both sides for each transport problem, and the flows that they allow.

    Masses start uniform. They are buffers, so they move, checkpoint and resume with the term that
    owns them, and never get a gradient. They change in `advance` only, from the flows of the last
    training pass.

    Args:
        problems: Names of the problems, for `record`.
        student_depth: L.
        teacher_depth: M.
        update: How they change; None keeps them uniform.

    Example:
        >>> masses = LayerMasses(("states",), 2, 2, MassUpdate("B", 1.0, 1e-12, coupled=False))
        >>> flow = masses.flows(torch.tensor([[[1.0, 9.0], [9.0, 3.0]]]))
        >>> masses.advance()
        >>> masses.student.tolist(), masses.record()["states"]["emd"]
        ([[0.75, 0.25]], 2.0)
    """

    student: Tensor
    teacher: Tensor

    def __init__(
        self, problems: Sequence[str], student_depth: int, teacher_depth: int, update: MassUpdate | None
    ):
        super().__init__()
        self.problems = tuple(problems)
        self.update = update
        P = len(self.problems)
        self.register_buffer("student", torch.full((P, student_depth), 1 / student_depth))
        self.register_buffer("teacher", torch.full((P, teacher_depth), 1 / teacher_depth))
        self._next: tuple[Array, Array] | None = None
        self._record: dict[str, Any] = {}

    def flows(self, cost_PLM: Tensor, *, keep: bool = True) -> Tensor:
        """Return the exact flow of each problem: see `exact_flow`.

        Costs and masses go to the host in one copy, the flows come back in one. Costs that are not
        finite get the flow of independent layers and change no mass: the loop stops at their loss.

        Args:
            cost_PLM: Ground costs by problem, shape ``(P, L, M)``; detached.
            keep: Whether, in training, the masses follow this flow, and `record` tells of it.

        Returns:
            Shape ``(P, L, M)``, on the costs' device and in their dtype, without gradient. Each sums to 1.

        Example:
            >>> masses = LayerMasses(("states",), 2, 2, None)
            >>> masses.flows(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).tolist()
            [[[0.5, 0.0], [0.0, 0.5]]]
        """
        packed = torch.cat([cost_PLM.detach().flatten(), self.student.flatten(), self.teacher.flatten()])
        # The one wait for the device in a step.
        values = packed.cpu().double().numpy()
        P, L, M = cost_PLM.shape
        cost, student, teacher = np.split(values, [P * L * M, P * L * M + P * L])
        cost, student, teacher = cost.reshape(P, L, M), student.reshape(P, L), teacher.reshape(P, M)
        # Float32 buffers sum to 1 only to rounding.
        student, teacher = (x / x.sum(1, keepdims=True) for x in (student, teacher))
        floored = [False] * P
        if np.isfinite(cost).all():
            flow = np.stack([exact_flow(*each) for each in zip(cost, student, teacher, strict=True)])
            if keep and self.training and self.update is not None:
                *masses, floored = self.update(flow, cost, student, teacher)
                self._next = (masses[0], masses[1])
        else:
            flow = student[:, :, None] * teacher[:, None]
        if keep and self.training:
            self._record = {
                name: {
                    "emd": _plain((flow[p] * cost[p]).sum()),
                    "cost": _plain(cost[p]),
                    "flow": _plain(flow[p]),
                    "student_masses": _plain(student[p]),
                    "teacher_masses": _plain(teacher[p]),
                    "floored": floored[p],
                }
                for p, name in enumerate(self.problems)
            }
        return torch.from_numpy(flow).to(cost_PLM.device, cost_PLM.dtype)

    def advance(self) -> None:
        """Take over the masses that the last training pass led to."""
        if self._next is not None:
            for masses, new in zip((self.student, self.teacher), self._next, strict=True):
                masses.copy_(torch.from_numpy(new))
            self._next = None

    def record(self) -> dict[str, Any]:
        """Return the last training pass's problems, solved, as plain JSON values.

        By problem: `emd`, the value; `cost` and `flow`, L lists of M numbers (student layer i in
        list i, teacher layer j at place j); `student_masses` and `teacher_masses`, with which it was
        solved: the sums of the flow's rows and columns; `floored`, whether the floor acted on the
        masses that follow.
        """
        return self._record


def _plain(values: Any) -> Any:
    """Return nested lists of numbers to six digits."""
    if np.ndim(values):
        return [_plain(each) for each in values]
    return float(f"{values:.6g}")
