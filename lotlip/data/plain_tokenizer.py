"""Tokenizers of CLIP and SigLIP, which are used as they are: their towers append the corner tokens themselves."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as Steps

from lotlip.core.files import read_json, sha256_json
from lotlip.data.text import SentenceEnds, join_sub_captions
from lotlip.data.tokenizer import CLIP, TextTokenizer, copy_of, tokenizer_file, word_pieces

Family = Literal["bert", "clip", "siglip"]
# Tokens that only these families have.
_CLIP_TOKENS = ("<|startoftext|>", "<|endoftext|>")
_GEMMA_TOKENS = ("<bos>", "<eos>")  # SigLIP 2
_BERT_FIRST = ("[CLS]", "<s>")


class PlainTokenizer(TextTokenizer):
    """A tokenizer that ends each text with one token, and marks no other sentence end.

    Args:
        name: as for `word_pieces`.
        context_length: maximum number of tokens in a text, including the start and end tokens, but not corner and
            register tokens, which take no position; longer texts are truncated, and their last token is still the end
            token.
        corner_tokens, register_tokens: of the model; they do not change the ids of texts.
        sentence_ends: has no effect on ids.

    Raises:
        ValueError: the tokenizer is missing or of another family, or the context has no room for words.
    """

    def __init__(
        self,
        name: str,
        context_length: int = 77,
        corner_tokens: int = 0,
        register_tokens: int = 0,
        sentence_ends: SentenceEnds = "released",
    ) -> None:
        self.corner_tokens, self.register_tokens = corner_tokens, register_tokens
        self.sentence_ends = sentence_ends
        self._use(word_pieces(name), name, context_length, None)

    @classmethod
    def of(cls, pieces: Tokenizer, context_length: int, pad_id: int | None = None) -> PlainTokenizer:
        """Returns the tokenizer of a model without corner tokens.

        Args:
            pieces: its word pieces.
            context_length: maximum number of tokens in a text.
            pad_id: id of the padding token; None: that of the end token.

        Raises:
            ValueError: it is of another family, or the context has no room for words.
        """
        tokenizer = cls.__new__(cls)
        tokenizer.corner_tokens = tokenizer.register_tokens = 0
        tokenizer.sentence_ends = "released"
        tokenizer._use(pieces, "", context_length, pad_id)
        return tokenizer

    def _use(self, pieces: Tokenizer, name: str, context_length: int, pad_id: int | None) -> None:
        self.name, self.context_length = name, context_length
        self._tokenizer = _prepared(pieces)
        special = self._tokenizer.encode("").ids
        if pieces.token_to_id(_CLIP_TOKENS[1]) is not None and special[-1:] != [pieces.token_to_id(_CLIP_TOKENS[1])]:
            raise ValueError(
                f"tokenizer {name!r} does not end a text with {_CLIP_TOKENS[1]}, which CLIP's feature is read from; "
                "save it with CLIPTokenizer of transformers"
            )
        if context_length < len(special) + 1:
            raise ValueError(f"context_length {context_length} has no room for words; raise it")
        self._tokenizer.enable_truncation(context_length)
        self.vocabulary_size = pieces.get_vocab_size(with_added_tokens=True)
        end = special[-1] if special else 0
        self.pad_id = _padding(name, pieces, end) if pad_id is None else pad_id
        self.end_id = special[-1] if special else self.pad_id

    @property
    def family(self) -> Family:
        return _family(self._tokenizer, self.name)

    @cached_property
    def words_hash(self) -> str:
        return sha256_json(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str | Sequence[str]]) -> list[list[int]]:
        whole = [text if isinstance(text, str) else _joined(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(whole)]

    def encode_words(self, words: np.ndarray) -> np.ndarray:
        raise NotImplementedError("ids of single sub-captions are stored for BERT-family tokenizers only")

    @property
    def special_ids(self) -> list[int]:
        return sorted({*self._tokenizer.encode("").ids, self.pad_id})

    def save(self, folder: Path) -> None:
        """See `TextTokenizer.save`. SigLIP's towers pad to the context length themselves."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        names = self._tokenizer.id_to_token
        special = self._tokenizer.encode("").ids
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "split_special_tokens": True,
            **({"bos_token": names(special[0])} if len(special) > 1 else {}),
            "eos_token": names(self.end_id),
            "pad_token": names(self.pad_id),
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def tokenizer_family(name: str) -> Family:
    """The family of models that a tokenizer is made for.

    Raises:
        ValueError: there is no such tokenizer, or it belongs to none of these families.
    """
    return "clip" if name == CLIP else _family(word_pieces(name), name)


def _family(pieces: Tokenizer, name: str) -> Family:
    def has(*tokens: str) -> bool:
        return all(pieces.token_to_id(token) is not None for token in tokens)

    if has(*_CLIP_TOKENS):
        return "clip"
    if has(*_GEMMA_TOKENS):
        return "siglip"
    if any(has(token) for token in _BERT_FIRST):
        return "bert"
    if has("</s>"):
        return "siglip"
    raise ValueError(
        f"tokenizer {name!r} has none of {', '.join((*_BERT_FIRST, '</s>'))}: it is not made for a BERT-family, "
        "CLIP or SigLIP model"
    )


def open_tokenizer(
    name: str,
    context_length: int = 128,
    corner_tokens: int = 0,
    register_tokens: int = 0,
    sentence_ends: SentenceEnds = "released",
) -> TextTokenizer:
    """Opens a tokenizer of any supported family; arguments as for `TextTokenizer`.

    Raises:
        ValueError: there is no such tokenizer, it belongs to another family, or the context has no room for words.
    """
    kind = TextTokenizer if tokenizer_family(name) == "bert" else PlainTokenizer
    return kind(name, context_length, corner_tokens, register_tokens, sentence_ends)


def _prepared(pieces: Tokenizer) -> Tokenizer:
    """Returns a copy that prepares captions as the model was trained, and gives no id of a special token for words.

    SigLIP lowers case, removes punctuation and joins white space before its tokenizer (`canonicalize_text` of
    big_vision); SigLIP 2 lowers case. Some files of these tokenizers do so, and others leave it to their library.
    CLIP's word pieces include the names of its start and end tokens, so these are removed from captions.
    """
    tokenizer = copy_of(pieces)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    own = pieces.normalizer

    def has(*tokens: str) -> bool:
        return all(pieces.token_to_id(token) is not None for token in tokens)

    def equal(first: str, second: str) -> bool:
        return own is not None and own.normalize_str(first) == own.normalize_str(second)

    steps: list[Any] = []
    if has(*_CLIP_TOKENS):
        if not equal(f"a{_CLIP_TOKENS[0]}", "a "):
            steps = [Replace(name, " ") for name in _CLIP_TOKENS]
    elif has(*_GEMMA_TOKENS):
        if not equal("A", "a"):
            steps = [Lowercase()]
    elif not equal("A-b", "ab"):
        punctuation = Regex(f"[{re.escape(string.punctuation)}]")
        steps = [Lowercase(), Replace(punctuation, ""), Replace(Regex(r"\s+"), " "), Strip()]
    if steps:
        tokenizer.normalizer = Steps([*steps, *([own] if own is not None else [])])
    return tokenizer


def _joined(sub_captions: Sequence[str]) -> str:
    """Joins sub-captions into the text that a caption had before it was split."""
    return join_sub_captions(sub_captions) + ("." if len(sub_captions) > 1 else "")


def _padding(name: str, tokenizer: Tokenizer, end: int) -> int:
    """Returns the id of the padding token: that of tokenizer_config.json, else the end token's."""
    file = Path() if name in ("", CLIP) else tokenizer_file(name).parent / "tokenizer_config.json"
    if not file.is_file():
        padding = tokenizer.token_to_id("<pad>") if tokenizer.token_to_id(_GEMMA_TOKENS[0]) is not None else None
        return end if padding is None else padding
    token = read_json(file).get("pad_token")
    content = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return end if number is None else number
