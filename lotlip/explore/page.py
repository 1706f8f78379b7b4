"""The page itself: Gradio's components, a server on loopback, and nothing that leaves this machine."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import gradio
from PIL import Image
from starlette.middleware import Middleware

from lotlip.core.loopback import HOST, LoopbackOnly
from lotlip.core.temporary import temporary_folder
from lotlip.data.images import ENDINGS, decode_rgb
from lotlip.explore.explorer import Explorer, Look, Reading
from lotlip.figures.overlay import beside, heat, shown

MAX_UPLOAD = "64mb"
_EXAMPLES = 4
_KEPT_S = 3600  # pictures that the page has shown are deleted after so long, and when the server ends
_HINT = (
    "Heat is relevance of patches for the text, by gradient-weighted attention roll-out; full heat is a picture's "
    "hottest patch, or three times the even share if that is more. The model sees "
)
_SEEN = {
    "crop": "the square in the centre.",
    "squash": "the whole picture, squashed to a square.",
    "pad": "the whole picture, padded to a square.",
}
# Gradio's galleries have square cells and scroll inside; here a cell is as high as its picture, and the page scrolls.
_CSS = """
.lotlip-gallery .grid-wrap {overflow: visible; min-height: 0 !important; max-height: none; padding: 0}
.lotlip-gallery .grid-container {grid-template-rows: none !important; grid-auto-rows: auto !important}
.lotlip-gallery .thumbnail-item {aspect-ratio: auto !important; height: auto !important}
#texts * {font-family: var(--font) !important}
.lotlip-text {white-space: pre-wrap} .lotlip-text s {opacity: .45}
.lotlip-spread table {border-collapse: collapse; width: 100%} .lotlip-spread th {font-weight: 600}
.lotlip-spread td, .lotlip-spread th {padding: .25rem .5rem; text-align: right; white-space: nowrap}
.lotlip-spread td:first-child, .lotlip-spread th:first-child {text-align: left; white-space: normal; width: 100%}
.lotlip-spread tfoot td {border-top: 1px solid var(--border-color-primary); opacity: .8}
"""
# The browser itself keeps to this server, whatever the page's libraries would like to fetch.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)

R = TypeVar("R")
_Shown = list[tuple[Image.Image, str]]  # pictures of a gallery with what stands below them


@contextmanager
def served(explorer: Explorer, port: int | None = None) -> Iterator[str]:
    """A block during which the page is served; gives its address.

    Args:
        explorer: what the page asks.
        port: on loopback; where None, the first that is free from 7860 on.

    Raises:
        ValueError: the port is taken.
    """
    # settings of Gradio's in the environment could open the server to others, or files of this machine to the page
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    with temporary_folder("explore") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
        page = build_page(explorer)
        page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=port,
                theme=_theme(),
                css=_CSS,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                pwa=False,
                ssr_mode=False,
                state_session_capacity=64,
                app_kwargs={"middleware": [Middleware(LoopbackOnly), Middleware(_Policy)]},
            )
        except OSError as error:
            raise ValueError(f"the page cannot be served on {HOST}: {error}; choose another --port") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _theme() -> gradio.themes.Base:
    """Gradio's, in the report's colour and in fonts of the reader's own."""
    return gradio.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


class _Policy:
    """Middleware that sends `_POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, answer)


def build_page(explorer: Explorer) -> gradio.Blocks:
    """The page, not yet served."""
    with gradio.Blocks(
        title="LoTLIP explorer", analytics_enabled=False, fill_width=True, delete_cache=(_KEPT_S, _KEPT_S)
    ) as page:
        gradio.Markdown(f"# Explore\n`{_near(explorer.folder)}`: long texts find pictures, pictures find texts.")
        with gradio.Tab("Text → pictures"):
            _text_tab(explorer)
        with gradio.Tab("Picture → texts"):
            if explorer.has_texts:
                _picture_tab(explorer)
            else:
                gradio.Markdown("There are no texts to find: start with `--texts` and an index of some.")
    return page


def _near(folder: Path) -> Path:
    """A folder as it is called from here, where it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _text_tab(explorer: Explorer) -> None:
    searched = gradio.State(("", []))  # the text, and names of the pictures that it found
    with gradio.Row():
        with gradio.Column(scale=2, min_width=320):
            text = gradio.Textbox(
                label="Text", lines=9, max_lines=20, placeholder="Type or paste a text of any length.", elem_id="text"
            )
            button = gradio.Button("Find pictures", variant="primary", elem_id="find")
            reading = gradio.HTML(elem_id="reading")
            if examples := explorer.examples(_EXAMPLES):
                labels = [shorten(example, 90, placeholder=" …") for example in examples]
                gradio.Examples([[example] for example in examples], text, label="Long texts", example_labels=labels)
        with gradio.Column(scale=3, min_width=420):
            gradio.Markdown("**Nearest pictures**, and where the text looks in each. Choose one to see more below.")
            gallery = _gallery("pictures", columns=2)
            gradio.Markdown(_HINT + _SEEN[explorer.resize])
    details = _details("text")

    def read(text: str) -> str:
        return reading_html(text, explorer.reading(text)) if text.strip() else ""

    def find(text: str) -> tuple[_Shown, tuple[str, list[str]]]:
        found = explorer.find_pictures(text)
        pictures = [
            (
                beside(shown(one.picture), heat(shown(one.picture), one.relevance, explorer.resize)),
                f"{one.match.score:.3f} · {one.match.name}",
            )
            for one in found
        ]
        return pictures, (text, [one.match.name for one in found])

    def choose(searched: tuple[str, list[str]], number: int = 0) -> tuple[_Shown, str]:
        text, names = searched
        picture = explorer.picture(names[number])
        look = explorer.look(picture, text)
        return look_pictures(picture, look, names[number], explorer.resize), spread_html(look)

    def chosen(searched: tuple[str, list[str]], event: gradio.SelectData) -> tuple[_Shown, str]:
        return choose(searched, event.index)

    text.change(_told(read), text, reading, queue=False, show_progress="hidden", trigger_mode="always_last", **_PRIVATE)
    asked = gradio.on([button.click, text.submit], _told(find), text, [gallery, searched], **_PRIVATE)
    asked.success(_told(choose), searched, details, **_PRIVATE)
    gallery.select(_told(chosen), searched, details, **_PRIVATE)


def _picture_tab(explorer: Explorer) -> None:
    texts = gradio.State([])
    with gradio.Row():
        with gradio.Column(scale=2, min_width=320):
            upload = gradio.File(
                label="Picture", file_types=[f".{ending}" for ending in ENDINGS], type="filepath", elem_id="upload"
            )
            preview = gradio.Image(show_label=False, interactive=False, buttons=[], height=288, visible=False)
        with gradio.Column(scale=3, min_width=420):
            gradio.Markdown("**Nearest texts.** Choose one to see more below.")
            table = gradio.Dataframe(
                headers=["cosine", "text", "name"],
                show_label=False,
                datatype="str",
                wrap=True,
                interactive=False,
                column_widths=["10%", "70%", "20%"],
                buttons=[],
                elem_id="texts",
            )
            gradio.Markdown(_HINT + _SEEN[explorer.resize])
    details = _details("picture")

    def find(file: str | None) -> tuple[Any, list[list[str]], list[str]]:
        if file is None:
            return gradio.Image(visible=False), [], []
        picture = decode_rgb(Path(file).read_bytes())
        found = explorer.find_texts(picture)
        rows = [[f"{one.score:.3f}", one.text or "", one.name] for one in found]
        return gradio.Image(shown(picture), visible=True), rows, [one.text or "" for one in found]

    def choose(file: str | None, texts: list[str], number: int = 0) -> tuple[_Shown, str]:
        if file is None or not texts:
            return [], ""
        picture = decode_rgb(Path(file).read_bytes())
        look = explorer.look(picture, texts[number])
        return look_pictures(picture, look, "the picture", explorer.resize), spread_html(look)

    def chosen(file: str | None, texts: list[str], event: gradio.SelectData) -> tuple[_Shown, str]:
        return choose(file, texts, event.index[0])

    asked = upload.change(_told(find), upload, [preview, table, texts], **_PRIVATE)
    asked.success(_told(choose), [upload, texts], details, **_PRIVATE)
    table.select(_told(chosen), [upload, texts], details, **_PRIVATE)


_PRIVATE: Any = {"api_visibility": "private"}


def _details(name: str) -> list[Any]:
    """Where a text is shown beside a picture, sub-caption by sub-caption."""
    gradio.Markdown("**Where each sub-caption looks** as a text of its own, beside the whole text.")
    maps = _gallery(f"{name}-maps", columns=6)
    return [maps, gradio.HTML(elem_id=f"{name}-spread", elem_classes="lotlip-spread")]


def _gallery(name: str, columns: int) -> gradio.Gallery:
    return gradio.Gallery(
        show_label=False,
        columns=columns,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=name,
        elem_classes="lotlip-gallery",
    )


def _told(work: Callable[..., R]) -> Callable[..., R]:
    """What a person can mend is told on the page in its own words."""

    @functools.wraps(work)
    def telling(*arguments: Any) -> R:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            raise gradio.Error(escape(str(error)), title="That did not work", print_exception=False) from error

    return telling


# --- what is shown ----------------------------------------------------------------------------------------------------


def look_pictures(picture: Image.Image, look: Look, name: str, resize: str) -> _Shown:
    """The picture, then with where the whole text looks, then with where each sub-caption does."""
    texts = ["the whole text", *(f"{number} · {text}" for number, text in enumerate(look.sub_captions, start=1))]
    maps = zip([look.whole, *look.relevance], texts, strict=True)
    return [(shown(picture), name), *((heat(shown(picture), one, resize), text) for one, text in maps)]


def reading_html(text: str, reading: Reading) -> str:
    """How many tokens a text has; where it is too long, the text with its unread end struck out."""
    if reading.end == len(text):
        return f"<p>{reading.tokens} of at most {reading.limit} tokens: the model reads all of it.</p>"
    read, rest = escape(text[: reading.end]), escape(text[reading.end :])
    return (
        f"<p>{reading.tokens} tokens, and the model reads the first {reading.limit}: not what is struck out.</p>"
        f'<p class="lotlip-text">{read}<s>{rest}</s></p>'
    )


def spread_html(look: Look) -> str:
    """A table of how each token that gives a feature spreads its attention over the sub-captions."""
    if look.silent:
        return f"<p>{escape(look.silent)}</p>"
    if not look.sub_captions:
        return ""
    highest = max(float(look.shares.max()), float(look.tokens.max()))

    def cell(share: float) -> str:
        return f'<td style="background: rgba(79, 70, 229, {0.55 * share / highest:.2f})">{share:.0%}</td>'

    rows = [
        f"<tr><td>{number + 1} · {escape(text)}</td>{''.join(cell(row[number]) for row in look.shares)}"
        f"<td>{look.tokens[number]:.0%}</td></tr>"
        for number, text in enumerate(look.sub_captions)
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in look.readers)
    even = "".join(f"<td>{'–' if math.isnan(value) else f'{value:.2f}'}</td>" for value in look.spread)
    return (
        "<p><b>How the text tower reads it</b>: attention of each token that gives a feature, rolled out over all "
        "layers, by sub-caption; beside it the sub-caption's share of the tokens.</p>"
        f"<table><thead><tr><th>sub-caption</th>{head}<th>tokens</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><td>evenness: entropy over that of an even spread</td>{even}<td></td></tr></tfoot></table>"
    )
