"""Captions to token ids with corner tokens, exactly as the method's release prepares them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lotlip.text import split_sub_captions

# Shipped with the package, so that anyone's captions work offline (Apache-2.0).
BUNDLED = ("bert-base-uncased",)

# What the BERT family calls its special tokens: BERT and its kin first, then RoBERTa's.
_SPECIAL = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "pad": ("[PAD]", "<pad>")}


@lru_cache(maxsize=8)
def word_pieces(name: str) -> Tokenizer:
    """The word pieces of a BERT-family model.

    Args:
        name: a bundled vocabulary ("bert-base-uncased"), a `tokenizer.json`, or a folder that has one.

    Raises:
        ValueError: there is no such tokenizer.
    """
    file = Path(str(files("lotlip.data"))) / name / "tokenizer.json" if name in BUNDLED else Path(name)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"no tokenizer {name!r}: {file} is not there; give a tokenizer.json, a folder with one, "
            f"or a bundled name ({', '.join(BUNDLED)})"
        )
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def count_tokens(name: str) -> Callable[[str], int]:
    """A function that counts a text's word pieces, special tokens not among them.

    Sub-captions are counted apart, as the model reads them: what ends a sentence is not a token.
    """
    pieces = word_pieces(name)

    def count(text: str) -> int:
        encodings = pieces.encode_batch_fast(split_sub_captions(text), add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)

    return count


def used_tokens(name: str, texts: Iterable[str]) -> set[int]:
    """Ids of the word pieces that occur in texts."""
    parts = [part for text in texts for part in split_sub_captions(text)]
    encodings = word_pieces(name).encode_batch_fast(parts, add_special_tokens=False)
    return {index for encoding in encodings for index in encoding.ids}


class TextTokenizer:
    """Turns captions into `[CLS] [Cor 1] … [Cor m] words [SEP] words [SEP] …` (paper, section 3.2).

    Attributes:
        context_length: most tokens in a text, special and corner tokens counted; longer texts are cut, and the last
            token stays [SEP].
        corner_tokens: m. Their ids follow the last word piece's.
    """

    def __init__(self, name: str, context_length: int = 128, corner_tokens: int = 0) -> None:
        self.name = name
        self.context_length = context_length
        self.corner_tokens = corner_tokens
        self._pieces = word_pieces(name)
        self.vocabulary_size = self._pieces.get_vocab_size(with_added_tokens=True)
        self._cls, self._sep, self.pad_id = (self._special(kind) for kind in ("cls", "sep", "pad"))
        corners = range(self.vocabulary_size, self.vocabulary_size + corner_tokens)
        self._prefix = [self._cls, *corners]

    def _special(self, kind: str) -> int:
        for token in _SPECIAL[kind]:
            if (index := self._pieces.token_to_id(token)) is not None:
                return index
        raise ValueError(
            f"tokenizer {self.name!r} has none of {', '.join(_SPECIAL[kind])}: not a BERT-family tokenizer"
        )

    def encode(self, texts: Sequence[str | Sequence[str]]) -> list[list[int]]:
        """Token ids of each text, without padding.

        Args:
            texts: captions, or captions already split into sub-captions.
        """
        parts = [split_sub_captions(text) if isinstance(text, str) else list(text) for text in texts]
        encodings = iter(
            self._pieces.encode_batch_fast([part for text in parts for part in text], add_special_tokens=False)
        )
        rows = []
        for text in parts:
            ids = list(self._prefix)
            for _ in text:
                ids += [*next(encodings).ids, self._sep]
            if not text:  # an empty caption is still a sentence
                ids.append(self._sep)
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self._sep]
            rows.append(ids)
        return rows

    def __call__(
        self, texts: Sequence[str | Sequence[str]], pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids padded to the longest of these texts (or to `pad_to`), and how long each one is.

        Returns:
            ids [B, L] int64 and lengths [B] int64.
        """
        rows = self.encode(texts)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.full((len(rows), pad_to or int(lengths.max(initial=1))), self.pad_id, dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids, lengths

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, so that transformers' AutoTokenizer reads the folder."""
        self._pieces.save(str(folder / "tokenizer.json"))
        names = {f"{kind}_token": self._pieces.id_to_token(self._special(kind)) for kind in _SPECIAL}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.context_length, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
