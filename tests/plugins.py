"""Fixtures with and without plug-ins of Pillow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from PIL import Image, ImageFile

# Headers of these formats; only the fixture below can read them.
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + b"x" * 50
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"x" * 50
JXL = b"\xff\x0a" + b"x" * 50


class _RedImage(ImageFile.ImageFile):
    """A red image of 5 × 4 pixels, whatever the file contains."""

    format = "HEIF"

    def _open(self) -> None:
        self._mode, self._size = "RGB", (5, 4)

    def load(self) -> Image.core.PixelAccess | None:
        if self._im is None:
            self.im = Image.new("RGB", self.size, "red").im
        return super(ImageFile.ImageFile, self).load()


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plug-in is installed, and Pillow was built without AVIF."""
    Image.init()
    for name in ("HEIF", "JXL", "AVIF"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    for module in ("pillow_heif", "pillow_jxl", "pillow_avif"):
        monkeypatch.setitem(sys.modules, module, None)  # its import fails


@pytest.fixture
def heif_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for pillow-heif is installed but not registered."""
    Image.init()
    module = ModuleType("pillow_heif")
    module.register_heif_opener = (
        lambda: Image.register_open(  # type: ignore[attr-defined]
            "HEIF", _RedImage, lambda data: data[4:12] == b"ftypheic"
        )
    )
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    yield
    Image.OPEN.pop("HEIF", None)
