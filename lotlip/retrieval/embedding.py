"""Embedding of texts and images with a saved model, in memory or into files, and search in those files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotlip.core.files import weights_hash
from lotlip.data.batches import in_batches, prefetch
from lotlip.data.pictures import Pictures, open_pictures, printable
from lotlip.retrieval.faiss_index import open_searchable
from lotlip.retrieval.index import Index, IndexRows, index_writer, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lotlip.models.lotlip import LotlipModel

KINDS = ("images", "texts")
_WINDOW = 4  # number of batches that are sorted by length together to reduce padding


class NotFiniteError(ValueError):
    """A model returned a feature with NaN or infinity.

    Attributes:
        row: index of the first such feature in the request.
    """

    def __init__(self, model: Path, what: str, row: int, name: str = "") -> None:
        super().__init__(
            f"the model in {model} is broken: its feature of {name or f'{what} {row}'} has NaN or infinity; restore "
            "its files or train it again"
        )
        self.model, self.what, self.row = model, what, row

    def with_name(self, names: Sequence[str]) -> NotFiniteError:
        """Returns the same error with the item's name."""
        return NotFiniteError(self.model, self.what, self.row, names[self.row])


class Embedder:
    """A saved model that embeds texts and images in the same space.

    Args:
        folder: folder of the model.
        device: "cpu", "cuda", or "auto" for cuda if available.
        batch_size: texts or images per batch.

    Attributes:
        encoder: the encoder used in evaluation.
        width: the dimension D of features.

    Raises:
        ValueError: the folder has no model, the model uses late interaction, or the device does not exist.
    """

    def __init__(self, folder: Path, device: str = "auto", batch_size: int = 64) -> None:
        from lotlip.core.device import choose_device
        from lotlip.evaluate.encoders import LotlipEncoder, Runner

        self._folder, self._batch_size = folder, batch_size
        self.encoder = LotlipEncoder.open(folder, Runner(batch_size, choose_device(device)))
        config = self.encoder.model.config
        if config.similarity != "cosine":
            raise ValueError(
                f"the model in {folder} compares token by token (similarity {config.similarity}), so it has no single "
                "feature to embed or search by; use a model with similarity cosine"
            )
        self.width: int = config.embed_dim

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns normalised [CLS] features of long or short texts (paper, section 4), float32 [N, D].

        Raises:
            NotFiniteError: a feature has NaN or infinity.
            ValueError: a text is not valid Unicode.
        """
        if not texts:
            return self._empty
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is not valid Unicode ({error.reason}); send it as UTF-8") from error
        features, _ = self.encoder.texts(texts)
        return self._finite(features.numpy(), "text")

    def images(self, images: Iterable[Image.Image | bytes]) -> np.ndarray:
        """Returns normalised features of decoded or encoded images, float32 [N, D].

        Raises:
            ValueError: an image cannot be decoded.
        """
        return self.prepared(self.prepare(image) for image in images)

    def prepare(self, image: Image.Image | bytes) -> np.ndarray:
        """Preprocesses an image for the image tower, float32 [3, S, S]. Thread-safe.

        Raises:
            ValueError: the image cannot be decoded.
        """
        return self.encoder.prepare(image)

    def prepared(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """Returns normalised features of preprocessed images, float32 [N, D].

        Raises:
            NotFiniteError: a feature has NaN or infinity.
        """
        features = [self.encoder.prepared(batch).numpy() for batch in in_batches(pictures, self._batch_size)]
        return self._finite(np.concatenate([self._empty, *features]), "image")

    def _finite(self, features: np.ndarray, what: str) -> np.ndarray:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise NotFiniteError(self._folder, what, int(broken[0]))
        return features

    @property
    def _empty(self) -> np.ndarray:
        return np.empty((0, self.width), dtype=np.float32)

    @property
    def model(self) -> LotlipModel:
        """The model, on its device."""
        return self.encoder.model

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenizes texts, on the model's device: ids [N, L], padded at the end, and lengths [N]."""
        import torch

        ids, lengths = (torch.from_numpy(part).to(self.model.device) for part in self.encoder.tokenizer(texts))
        return ids, lengths


# --- features into a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbedResult:
    """The result of `embed`.

    Attributes:
        rows: number of features written.
        width: the dimension D of features.
        left_out: name of each item without a feature, and the reason.
    """

    rows: int
    width: int
    left_out: list[tuple[str, str]]


def embed(
    model: Path,
    source: Path,
    out: Path,
    kind: str | None = None,
    batch_size: int = 64,
    fields: Sequence[str] = (),
    split: str | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EmbedResult:
    """Writes the features of images or texts to a file, atomically.

    Features are written in batches, so memory does not grow with their number. Unreadable images and empty texts are
    left out.

    Args:
        model: folder of the saved model.
        source: for images, a folder of images or the output of ingest, see `lotlip.data.pictures.open_pictures`. For
            texts, a .txt file with one text per line, or any source of `lotlip.data.annotations.read_texts`.
        out: a .parquet or .npy file, see `lotlip.retrieval.index`.
        kind: "images" or "texts"; default: images for a folder, texts for a file.
        batch_size: items per batch.
        fields: fields of the texts, see `read_texts`.
        split: the split to embed; default: all.
        device: see `Embedder`.
        on_progress: called with the number of items done and the total.

    Raises:
        ValueError: an argument is invalid, the model uses late interaction, or all items were left out.
    """
    kind = kind or ("images" if source.is_dir() else "texts")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose {' or '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    left_out: list[tuple[str, str]] = []
    if kind == "images":
        if fields:
            raise ValueError("images have no fields; leave out --field or use --kind texts")
        pictures = open_pictures(source, split)
        total = len(pictures.names)
    else:
        # Reading all texts first is cheap, and finds broken input before hours of encoding.
        total = sum(1 for _ in _texts(source, fields, split))
    embedder = Embedder(model, device, batch_size)
    about = {
        "model": str(model.resolve()),
        "weights_sha256": weights_hash(model),
        "kind": kind,
        "width": embedder.width,
        "source": str(source.resolve()),
        "split": split,
    }
    written = 0
    with index_writer(out, about) as write:
        on_progress(0, total)
        if kind == "images":
            encoded = _encode_images(embedder, pictures, batch_size, left_out)
        else:
            encoded = _encode_texts(embedder, _texts(source, fields, split), batch_size, left_out)
        for rows in encoded:
            write(rows)
            written += len(rows.names)
            on_progress(written + len(left_out), total)
        if not written:
            first = "; first problem: " + ": ".join(left_out[0]) if left_out else ""
            raise ValueError(f"none of the {total} {kind} in {source} can be embedded{first}")
    return EmbedResult(written, embedder.width, left_out)


def _encode_images(
    embedder: Embedder, pictures: Pictures, batch_size: int, left_out: list[tuple[str, str]]
) -> Iterator[IndexRows]:
    """Encodes a batch of images while threads decode the next ones."""

    def prepare(name: str) -> tuple[str, np.ndarray | str]:
        try:
            return name, embedder.prepare(pictures.read(name))
        except ValueError as error:
            return name, str(error)

    for batch in in_batches(prefetch(prepare, pictures.names, 2 * batch_size), batch_size):
        left_out += [(name, result) for name, result in batch if isinstance(result, str)]
        good = [(name, result) for name, result in batch if not isinstance(result, str)]
        names = [name for name, _ in good]
        try:
            features = embedder.prepared(pixels for _, pixels in good)
        except NotFiniteError as error:
            raise error.with_name(names) from None
        yield IndexRows(names, None, features)


def _encode_texts(
    embedder: Embedder, texts: Iterator[tuple[str, str]], batch_size: int, left_out: list[tuple[str, str]]
) -> Iterator[IndexRows]:
    for window in in_batches(texts, _WINDOW * batch_size):
        left_out += [(name, "the text is empty") for name, text in window if not text]
        good = [(name, text) for name, text in window if text]
        names, batch = [name for name, _ in good], [text for _, text in good]
        try:
            features = embedder.texts(batch)
        except NotFiniteError as error:
            raise error.with_name(names) from None
        yield IndexRows(names, batch, features)


def _texts(source: Path, fields: Sequence[str], split: str | None) -> Iterator[tuple[str, str]]:
    """Yields the name and text of each; a blank text is ""."""
    from lotlip.data.annotations import read_texts

    if source.is_dir() or source.suffix.lower() != ".txt":
        for name, text in read_texts(source, fields, split):
            yield printable(name), text
        return
    if fields or split is not None:
        raise ValueError(f"{source} has one text per line and no fields or splits; leave out --field and --split")
    try:
        with source.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield printable(f"{source.as_posix()}:{number}"), line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error.reason}); convert it to UTF-8") from error


# --- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A search result.

    Attributes:
        score: cosine of its feature and the query's.
        name: name of the image or text.
        text: the text; None for an image.
        source: path of what was embedded, which contains the item; None if the index does not record it.
    """

    score: float
    name: str
    text: str | None
    source: str | None = None


def search(
    index: Path,
    text: str | None = None,
    image: Path | None = None,
    top: int = 10,
    model: Path | None = None,
    device: str = "auto",
    exact: bool = False,
) -> list[Match]:
    """Finds the nearest rows of an index to a text or an image, best first; exact ties are in index order.

    Args:
        index: an index written by `embed`; its FAISS index is used as `open_searchable` says.
        text: query text.
        image: query image file, instead of a text.
        top: number of results.
        model: folder of the model that made the index; default: the folder recorded in the index.
        device: see `Embedder`.
        exact: do not search approximately, however large the index is.

    Raises:
        ValueError: an argument is invalid, the file is not an index, or its model is missing.
    """
    if (text is None) == (image is None):
        raise ValueError("give either a text or an image to search for")
    if text is not None and not text.strip():
        raise ValueError("the text to search for is empty")
    if top < 1:
        raise ValueError(f"top is {top}; it must be at least 1")
    opened = open_searchable(index, exact)
    embedder = Embedder(index_model(index, opened.about, model), device, batch_size=1)
    return matches(opened, _query(embedder, text, image), top)


def matches(index: Index, query: np.ndarray, top: int) -> list[Match]:
    """Finds the nearest rows of an index to a feature [D], see `search`."""
    best = index.approximate(query, top) if index.approximate else nearest(index.blocks(), query, top)
    rows = index.rows([row for _, row in best])
    return [Match(score, *rows[row], index.about_row(row).get("source")) for score, row in best]


def _query(embedder: Embedder, text: str | None, image: Path | None) -> np.ndarray:
    if image is None:
        return embedder.texts([str(text)])[0]
    try:
        return embedder.images([image.read_bytes()])[0]
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error


def index_model(index: Path, about: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Returns the folder of the model that made an index.

    Args:
        index: file of the index, for messages.
        about: metadata of the index.
        folder: folder of the model; default: the folder recorded in the index.

    Raises:
        ValueError: the model is missing or has different weights.
    """
    folder = folder or Path(about["model"])
    if not folder.is_dir():
        raise ValueError(f"{index} was made by a model in {folder}, which does not exist; give its folder with --model")
    if weights_hash(folder) != about["weights_sha256"]:
        raise ValueError(
            f"the weights in {folder} are not those that made {index}; give the model with --model, or embed again"
        )
    return folder
