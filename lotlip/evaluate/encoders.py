"""Encoders: models that turn images and texts into comparable features, with the protocol of how they do it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lotlip.core.files import weights_hash
from lotlip.data.batches import by_length, in_batches, prefetch
from lotlip.data.images import decode_rgb, image_transform, resized_side, to_rgb
from lotlip.data.models import OPEN_CLIP
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.lotlip import LotlipModel
from lotlip.models.vision.image_tower import for_inference

if TYPE_CHECKING:
    from PIL import Image

PRECISIONS = ("fp32", "bf16")
ACCEPTED = (
    "a model must be the folder of a saved model of this project, the folder or Hugging Face name of a CLIP or SigLIP "
    f"model of transformers or of an open_clip model, or {OPEN_CLIP}NAME:TAG_OR_FILE"
)


class Encoder(Protocol):
    """A dual encoder. Features are returned in float32 on the CPU."""

    def images(self, images: Iterable[bytes]) -> Tensor:
        """Returns normalised features of encoded images, [I, D]; with late interaction those of patches, [I, P, D].

        Raises:
            UnreadableImage: an image cannot be decoded.
        """

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Returns normalised features of short or long texts.

        Returns:
            [T, D] and None; with late interaction features of all tokens, [T, L, D], and a mask, [T, L], which is False
            for padding.
        """

    def protocol(self) -> dict[str, str | int]:
        """Returns what determines the features: context length, image size, preprocessing, precision, …"""


class CachedTextEncoder:
    """An encoder that caches the features of texts, so that each text is encoded once.

    Args:
        encoder: the encoder.

    Attributes:
        protocol, images: those of the encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._rows: dict[str, Tensor] = {}  # text → [D]; with late interaction [l, D]
        self.images, self.protocol = encoder.images, encoder.protocol

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """See `Encoder`."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._rows]:
            features, mask = self._encoder.texts(new)
            new_rows = features if mask is None else [row[valid] for row, valid in zip(features, mask, strict=True)]
            self._rows |= zip(new, new_rows, strict=True)
        rows = [self._rows[text] for text in texts]
        return (torch.stack(rows), None) if rows[0].ndim == 1 else _padded(rows)


class UnreadableImage(ValueError):
    """An image cannot be decoded.

    Attributes:
        number: its index among the images to encode.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(frozen=True)
class Runner:
    """Runs a model in batches, on a device and in a precision.

    Attributes:
        batch_size: number of images or texts per batch.
        device: "cpu", "cuda" or "cuda:N".
        precision: "fp32", or "bf16" for autocast: weights stay fp32, matrix products are bf16.
        on_batch: called with the number of images or texts after every batch.

    Raises:
        ValueError: a value is invalid.
    """

    batch_size: int = 64
    device: str = "cpu"
    precision: str = "fp32"
    on_batch: Callable[[int], object] = lambda _: None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; choose {' or '.join(PRECISIONS)}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sets the precision and disables gradients within the context."""
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield

    def features(self, encode: Callable[..., Tensor], *inputs: Tensor, **named: Tensor) -> Tensor:
        """Encodes one batch on the device and returns normalised features, float32 on the CPU."""

        def normalised(*inputs: Tensor, **named: Tensor) -> Tensor:
            return normalize(encode(*inputs, **named).float(), dim=-1)

        return self.outputs(normalised, *inputs, **named)

    def outputs(self, encode: Callable[..., Tensor], *inputs: Tensor, **named: Tensor) -> Tensor:
        """Encodes one batch on the device, without normalisation; float32 on the CPU."""
        with self.running():
            moved = [tensor.to(self.device) for tensor in inputs]
            features = encode(*moved, **{name: tensor.to(self.device) for name, tensor in named.items()})
            self.on_batch(len(features))
            return features.float().cpu()

    def prepared(self, images: Iterable[bytes], prepare: Callable[[bytes], Any]) -> Iterator[list[Any]]:
        """Yields batches of images, preprocessed by threads while the model runs.

        Raises:
            UnreadableImage: an image cannot be decoded.
        """

        def prepare_one(numbered: tuple[int, bytes]) -> Any:
            try:
                return prepare(numbered[1])
            except ValueError as error:
                raise UnreadableImage(numbered[0], str(error)) from error

        return in_batches(prefetch(prepare_one, enumerate(images), 2 * self.batch_size), self.batch_size)

    def protocol(self, *libraries: str) -> dict[str, str | int]:
        """Returns the settings that determine features, with the versions of the libraries."""
        return {
            "precision": self.precision,
            "device": self.device,
            "libraries": ", ".join(f"{name} {version(name)}" for name in ("torch", *libraries)),
        }


class LotlipEncoder:
    """A model of this project; the feature of a text is that of [CLS] (paper, section 4).

    Args:
        model: the model.
        tokenizer: its tokenizer.
        run: device, precision and batch size; a number is a batch size, in fp32 on the CPU.
        folder: the model's folder; None if it was not loaded from one.
        token_ids: text → token ids, a cache for models with the same tokenizer, such as seeds; None: no cache.

    Attributes:
        model: the model, on the device.
        tokenizer: its tokenizer.
        folder: the model's folder, or None.
    """

    def __init__(
        self,
        model: LotlipModel,
        tokenizer: TextTokenizer,
        run: Runner | int,
        folder: Path | None = None,
        token_ids: dict[str, np.ndarray] | None = None,
    ) -> None:
        self._run = Runner(run) if isinstance(run, int) else run
        untyped: Any = model  # mypy cannot call the type of transformers' `to`
        self.model: Any = untyped.to(self._run.device)
        if getattr(self.model, "image", None) is not None:
            for_inference(self.model.image, self._run.device)
        self.tokenizer = tokenizer
        self.folder = folder
        self._token_ids = token_ids

    @classmethod
    def open(cls, folder: Path, run: Runner) -> LotlipEncoder:
        """Loads a saved model.

        Raises:
            ValueError: the folder has no model.
        """
        from lotlip.models.saving import load_model

        return cls(*load_model(folder), run, folder)

    @property
    def _late_interaction(self) -> bool:
        return self.model.config.similarity == "late-interaction"

    @cached_property
    def _transform(self) -> Callable[[Image.Image], np.ndarray]:
        spec = self.model.image_tower.spec
        return image_transform(**spec.preprocessing)

    def prepare(self, image: Image.Image | bytes) -> np.ndarray:
        """Preprocesses an image for the image tower, float32 [3, S, S]. Thread-safe.

        Raises:
            ValueError: the image cannot be decoded.
        """
        return self._transform(decode_rgb(image) if isinstance(image, bytes) else to_rgb(image))

    def prepared(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Returns normalised features of a batch of preprocessed images, as `images` does."""
        encode = self.model.encode_image_patches if self._late_interaction else self.model.encode_image
        return self._run.features(encode, _stacked(pictures))

    def images(self, images: Iterable[bytes]) -> Tensor:
        """See `Encoder`."""
        return torch.cat([self.prepared(batch) for batch in self._run.prepared(images, self.prepare)])

    def patches(self, images: Iterable[bytes]) -> Iterator[Tensor]:
        """Yields features of the patches of encoded images in batches, [B, P, C], not normalised, float32 on the CPU.

        Raises:
            UnreadableImage: an image cannot be decoded.
        """
        tower = self.model.image_tower
        for batch in self._run.prepared(images, self.prepare):
            yield self._run.outputs(lambda pixels: tower.patches(tower.hidden_states(pixels)), _stacked(batch))

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """See `Encoder`. Texts of similar length are encoded together."""
        ids, lengths = self._tokenized(texts)
        encode = self._tokens if self._late_interaction else self._cls
        rows = [torch.empty(0)] * len(texts)
        for places in by_length(lengths, self._run.batch_size):
            batch = torch.from_numpy(ids[places, : lengths[places[-1]]]), torch.from_numpy(lengths[places])
            for place, row in zip(places, self._run.features(encode, *batch), strict=True):
                rows[place] = row[: lengths[place]] if self._late_interaction else row
        return _padded(rows) if self._late_interaction else (torch.stack(rows), None)

    def _tokenized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of texts, [T, L], padded, and their lengths, [T]."""
        if self._token_ids is None:
            return self.tokenizer(texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self._token_ids]:
            rows = zip(*self.tokenizer(new), strict=True)
            self._token_ids |= {text: row[:length].copy() for text, (row, length) in zip(new, rows, strict=True)}
        lengths = np.array([len(self._token_ids[text]) for text in texts], dtype=np.int64)
        ids = np.full((len(texts), lengths.max(initial=1)), self.tokenizer.pad_id, dtype=np.int64)
        for row, text, length in zip(ids, texts, lengths, strict=True):
            row[:length] = self._token_ids[text]
        return ids, lengths

    def image_protocol(self) -> dict[str, Any]:
        """Returns all that decides the features of images: hash of the tower's weights, its spec and how it runs."""
        tower = self.model.image_tower
        weights = {name: weight.contiguous() for name, weight in tower.state_dict().items()}
        return {
            "weights_sha256": hashlib.sha256(save(weights)).hexdigest(),
            "spec": tower.spec.to_json(),
            "batch_size": self._run.batch_size,
            **self._run.protocol("transformers", "timm", "pillow"),
        }

    def _cls(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_text(ids, lengths, cls_only=True)[:, 0]

    def _tokens(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_text_tokens(ids, lengths)[0]

    def protocol(self) -> dict[str, str | int]:
        """See `Encoder`."""
        spec = self.model.image_tower.spec
        side, resized = spec.image_size, resized_side(spec.image_size, spec.crop)
        cropped = f"centre crop to {side}"
        steps = {
            "crop": (f"shorter side to {resized}, {spec.interpolation}", cropped),
            "squash": (f"both sides to {resized}, {spec.interpolation}", cropped if resized > side else ""),
            "pad": (f"longer side to {side}, {spec.interpolation}", f"padded to {side} with the mean"),
        }[spec.resize]
        where = {"model": str(self.folder), "weights_sha256": weights_hash(self.folder)} if self.folder else {}
        return {
            **where,
            "kind": "lotlip",
            "context_length": self.model.config.context_length,
            "image_size": side,
            "preprocessing": preprocessing(*steps, spec.mean, spec.std),
            "text_preparation": _TEXT_PREPARATION[self.tokenizer.family],
            "similarity": self.model.config.similarity,
            **self._run.protocol("transformers", "timm", "pillow"),
        }


# By the family of the tokenizer. Only BERT's marks sentence ends.
_TEXT_PREPARATION = {
    "bert": "sub-captions joined by [SEP], cut at the context length",
    "clip": "cut at the context length",
    "siglip": "cut at the context length, padded to it",
}


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads rows [l, D] of each text to [T, L, D], and returns a mask [T, L] that is False for padding."""
    padded = pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def preprocessing(resize: str, crop: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """Describes the preprocessing of images."""
    shift, scale = (", ".join(f"{value:.8g}" for value in values) for values in (mean, std))
    return ", ".join(part for part in (resize, crop, f"mean {shift}", f"std {scale}") if part)
