"""What captioners that reword short captions have in common (LaCLIP, arXiv 2305.20088): the question, and the answer.

They are given the text alone, never the image, so a rewrite knows no more than the short caption says.
"""

from __future__ import annotations

from lotlip.caption.config import CAPTION
from lotlip.data.text import has_words

_QUOTES = "\"'“”‘’«»`"


def question(prompt: str, caption: str) -> str:
    """The prompt with a short caption in its place."""
    return prompt.replace(CAPTION, caption)


def rewrite_in(answer: str) -> str:
    """The first line of an answer that has words, without quotation marks around it; empty if there is none.

    Models without a chat template continue the prompt after the rewrite.

    >>> rewrite_in('\\n"A dog runs over grass."\\nCaption: a cat')
    'A dog runs over grass.'
    """
    line = next((line.strip() for line in answer.splitlines() if has_words(line)), "")
    return line[1:-1].strip() if len(line) > 2 and line[0] in _QUOTES and line[-1] in _QUOTES else line
