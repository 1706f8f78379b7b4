"""Validates images and captions of every source: turns each item into a record or a failure."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lotlip.data.records import Failure, ImageRecord, ItemWarning
from lotlip.data.text import has_words
from lotlip.ingest.config import ImagesConfig

if TYPE_CHECKING:
    from PIL import Image


class RecordValidator:
    """Validates encoded images and their captions, and stores images as `ingest.images` of params.yaml says.

    Kinds of failures: "unreadable" (the image is broken, truncated or not an image), "bomb" (more pixels than
    `max_pixels`), "too-small", "aspect-ratio" (more extreme than `max_aspect_ratio`), "too-large" (more than
    `max_bytes`), "empty" (a caption without a letter or digit), "encoding" (a caption that is not UTF-8). An image in
    another format than its name says is kept, with a warning "renamed".
    """

    def __init__(self, settings: ImagesConfig) -> None:
        self._settings = settings

    def __call__(
        self, key: str, where: str, image: bytes, caption: str | bytes, ending: str = ""
    ) -> ImageRecord | Failure:
        """Turns an image and its caption into a record, or a failure that says why it cannot be one.

        Args:
            key: of the sample.
            where: file, member or row that it comes from, in a form that a person can look up.
            image: encoded.
            caption: as in the source; white space is normalised.
            ending: of the image's name, without the dot; empty if it has none.
        """
        from lotlip.data.images import ENDINGS, FORMATS, TooManyPixels, open_image, to_rgb

        if len(image) > self._settings.max_bytes:
            return self.too_large(key, where, len(image))
        try:
            text = " ".join((caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption).split())
            text.encode()
        except UnicodeError as error:
            at = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else "lone surrogate"
            return Failure(key, where, f"the caption is not UTF-8: {at}", "encoding")
        if not has_words(text):
            reason = f"the caption has no words: {text[:40]!r}" if text else "the caption is empty"
            return Failure(key, where, reason, "empty")
        try:
            with open_image(image, self._settings.max_pixels) as file:
                name = "JPEG" if file.format == "MPO" else str(file.format)  # MPO: a JPEG followed by more pictures
                if min(file.size) < self._settings.min_side:
                    reason = f"{file.width} × {file.height} pixels: a side is below {self._settings.min_side}"
                    return Failure(key, where, reason, "too-small")
                ratio = max(file.size) / min(file.size)
                if ratio > self._settings.max_aspect_ratio:
                    limit = f"ingest.images.max_aspect_ratio, {self._settings.max_aspect_ratio:g}"
                    reason = f"{file.width} × {file.height} pixels: the ratio of the sides is above {limit}"
                    return Failure(key, where, reason, "aspect-ratio")
                file.load()
                picture = to_rgb(file)
        except TooManyPixels as error:
            return Failure(key, where, f"{error}; raise ingest.images.max_pixels if the image is genuine", "bomb")
        except Exception as error:  # Pillow's decoders raise many types on broken files
            return Failure(key, where, f"not a readable image ({len(image)} bytes): {error}", "unreadable")
        warnings: tuple[ItemWarning, ...] = ()
        if ending and ENDINGS.get(ending.lower()) != name:
            reason = f"its name ends in .{ending}, but it is a {name}; it is stored with the ending of its format"
            warnings = (ItemWarning(key, where, reason, "renamed"),)
        try:
            image, name, picture = self._stored(image, name, picture)
        except (OSError, ValueError) as error:  # WebP allows up to 16383 pixels per side, JPEG up to 65535
            reason = f"{picture.width} × {picture.height} pixels cannot be stored as {self._settings.encoding}: {error}"
            return Failure(key, where, reason, "too-large")
        digest = hashlib.sha256(image).hexdigest()
        return ImageRecord(key, image, FORMATS[name][0], text, *picture.size, digest, warnings=warnings)

    def read(self, key: str, where: str, path: Path) -> bytes | Failure:
        """A file's bytes, or a failure that says why it cannot be read; reads at most one byte over `max_bytes`."""
        try:
            if not path.is_file():
                if path.exists() or path.is_symlink():
                    return Failure(key, where, "it cannot be read: it is not a file", "unreadable")
                return Failure(key, where, "there is no such file", "missing")
            with path.open("rb") as file:
                data = file.read(self._settings.max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            reason = error.strerror if isinstance(error, OSError) else error
            return Failure(key, where, f"it cannot be read: {reason}", "unreadable")
        if len(data) > self._settings.max_bytes:
            return self.too_large(key, where, path.stat().st_size)
        return data

    def too_large(self, key: str, where: str, size: int) -> Failure:
        """The failure of an item that is larger than allowed."""
        limit = self._settings.max_bytes
        return Failure(key, where, f"{size} bytes are more than ingest.images.max_bytes, {limit}", "too-large")

    def _stored(self, image: bytes, name: str, picture: Image.Image) -> tuple[bytes, str, Image.Image]:
        """The encoded image as it is stored, its format, and the decoded picture."""
        from lotlip.data.images import resized

        side, encoding = self._settings.shorter_side, self._settings.encoding
        smaller = side is not None and side < min(picture.size)
        if encoding == "keep" and not smaller:
            return image, name, picture
        if side is not None and smaller:
            picture = resized(picture, side)
        if encoding != "keep":
            name = encoding.upper()
        elif name not in ("JPEG", "PNG", "WEBP"):
            name = "PNG"
        file = io.BytesIO()
        options = {} if name == "PNG" else {"quality": self._settings.quality}
        picture.save(file, name, **options)  # `to_rgb` removed the metadata
        return file.getvalue(), name, picture
