"""The parts of requests to a captioning server and of its responses."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

from PIL import Image

from lotlip.data.images import decode_rgb

# Formats, by Pillow's name, that servers accept directly.
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


def data_url(image: bytes) -> str:
    """An encoded image as a data URL: unchanged, or as PNG if servers may not know its format.

    Raises:
        ValueError: it must be re-encoded and cannot be read.
    """
    try:
        with Image.open(io.BytesIO(image)) as file:  # reads the header only
            media_type = MEDIA_TYPES.get(file.format or "")
    except Exception:  # Pillow raises many types on broken files
        media_type = None
    if media_type is None:
        png = io.BytesIO()
        decode_rgb(image).save(png, "PNG")
        image, media_type = png.getvalue(), MEDIA_TYPES["PNG"]
    return f"data:{media_type};base64,{base64.b64encode(image).decode('ascii')}"


@cache
def trial_picture() -> str:
    """A white square, which any captioning server can describe."""
    png = io.BytesIO()
    Image.new("RGB", (224, 224), "white").save(png, "PNG")
    return data_url(png.getvalue())


def text_of(message: Any) -> tuple[str, str]:
    """The text of a response's message and the model's refusal; each may be empty.

    `content` is a text or a list of parts; text parts are joined, reasoning parts are skipped.

    Raises:
        TypeError: it is neither; the message names its type.
    """
    content = message.content
    refused = [message.refusal] if isinstance(message.refusal, str) else []
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) and part is not content else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            refused.append(part["refusal"])
        elif kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind not in ("thinking", "redacted_thinking", "reasoning"):
            what = f"a part of type {kind!r}" if isinstance(kind, str) else type(part).__name__
            raise TypeError(f"content has {what}, not text")
    # an unpaired surrogate, which JSON may contain, is not accepted by tokenizers
    text = "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, " ".join(refused).strip()


def has_reasoning_field(message: Any) -> bool:
    """Whether the server separated reasoning from the answer, as vLLM and SGLang do for models that they support."""
    return any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
