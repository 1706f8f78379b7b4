"""Models as evaluation sees them: images and texts in, features that can be compared out, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lotlip.data.images import decode_rgb, image_transform
from lotlip.data.tokenizer import TextTokenizer
from lotlip.embedding import in_batches
from lotlip.models.lotlip import LotlipModel


class Encoder(Protocol):
    """A dual encoder that can be scored."""

    def images(self, images: Iterable[bytes]) -> Tensor:
        """Normalised features of encoded images, [I, D]; with late interaction those of their patches, [I, P, D].

        Raises:
            ValueError: an image cannot be decoded.
        """

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Normalised features of texts, short and long alike.

        Returns:
            [T, D] and None; with late interaction those of all tokens, [T, L, D], and which are no padding, [T, L].
        """

    def protocol(self) -> dict[str, str | int]:
        """What decides its features: context length, image size, preparation of images and texts, precision, …"""


class LotlipEncoder:
    """A model of this project; its texts' features are [CLS]'s (paper, section 4).

    Args:
        model: to score; where it is, its features are made.
        tokenizer: its own.
        batch_size: images or texts encoded at a time.
    """

    def __init__(self, model: LotlipModel, tokenizer: TextTokenizer, batch_size: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    @property
    def _token_by_token(self) -> bool:
        return self._model.config.similarity == "late-interaction"

    def images(self, images: Iterable[bytes]) -> Tensor:
        """As of `Encoder`."""
        spec = self._model.image_tower.spec
        transform = image_transform(spec.image_size, spec.mean, spec.std)
        encode = self._model.encode_image_patches if self._token_by_token else self._model.encode_image
        with torch.inference_mode():
            return torch.cat(
                [
                    encode(torch.from_numpy(np.stack([transform(decode_rgb(image)) for image in batch])))
                    for batch in in_batches(images, self._batch_size)
                ]
            )

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As of `Encoder`."""
        rows: list[Tensor] = []
        with torch.inference_mode():
            for batch in in_batches(texts, self._batch_size):
                ids, lengths = map(torch.from_numpy, self._tokenizer(batch))
                if self._token_by_token:
                    tokens, mask = self._model.encode_text_tokens(ids, lengths)
                    rows += [own[real] for own, real in zip(tokens, mask, strict=True)]
                else:
                    rows.append(self._model.encode_text(ids, lengths)[:, 0])
        if not self._token_by_token:
            return torch.cat(rows), None
        lengths = torch.tensor([len(row) for row in rows])
        padded = pad_sequence(rows, batch_first=True)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]

    def protocol(self) -> dict[str, Any]:
        """As of `Encoder`."""
        return {
            "context_length": self._model.config.context_length,
            "image_size": self._model.image_tower.spec.image_size,
            "resize": "shorter side bicubic, centre crop",
            "precision": str(self._model.dtype).removeprefix("torch."),
            "similarity": self._model.config.similarity,
            "text_preparation": "sub-captions joined by [SEP], cut at the context length",
        }
