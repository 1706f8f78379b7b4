"""Text towers: texts to one feature for the whole text and one for each corner token (paper, section 3.2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotlip.models.checkpointing import checkpoint_layers
from lotlip.models.text.packing import TextBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lotlip.models.configuration import LotlipConfig

# Model type of transformers → its tower. All other model types are of the BERT family.
_TOWERS = {
    "clip_text_model": "lotlip.models.text.clip:ClipTower",
    "modernbert": "lotlip.models.text.modernbert:ModernBertTower",
    "siglip_text_model": "lotlip.models.text.siglip:SiglipTower",
}
_BERT = "lotlip.models.text.bert:BertTower"


class TextTower(nn.Module):
    """A text encoder of transformers with a projection. A subclass adapts the models of one family.

    The summary token is the one whose feature stands for the whole text: [CLS], or the end token of CLIP. The summary
    token and the corner tokens each read all words, but not one another, and words never read corner tokens (paper,
    section 3.2). Register tokens (Table 7) are masked like words, and their features are not used.

    Args:
        transformer: the encoder. Its `vocab_size` includes the corner and register tokens.
        config: configuration of the whole model.

    Attributes:
        transformer: the encoder.
        corner_tokens: m.
        register_tokens: number of register tokens.
        corner_mask: whether the summary token and the corner tokens are masked from one another.
        proj: the projection to the shared space; a subclass sets it.
    """

    proj: nn.Linear

    def __init__(self, transformer: PreTrainedModel, config: LotlipConfig) -> None:
        super().__init__()
        self.checkpointing = False
        self.transformer = transformer
        self.corner_tokens = config.corner_tokens
        self.register_tokens = config.register_tokens
        self.corner_mask = config.corner_mask

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns features before normalisation: that of the text, then those of the corner tokens in order.

        Args:
            input_ids: [B, L], padded at the end.
            lengths: number of tokens of each text, [B].

        Returns:
            [B, 1 + m, D]
        """
        return self.encode(TextBatch(input_ids, lengths))[0]

    def encode(self, *batches: TextBatch) -> list[Tensor]:
        """Returns features of several batches of texts, before normalisation, in one pass if the encoder supports it.

        Returns:
            for each batch [B, 1 + m, D], or [B, 1, D] if it is `cls_only`.
        """
        return [
            self.features(self.hidden_states(ids, lengths)[1][:, : 1 if cls_only else None])
            for ids, lengths, cls_only, _ in batches
        ]

    def enable_checkpointing(self) -> None:
        """Makes the backward pass recompute the activations of layers.

        Raises:
            ValueError: the encoder does not support it.
        """
        if not checkpoint_layers(self.transformer):
            raise ValueError(
                f"a {self.transformer.config.model_type} encoder does not support activation checkpointing; set "
                "compute.training.activation_checkpointing to false"
            )
        self.checkpointing = True

    def run_layer(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Runs a layer on packed texts, with checkpointing if it is enabled."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def attention_mask(self, input_ids: Tensor) -> Tensor:
        """Returns 1 for tokens and 0 for padding, [B, L], derived from the ids."""
        return input_ids != self.transformer.config.pad_token_id

    @property
    def moves_words(self) -> bool:
        """Whether texts may have offsets: if they are packed and positions are learned."""
        return self.packs and position_table(self.transformer) is not None

    @property
    def packs(self) -> bool:
        """Whether texts are packed into one sequence instead of padded."""
        return False

    @property
    @abstractmethod
    def first_word(self) -> int:
        """Index of a text's first word among its ids."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Maximum number of tokens in a text."""

    @abstractmethod
    def hidden_states(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns last hidden states.

        Args:
            input_ids: [B, L], padded at the end.
            lengths: number of tokens of each text, [B].

        Returns:
            those of the tokens in `input_ids` [B, L, H], and those of the summary token and the corner tokens
            [B, 1 + m, H].
        """

    @abstractmethod
    def features(self, hidden: Tensor) -> Tensor:
        """Maps last hidden states [..., H] to features [..., D]."""


def position_table(encoder: nn.Module) -> tuple[str, nn.Embedding] | None:
    """Returns the name and the table of an encoder's learned absolute positions, [P, H]; None for rotary ones."""
    for name in ("embeddings.position_embeddings", "embeddings.position_embedding"):
        try:
            table = encoder.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(table, nn.Embedding):
            return name, table
    return None


def build_text_tower(config: LotlipConfig) -> TextTower:
    """Builds the text tower of a model with random weights.

    Raises:
        ValueError: an encoder of this type cannot be a text tower.
    """
    module, _, name = _TOWERS.get(config.text_config.model_type, _BERT).partition(":")
    return getattr(import_module(module), name)(config)
