"""Trains only those rows of the table of word embeddings that training texts use.

A small data set uses a few hundred of BERT's 30,522 word pieces. The gradient of all other rows is zero. So AdamW's
moments of these rows stay zero, and each step only multiplies the rows by 1 − learning rate × weight decay. Their
values after any number of steps are known in advance. During training the table has the used rows only. Checkpoints and
saved models have the full table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lotlip.pretrain.model import LotlipForPreTraining

# If a larger share of the table is used, cutting it gains little.
MAX_SHARE = 0.5


class WordRows:
    """The used rows of a model's table of word embeddings, and the full table before training.

    Args:
        model: its table is cut to the used rows.
        ids: ids of the tokens that occur. Rows up to the padding token's are kept too, so that this token keeps its id.
        decay: number of steps → factor by which weight decay has scaled an unused row.

    Attributes:
        name: parameter name of the table.
        row_of: token id → row of the cut table, −1 for unused rows, int64 [V].
    """

    def __init__(self, model: LotlipForPreTraining, ids: Iterable[int], decay: Callable[[int], float]) -> None:
        table = model.text.transformer.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        self.name = next(name for name, value in model.named_parameters() if value is table.weight)
        self._start, self._decay = table.weight.detach(), decay
        self._ids = torch.tensor(sorted({*ids, *range((table.padding_idx or 0) + 1)}))
        self.row_of = torch.full((len(self._start),), -1)
        self.row_of[self._ids] = torch.arange(len(self._ids))
        table.weight = nn.Parameter(self._start[self._ids])
        table.num_embeddings = len(self._ids)

    def select(self, table: Tensor) -> Tensor:
        """Returns the used rows of a full table [V, H].

        Raises:
            ValueError: the table belongs to another model.
        """
        if table.shape != self._start.shape:
            expected = tuple(self._start.shape)
            raise ValueError(f"{self.name} has shape {tuple(table.shape)}, not {expected}")
        return table[self._ids]

    def full(self, used: Tensor, steps: int) -> Tensor:
        """Returns the full table [V, H] after a number of steps, given its used rows."""
        return self._insert(used, self._start * self._decay(steps))

    def full_moment(self, used: Tensor) -> Tensor:
        """Returns one of AdamW's moments of the full table [V, H], given that of its used rows."""
        return self._insert(used, torch.zeros_like(self._start))

    def _insert(self, used: Tensor, table: Tensor) -> Tensor:
        table[self._ids] = used
        return table


def keep_used_rows(model: LotlipForPreTraining, ids: Iterable[int], decay: Callable[[int], float]) -> None:
    """Cuts a model's table of word embeddings to the used rows (`model.word_rows`), unless these are more than half."""
    used = set(ids)
    if len(used) <= MAX_SHARE * model.config.text_config.vocab_size:
        model.word_rows = WordRows(model, used, decay)
