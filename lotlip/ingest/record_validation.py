"""The one way in for images and captions of every source: what becomes a record, and what a failure."""

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


class Intake:
    """Checks encoded images and their captions, and stores them as `ingest.images` of params.yaml says.

    Failures are of the kinds "unreadable" (the image is broken or cut off, or no image), "bomb" (more pixels than
    `max_pixels`), "too-small", "aspect-ratio" (longer than `max_aspect_ratio` allows), "too-large" (more than
    `max_bytes`), "empty" (a caption without a letter or digit), "encoding" (a caption that is not UTF-8). An image that
    is not what its name says comes through with a warning, "renamed".
    """

    def __init__(self, settings: ImagesConfig) -> None:
        self._settings = settings

    def __call__(
        self, key: str, where: str, image: bytes, caption: str | bytes, ending: str = ""
    ) -> ImageRecord | Failure:
        """An image with its caption as a record, or why it cannot be one.

        Args:
            key: of the sample.
            where: file, member or row that it is from, as a person would look it up.
            image: encoded.
            caption: as it was found; blanks and line ends become single blanks.
            ending: of the image's name, without the dot; empty where it has none.
        """
        from lotlip.data.images import ENDINGS, FORMATS, TooManyPixels, open_image, to_rgb

        if len(image) > self._settings.max_bytes:
            return self.too_large(key, where, len(image))
        try:
            text = " ".join((caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption).split())
            text.encode()
        except UnicodeError as error:
            at = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else "half a sign"
            return Failure(key, where, f"the caption is not UTF-8: {at}", "encoding")
        if not has_words(text):
            reason = f"the caption has no words: {text[:40]!r}" if text else "the caption is empty"
            return Failure(key, where, reason, "empty")
        try:
            with open_image(image, self._settings.max_pixels) as file:
                name = "JPEG" if file.format == "MPO" else str(file.format)  # MPO: a JPEG with more pictures behind it
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
            return Failure(key, where, f"{error}; raise ingest.images.max_pixels if it is a picture", "bomb")
        except Exception as error:  # Pillow's decoders raise many types on broken files
            return Failure(key, where, f"not a readable image ({len(image)} bytes): {error}", "unreadable")
        warnings: tuple[ItemWarning, ...] = ()
        if ending and ENDINGS.get(ending.lower()) != name:
            reason = f"its name ends in .{ending}, but it is a {name}: the ending follows what it is"
            warnings = (ItemWarning(key, where, reason, "renamed"),)
        try:
            image, name, picture = self._stored(image, name, picture)
        except (OSError, ValueError) as error:  # WebP ends at 16383 pixels, JPEG at 65535
            reason = f"{picture.width} × {picture.height} pixels cannot be stored as {self._settings.encoding}: {error}"
            return Failure(key, where, reason, "too-large")
        digest = hashlib.sha256(image).hexdigest()
        return ImageRecord(key, image, FORMATS[name][0], text, *picture.size, digest, warnings=warnings)

    def read(self, key: str, where: str, path: Path) -> bytes | Failure:
        """A file's bytes, or why they are not to be had; never more than `max_bytes` of them."""
        try:
            if not path.is_file():
                if path.exists() or path.is_symlink():
                    return Failure(key, where, "it cannot be read: it is no file", "unreadable")
                return Failure(key, where, "there is no such file", "missing")
            with path.open("rb") as file:
                data = file.read(self._settings.max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else error
            return Failure(key, where, f"it cannot be read: {reason}", "unreadable")
        if len(data) > self._settings.max_bytes:
            return self.too_large(key, where, path.stat().st_size)
        return data

    def too_large(self, key: str, where: str, size: int) -> Failure:
        """Of something with more bytes than are allowed."""
        limit = self._settings.max_bytes
        return Failure(key, where, f"{size} bytes are more than ingest.images.max_bytes, {limit}", "too-large")

    def _stored(self, image: bytes, name: str, picture: Image.Image) -> tuple[bytes, str, Image.Image]:
        """The encoded image as it is stored, what it then is, and the picture in it."""
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
        picture.save(file, name, **options)  # `to_rgb` left no metadata in it
        return file.getvalue(), name, picture
