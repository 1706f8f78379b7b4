"""Tokenizers of starting models."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from lotlip.data.plain_tokenizer import Family, PlainTokenizer


def as_plain(tokenizer: Any, context_length: int) -> PlainTokenizer:
    """Returns a tokenizer of transformers as one of this project.

    Args:
        tokenizer: a fast tokenizer.
        context_length: maximum number of tokens in a text.

    Raises:
        ValueError: it is not a fast tokenizer of CLIP or SigLIP.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (it has no tokenizer.json); import the model with "
            "`lotlip import --tokenizer FOLDER`"
        )
    return PlainTokenizer.of(backend, context_length, tokenizer.pad_token_id)


def check_tokenizer(words: PlainTokenizer, family: Family, rows: int, name: str) -> None:
    """Checks that a tokenizer can be that of a text tower.

    Args:
        words: the tokenizer.
        family: of the text tower.
        rows: number of its word embeddings.
        name: of the model, for the message.

    Raises:
        ValueError: the tokenizer is made for another family, or has more tokens than there are rows, or less than half
            as many. Libraries make up a small tokenizer where a model's files of it are missing.
    """
    remedy = "restore the tokenizer's files, or import the model with `lotlip import --tokenizer FOLDER`"
    if words.family != family:
        raise ValueError(
            f"the text tower of {name} is of the {family} family, but its tokenizer is made for models of the "
            f"{words.family} family; {remedy}, which has the model's own tokenizer"
        )
    if not rows / 2 <= words.vocabulary_size <= rows:
        raise ValueError(
            f"the text tower of {name} has {rows} word embeddings, but its tokenizer has {words.vocabulary_size} "
            f"tokens; {remedy}"
        )
