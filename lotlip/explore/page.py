"""The explorer's page: Gradio components, served on loopback only."""

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
from lotlip.explore.explorer import Analysis, Explorer, Truncation
from lotlip.figures.overlay import heat, scale_to_page, side_by_side

MAX_UPLOAD = "64mb"
_EXAMPLES = 4
_CACHE_SECONDS = 3600  # displayed pictures are deleted after this time, and when the server stops
_HINT = (
    "Heat is the relevance of patches for the text, by gradient-weighted attention rollout. Full heat is the maximum "
    "of the picture, but at least three times uniform relevance. The model sees "
)
_MODEL_INPUT = {
    "crop": "the square in the centre.",
    "squash": "the whole picture, squashed to a square.",
    "pad": "the whole picture, padded to a square.",
}
# Gradio's galleries have square cells and scroll; here cells are as high as their pictures, and the page scrolls.
_CSS = """
.lotlip-gallery .grid-wrap {overflow: visible; min-height: 0 !important; max-height: none; padding: 0}
.lotlip-gallery .grid-container {grid-template-rows: none !important; grid-auto-rows: auto !important}
.lotlip-gallery .thumbnail-item {aspect-ratio: auto !important; height: auto !important}
#texts * {font-family: var(--font) !important}
.lotlip-text {white-space: pre-wrap} .lotlip-text s {opacity: .45}
.lotlip-attention table {border-collapse: collapse; width: 100%} .lotlip-attention th {font-weight: 600}
.lotlip-attention td, .lotlip-attention th {padding: .25rem .5rem; text-align: right; white-space: nowrap}
.lotlip-attention td:first-child, .lotlip-attention th:first-child {text-align: left; white-space: normal; width: 100%}
.lotlip-attention tfoot td {border-top: 1px solid var(--border-color-primary); opacity: .8}
"""
# Keeps the browser from loading anything from other servers.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)

R = TypeVar("R")
_Gallery = list[tuple[Image.Image, str]]  # pictures with captions
_Searched = tuple[str, list[tuple[str, str | None]]]  # a text, and name and source of each picture found


@contextmanager
def serve_page(explorer: Explorer, port: int | None = None) -> Iterator[str]:
    """Serves the page within the context; yields its address.

    Args:
        explorer: the explorer.
        port: port on loopback; default: the first free one from 7860.

    Raises:
        ValueError: the port is in use.
    """
    # Gradio's environment variables could expose the server to other machines, or local files to the page.
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
    """Gradio's default theme, with the report's colour and system fonts."""
    return gradio.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


class _Policy:
    """Middleware that adds the content security policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_page(explorer: Explorer) -> gradio.Blocks:
    """Builds the page without serving it."""
    with gradio.Blocks(
        title="LoTLIP explorer", analytics_enabled=False, fill_width=True, delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS)
    ) as page:
        gradio.Markdown(f"# Explore\n`{_relative(explorer.folder)}`: search pictures by text and texts by picture.")
        with gradio.Tab("Text → pictures"):
            _text_tab(explorer)
        with gradio.Tab("Picture → texts"):
            if explorer.has_texts:
                _picture_tab(explorer)
            else:
                gradio.Markdown("There is no index of texts. Start with `--texts INDEX` to search texts.")
    return page


def _relative(folder: Path) -> Path:
    """Makes a path relative to the current folder if it is inside."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _text_tab(explorer: Explorer) -> None:
    searched = gradio.State(("", []))  # the text, and the names of the pictures found
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
            maps = "" if explorer.maps_problem else " with relevance maps for the text"
            gradio.Markdown(f"**Nearest pictures**{maps}. Select one for details below.")
            gallery = _gallery("pictures", columns=2)
            gradio.Markdown(explorer.maps_problem or _HINT + _MODEL_INPUT[explorer.resize])
    details = _details("text", explorer)

    def read(text: str) -> str:
        return truncation_html(text, explorer.truncation(text)) if text.strip() else ""

    def find(text: str) -> tuple[_Gallery, _Searched]:
        found = explorer.find_pictures(text)
        pictures = [
            (
                scale_to_page(one.picture)
                if one.relevance is None
                else side_by_side(
                    scale_to_page(one.picture),
                    heat(scale_to_page(one.picture), one.relevance, explorer.resize, explorer.crop),
                ),
                f"{one.match.score:.3f} · {one.match.name}",
            )
            for one in found
        ]
        return pictures, (text, [(one.match.name, one.match.source) for one in found])

    def choose(searched: _Searched, number: int = 0) -> tuple[_Gallery, str]:
        text, found = searched
        name, source = found[number]
        picture = explorer.picture(name, source)
        analysis = explorer.analyse(picture, text)
        return relevance_pictures(picture, analysis, name, explorer), attention_html(analysis)

    def chosen(searched: _Searched, event: gradio.SelectData) -> tuple[_Gallery, str]:
        return choose(searched, event.index)

    text.change(
        _with_errors(read),
        text,
        reading,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
        **_PRIVATE,
    )
    search = gradio.on([button.click, text.submit], _with_errors(find), text, [gallery, searched], **_PRIVATE)
    search.success(_with_errors(choose), searched, details, **_PRIVATE)
    gallery.select(_with_errors(chosen), searched, details, **_PRIVATE)


def _picture_tab(explorer: Explorer) -> None:
    texts = gradio.State([])
    with gradio.Row():
        with gradio.Column(scale=2, min_width=320):
            upload = gradio.File(
                label="Picture", file_types=[f".{ending}" for ending in ENDINGS], type="filepath", elem_id="upload"
            )
            preview = gradio.Image(show_label=False, interactive=False, buttons=[], height=288, visible=False)
        with gradio.Column(scale=3, min_width=420):
            gradio.Markdown("**Nearest texts.** Select one for details below.")
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
            gradio.Markdown(explorer.maps_problem or _HINT + _MODEL_INPUT[explorer.resize])
    details = _details("picture", explorer)

    def find(file: str | None) -> tuple[Any, list[list[str]], list[str]]:
        if file is None:
            return gradio.Image(visible=False), [], []
        picture = decode_rgb(Path(file).read_bytes())
        found = explorer.find_texts(picture)
        rows = [[f"{one.score:.3f}", one.text or "", one.name] for one in found]
        return gradio.Image(scale_to_page(picture), visible=True), rows, [one.text or "" for one in found]

    def choose(file: str | None, texts: list[str], number: int = 0) -> tuple[_Gallery, str]:
        if file is None or not texts:
            return [], ""
        picture = decode_rgb(Path(file).read_bytes())
        analysis = explorer.analyse(picture, texts[number])
        return relevance_pictures(picture, analysis, "the picture", explorer), attention_html(analysis)

    def chosen(file: str | None, texts: list[str], event: gradio.SelectData) -> tuple[_Gallery, str]:
        return choose(file, texts, event.index[0])

    search = upload.change(_with_errors(find), upload, [preview, table, texts], **_PRIVATE)
    search.success(_with_errors(choose), [upload, texts], details, **_PRIVATE)
    table.select(_with_errors(chosen), [upload, texts], details, **_PRIVATE)


_PRIVATE: Any = {"api_visibility": "private"}


def _details(name: str, explorer: Explorer) -> list[Any]:
    """Adds the relevance maps, if there are any, and the attention table by sub-caption."""
    if not explorer.maps_problem:
        gradio.Markdown("**Relevance maps** for the whole text, and for each sub-caption as a separate text.")
    # Gradio names a picture's file by its bytes and writes it anew for each place on the page, also while the browser
    # reads it. Another format makes it another file.
    maps = _gallery(f"{name}-maps", columns=6, encoding="png")
    return [maps, gradio.HTML(elem_id=f"{name}-attention", elem_classes="lotlip-attention")]


def _gallery(name: str, columns: int, encoding: str = "webp") -> gradio.Gallery:
    return gradio.Gallery(
        format=encoding,
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


def _with_errors(work: Callable[..., R]) -> Callable[..., R]:
    """Shows errors that a user can fix on the page."""

    @functools.wraps(work)
    def wrapped(*arguments: Any) -> R:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            raise gradio.Error(escape(str(error)), title="Error", print_exception=False) from error

    return wrapped


# --- content ----------------------------------------------------------------------------------------------------------


def relevance_pictures(picture: Image.Image, analysis: Analysis, name: str, explorer: Explorer) -> _Gallery:
    """Returns the picture, then its relevance maps for the whole text and for each sub-caption."""
    texts = ["the whole text", *(f"{number} · {text}" for number, text in enumerate(analysis.sub_captions, start=1))]
    if analysis.whole is None:
        return [(scale_to_page(picture), name)]
    maps = zip([analysis.whole, *analysis.relevance], texts, strict=True)
    shown, seen = scale_to_page(picture), (explorer.resize, explorer.crop)
    return [(shown, name), *((heat(shown, one, *seen), text) for one, text in maps)]


def truncation_html(text: str, truncation: Truncation) -> str:
    """Shows the number of tokens of a text and, if it is too long, the text with the truncated part struck out."""
    if truncation.end == len(text):
        return f"<p>{truncation.tokens} of at most {truncation.limit} tokens: the model reads the whole text.</p>"
    read, rest = escape(text[: truncation.end]), escape(text[truncation.end :])
    return (
        f"<p>{truncation.tokens} tokens; the model reads only the first {truncation.limit}. The rest is struck out.</p>"
        f'<p class="lotlip-text">{read}<s>{rest}</s></p>'
    )


def attention_html(analysis: Analysis) -> str:
    """Returns a table of the attention of [CLS] and the corner tokens over the sub-captions."""
    if analysis.problem:
        return f"<p>{escape(analysis.problem)}</p>"
    if not analysis.sub_captions:
        return ""
    highest = max(float(analysis.shares.max()), float(analysis.tokens.max()))

    def cell(share: float) -> str:
        return f'<td style="background: rgba(79, 70, 229, {0.55 * share / highest:.2f})">{share:.0%}</td>'

    rows = [
        f"<tr><td>{number + 1} · {escape(text)}</td>{''.join(cell(row[number]) for row in analysis.shares)}"
        f"<td>{analysis.tokens[number]:.0%}</td></tr>"
        for number, text in enumerate(analysis.sub_captions)
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in analysis.readers)
    entropy = "".join(f"<td>{'–' if math.isnan(value) else f'{value:.2f}'}</td>" for value in analysis.entropy)
    return (
        "<p><b>Attention of the text tower</b>: share of the attention of [CLS] and each corner token on each "
        "sub-caption, by attention rollout; last column: share of tokens.</p>"
        f"<table><thead><tr><th>sub-caption</th>{head}<th>tokens</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><td>normalised entropy</td>{entropy}<td></td></tr></tfoot></table>"
    )
