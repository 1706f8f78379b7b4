"""Looks at data that the pipeline has not read yet: the command `lotlip look` before the first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lotlip.caption.captioners import open_captioner
from lotlip.caption.quality import assess, content_words, measure
from lotlip.config.params import Params
from lotlip.core.files import atomic_write, check_replaceable, write_record
from lotlip.data.index import INDEX_FILE
from lotlip.data.records import Caption, Failure, ImageRecord, MeasuredCaption
from lotlip.data.text import split_sub_captions
from lotlip.init.inspection import read_sample
from lotlip.report.look import FAILURES, LOOKED_AT, SHOWN, Item, Items, Look, look_of, read_items, write_look


def look(params: Params, out: Path, most: int = LOOKED_AT, shown: int = SHOWN) -> Path:
    """Writes a page about the data: from the partitions that the pipeline wrote, or else from the source itself.

    Args:
        params: params.yaml of the project in the working directory.
        out: folder of the page.
        most: number of images, evenly spaced.
        shown: number of the worst and of the other images that are shown with all texts.

    Returns:
        The path of the page.

    Raises:
        ValueError: the data cannot be read.
        ForeignFileError: the folder has files that this command did not write.
    """
    check_replaceable(out)
    ingested = (params.paths.ingest / INDEX_FILE).is_file()
    found = read_items(params, Path(), most) if ingested else source_items(params, most)
    return write_page(look_of(params, Path(), found, shown), out)


def write_page(page: Look, out: Path) -> Path:
    """Writes a page to a folder, which may hold an earlier one, and returns the path of the page."""
    out = out.resolve()
    with atomic_write(out) as folder:
        written = write_look(page, folder)
        write_record(folder, Path(out.name))
    return out / written.name


def source_items(params: Params, most: int) -> Items:
    """Reads images and texts from the source and from tables of captions.

    Args:
        params: params.yaml.
        most: number of images.

    Raises:
        ValueError: the source or a table cannot be read, or has nothing that can be used.
    """
    records, failures, items, complete = read_sample(params.ingest.source)
    if not records:
        raise ValueError(
            f"{params.ingest.source.path} has no image that can be used; such as: "
            f"{'; '.join(f'{one.where}: {one.reason}' for one in failures[:1]) or 'it is empty'}"
        )
    records = records[:: max(len(records) // most, 1)][:most]
    tables = [name for name, captioner in params.caption.captioners.items() if captioner.kind == "table"]
    captions = {
        name: list(open_captioner(name, params.caption.captioners[name], params.caption.tokenizer).caption(records))
        for name in tables
    }
    total = f"{items:,}" if complete else f"about {items:,}"
    missing = [name for name in params.caption.captioners if name not in tables]
    source = str(params.ingest.source.path)
    return Items(items_of(params, records, captions), total, source, failures[:FAILURES], missing)


def items_of(
    params: Params, records: Sequence[ImageRecord], captions: Mapping[str, Sequence[Caption | Failure]]
) -> list[Item]:
    """Images with their captions, measured and filtered as the caption stage does.

    Args:
        params: params.yaml.
        records: the images.
        captions: captioner → a caption or failure for each image, in order.
    """
    checked = {name: [_assessed(params, name, *pair) for pair in zip(records, found, strict=True)]
               for name, found in captions.items()}  # fmt: skip
    return [
        Item(
            record.key,
            lambda image=record.image: image,  # type: ignore[misc]
            record.short_caption,
            {name: found[place] for name, found in checked.items()},
        )
        for place, record in enumerate(records)
    ]


def _assessed(params: Params, name: str, record: ImageRecord, found: Caption | Failure) -> MeasuredCaption | Failure:
    if isinstance(found, Failure):
        return found
    caption = replace(found, sub_captions=split_sub_captions(found.text, params.caption.sentence_ends))
    measured = measure(caption, content_words(record.short_caption), (), name in params.caption.rewriting)
    return next(assess([measured], params.caption.rules(name)))
