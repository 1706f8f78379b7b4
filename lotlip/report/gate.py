"""The gate after the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from lotlip.core.checks import SHOWN_ROWS, Check, one_value, run_gate


def gate_report(page: Path, images: int, report: Path) -> list[Check]:
    """Checks that the page exists, shows its images, loads no other file, and has no broken file links.

    Args:
        page: the HTML file.
        images: minimum number of images on the page.
        report: scratch folder.
    """
    references = _References()
    if page.is_file():
        references.feed(page.read_text(encoding="utf-8"))
    outside = ", ".join(references.outside[:SHOWN_ROWS])
    broken = [link for link in references.links if not (page.parent / link).is_file()][:SHOWN_ROWS]
    row = {
        "page": page.name,
        "bytes": page.stat().st_size if page.is_file() else 0,
        "images": references.images,
        "outside": len(references.outside),
        "broken_links": len(broken),
    }
    checks = [
        one_value("bytes", f"{page.name} exists and is not empty (bytes)", low=1),
        one_value("images", f"{page.name} shows at least {images} images", low=images),
        one_value("outside", f"{page.name} loads no other file", high=0, detail=outside),
        one_value(
            "broken_links", f"{page.name} links only to existing files", high=0, detail=", ".join(broken[:SHOWN_ROWS])
        ),
    ]
    return run_gate("report", {"stage": pd.DataFrame([row])}, {"stage": checks}, report)


# Files that a style sheet loads; data URLs and anchors within the page load nothing.
_LOADED_BY_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?(?!data:|\#|url)([^"')\s]+)""")


class _References(HTMLParser):
    """Counts a page's images and collects the files that it loads or links to; web links are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.outside: list[str] = []
        self.links: list[str] = []  # to local files

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value is not None and not value.startswith(("data:", "#")):
                web = value.startswith(("http://", "https://"))
                if tag != "a":
                    self.outside.append(value)
                elif not web:
                    self.links.append(value)
            elif name == "style":
                self.outside += _LOADED_BY_STYLE.findall(value or "")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.outside += _LOADED_BY_STYLE.findall(data)
