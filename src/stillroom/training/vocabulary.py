"""Train only the word embeddings that the training rows can reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.encoder import Encoder


class Vocabulary(nn.Module):
    """A table of word embeddings of which only some rows are trained.

    Stands in the model where the whole `nn.Embedding` stood. `weight` `(U, D)` holds the rows of the U
    ids that occur in training, so that gradient, clipping and optimiser state have U rows instead of V.
    It gives and gets the same numbers as the whole table: a row that no batch looks up has gradient 0 in
    every step, so that its moments stay 0 and AdamW only decays it. That decay is one factor for all
    such rows: it is multiplied up in float64 and applied when the whole table is read (evaluation,
    checkpoint, end), where AdamW would round every row in every step.

    A state dict holds the whole table under the name it always had.

    Args:
        table: The whole table, which is kept and brought up to date by `whole`.
        used: Ids that occur in training, each once, shape `(U,)`.

    Example:
        >>> table = nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), freeze=False)
        >>> words = Vocabulary(table, torch.tensor([1, 3]))
        >>> words(torch.tensor([[3, 1]])).flatten().tolist()
        [3.0, 1.0]
        >>> words.weight.shape
        torch.Size([2, 1])
    """

    def __init__(self, table: nn.Embedding, used: Tensor):
        super().__init__()
        # In a tuple it is no submodule: neither a parameter nor in the state dict.
        self._table = (table,)
        self._decay = 1.0
        self.weight = nn.Parameter(table.weight.detach()[used].clone())
        # An id that was not expected lies outside, and looking it up is an error.
        index = torch.full((table.num_embeddings,), len(used)).index_copy(0, used, torch.arange(len(used)))
        self.register_buffer("_used", used, persistent=False)
        self.register_buffer("_index", index, persistent=False)
        pad = table.padding_idx
        self._padding = int(index[pad]) if pad is not None and int(index[pad]) < len(used) else None

    _used: Tensor
    _index: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of ids; gradients flow to the table's rows that are trained.

        Args:
            input_ids: int64, shape `(B, S)`.

        Returns:
            Shape `(B, S, D)`.

        Raises:
            IndexError: If an id is none that is trained.

        Example:
            >>> words = Vocabulary(nn.Embedding.from_pretrained(torch.eye(4)), torch.tensor([0, 2]))
            >>> words(torch.tensor([[2]])).tolist(), len(words.weight)
            ([[[0.0, 0.0, 1.0, 0.0]]], 2)
        """
        return F.embedding(self._index[input_ids], self.weight, self._padding)

    def after_step(self, decay: float) -> None:
        """Note that the optimiser has multiplied what it decays by ``1 - decay``."""
        if self.weight.grad is not None:
            self._decay *= 1 - decay

    @torch.no_grad()
    def whole(self) -> nn.Embedding:
        """Return the whole table, up to date. The same object every time."""
        (table,) = self._table
        table.to(self.weight.device)
        if self._decay != 1:
            table.weight *= self._decay
            self._decay = 1.0
        table.weight[self._used] = self.weight
        return table

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.whole().weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        (table,) = self._table
        table._load_from_state_dict(state_dict, prefix, *others)
        self.weight.copy_(table.weight[self._used.to(table.weight.device)])
        self._decay = 1.0


@contextmanager
def trained_words(student: Encoder, ids: np.ndarray | None) -> Iterator[Vocabulary | None]:
    """Let the student train the embeddings of `ids` and of nothing else, while this lasts.

    Afterwards the model has its whole table again, also if training failed. Yields None, and changes
    nothing, where any id may be looked up, where all of the table is used, or where it is no plain
    `nn.Embedding` of its own (tied weights serve elsewhere too).

    Args:
        student: Changed in place.
        ids: All token ids that training may look up, in any order and number; None for any id.
    """
    if ids is None:
        yield None
        return
    model: Any = student.model
    table = model.get_input_embeddings()
    # Counted and not sorted: there may be a hundred million of them.
    counts = np.bincount(ids)
    used = torch.from_numpy(np.union1d(np.flatnonzero(counts), [student.tokenizer.pad_token_id]))
    if not _stands_alone(table, model) or len(used) == table.num_embeddings:
        yield None
        return
    words = Vocabulary(table, used)
    model.set_input_embeddings(words)
    try:
        yield words
    finally:
        model.set_input_embeddings(words.whole())


@contextmanager
def whole_table(student: Encoder, words: Vocabulary | None) -> Iterator[None]:
    """Give the student its whole table while this lasts: evaluation reads words that training does not."""
    model: Any = student.model
    if words is not None:
        model.set_input_embeddings(words.whole())
    try:
        yield
    finally:
        if words is not None:
            model.set_input_embeddings(words)


def _stands_alone(table: Any, model: nn.Module) -> bool:
    """Return whether `table` is a plain table that is trained, and whose weights nothing else uses."""
    if type(table) is not nn.Embedding or not table.weight.requires_grad:
        return False
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return False
    owners = [m for m in model.modules() for p in m.parameters(recurse=False) if p is table.weight]
    return len(owners) == 1
