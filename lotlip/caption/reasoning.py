"""The reasoning that models write before their answer, and how it is told from the answer.

Reasoning models put their thoughts between markers, such as `<think>` and `</think>`. A server that knows the model
keeps them out of the answer; one that does not sends them along. Chat templates often write the first marker
themselves, so that only the last one is in the text.
"""

from __future__ import annotations

import html
import re
from functools import lru_cache
from importlib.resources import files

_TAGS = "think|thinking|thought|thoughts|reason|reasoning|analysis|reflection|scratchpad|seed:think"

# A marker starts or ends the thoughts. The group `ends` tells which.
_MARKER = re.compile(
    rf"<\s*(?P<xml>/?)\s*(?:{_TAGS})(?:\s[^<>]*)?>"  # <think>: DeepSeek, Qwen, GLM; <seed:think>: Seed-OSS
    r"|\[(?P<brackets>/?)think\]"  # [THINK]: Magistral
    r"|◁(?P<arrows>/?)think▷"  # Kimi-VL
    r"|<\|(?P<begin>begin_of_|end_of_)(?:thought|thinking|reasoning)\|>"  # LLaVA-o1's kind
    r"|<\|(?P<start>START_|END_)(?:THINKING|REASONING)\|>"  # Cohere
    r"|<unused9(?P<unused>[45])>",  # MedGemma
    re.IGNORECASE,
)
# What some models put around the answer.
_ANSWER = re.compile(
    r"</?\s*(?:answer|response|final_answer)\s*>|<\|(?:begin|end)_of_(?:solution|answer|box)\|>"
    r"|<\|(?:START|END)_RESPONSE\|>",
    re.IGNORECASE,
)
# OpenAI's harmony format: a message for each channel, of which only "final" is for the user.
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|start|return|call|channel)\|>|\Z)", re.S
)
# The same where the special tokens were taken out.
_BARE_CHANNEL = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?:[A-Z]|\s.*assistantfinal)", re.S)


def cut_reasoning(text: str) -> str:
    """A model's text without its reasoning; empty if nothing else is there.

    Reasoning that has no end was cut off, so all after its start is dropped. Before an end without a start, all is
    reasoning. Text without markers comes back as it is, but for white space at its ends.
    """
    if "<|channel|>" in text:
        answers = [words for channel, words in _CHANNEL.findall(text) if channel.casefold() == "final"]
        text = answers[-1] if answers else ""
    elif _BARE_CHANNEL.match(text):
        text = text.rpartition("assistantfinal")[2] if "assistantfinal" in text else ""
    kept: list[str] = []
    place, thinking = 0, False
    for marker in _MARKER.finditer(text):
        if not thinking:
            kept.append(text[place : marker.start()])
        if not _ends(marker):
            thinking = True
        elif thinking:
            thinking = False
        else:
            kept.clear()
        place = marker.end()
    if not thinking:
        kept.append(text[place:])
    answer = "".join(kept)
    return (_ANSWER.sub("", answer) if len(kept) > 1 or place else answer).strip()


def _ends(marker: re.Match[str]) -> bool:
    groups = marker.groupdict()
    if groups["unused"]:
        return groups["unused"] == "5"
    found = groups["xml"] or groups["brackets"] or groups["arrows"] or groups["begin"] or groups["start"] or ""
    return found == "/" or found.casefold().startswith("end")


def has_marker(text: str) -> bool:
    """Whether a text has a marker of reasoning, or of a channel."""
    return bool(_MARKER.search(text)) or "<|channel|>" in text


def is_marker(token: str) -> bool:
    """Whether a token is a marker of reasoning, or of the channels' format."""
    return bool(_MARKER.fullmatch(token)) or token in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")


def reasoning(text: str) -> str:
    """The first sign of reasoning in a caption; empty if it has none.

    Signs are markers that are left, also as HTML writes them, and the phrases of `reasoning.txt`, with which models
    think about what they are asked to do. These find reasoning that has no marker at all: a server may take the markers
    out, and an answer that was cut off within the thoughts may never have had one.
    """
    plain = html.unescape(text)
    marker = _MARKER.search(plain) or re.search(r"<\|(?:channel|message|start|end)\|>", plain)
    if marker:
        return marker[0]
    found = _phrases().search(" ".join(text.casefold().replace("’", "'").split()))
    return found[0] if found else ""


@lru_cache(maxsize=1)
def _phrases() -> re.Pattern[str]:
    lines = (files("lotlip.caption") / "reasoning.txt").read_text(encoding="utf-8").splitlines()
    return re.compile(r"\b(?:" + "|".join(map(re.escape, lines)) + r")\b")
