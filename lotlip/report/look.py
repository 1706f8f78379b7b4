"""A look at the data: texts side by side, their lengths, near-duplicates, and the worst captions first, on one page."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotlip.data.index import INDEX_FILE, UnitIndex
from lotlip.data.inspection import spread
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.data.records import Failure, MeasuredCaption
from lotlip.data.text import SentenceEnds, split_sub_captions
from lotlip.figures.charts import INK, LOW, OTHER_COLOURS, Figure, draw_figure, literal
from lotlip.ingest.perceptual import BITS, perceptual_hash
from lotlip.models.vision.spec import START
from lotlip.report.rendering import render
from lotlip.report.similar import similar_images, similar_texts
from lotlip.report.tables import Column, ReportTable, number, percent, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lotlip.config.params import Params

PICTURE_SIZE = 320  # maximum length of a picture's longer side on a page, in pixels
LOOKED_AT = 1000  # images
SHOWN = 12  # of the worst images, and of the others
FAILURES = 10  # that are shown
_UNITS = 10  # partitions that are looked at
_GROUPS, _MEMBERS = 8, 6  # of near-duplicates
_NEAR = 6  # bits in which perceptual hashes of near-duplicates may differ, as in `ingest`
_COMMON = 0.8  # share of words that near-duplicate texts have in common
SHORT, PAGE = "short", "index.html"


@dataclass(frozen=True)
class Item:
    """An image with its texts.

    Attributes:
        key: of the image.
        read: returns its encoded bytes.
        short: its short caption.
        captions: captioner → caption, or why there is none.
        scene: what the demo's picture shows, as JSON; None: unknown.
    """

    key: str
    read: Callable[[], bytes] = field(repr=False)
    short: str
    captions: Mapping[str, MeasuredCaption | Failure]
    scene: str | None = None


@dataclass(frozen=True)
class Items:
    """Images that are looked at.

    Attributes:
        items: evenly spaced in the data set.
        total: number of images in the data set, in words.
        source: where they come from, in words.
        failures: items that could not be used, the first ones.
        missing: captioners without captions so far.
    """

    items: list[Item]
    total: str
    source: str
    failures: Sequence[Failure] = ()
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class ShownText:
    """A caption on the page: its sub-captions, or why there is none, and its measures in words."""

    captioner: str
    text: str
    sub_captions: Sequence[str]
    tokens: int
    measures: Sequence[str]
    missing: str = ""


@dataclass(frozen=True)
class Shown:
    """An image on the page; `file` is its JPEG in the page's folder, "" if it cannot be drawn."""

    key: str
    file: str
    short: str
    tokens: int
    texts: Sequence[ShownText] = ()


@dataclass(frozen=True)
class Similar:
    """Near-duplicates: the number in a group, and the first ones with their images."""

    kind: str
    count: int
    members: Sequence[tuple[Shown, str]]


@dataclass(frozen=True)
class Look:
    """The contents of the page.

    Attributes:
        title, summary: of the page.
        notes: what is missing.
        tables: texts by kind; items that cannot be used.
        lengths: histograms.
        images, texts: near-duplicates; `counts` has their numbers of groups.
        worst, samples: images with all texts.
        jpegs: file in the page's folder → its bytes.
    """

    title: str
    summary: str
    notes: Sequence[str]
    tables: Sequence[ReportTable]
    lengths: Figure
    images: Sequence[Similar]
    texts: Sequence[Similar]
    counts: tuple[int, int]
    worst: Sequence[Shown]
    samples: Sequence[Shown]
    jpegs: Mapping[str, bytes] = field(repr=False)


# --- reading --------------------------------------------------------------------------------------------------------


def read_items(params: Params, root: Path, most: int = LOOKED_AT) -> Items:
    """Reads images and texts from the partitions of ingest and of the captioners.

    Args:
        params: params.yaml.
        root: of the project.
        most: number of images, evenly spaced.

    Raises:
        ValueError: ingest has not finished.
    """
    from lotlip.data.index import read_index
    from lotlip.data.partitions import finished, read_captions, read_image, read_table, unit_names

    ingest = root / params.paths.ingest
    index = read_index(ingest, UnitIndex)
    names = unit_names(ingest)
    chosen = [names[int(place)] for place in np.linspace(0, len(names) - 1, min(_UNITS, len(names)))]
    folders = {name: root / params.paths.captions / name for name in params.caption.captioners}
    there = {name: folder for name, folder in folders.items() if (folder / INDEX_FILE).is_file()}
    items = []
    for unit in chosen:
        table = spread(read_table(ingest, unit), math.ceil(most / len(chosen)))
        captions: dict[str, dict[str, MeasuredCaption | Failure]] = {key: {} for key in table["key"]}
        for name, folder in there.items():
            report = finished(unit, folder)
            rows = read_captions(folder, unit).to_dict("records") if report and report.written else []
            found: list[MeasuredCaption | Failure] = [_measured(row) for row in rows]
            for one in [*found, *(report.failures if report else ())]:
                if one.key in captions:
                    captions[one.key][name] = one
        items += [
            Item(
                row["key"],
                partial(read_image, ingest, unit, row["offset"], row["size"]),
                row["short_caption"],
                captions[row["key"]],
                row["scene"] if isinstance(row["scene"], str) else None,
            )
            for row in table.to_dict("records")
        ]
    missing = [name for name in folders if name not in there]
    return Items(items, f"{index.written:,}", str(params.paths.ingest), index.failures[:FAILURES], missing)


def _measured(row: Mapping[Any, Any]) -> MeasuredCaption:
    """A caption from its row, in which missing numbers are NaN."""
    agreement = row["agreement"]
    known = agreement is not None and not math.isnan(agreement)
    return MeasuredCaption(**{**row, "agreement": agreement if known else None})


def look_of(params: Params, root: Path, found: Items | None = None, shown: int = SHOWN) -> Look:
    """A look at the data of a project.

    Args:
        params: params.yaml.
        root: of the project.
        found: what is looked at; None: the partitions that its stages wrote.
        shown: as for `look_at`.

    Raises:
        ValueError: ingest has not finished.
    """
    text, start = params.pretrain.text, root / params.paths.image_tower / START
    # a starting model has its own tokenizer, which the stage image-tower stores; before that, CLIP's is assumed
    name = text.tokenizer if not params.pretrain.start else str(start) if start.is_dir() else "clip"
    return look_at(
        read_items(params, root) if found is None else found,
        f"A look at the data: {params.report.title}",
        open_tokenizer(name, text.context_length, text.corner_tokens, text.register_tokens).full_lengths,
        text.context_length,
        params.caption.sentence_ends,
        params.caption.rewriting,
        shown,
    )


# --- the page -------------------------------------------------------------------------------------------------------


def quality(caption: MeasuredCaption | Failure, rewrites: bool = False) -> float:
    """How good a caption is by its measures: agreement with the short caption, less repetition, and 0.5 if cut off.

    A missing caption has 0. A rewrite of the short caption may say the same in other words, so only its repetition
    counts.
    """
    if isinstance(caption, Failure):
        return 0.0
    if rewrites:
        return 1 - caption.repetition
    agreement = 1.0 if caption.agreement is None else caption.agreement
    return agreement - caption.repetition - 0.5 * caption.truncated


def look_at(
    found: Items,
    title: str,
    count_tokens: Callable[[Sequence[str]], list[int]],
    context_length: int,
    sentence_ends: SentenceEnds,
    rewriters: Sequence[str] = (),
    shown: int = SHOWN,
) -> Look:
    """Collects the contents of the page.

    Args:
        found: images with their texts.
        title: of the page.
        count_tokens: number of tokens of each text, before truncation.
        context_length: tokens that the text tower reads.
        sentence_ends: splits short captions into sub-captions.
        rewriters: captioners that reword short captions.
        shown: number of the worst and of the other images that are shown with all texts.
    """
    items = found.items
    names = list(dict.fromkeys(name for item in items for name in item.captions))
    kinds = {SHORT: [(place, item.short) for place, item in enumerate(items)]}
    sub_captions = {SHORT: [len(split_sub_captions(item.short, sentence_ends)) for item in items]}
    for name in names:
        written = [
            (place, one)
            for place, item in enumerate(items)
            if isinstance(one := item.captions.get(name), MeasuredCaption)
        ]
        kinds[name] = [(place, one.text) for place, one in written]
        sub_captions[name] = [len(one.sub_captions) for _, one in written]
    tokens = {name: count_tokens([text for _, text in texts]) for name, texts in kinds.items()}
    by_item = {name: dict(zip((p for p, _ in kinds[name]), tokens[name], strict=True)) for name in kinds}
    pictures = _Pictures(items)

    def show(place: int, with_texts: bool = False) -> Shown:
        item = items[place]
        texts = [
            _shown_text(name, item.captions.get(name), by_item[name].get(place, 0), context_length, name in rewriters)
            for name in (names if with_texts else ())
        ]
        return Shown(item.key, pictures.file(place), item.short, by_item[SHORT][place], texts)

    def worth(place: int) -> tuple[float, int]:
        item = items[place]
        missing = Failure(item.key, item.key, "", "missing")
        found_ = [quality(item.captions.get(name, missing), name in rewriters) for name in names]
        return min(found_, default=1.0), len(item.short.split())

    order = sorted(range(len(items)), key=worth)
    worst = order[:shown]
    spaced = [int(place) for place in np.linspace(0, len(items) - 1, min(shown, len(items)))]
    hashed, hashes = pictures.hashes()
    images = [[hashed[row] for row in group] for group in similar_images(hashes, _NEAR)]
    texts = [
        (name, [places[row] for row in group])
        for name, of_kind in kinds.items()
        for places in [[place for place, _ in of_kind]]
        for group in similar_texts([text for _, text in of_kind], _COMMON)
    ]
    text_of = {name: dict(of_kind) for name, of_kind in kinds.items()}
    lengths = _lengths_figure(tokens, sub_captions, context_length)
    look_tables = [
        _texts_table(len(items), tokens, sub_captions, text_of, context_length, items),
        _failures_table(found.failures),
    ]
    return Look(
        title,
        f"{len(items):,} of {found.total} images in {found.source}, evenly spaced, with all their texts.",
        [f"No captions of {name} yet." for name in found.missing],
        [table for table in look_tables if table.rows],
        lengths,
        [
            Similar("images", len(group), [(show(place), items[place].short) for place in group[:_MEMBERS]])
            for group in images[:_GROUPS]
        ],
        [
            Similar(name, len(group), [(show(place), text_of[name][place]) for place in group[:_MEMBERS]])
            for name, group in sorted(texts, key=lambda one: -len(one[1]))[:_GROUPS]
        ],
        (len(images), len(texts)),
        [show(place, with_texts=True) for place in worst],
        [show(place, with_texts=True) for place in spaced if place not in worst],
        pictures.jpegs,
    )


def write_look(look: Look, folder: Path) -> Path:
    """Writes the page and its images to a folder, and returns the path of the page, which loads only these images."""
    (folder / "images").mkdir(parents=True)
    for name, data in look.jpegs.items():
        (folder / name).write_bytes(data)
    page = folder / PAGE
    context = {"look": look, "bits": BITS, "near": _NEAR, "common": f"{_COMMON:.0%}"}
    render("look.html.j2", context, page)
    return page


class _Pictures:
    """The images of some items: hashes of all, and JPEGs of those that are shown."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self.jpegs: dict[str, bytes] = {}

    def file(self, place: int) -> str:
        """The image's file in the page's folder; "" if it cannot be drawn."""
        name = f"images/{place}.jpg"
        if name not in self.jpegs:
            try:
                self.jpegs[name] = jpeg(self._items[place].read(), self._items[place].scene)
            except (OSError, ValueError):
                return ""
        return name

    def hashes(self) -> tuple[list[int], np.ndarray]:
        """Places of the images that can be read, and their perceptual hashes."""

        def hash_of(item: Item) -> np.uint64 | None:
            try:
                return perceptual_hash(item.read())
            except (OSError, ValueError):
                return None

        with ThreadPoolExecutor() as pool:
            found = list(enumerate(pool.map(hash_of, self._items)))
        known = [(place, value) for place, value in found if value is not None]
        return [place for place, _ in known], np.array([value for _, value in known], dtype=np.uint64)


def jpeg(image: bytes, scene: str | None) -> bytes:
    """Scales an image to at most `PICTURE_SIZE` pixels; a scene is rendered again, sharper than the model sees it."""
    from PIL import Image

    from lotlip.data.images import decode_rgb

    if scene is not None:
        from lotlip.demo.world import Scene, render

        picture = render(Scene.from_json(json.loads(scene)), size=PICTURE_SIZE)
    else:
        picture = decode_rgb(image)
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _shown_text(
    name: str, caption: MeasuredCaption | Failure | None, tokens: int, context_length: int, rewrites: bool
) -> ShownText:
    if caption is None:
        return ShownText(name, "", (), 0, (), "no caption")
    if isinstance(caption, Failure):
        return ShownText(name, "", (), 0, (), f"{caption.kind}: {caption.reason}")
    measures = [f"{tokens} tokens" + (f", cut at {context_length}" if tokens > context_length else "")]
    if caption.agreement is not None and not rewrites:
        measures.append(f"agreement {caption.agreement:.0%}")
    if caption.repetition:
        measures.append(f"repetition {caption.repetition:.0%}")
    if caption.truncated:
        measures.append("no end")
    return ShownText(name, caption.text, caption.sub_captions, tokens, measures)


def _texts_table(
    images: int,
    tokens: Mapping[str, Sequence[int]],
    sub_captions: Mapping[str, Sequence[int]],
    texts: Mapping[str, Mapping[int, str]],
    context_length: int,
    items: Sequence[Item],
) -> ReportTable:
    columns = [
        Column("texts", "Texts", numeric=False),
        Column("count", "Number"),
        Column("missing", "Missing"),
        Column("sub_captions", "Sub-captions"),
        Column("tokens", "mean", group="Tokens"),
        Column("tokens_p95", "95 %", group="Tokens"),
        Column("tokens_max", "longest", group="Tokens"),
        Column("truncated", f"Longer than {context_length}"),
        Column("equal", "Repeated"),
        Column("no_end", "No end"),
    ]
    rows = []
    for name, counts in tokens.items():
        number_of, lengths = len(counts), np.array(counts if len(counts) else [0])
        captions = [one for item in items if isinstance(one := item.captions.get(name), MeasuredCaption)]
        rows.append(
            [
                words(name),
                number(number_of),
                number(images - number_of),
                number(float(np.mean(sub_captions[name])) if number_of else None, "{:.1f}"),
                number(float(lengths.mean()), "{:.1f}"),
                *(number(float(np.quantile(lengths, share))) for share in (0.95, 1)),
                percent(float((lengths > context_length).mean()) if number_of else None),
                number(number_of - len(set(texts[name].values()))),
                number(sum(one.truncated for one in captions) if captions else None),
            ]
        )
    note = (
        "Sub-captions and tokens are means per text; tokens include special tokens. "
        f"The text tower reads {context_length} tokens and cuts off longer texts. Repeated: equal to an earlier text."
    )
    return ReportTable("texts", "Texts", note, columns, rows)


def _failures_table(failures: Iterable[Failure]) -> ReportTable:
    columns = [
        Column("kind", "Kind", numeric=False),
        Column("where", "Where", numeric=False),
        Column("reason", "Reason", numeric=False),
    ]
    rows = [[words(one.kind), words(one.where), words(one.reason)] for one in failures]
    return ReportTable("unused", "Items that cannot be used", "The first ones.", columns, rows)


def _lengths_figure(
    tokens: Mapping[str, Sequence[int]], sub_captions: Mapping[str, Sequence[int]], context_length: int
) -> Figure:
    """Histograms of tokens and of sub-captions per text, an outline for each kind of text."""

    def draw(axes: Axes, values: Mapping[str, Sequence[int]], x_label: str, mark: int | None) -> None:
        longest = max((max(counts) for counts in values.values() if len(counts)), default=1)
        step = max(math.ceil(longest / 40), 1)
        edges = np.arange(0, longest + 2 * step, step) - 0.5
        for number_, (name, counts) in enumerate(values.items()):
            shares, _ = np.histogram(counts, edges)
            colour = OTHER_COLOURS[number_ % len(OTHER_COLOURS)]
            axes.stairs(100 * shares / max(len(counts), 1), edges, color=colour, label=literal(name), linewidth=1.6)
        if mark is not None:
            axes.axvline(mark, color=INK, linestyle=":", linewidth=1, label=f"context length {mark}")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of texts (%)")
        axes.set_ylim(bottom=0)

    return draw_figure(
        "lengths",
        "Lengths of texts",
        "",
        LOW,
        lambda axes: draw(axes, tokens, "tokens", context_length),
        lambda axes: draw(axes, sub_captions, "sub-captions", None),
        wide=True,
    )
