"""Features of texts and images by a saved model: in memory, into files, and the search through those files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotlip.core.files import weights_hash
from lotlip.data.batches import in_batches, prefetch
from lotlip.data.pictures import Pictures, open_pictures, printable
from lotlip.retrieval.index import Index, Rows, index_writer, nearest, open_index

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lotlip.models.lotlip import LotlipModel

KINDS = ("images", "texts")
_WINDOW = 4  # batches whose texts are sorted by length together, so that few positions are padding


class NotFiniteError(ValueError):
    """A model gives features with NaN or infinity.

    Attributes:
        row: of the first such feature, among those that were asked for.
    """

    def __init__(self, model: Path, what: str, row: int, name: str = "") -> None:
        super().__init__(
            f"the model in {model} is broken: its feature of {name or f'{what} {row}'} has NaN or infinity; restore "
            "the model's files, or train it again"
        )
        self.model, self.what, self.row = model, what, row

    def of(self, names: Sequence[str]) -> NotFiniteError:
        """The same error, with the item's name."""
        return NotFiniteError(self.model, self.what, self.row, names[self.row])


class Embedder:
    """A saved model, ready to turn texts and images into features of one space.

    Args:
        folder: of the model.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        batch_size: texts or images that the model takes at a time.

    Attributes:
        encoder: the model as evaluation runs it.
        width: D, the size of a feature.

    Raises:
        ValueError: the folder has no model, its model gives no single features, or there is no such device.
    """

    def __init__(self, folder: Path, device: str = "auto", batch_size: int = 64) -> None:
        from lotlip.core.device import choose_device
        from lotlip.evaluate.encoders import LotlipEncoder, Runner

        self._folder, self._batch_size = folder, batch_size
        self.encoder = LotlipEncoder.open(folder, Runner(batch_size, choose_device(device)))
        config = self.encoder.model.config
        if config.similarity != "cosine":
            raise ValueError(
                f"the model in {folder} compares texts and images token by token ({config.similarity}): none of "
                "them has one feature to embed or to search by; take a model whose similarity is cosine"
            )
        self.width: int = config.embed_dim

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised [CLS] features of texts, long or short (paper, section 4): float32 [N, D].

        Raises:
            NotFiniteError: a feature has NaN or infinity.
        """
        if not texts:
            return self._none
        features, _ = self.encoder.texts(texts)
        return self._finite(features.numpy(), "text")

    def images(self, images: Iterable[Image.Image | bytes]) -> np.ndarray:
        """Normalised features of images, decoded or encoded: float32 [N, D].

        Raises:
            ValueError: an image cannot be decoded.
        """
        return self.prepared(self.prepare(image) for image in images)

    def prepare(self, image: Image.Image | bytes) -> np.ndarray:
        """What the image tower takes of an image, float32 [3, S, S]: for threads to do beside the model.

        Raises:
            ValueError: the image cannot be decoded.
        """
        return self.encoder.prepare(image)

    def prepared(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """Normalised features of what `prepare` made: float32 [N, D].

        Raises:
            NotFiniteError: a feature has NaN or infinity.
        """
        features = [self.encoder.prepared(batch).numpy() for batch in in_batches(pictures, self._batch_size)]
        return self._finite(np.concatenate([self._none, *features]), "image")

    def _finite(self, features: np.ndarray, what: str) -> np.ndarray:
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise NotFiniteError(self._folder, what, int(broken[0]))
        return features

    @property
    def _none(self) -> np.ndarray:
        return np.empty((0, self.width), dtype=np.float32)

    @property
    def model(self) -> LotlipModel:
        """The model itself, on its device."""
        return self.encoder.model

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the text tower takes of texts, on the model's device: ids [N, L], padded at the end, and lengths [N]."""
        import torch

        ids, lengths = (torch.from_numpy(part).to(self.model.device) for part in self.encoder.tokenizer(texts))
        return ids, lengths


# --- features into a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """What `embed` has done.

    Attributes:
        rows: features written.
        width: D.
        left_out: name of each item that has no feature, and the reason.
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
) -> Embedded:
    """Writes the features of images, or of texts. The file is whole or not there.

    Features are written as they come, so that memory does not grow with their number. An image that cannot be read, or
    a text without a character, is left out.

    Args:
        model: folder of the saved model.
        source: of images: a folder of them, or what ingest left, as for `lotlip.data.pictures.open_pictures`, which
            names them. Of texts: a .txt file with one on each line, or whatever
            `lotlip.data.annotations.read_texts` reads.
        out: a .parquet or .npy file, as of `lotlip.retrieval.index`.
        kind: "images" or "texts"; where None, a folder has images and a file has texts.
        batch_size: items that the model takes at a time.
        fields: of the texts, as for `read_texts`.
        split: only this one, of what has splits; all where None.
        device: as for `Embedder`.
        on_progress: told how many items are done, and of how many.

    Raises:
        ValueError: an argument is wrong, the model has no single features, or all items were left out.
    """
    kind = kind or ("images" if source.is_dir() else "texts")
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; choose {' or '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and must be at least 1")
    left_out: list[tuple[str, str]] = []
    if kind == "images":
        if fields:
            raise ValueError("images have no fields: leave --field out, or say --kind texts")
        pictures = open_pictures(source, split)
        total = len(pictures.names)
    else:
        # reading texts takes little beside encoding them: what is broken is known before hours are spent
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
            first = "; the first: " + ": ".join(left_out[0]) if left_out else ""
            raise ValueError(f"none of the {total} {kind} in {source} can be embedded{first}")
    return Embedded(written, embedder.width, left_out)


def _encode_images(
    embedder: Embedder, pictures: Pictures, batch_size: int, left_out: list[tuple[str, str]]
) -> Iterator[Rows]:
    """Encodes a batch of images while threads decode the next ones."""

    def prepare(name: str) -> tuple[str, np.ndarray | str]:
        try:
            return name, embedder.prepare(pictures.read(name))
        except ValueError as error:
            return name, str(error)

    for batch in in_batches(prefetch(prepare, pictures.names, 2 * batch_size), batch_size):
        left_out += [(name, found) for name, found in batch if isinstance(found, str)]
        good = [(name, found) for name, found in batch if not isinstance(found, str)]
        names = [name for name, _ in good]
        try:
            features = embedder.prepared(pixels for _, pixels in good)
        except NotFiniteError as error:
            raise error.of(names) from None
        yield Rows(names, None, features)


def _encode_texts(
    embedder: Embedder, texts: Iterator[tuple[str, str]], batch_size: int, left_out: list[tuple[str, str]]
) -> Iterator[Rows]:
    for window in in_batches(texts, _WINDOW * batch_size):
        left_out += [(name, "the text is empty") for name, text in window if not text]
        good = [(name, text) for name, text in window if text]
        names, found = [name for name, _ in good], [text for _, text in good]
        try:
            features = embedder.texts(found)
        except NotFiniteError as error:
            raise error.of(names) from None
        yield Rows(names, found, features)


def _texts(source: Path, fields: Sequence[str], split: str | None) -> Iterator[tuple[str, str]]:
    """Name and text of each; a text without a character is ""."""
    from lotlip.data.annotations import read_texts

    if source.is_dir() or source.suffix.lower() != ".txt":
        for name, text in read_texts(source, fields, split):
            yield printable(name), text
        return
    if fields or split is not None:
        raise ValueError(f"{source} has a text on each line, without fields or splits: leave --field and --split out")
    try:
        with source.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield printable(f"{source.as_posix()}:{number}"), line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error.reason})") from error


# --- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A row of an index.

    Attributes:
        score: cosine of its feature with the query's.
        name: of the image or text.
        text: the text itself; None for an image.
    """

    score: float
    name: str
    text: str | None


def search(
    index: Path,
    text: str | None = None,
    image: Path | None = None,
    top: int = 10,
    model: Path | None = None,
    device: str = "auto",
) -> list[Match]:
    """The rows of an index that are nearest to a text or an image, best first; of equal ones, the earlier first.

    Args:
        index: what `embed` wrote.
        text: to search for.
        image: a file, to search for instead.
        top: how many rows.
        model: folder of the model that made the index; where None, the one where it was then.
        device: as for `Embedder`.

    Raises:
        ValueError: an argument is wrong, the index is none, or the model that made it is not there.
    """
    if (text is None) == (image is None):
        raise ValueError("search for a text or for an image, one of the two")
    if text is not None and not text.strip():
        raise ValueError("the text to search for is empty")
    if top < 1:
        raise ValueError(f"top is {top}, and must be at least 1")
    found = open_index(index)
    embedder = Embedder(maker(index, found.about, model), device, batch_size=1)
    return matches(found, _query(embedder, text, image), top)


def matches(index: Index, query: np.ndarray, top: int) -> list[Match]:
    """The rows of an index that are nearest to a feature [D], as of `search`."""
    best = nearest(index.blocks(), query, top)
    rows = index.rows([row for _, row in best])
    return [Match(score, *rows[row]) for score, row in best]


def _query(embedder: Embedder, text: str | None, image: Path | None) -> np.ndarray:
    if image is None:
        return embedder.texts([str(text)])[0]
    try:
        return embedder.images([image.read_bytes()])[0]
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error


def maker(index: Path, about: Mapping[str, Any], given: Path | None = None) -> Path:
    """The folder of the model that made an index.

    Args:
        index: its file, for the messages.
        about: what it says of itself.
        given: where the model is now, if not where it was then.

    Raises:
        ValueError: the model is not there, or has other weights.
    """
    folder = given or Path(about["model"])
    if not folder.is_dir():
        raise ValueError(f"{index} was made by a model in {folder}, which is not there; say with --model where it is")
    if weights_hash(folder) != about["weights_sha256"]:
        raise ValueError(
            f"the weights in {folder} are not those that made {index}; say with --model where those are, or embed anew"
        )
    return folder
