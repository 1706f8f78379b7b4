"""Chromium, for the tests that use a page as a person does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
PICTURES = os.environ.get("LOTLIP_PICTURES")  # optional folder for screenshots, such as docs
TIMEOUT = 120_000  # milliseconds, long because a machine may be busy

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """Runs Chromium for the duration of the block.

    It has WebGL only for screenshots: without a GPU it takes more than half of a core to draw the graph on the page of
    a flow run, again and again.

    Args:
        arguments: further arguments of its command line.
    """
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT)
    drawing = [] if PICTURES else ["--disable-gpu", "--disable-software-rasterizer"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *drawing, *arguments])
        yield browser
        browser.close()
