"""Tokenizers of starting models, with the preparation of text that other libraries do outside of them."""

from __future__ import annotations

import re
import string
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as Steps

from lotlip.data.plain_tokenizer import PlainTokenizer


def save_as_plain(tokenizer: Any, context_length: int) -> PlainTokenizer:
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
            f"{type(tokenizer).__name__} is not a fast tokenizer (it has no tokenizer.json); name one with --tokenizer"
        )
    return PlainTokenizer.of(prepare_text(backend), context_length, tokenizer.pad_token_id)


def prepare_text(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy that prepares texts as SigLIP was trained, if it is a tokenizer of SigLIP.

    SigLIP lowers case, removes punctuation and joins white space before its tokenizer (`canonicalize_text` of
    big_vision), SigLIP 2 lowers case; some files of these tokenizers do so and others leave it to their library.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    steps: list[Any] = []
    if tokenizer.token_to_id("<bos>") is not None and tokenizer.token_to_id("<eos>") is not None:
        steps = [Lowercase()]
    elif tokenizer.token_to_id("<|startoftext|>") is None and tokenizer.token_to_id("</s>") is not None:
        punctuation = Regex(f"[{re.escape(string.punctuation)}]")
        steps = [Lowercase(), Replace(punctuation, ""), Replace(Regex(r"\s+"), " "), Strip()]
    if steps:
        own = tokenizer.normalizer
        tokenizer.normalizer = Steps([*steps, *([own] if own is not None else [])])
    return tokenizer
