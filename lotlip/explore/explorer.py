"""What the page asks: the nearest pictures or texts, where attention goes, how far into a text the model reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lotlip.data.pictures import Pictures, open_pictures
from lotlip.retrieval.embedding import Embedder, Match, maker, matches
from lotlip.retrieval.index import Index, open_index

if TYPE_CHECKING:
    from PIL import Image

_LOOKED_THROUGH = 256  # texts of the index, for examples


@dataclass(frozen=True)
class Reading:
    """How far into a text the model reads.

    Attributes:
        tokens: of the whole text, special and corner tokens counted.
        limit: most tokens that the model takes.
        end: how many characters of the text it reads.
    """

    tokens: int
    limit: int
    end: int


@dataclass(frozen=True)
class Found:
    """A picture that was found, and which of its patches the text looks at.

    Attributes:
        match: its row in the index.
        picture: RGB.
        relevance: of patches of the square that the model sees, [G, G]; sums to 1.
    """

    match: Match
    picture: Image.Image
    relevance: np.ndarray


@dataclass(frozen=True)
class Look:
    """A text beside a picture, sub-caption by sub-caption.

    Attributes:
        whole: relevance of patches for the whole text, [G, G].
        sub_captions: those that the model reads, the last one maybe cut.
        relevance: for each of them as a text of its own, [N, G, G].
        readers: "[CLS]", "Cor 1", …; none where the encoder does not tell.
        shares: of each reader's attention on each sub-caption, [R, N].
        tokens: each sub-caption's share of the tokens, [N].
        spread: how evenly each reader spreads over the sub-captions, 0 … 1, [R]; NaN where there is but one.
        silent: why there are no readers; empty where there are.
    """

    whole: np.ndarray
    sub_captions: list[str]
    relevance: np.ndarray
    readers: list[str]
    shares: np.ndarray
    tokens: np.ndarray
    spread: np.ndarray
    silent: str = ""


class Explorer:
    """A model with what it has embedded. Threads may share it: the model does one thing at a time.

    Args:
        pictures: what `lotlip embed` wrote of images.
        texts: the same of texts, by the same model.
        model: its folder, if not where it was then.
        source: folder of the pictures, if not where they were then.
        top: how many pictures or texts are found.
        device: as for `Embedder`.

    Raises:
        ValueError: an index, the model or the pictures are not there, or do not belong together.
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
            raise ValueError(f"top is {top}, and must be at least 1")
        self._pictures = _index(pictures, "images")
        self._texts = None if texts is None else _index(texts, "texts")
        about = self._pictures.about
        if self._texts is not None and self._texts.about["weights_sha256"] != about["weights_sha256"]:
            raise ValueError(f"{pictures} and {texts} are of two models' making: embed both with one")
        self.folder = maker(pictures, about, model)
        self._read = _pictures(pictures, about.get("source"), source, about.get("split")).read
        self._top = top
        self._embedder = Embedder(self.folder, device, batch_size=1)
        self._lock = threading.Lock()
        self._whole_text = _tokenizer(self.folder / "tokenizer.json")
        self._whole_text.no_truncation()
        self._whole_text.no_padding()

    # --- texts ----------------------------------------------------------------------------------------------------

    def reading(self, text: str) -> Reading:
        """How far into a text the model reads."""
        encoding = self._whole_text.encode(text)
        limit = self._embedder.model.config.context_length
        if len(encoding) <= limit:
            return Reading(len(encoding), limit, len(text))
        return Reading(len(encoding), limit, encoding.offsets[limit - 2][1])  # the last token that is kept is [SEP]

    def examples(self, number: int) -> list[str]:
        """The longest of the first texts of the index; none where there is no such index."""
        if self._texts is None:
            return []
        first = self._texts.rows(range(min(_LOOKED_THROUGH, sum(len(block) for block in self._texts.blocks()))))
        return sorted((text or "" for _, text in first.values()), key=len, reverse=True)[:number]

    @property
    def resize(self) -> str:
        """How the model makes a square of a picture, one of `lotlip.data.images.RESIZES`."""
        return self._embedder.model.image_tower.spec.resize

    @property
    def has_texts(self) -> bool:
        """Whether texts can be found."""
        return self._texts is not None

    # --- search ---------------------------------------------------------------------------------------------------

    def find_pictures(self, text: str) -> list[Found]:
        """The pictures nearest to a text, best first, and where the text looks in each.

        Raises:
            ValueError: the text is blank, or a picture of the index is not there any more.
        """
        from lotlip.evaluate.attention import maps_of

        text = _not_blank(text)
        with self._lock:
            found = matches(self._pictures, self._embedder.texts([text])[0], self._top)
            pictures = [self.picture(match.name) for match in found]
            maps = maps_of(self._embedder.encoder, pictures, [[text]] * len(found))
        shown = zip(found, pictures, maps, strict=True)
        return [Found(match, picture, relevance[0].numpy()) for match, picture, relevance in shown]

    def find_texts(self, picture: Image.Image) -> list[Match]:
        """The texts nearest to a picture, best first.

        Raises:
            ValueError: there is no index of texts.
        """
        if self._texts is None:
            raise ValueError("there are no texts to find: start with --texts and an index of some")
        with self._lock:
            return matches(self._texts, self._embedder.images([picture])[0], self._top)

    def picture(self, name: str) -> Image.Image:
        """A picture of the index, RGB.

        Raises:
            ValueError: it is not there, or cannot be read.
        """
        from lotlip.data.images import decode_rgb

        return decode_rgb(self._read(name))

    # --- attention ------------------------------------------------------------------------------------------------

    def look(self, picture: Image.Image, text: str) -> Look:
        """Where a text looks in a picture, and how the text tower reads it.

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
            whole, *maps = attention.maps_of(self._embedder.encoder, [picture], [[text, *parts]])[0].numpy()
            names = ["[CLS]", *(f"Cor {number + 1}" for number in range(model.config.corner_tokens))]
            silent = ""
            try:
                over_tokens = attention.text_attention(model, ids, lengths)
            except ValueError as error:
                silent, names, over_tokens = str(error), [], ids.new_zeros(1, 0, ids.shape[1]).float()
            shares, tokens = attention.sub_caption_shares(over_tokens, place)
            spread = attention.spread(shares, place.max(dim=1).values + 1)
        grid = np.stack(maps) if maps else np.empty((0, *whole.shape), dtype=np.float32)
        return Look(
            whole, parts, grid, names, shares[0].cpu().numpy(), tokens[0].cpu().numpy(), spread[0].cpu().numpy(), silent
        )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is missing or damaged ({error}); restore it") from error


def _index(path: Path, kind: str) -> Index:
    index = open_index(path)
    if index.about["kind"] != kind:
        raise ValueError(f"{path} is an index of {index.about['kind']}, where one of {kind} is wanted")
    return index


def _pictures(index: Path, source: str | None, given: Path | None, split: str | None) -> Pictures:
    if given is None and source is None:
        raise ValueError(f"{index} does not say where its pictures are; say so with --pictures, or embed them anew")
    folder = given or Path(str(source))
    if not folder.is_dir():
        raise ValueError(f"the pictures of {index} were in {folder}, which is not there; say with --pictures where")
    return open_pictures(folder, split)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def _spans(place: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where each sub-caption starts and ends in the text.

    Args:
        place: sub-caption of each token that the model reads, −1 for special ones.
        offsets: start and end of at least these tokens in the text.
    """
    spans: list[tuple[int, int]] = []
    for number, (start, end) in zip(place, offsets, strict=False):
        if number == len(spans):
            spans.append((start, end))
        elif number >= 0:
            spans[number] = (spans[number][0], end)
    return spans
