"""Writes pages from templates."""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotlip.core.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, context: dict[str, Any], path: Path) -> None:
    """Writes a page from a template of `templates/`; in HTML, everything that the context holds is escaped."""
    with atomic_write(path) as partial:
        partial.write_text(printable(_compiled(template).render(context)), encoding="utf-8")


@lru_cache
def _compiled(template: str) -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("lotlip.report", "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["code"] = lambda text: Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704
    environment.filters["in_cell"] = lambda text: str(text).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")
    return environment.get_template(template)


# Characters that HTML may not contain: control characters (except tab, line feed and carriage return), lone
# surrogates, and noncharacters.
_NOT_IN_HTML = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x10000, 0x110000, 0x10000))
    + "]"
)


def printable(text: str) -> str:
    """Replaces characters that HTML may not contain; captions from files may contain them."""
    return _NOT_IN_HTML.sub("\ufffd", text)
