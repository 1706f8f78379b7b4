"""Figures of attention (paper, Figs. 1 and 6): over images for a text, and over a text's sub-captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
SENTENCES = 6  # sentences of a long text that fit side by side
SIDE = 160  # longer side of a displayed image, in pixels
_DPI = 130

Disc = tuple[float, float, float]  # x, y and radius as fractions of the image's side


def disc_in_crop(disc: Disc, crop: float) -> Disc:
    """A disc as fractions of the side of the centre that a crop keeps, of which it is the share."""
    x, y, radius = disc
    return (x - 0.5) / crop + 0.5, (y - 0.5) / crop + 0.5, radius / crop


@dataclass(frozen=True)
class ImageRelevance:
    """An image with its relevance maps for some texts.

    Attributes:
        picture: the model's square input.
        texts: the texts.
        maps: relevance of the patches for each text, [N, G, G'].
        named: for each text, the position of the object that it names; None if unknown or if it names none.
    """

    picture: Image
    texts: Sequence[str]
    maps: np.ndarray
    named: Sequence[Disc | None] = ()


@dataclass(frozen=True)
class TextReading:
    """The distribution of attention over a long text.

    Attributes:
        sub_captions: the n sub-captions within the context.
        shares: reader, such as "[CLS]" → shares of attention, [n].
        entropy: reader → normalised entropy of its shares, 0 … 1; NaN with one sub-caption.
    """

    sub_captions: Sequence[str]
    shares: dict[str, np.ndarray]
    entropy: dict[str, float] = field(default_factory=dict)


def attention_pictures(
    encoder: LotlipEncoder, benchmark: Benchmark, on_failure: Callable[[str, str], object] = lambda name, reason: None
) -> dict[str, bytes]:
    """Draws attention figures for the first images of a benchmark; those that the model does not support are left out.

    `relevance` has a row for each image and a column for its short text and each sentence of its long one. `reading`
    shows the attention of [CLS] and the corner tokens over the sub-captions of the long texts.

    Args:
        encoder: the model.
        benchmark: the benchmark.
        on_failure: called with the name of a figure that could not be drawn, and the reason.

    Returns:
        Name → PNG.
    """
    pictures = {}
    data: Any
    for name, draw, compute in (
        ("relevance", draw_relevance, image_relevance),
        ("reading", draw_reading, text_readings),
    ):
        try:
            data = compute(encoder, benchmark)
        except ValueError:  # the attention scores have the reason
            continue
        except Exception as error:  # such as out of memory; a figure must not cost the scores
            on_failure(name, in_one_line(error))
            continue
        try:
            if data:
                pictures[name] = draw(data)
        except Exception as error:  # matplotlib raises many types
            on_failure(name, in_one_line(error))
    return pictures


def image_relevance(encoder: LotlipEncoder, benchmark: Benchmark) -> list[ImageRelevance]:
    """Computes relevance maps of the first images with texts, for the short text and the sentences of the long one."""
    from lotlip.evaluate.attention import image_relevance_maps

    texts_of: dict[int, list[str]] = {}
    ends = encoder.tokenizer.sentence_ends
    for kind in ("short", "long"):
        if kind in benchmark.retrieval:
            retrieval = benchmark.retrieval[kind]
            first = dict(reversed(list(zip(retrieval.image, retrieval.texts, strict=True))))
            for image, text in first.items():
                texts_of.setdefault(image, []).extend(
                    [text] if kind == "short" else split_sub_captions(text, ends)[:SENTENCES]
                )
    images = sorted(texts_of)[:IMAGES]
    encoded, texts = [benchmark.read(image) for image in images], [texts_of[image] for image in images]
    all_maps = image_relevance_maps(encoder, encoded, texts)
    return [
        ImageRelevance(
            _model_input(encoder, benchmark, image, data),
            parts,
            maps.numpy(),
            _named_objects(benchmark, image, parts, encoder.model.image_tower.spec.crop),
        )
        for image, data, parts, maps in zip(images, encoded, texts, all_maps, strict=True)
    ]


def text_readings(encoder: LotlipEncoder, benchmark: Benchmark) -> list[TextReading]:
    """Computes the attention of [CLS] and each corner token over the first long texts, and uniform attention."""
    import torch

    from lotlip.evaluate.attention import normalised_entropy, sub_caption_shares, sub_captions, text_attention

    model, readings = encoder.model, []
    for text in benchmark.retrieval["long"].texts[:IMAGES] if "long" in benchmark.retrieval else ():
        ids, lengths = (torch.from_numpy(array).to(model.device) for array in encoder.tokenizer([text]))
        number = sub_captions(model, ids, lengths)
        shares, by_length = sub_caption_shares(text_attention(model, ids, lengths), number)
        rows = torch.cat([shares[0], by_length]).cpu()  # [1 + m + 1, N]
        names = ["[CLS]", *(f"Cor {corner}" for corner in range(1, len(rows) - 1)), "by length"]
        entropy = normalised_entropy(rows[None], number.amax(dim=1).cpu() + 1)[0].tolist()
        parts = split_sub_captions(text, encoder.tokenizer.sentence_ends)[: rows.shape[1]]
        readings.append(
            TextReading(parts, dict(zip(names, rows.numpy(), strict=True)), dict(zip(names, entropy, strict=True)))
        )
    return readings


def overlay(picture: Image, relevance: np.ndarray, named: Disc | None = None) -> Image:
    """Draws relevance [G, G'] in red over a grey image, scaled to its maximum.

    Args:
        picture: the model's square input.
        relevance: relevance of its patches.
        named: circle to draw.
    """
    from PIL import ImageDraw

    shown = heat(picture, relevance)
    if named:
        x, y, radius = (share * picture.width for share in named)
        ImageDraw.Draw(shown).ellipse((x - radius, y - radius, x + radius, y + radius), outline=(255, 255, 255))
    return shown


def draw_relevance(images: Sequence[ImageRelevance]) -> bytes:
    """Draws a row for each image and a column for each text, with the text above it, as PNG."""
    columns = 1 + max(len(image.texts) for image in images)
    width, height = SIDE + 10, SIDE + 95  # of a cell, in pixels: the picture is at the bottom, the text above it

    def draw(figure: Figure) -> None:
        for row, image in enumerate(reversed(images)):
            named = image.named or [None] * len(image.texts)
            shown = [overlay(image.picture, *one) for one in zip(image.maps, named, strict=True)]
            for column, (picture, text) in enumerate(zip([image.picture, *shown], ["", *image.texts], strict=True)):
                left, bottom = column * width + 5, row * height + 5
                # axes would take most of the time
                figure.figimage(np.asarray(picture), left, bottom, origin="upper")
                above = ((left + SIDE / 2) / (columns * width), (bottom + SIDE + 8) / (len(images) * height))
                figure.text(*above, _wrapped(text, 20, 4), ha="center", va="bottom", fontsize=6.5)

    return _png((columns * width / _DPI, len(images) * height / _DPI), draw, layout=None)


def draw_reading(texts: Sequence[TextReading]) -> bytes:
    """Draws each text as a heat map of shares, readers by sub-captions, with the entropy on the right, as PNG."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", SYSTEM_COLOURS["LoTLIP"]])
    widest = max(len(text.sub_captions) for text in texts)

    def draw(figure: Figure) -> None:
        for axes, text in zip(figure.subplots(len(texts), 1, squeeze=False)[:, 0], texts, strict=True):
            shares = np.stack(list(text.shares.values()))
            maximum = max(float(shares.max()), 1e-6)
            axes.imshow(shares, cmap=colours, vmin=0, vmax=maximum, aspect="auto")
            axes.set_xlim(-0.5, widest - 0.5)
            axes.grid(False)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(length=0)
            labels = [_wrapped(part, 20, 4) for part in text.sub_captions]
            axes.set_xticks(range(len(labels)), labels, fontsize=6.5)
            axes.set_yticks(range(len(shares)), list(text.shares), fontsize=8)
            for (row, column), share in np.ndenumerate(shares):
                ink = "white" if share > 0.6 * maximum else INK
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
    """Returns an image of a benchmark, uncropped, with a longer side of `SIDE` pixels; scenes are rendered again."""
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


def _model_input(encoder: LotlipEncoder, benchmark: Benchmark, image: int, encoded: bytes) -> Image:
    """The model's square input at display size; scenes are rendered again, sharper than the model sees them."""
    from lotlip.data.images import decode_rgb, resized_side, square

    spec = encoder.model.image_tower.spec
    if benchmark.scenes:
        from lotlip.demo.world import render

        whole = render(benchmark.scenes[image], resized_side(SIDE, spec.crop))
        return square(whole, SIDE, crop=spec.crop)
    return square(decode_rgb(encoded), SIDE, spec.resize, spec.mean, spec.interpolation, spec.crop)


def _named_objects(benchmark: Benchmark, image: int, texts: Sequence[str], crop: float) -> list[Disc | None]:
    """The position of the object that each text names. Shapes are unique within a scene, so the shape identifies it."""
    if not benchmark.scenes:
        return [None] * len(texts)
    scene = benchmark.scenes[image]
    objects = {thing.shape: disc_in_crop(thing.disc, crop) for thing in (scene.salient, *scene.objects)}
    words = [set(text.lower().split()) for text in texts]
    return [next((disc for shape, disc in objects.items() if shape in text_words), None) for text_words in words]


def _png(size: tuple[float, float], draw: Any, layout: Literal["constrained"] | None = "constrained") -> bytes:
    """Draws a figure of `size` inches as PNG; equal inputs give equal bytes."""
    from matplotlib.figure import Figure as Canvas

    with styled():
        canvas = Canvas(figsize=size, dpi=_DPI, layout=layout)
        draw(canvas)
        png = io.BytesIO()
        canvas.savefig(png, format="png", facecolor="white", metadata={"Software": None})
    return png.getvalue()
