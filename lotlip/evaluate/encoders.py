"""Models as evaluation sees them: images and texts in, features that can be compared out, and how they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lotlip.core.files import weights_hash
from lotlip.data.batches import by_length, in_batches, prefetch
from lotlip.data.images import decode_rgb, image_transform, to_rgb
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.lotlip import LotlipModel

if TYPE_CHECKING:
    from PIL import Image

PRECISIONS = ("fp32", "bf16")
OPEN_CLIP = "open_clip:"
ACCEPTED = (
    "a model is the folder of a saved model of this project, a folder or the Hugging Face name of a CLIP or SigLIP of "
    f"transformers or of a model of open_clip, or {OPEN_CLIP}NAME:TAG_OR_FILE"
)


class Encoder(Protocol):
    """A dual encoder that can be scored. Features come back in float32 on the CPU, wherever they were made."""

    def images(self, images: Iterable[bytes]) -> Tensor:
        """Normalised features of encoded images, [I, D]; with late interaction those of their patches, [I, P, D].

        Raises:
            UnreadableImage: one cannot be decoded.
        """

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Normalised features of texts, short and long alike.

        Returns:
            [T, D] and None; with late interaction those of all tokens, [T, L, D], and which are no padding, [T, L].
        """

    def protocol(self) -> dict[str, str | int]:
        """What decides its features: context length, image size, preparation of images and texts, precision, …"""


class EachTextOnce:
    """Texts' features of an encoder, each made once however many measures ask for it.

    Args:
        encoder: that makes them.

    Attributes:
        protocol, images: the encoder's.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._rows: dict[str, Tensor] = {}  # [D]; with late interaction those of its tokens, [l, D]
        self.images, self.protocol = encoder.images, encoder.protocol

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As of `Encoder`."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._rows]:
            features, mask = self._encoder.texts(new)
            rows = features if mask is None else [row[own] for row, own in zip(features, mask, strict=True)]
            self._rows |= zip(new, rows, strict=True)
        found = [self._rows[text] for text in texts]
        return (torch.stack(found), None) if found[0].ndim == 1 else _padded(found)


class UnreadableImage(ValueError):
    """An image that cannot be decoded.

    Attributes:
        number: its place among those that were to be encoded.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(frozen=True)
class Runner:
    """How a model is run: a batch at a time, somewhere, in a precision.

    Attributes:
        batch_size: images or texts encoded at a time.
        device: "cpu", "cuda" or "cuda:N".
        precision: "fp32"; or "bf16", where weights stay fp32 and matrix products are made of bf16 (torch's autocast).
        on_batch: told how many images or texts were encoded, after every batch.

    Raises:
        ValueError: a value is not allowed.
    """

    batch_size: int = 64
    device: str = "cpu"
    precision: str = "fp32"
    on_batch: Callable[[int], object] = lambda _: None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, and must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"there is no precision {self.precision!r}; choose {' or '.join(PRECISIONS)}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it a model runs in this precision, without gradients."""
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield

    def features(self, encode: Callable[..., Tensor], *inputs: Tensor, **named: Tensor) -> Tensor:
        """Normalised features of one batch, float32 on the CPU: of what `encode` makes of tensors on the device."""
        with self.running():
            moved = [tensor.to(self.device) for tensor in inputs]
            found = encode(*moved, **{name: tensor.to(self.device) for name, tensor in named.items()})
            self.on_batch(len(found))
            return normalize(found.float(), dim=-1).cpu()

    def prepared(self, images: Iterable[bytes], prepare: Callable[[bytes], Any]) -> Iterator[list[Any]]:
        """Images in batches, decoded and made ready by threads while the model runs.

        Raises:
            UnreadableImage: one cannot be decoded.
        """

        def made(numbered: tuple[int, bytes]) -> Any:
            try:
                return prepare(numbered[1])
            except ValueError as error:
                raise UnreadableImage(numbered[0], str(error)) from error

        return in_batches(prefetch(made, enumerate(images), 2 * self.batch_size), self.batch_size)

    def protocol(self, *libraries: str) -> dict[str, str | int]:
        """What of it decides features, with the versions of the libraries that make them."""
        return {
            "precision": self.precision,
            "device": self.device,
            "libraries": ", ".join(f"{name} {version(name)}" for name in ("torch", *libraries)),
        }


class LotlipEncoder:
    """A model of this project; its texts' features are [CLS]'s (paper, section 4).

    Args:
        model: to score.
        tokenizer: its own.
        run: how; a number is a batch size, in fp32 on the CPU.
        folder: where the model is, for its protocol to tell; None where it is in no folder.

    Attributes:
        model: on the device.
        tokenizer: its own.
    """

    def __init__(
        self, model: LotlipModel, tokenizer: TextTokenizer, run: Runner | int, folder: Path | None = None
    ) -> None:
        self._run = Runner(run) if isinstance(run, int) else run
        moved: Any = model  # transformers' `to` has a type that mypy cannot call
        self.model: Any = moved.to(self._run.device)
        self.tokenizer = tokenizer
        self._folder = folder

    @classmethod
    def open(cls, folder: Path, run: Runner) -> LotlipEncoder:
        """Of a saved model.

        Raises:
            ValueError: the folder has no model.
        """
        from lotlip.models.saving import load_model

        return cls(*load_model(folder), run, folder)

    @property
    def _token_by_token(self) -> bool:
        return self.model.config.similarity == "late-interaction"

    @cached_property
    def _transform(self) -> Callable[[Image.Image], np.ndarray]:
        spec = self.model.image_tower.spec
        return image_transform(spec.image_size, spec.mean, spec.std, spec.resize)

    def prepare(self, image: Image.Image | bytes) -> np.ndarray:
        """What the image tower takes of an image, float32 [3, S, S]: for threads to do beside the model.

        Raises:
            ValueError: the image cannot be decoded.
        """
        return self._transform(decode_rgb(image) if isinstance(image, bytes) else to_rgb(image))

    def prepared(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Normalised features of a batch of what `prepare` made, as of `images`."""
        encode = self.model.encode_image_patches if self._token_by_token else self.model.encode_image
        return self._run.features(encode, torch.from_numpy(np.stack(pictures)))

    def images(self, images: Iterable[bytes]) -> Tensor:
        """As of `Encoder`."""
        return torch.cat([self.prepared(batch) for batch in self._run.prepared(images, self.prepare)])

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As of `Encoder`. Texts of like length are encoded together."""
        ids, lengths = self.tokenizer(texts)
        encode = self._tokens if self._token_by_token else self._cls
        rows = [torch.empty(0)] * len(texts)
        for places in by_length(lengths, self._run.batch_size):
            own = torch.from_numpy(ids[places, : lengths[places[-1]]]), torch.from_numpy(lengths[places])
            for place, row in zip(places, self._run.features(encode, *own), strict=True):
                rows[place] = row[: lengths[place]] if self._token_by_token else row
        return _padded(rows) if self._token_by_token else (torch.stack(rows), None)

    def _cls(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_text(ids, lengths, cls_only=True)[:, 0]

    def _tokens(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_text_tokens(ids, lengths)[0]

    def protocol(self) -> dict[str, str | int]:
        """As of `Encoder`."""
        spec = self.model.image_tower.spec
        side = spec.image_size
        steps = {
            "crop": (f"shorter side to {side}, bicubic", f"centre crop to {side}"),
            "squash": (f"both sides to {side}, bicubic", ""),
            "pad": (f"longer side to {side}, bicubic", f"padded to {side} with the mean"),
        }[spec.resize]
        where = {"model": str(self._folder), "weights_sha256": weights_hash(self._folder)} if self._folder else {}
        return {
            **where,
            "kind": "lotlip",
            "context_length": self.model.config.context_length,
            "image_size": side,
            "preprocessing": preprocessing(*steps, spec.mean, spec.std),
            "text_preparation": "sub-captions joined by [SEP], cut at the context length",
            "similarity": self.model.config.similarity,
            **self._run.protocol("transformers", "timm", "pillow"),
        }


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [l, D] of each text side by side, [T, L, D], and which are no padding, [T, L]."""
    padded = pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def preprocessing(resize: str, crop: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """How pictures are prepared, in words."""
    shift, scale = (", ".join(f"{value:.8g}" for value in values) for values in (mean, std))
    return ", ".join(part for part in (resize, crop, f"mean {shift}", f"std {scale}") if part)
