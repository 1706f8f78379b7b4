"""The explorer's operations: search, relevance maps, and how much of a text the model reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lotlip.data.pictures import Pictures, open_pictures
from lotlip.retrieval.embedding import Embedder, Match, index_model, matches
from lotlip.retrieval.faiss_index import open_searchable
from lotlip.retrieval.index import Index

if TYPE_CHECKING:
    from PIL import Image

_EXAMPLE_CANDIDATES = 256  # first texts of the index, from which examples are chosen


@dataclass(frozen=True)
class Truncation:
    """How much of a text the model reads.

    Attributes:
        tokens: number of tokens of the complete text, including special and corner tokens.
        limit: the model's context length.
        end: number of characters of the text that the model reads.
    """

    tokens: int
    limit: int
    end: int


@dataclass(frozen=True)
class PictureMatch:
    """A picture found for a text, with its relevance map.

    Attributes:
        match: the search result.
        picture: RGB.
        relevance: relevance of the patches of the model's square input, [G, G]; sums to 1. None where the image tower
            has no attention maps.
    """

    match: Match
    picture: Image.Image
    relevance: np.ndarray | None


@dataclass(frozen=True)
class Analysis:
    """Relevance maps and attention of a text for a picture, by sub-caption.

    Attributes:
        whole: relevance of patches for the whole text, [G, G]; None where the image tower has no attention maps.
        sub_captions: sub-captions within the context; the last one may be truncated.
        relevance: relevance of patches for each sub-caption as a separate text, [N, G, G]; N = 0 without maps.
        readers: "[CLS]", "Cor 1", …; empty if the encoder does not return attention.
        shares: share of each reader's attention on each sub-caption, [R, N].
        tokens: share of tokens of each sub-caption, [N].
        entropy: normalised entropy of each reader's shares, 0 … 1, [R]; NaN for a single sub-caption.
        problem: why there are no readers; empty if there are.
    """

    whole: np.ndarray | None
    sub_captions: list[str]
    relevance: np.ndarray
    readers: list[str]
    shares: np.ndarray
    tokens: np.ndarray
    entropy: np.ndarray
    problem: str = ""


class Explorer:
    """A model with its indexes of pictures and texts. Thread-safe; calls of the model are serialized.

    Args:
        pictures: index of pictures written by `lotlip embed`.
        texts: index of texts by the same model.
        model: folder of the model; default: the folder recorded in the index.
        source: folder of the pictures; default: the folder recorded in the index.
        top: number of search results.
        device: see `Embedder`.

    Raises:
        ValueError: an index, the model or the pictures are missing or do not match.
    """

    def __init__(
        self,
        pictures: Path,
        texts: Path | None = None,
        model: Path | None = None,
        source: Path | None = None,
        top: int = 6,
        device: str = "auto",
    ) -> None:
        if top < 1:
            raise ValueError(f"top is {top}; it must be at least 1")
        self._pictures = _index(pictures, "images")
        self._texts = None if texts is None else _index(texts, "texts")
        about = self._pictures.about
        if self._texts is not None and self._texts.about["weights_sha256"] != about["weights_sha256"]:
            raise ValueError(f"{pictures} and {texts} were made by different models; embed both with the same model")
        self.folder = index_model(pictures, about, model)
        self._sources = _pictures(pictures, self._pictures, source)
        self._top = top
        self._embedder = Embedder(self.folder, device, batch_size=1)
        self._lock = threading.Lock()
        self._whole_text = _tokenizer(self.folder / "tokenizer.json")
        self._whole_text.no_truncation()
        self._whole_text.no_padding()

    # --- texts ----------------------------------------------------------------------------------------------------

    def truncation(self, text: str) -> Truncation:
        """Returns how much of a text the model reads."""
        encoding = self._whole_text.encode(text)
        limit = self._embedder.model.config.context_length
        if len(encoding) <= limit:
            return Truncation(len(encoding), limit, len(text))
        return Truncation(len(encoding), limit, encoding.offsets[limit - 2][1])  # the last token kept is [SEP]

    def examples(self, number: int) -> list[str]:
        """Returns the longest of the first texts of the index; empty without an index of texts."""
        if self._texts is None:
            return []
        first = self._texts.rows(range(min(_EXAMPLE_CANDIDATES, self._texts.size)))
        return sorted((text or "" for _, text in first.values()), key=len, reverse=True)[:number]

    @property
    def resize(self) -> str:
        """How the model resizes pictures to a square, one of `lotlip.data.images.RESIZES`."""
        return self._embedder.model.image_tower.spec.resize

    @cached_property
    def maps_problem(self) -> str:
        """Why the image tower has no attention maps; empty if it has them."""
        from lotlip.evaluate.attention import check_maps

        try:
            check_maps(self._embedder.model.image_tower)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def crop(self) -> float:
        """The share of the resized picture's sides that the model sees."""
        return self._embedder.model.image_tower.spec.crop

    @property
    def has_texts(self) -> bool:
        """Whether there is an index of texts."""
        return self._texts is not None

    # --- search ---------------------------------------------------------------------------------------------------

    def find_pictures(self, text: str) -> list[PictureMatch]:
        """Finds the nearest pictures to a text, best first, with relevance maps.

        Raises:
            ValueError: the text is blank, or a picture of the index no longer exists.
        """
        from lotlip.evaluate.attention import image_relevance_maps

        text = _not_blank(text)
        with self._lock:
            found = matches(self._pictures, self._embedder.texts([text])[0], self._top)
            pictures = [self.picture(match.name, match.source) for match in found]
            if self.maps_problem:
                return [PictureMatch(match, picture, None) for match, picture in zip(found, pictures, strict=True)]
            maps = image_relevance_maps(self._embedder.encoder, pictures, [[text]] * len(found))
        results = zip(found, pictures, maps, strict=True)
        return [PictureMatch(match, picture, relevance[0].numpy()) for match, picture, relevance in results]

    def find_texts(self, picture: Image.Image) -> list[Match]:
        """Finds the nearest texts to a picture, best first.

        Raises:
            ValueError: there is no index of texts.
        """
        if self._texts is None:
            raise ValueError("there is no index of texts; give one with --texts")
        with self._lock:
            return matches(self._texts, self._embedder.images([picture])[0], self._top)

    def picture(self, name: str, source: str | None = None) -> Image.Image:
        """Returns a picture of the index, RGB.

        Args:
            name: name of the picture.
            source: the source that its match names; default: that of the index's first pictures.

        Raises:
            ValueError: it does not exist or cannot be read.
        """
        from lotlip.data.images import decode_rgb

        pictures = self._sources.get(source) or next(iter(self._sources.values()))
        return decode_rgb(pictures.read(name))

    # --- attention ------------------------------------------------------------------------------------------------

    def analyse(self, picture: Image.Image, text: str) -> Analysis:
        """Computes relevance maps of a picture and attention over the text, by sub-caption.

        Raises:
            ValueError: the text is blank.
        """
        from lotlip.evaluate import attention

        text = _not_blank(text)
        offsets = self._whole_text.encode(text).offsets
        with self._lock:
            model, (ids, lengths) = self._embedder.model, self._embedder.tokens([text])
            place = attention.sub_captions(model, ids, lengths)  # [1, L]
            spans = _spans(place[0].tolist(), offsets)
            parts = [text[start:end] for start, end in spans]
            whole, maps = None, list[np.ndarray]()
            if not self.maps_problem:
                (relevance,) = attention.image_relevance_maps(self._embedder.encoder, [picture], [[text, *parts]])
                whole, *maps = relevance.numpy()
            names = ["[CLS]", *(f"Cor {number + 1}" for number in range(model.config.corner_tokens))]
            problem = ""
            try:
                over_tokens = attention.text_attention(model, ids, lengths)
            except ValueError as error:
                problem, names, over_tokens = str(error), [], ids.new_zeros(1, 0, ids.shape[1]).float()
            shares, tokens = attention.sub_caption_shares(over_tokens, place)
            entropy = attention.normalised_entropy(shares, place.max(dim=1).values + 1)
        grid = np.stack(maps) if maps else np.empty((0, 0, 0), dtype=np.float32)
        by_reader, by_length, by_entropy = (values[0].cpu().numpy() for values in (shares, tokens, entropy))
        return Analysis(whole, parts, grid, names, by_reader, by_length, by_entropy, problem)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is missing or damaged ({error}); restore it") from error


def _index(path: Path, kind: str) -> Index:
    index = open_searchable(path)
    if index.about["kind"] != kind:
        raise ValueError(f"{path} is an index of {index.about['kind']}; an index of {kind} is needed")
    return index


def _pictures(path: Path, index: Index, folder: Path | None) -> dict[str | None, Pictures]:
    """Returns the pictures by the source that an index records, first those of its first rows.

    Args:
        path: file of the index, for messages.
        index: its contents; files that were added to it may have other sources.
        folder: folder of the pictures; default: the recorded ones.
    """
    abouts = {part.about.get("source"): part.about for part in index.parts or (index,)}
    if folder is not None and len(abouts) > 1:
        raise ValueError(
            f"the pictures of {path} are in {len(abouts)} folders, so --images cannot name another; move them back "
            f"to {', '.join(map(str, abouts))}, or embed them again"
        )
    found: dict[str | None, Pictures] = {}
    for source, about in abouts.items():
        if folder is None and source is None:
            raise ValueError(
                f"{path} does not record the folder of its pictures; give it with --images, or embed again"
            )
        place = folder or Path(str(source))
        if not place.is_dir():
            raise ValueError(f"the folder {place} of the pictures of {path} does not exist; give it with --images")
        found[source] = open_pictures(place, about.get("split"))
    return found


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def _spans(place: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the start and end of each sub-caption in the text.

    Args:
        place: index of the sub-caption of each token within the context, −1 for special tokens.
        offsets: start and end of at least these tokens in the text.
    """
    spans: list[tuple[int, int]] = []
    for number, (start, end) in zip(place, offsets, strict=False):
        if number == len(spans):
            spans.append((start, end))
        elif number >= 0:
            spans[number] = (spans[number][0], end)
    return spans
