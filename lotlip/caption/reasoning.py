"""Separates the reasoning that models write before their answer from the answer.

Reasoning models put their thoughts between markers, such as `<think>` and `</think>`. A server that knows the model
removes them from the answer; other servers send them along. Chat templates often write the opening marker themselves,
so the text contains only the closing one.
"""

from __future__ import annotations

import html
import re
from functools import lru_cache
from importlib.resources import files

_TAGS = "think|thinking|thought|thoughts|reason|reasoning|analysis|reflection|scratchpad|seed:think"

# A marker starts or ends reasoning; the named groups tell which.
_MARKER = re.compile(
    rf"<\s*(?P<xml>/?)\s*(?:{_TAGS})(?:\s[^<>]*)?>"  # <think>: DeepSeek, Qwen, GLM; <seed:think>: Seed-OSS
    r"|\[(?P<brackets>/?)think\]"  # [THINK]: Magistral
    r"|◁(?P<arrows>/?)think▷"  # Kimi-VL
    r"|<\|(?P<begin>begin_of_|end_of_)(?:thought|thinking|reasoning)\|>"  # LLaVA-o1's kind
    r"|<\|(?P<start>START_|END_)(?:THINKING|REASONING)\|>"  # Cohere
    r"|<unused9(?P<unused>[45])>",  # MedGemma
    re.IGNORECASE,
)
# Markers that some models put around the answer.
_ANSWER = re.compile(
    r"</?\s*(?:answer|response|final_answer)\s*>|<\|(?:begin|end)_of_(?:solution|answer|box)\|>"
    r"|<\|(?:START|END)_RESPONSE\|>",
    re.IGNORECASE,
)
# OpenAI's harmony format: one message per channel; only the channel "final" is for the user.
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:end|start|return|call|channel)\|>|\Z)", re.S
)
# The same format with the special tokens removed.
_BARE_CHANNEL = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?:[A-Z]|\s.*assistantfinal)", re.S)


def cut_reasoning(text: str) -> str:
    """A model's text without its reasoning; empty if nothing else is left.

    Reasoning without an end was cut off, so everything after its start is dropped. Everything before an end without a
    start is reasoning. Text without markers is returned with only its outer white space removed.
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
    prefix = groups["xml"] or groups["brackets"] or groups["arrows"] or groups["begin"] or groups["start"] or ""
    return prefix == "/" or prefix.casefold().startswith("end")


def has_marker(text: str) -> bool:
    """Whether a text has a marker of reasoning or of the harmony format."""
    return bool(_MARKER.search(text)) or "<|channel|>" in text


def is_marker(token: str) -> bool:
    """Whether a token is a marker of reasoning or of the harmony format."""
    return bool(_MARKER.fullmatch(token)) or token in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")


def reasoning(text: str) -> str:
    """The first sign of reasoning in a caption; empty if there is none.

    Signs are leftover markers, also HTML-escaped ones, and the phrases of `reasoning.txt`, with which models think
    about their task. The phrases find reasoning without any marker: a server may remove markers, and an answer that was
    cut off during reasoning may never have had one.
    """
    plain = html.unescape(text)
    marker = _MARKER.search(plain) or re.search(r"<\|(?:channel|message|start|end)\|>", plain)
    if marker:
        return marker[0]
    match = _phrases().search(" ".join(text.casefold().replace("’", "'").split()))
    return match[0] if match else ""


@lru_cache(maxsize=1)
def _phrases() -> re.Pattern[str]:
    lines = (files("lotlip.caption") / "reasoning.txt").read_text(encoding="utf-8").splitlines()
    return re.compile(r"\b(?:" + "|".join(map(re.escape, lines)) + r")\b")
