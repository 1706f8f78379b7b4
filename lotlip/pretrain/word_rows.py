"""Trains only those rows of the table of word embeddings that training texts use.

A small data set uses a few hundred of BERT's 30,522 word pieces. The gradient of all other rows is zero. So AdamW's
moments of these rows stay zero, and each step only multiplies them by 1 − learning rate × weight decay: their values
after any number of steps are known in advance. While a model trains, its table has the used rows only. Checkpoints and
saved models have the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lotlip.pretrain.model import LotlipForPreTraining

# Where more of the table is used, cutting it gains little.
MAX_SHARE = 0.5


class WordRows:
    """The used rows of a model's table of word embeddings, and the whole table as it was before training.

    Args:
        model: its table is cut to the used rows.
        ids: of tokens that occur. Rows up to the padding token's are kept as well, so that the token keeps its id.
        decay: number of steps → what weight decay leaves of an unused row, as a factor.

    Attributes:
        name: of the table among the model's parameters.
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

    def used(self, whole: Tensor) -> Tensor:
        """The used rows of a table [V, H].

        Raises:
            ValueError: it is a table of another model.
        """
        if whole.shape != self._start.shape:
            expected = tuple(self._start.shape)
            raise ValueError(f"{self.name} has shape {tuple(whole.shape)}, not {expected}")
        return whole[self._ids]

    def whole(self, used: Tensor, steps: int) -> Tensor:
        """The table [V, H] after a number of steps, from its used rows."""
        return self._with(used, self._start * self._decay(steps))

    def whole_moment(self, used: Tensor) -> Tensor:
        """One of AdamW's moments of the table [V, H], from that of its used rows."""
        return self._with(used, torch.zeros_like(self._start))

    def _with(self, used: Tensor, whole: Tensor) -> Tensor:
        whole[self._ids] = used
        return whole


def keep_used_rows(model: LotlipForPreTraining, ids: Iterable[int], decay: Callable[[int], float]) -> None:
    """Cuts a model's table of word embeddings to the used rows (`model.word_rows`), unless they are more than half."""
    used = set(ids)
    if len(used) <= MAX_SHARE * model.config.text_config.vocab_size:
        model.word_rows = WordRows(model, used, decay)
