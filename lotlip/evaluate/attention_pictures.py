"""Pictures of where attention goes (paper, Figs. 1 and 6): over images for a text, over a text's sub-captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lotlip.data.text import split_sub_captions
from lotlip.figures.charts import INK, SYSTEM_COLOURS, in_one_line, literal, styled
from lotlip.figures.overlay import heat

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from lotlip.evaluate.benchmarks import Benchmark
    from lotlip.evaluate.encoders import LotlipEncoder

IMAGES = 3
SENTENCES = 6  # of a long text, the others have no place beside one another
SIDE = 160  # pixels of a shown image
_DPI = 130

Disc = tuple[float, float, float]  # x, y and radius in shares of a picture's side


@dataclass(frozen=True)
class SeenImage:
    """One image with what some texts find in it.

    Attributes:
        picture: the square that the model sees.
        texts: the texts.
        maps: relevance of the patches for each text, [N, G, G'].
        named: for each text, where the object is that it names; None where that is not known, or there is none.
    """

    picture: Image
    texts: Sequence[str]
    maps: np.ndarray
    named: Sequence[Disc | None] = ()


@dataclass(frozen=True)
class ReadText:
    """How one long text is read.

    Attributes:
        sub_captions: that were not cut off, n.
        shares: of attention, a row of n for each reader's name.
        entropy: of each reader's shares, 0 … 1; NaN with one sub-caption.
    """

    sub_captions: Sequence[str]
    shares: dict[str, np.ndarray]
    entropy: dict[str, float] = field(default_factory=dict)


def attention_pictures(
    encoder: LotlipEncoder, benchmark: Benchmark, on_failure: Callable[[str, str], object] = lambda name, reason: None
) -> dict[str, bytes]:
    """Name → PNG, for the first images of a benchmark; what a model does not show is left out.

    `relevance`: a row for each image, a column for its short text and for each sentence of its long one. `reading`: how
    [CLS] and the corner tokens spread over the sub-captions of the long texts. `on_failure` gets the name and the
    reason of a picture that could not be drawn.
    """
    pictures = {}
    seen: Any
    for name, draw, look in (
        ("relevance", draw_relevance, look_at_images),
        ("reading", draw_reading, look_at_texts),
    ):
        try:
            seen = look(encoder, benchmark)
        except ValueError:  # the reason stands beside the scores
            continue
        except Exception as error:  # such as too little memory; no picture is worth a score
            on_failure(name, in_one_line(error))
            continue
        try:
            if seen:
                pictures[name] = draw(seen)
        except Exception as error:  # matplotlib raises many types
            on_failure(name, in_one_line(error))
    return pictures


def look_at_images(encoder: LotlipEncoder, benchmark: Benchmark) -> list[SeenImage]:
    """The first images that have a text, each with its short text and the sentences of its long one."""
    from lotlip.evaluate.attention import maps_of

    asked: dict[int, list[str]] = {}
    ends = encoder.tokenizer.sentence_ends
    for kind in ("short", "long"):
        if kind in benchmark.retrieval:
            own = benchmark.retrieval[kind]
            first = dict(reversed(list(zip(own.image, own.texts, strict=True))))
            for image, text in first.items():
                asked.setdefault(image, []).extend(
                    [text] if kind == "short" else split_sub_captions(text, ends)[:SENTENCES]
                )
    first_images = sorted(asked)[:IMAGES]
    encoded, texts = [benchmark.read(image) for image in first_images], [asked[image] for image in first_images]
    return [
        SeenImage(_square(encoder, benchmark, image, data), own, maps.numpy(), _named(benchmark, image, own))
        for image, data, own, maps in zip(first_images, encoded, texts, maps_of(encoder, encoded, texts), strict=True)
    ]


def look_at_texts(encoder: LotlipEncoder, benchmark: Benchmark) -> list[ReadText]:
    """The first long texts, read by [CLS], by each corner token, and by one that reads every token alike."""
    import torch

    from lotlip.evaluate.attention import spread, sub_caption_shares, sub_captions, text_attention

    model, read = encoder.model, []
    for text in benchmark.retrieval["long"].texts[:IMAGES] if "long" in benchmark.retrieval else ():
        ids, lengths = (torch.from_numpy(made).to(model.device) for made in encoder.tokenizer([text]))
        number = sub_captions(model, ids, lengths)
        shares, by_length = sub_caption_shares(text_attention(model, ids, lengths), number)
        rows = torch.cat([shares[0], by_length]).cpu()  # [1 + m + 1, N]
        names = ["[CLS]", *(f"Cor {corner}" for corner in range(1, len(rows) - 1)), "by length"]
        entropy = spread(rows[None], number.amax(dim=1).cpu() + 1)[0].tolist()
        parts = split_sub_captions(text, encoder.tokenizer.sentence_ends)[: rows.shape[1]]
        read.append(
            ReadText(parts, dict(zip(names, rows.numpy(), strict=True)), dict(zip(names, entropy, strict=True)))
        )
    return read


def overlay(picture: Image, relevance: np.ndarray, named: Disc | None = None) -> Image:
    """A picture in grey with relevance [G, G'] laid over it in red, full where it is largest.

    Args:
        picture: the square that the model sees.
        relevance: of its patches.
        named: a circle to draw.
    """
    from PIL import ImageDraw

    shown = heat(picture, relevance)
    if named:
        x, y, radius = (share * picture.width for share in named)
        ImageDraw.Draw(shown).ellipse((x - radius, y - radius, x + radius, y + radius), outline=(255, 255, 255))
    return shown


def draw_relevance(images: Sequence[SeenImage]) -> bytes:
    """A row for each image, a column for each text, the text above; PNG."""
    columns = 1 + max(len(image.texts) for image in images)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(images), columns, squeeze=False)
        for row, image in zip(panels, images, strict=True):
            named = image.named or [None] * len(image.texts)
            shown = [overlay(image.picture, *one) for one in zip(image.maps, named, strict=True)]
            for axes, picture, text in zip(row, [image.picture, *shown], ["", *image.texts], strict=False):
                axes.imshow(picture)
                axes.set_title(_wrapped(text, 20, 4), fontsize=6.5)
            for axes in row:
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)

    return _png((1.3 * columns, 1.95 * len(images)), draw)


def draw_reading(texts: Sequence[ReadText]) -> bytes:
    """For each text a row for each reader, a column for each sub-caption: its share in colour, entropy on the right."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", SYSTEM_COLOURS["LoTLIP"]])
    widest = max(len(text.sub_captions) for text in texts)

    def draw(figure: Figure) -> None:
        for axes, text in zip(figure.subplots(len(texts), 1, squeeze=False)[:, 0], texts, strict=True):
            shares = np.stack(list(text.shares.values()))
            most = max(float(shares.max()), 1e-6)
            axes.imshow(shares, cmap=colours, vmin=0, vmax=most, aspect="auto")
            axes.set_xlim(-0.5, widest - 0.5)
            axes.grid(False)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(length=0)
            labels = [_wrapped(part, 20, 4) for part in text.sub_captions]
            axes.set_xticks(range(len(labels)), labels, fontsize=6.5)
            axes.set_yticks(range(len(shares)), list(text.shares), fontsize=8)
            for (row, column), share in np.ndenumerate(shares):
                ink = "white" if share > 0.6 * most else INK
                axes.text(column, row, f"{100 * share:.0f} %", ha="center", va="center", fontsize=7.5, color=ink)
            for row, name in enumerate(text.shares):
                entropy = text.entropy.get(name, np.nan)
                words = "–" if np.isnan(entropy) else f"{entropy:.2f}"
                axes.text(len(labels) - 0.4, row, words, ha="left", va="center", fontsize=7.5)
            axes.text(len(labels) - 0.4, -0.62, "entropy", ha="left", va="bottom", fontsize=7.5)

    rows = sum(len(text.shares) for text in texts)
    return _png((1.25 * widest + 1.3, 0.24 * rows + 0.85 * len(texts)), draw)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(literal(text, 2 * width * lines), width, max_lines=lines, placeholder=" …"))


def small_jpeg(benchmark: Benchmark, image: int) -> bytes:
    """An image of a benchmark, atomic_write, with a longer side of SIDE pixels; a scene is drawn anew."""
    if benchmark.scenes:
        from lotlip.demo.world import render

        picture = render(benchmark.scenes[image], SIDE)
    else:
        from lotlip.data.images import decode_rgb

        picture = decode_rgb(benchmark.read(image))
        picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def _square(encoder: LotlipEncoder, benchmark: Benchmark, image: int, encoded: bytes) -> Image:
    """What the model sees of an image, as it is to be shown; a scene is drawn anew, sharper than the model sees it."""
    if benchmark.scenes:
        from lotlip.demo.world import render

        return render(benchmark.scenes[image], SIDE)
    from lotlip.data.images import decode_rgb, square

    spec = encoder.model.image_tower.spec
    return square(decode_rgb(encoded), SIDE, spec.resize, spec.mean)


def _named(benchmark: Benchmark, image: int, texts: Sequence[str]) -> list[Disc | None]:
    """Where the object is that each text names: in a scene each has a shape of its own, which the text has."""
    if not benchmark.scenes:
        return [None] * len(texts)
    scene = benchmark.scenes[image]
    objects = {thing.shape: thing.disc for thing in (scene.salient, *scene.objects)}
    words = [set(text.lower().split()) for text in texts]
    return [next((disc for shape, disc in objects.items() if shape in own), None) for own in words]


def _png(size: tuple[float, float], draw: Any) -> bytes:
    """Draws a figure of `size` inches; the same numbers give the same bytes."""
    from matplotlib.figure import Figure as Canvas

    with styled():
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas)
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return png.getvalue()
