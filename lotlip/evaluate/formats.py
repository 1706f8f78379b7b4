"""Published benchmarks as they lie on disk: which image has which texts.

A reader yields what the annotations say and judges nothing: what is missing, comes twice or leads elsewhere is for
`lotlip.evaluate.published` to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lotlip.core.listing import is_hidden
from lotlip.data.annotations import dci_annotations, read_records

CAPTIONS = 5  # of an image of COCO and Flickr30k; a few have more, of which the first count


class Described(NamedTuple):
    """One image of a benchmark, as its annotations have it.

    Attributes:
        name: of the image, the same wherever the benchmark lies; no text where none is named.
        path: of the image, below the folder of images.
        texts: in their order; what is no text stands for one that is missing.
        where: the annotation, for a person.
    """

    name: Any
    path: str
    texts: list[Any]
    where: str


@dataclass(frozen=True)
class Format:
    """How a benchmark lies on disk, and how large it was published.

    Attributes:
        read: folder → its images, in the order of the annotations.
        size: images.
        texts: of each image.
        kind: of the texts: "long" or "short".
        split: that is read.
        images: names that the folder of images may have below the benchmark's own; where there is none of them, images
            lie in the benchmark's own.
    """

    read: Callable[[Path], Iterator[Described]]
    size: int
    kind: Literal["long", "short"] = "long"
    texts: int = 1
    split: str = "all"
    images: tuple[str, ...] = ("images",)


def _sharegpt4v(folder: Path) -> Iterator[Described]:
    """ShareGPT4V's JSON list, whatever it is called."""
    path = _annotations(folder)
    for number, record in read_records(path):
        image = _at(record, "image")
        yield Described(image, str(image), [_at(record, "conversations", 1, "value")], f"{path}, record {number}")


def _dci(folder: Path) -> Iterator[Described]:
    """Densely Captioned Images; the text is what the annotators wrote of the whole image."""
    inner = folder / "densely_captioned_images"
    for path in dci_annotations((inner if inner.is_dir() else folder) / "splits.json"):
        if not path.is_file():
            yield Described(path.name, "", [None], str(path))
            continue
        for _, record in read_records(path):
            parts = [_at(record, field) for field in ("short_caption", "extra_caption")]
            text = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
            image = _at(record, "image")
            yield Described(image, str(image), [text], str(path))


# ImageInWords' parts, and the folders that the script of the method's authors copies their images to.
_IIW = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def _iiw(folder: Path) -> Iterator[Described]:
    """ImageInWords' three parts that people wrote, one after the other; images lie beside a part or as in `_IIW`."""
    for part, images in _IIW.items():
        path = folder / part / "data.jsonl"
        below = part if _names(folder / part, ".jpg") else images
        for number, record in read_records(path):
            image = _at(record, "image") or _at(record, "image/key")
            if isinstance(image, str) and image:
                image = image if ".jpg" in image else f"{image}.jpg"
                name = f"{part}/{image}"
            else:
                name = None
            yield Described(name, f"{below}/{image}", [_at(record, "IIW")], f"{path}, record {number}")


def _urban(folder: Path) -> Iterator[Described]:
    """Urban-1k: the text is the first line of an image's file, as in its authors' and in the method's evaluation."""
    images = {path.stem for path in _names(folder / "image", ".jpg")}
    texts = {path.stem: path for path in _names(folder / "caption", ".txt")}
    for stem in sorted(images | set(texts)):
        text = _first_line(texts[stem]) if stem in texts else None
        yield Described(f"{stem}.jpg", f"{stem}.jpg", [text], str(folder / "caption" / f"{stem}.txt"))


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")[0]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason})") from error


def _docci(folder: Path) -> Iterator[Described]:
    """DOCCI's test split."""
    path = folder / "docci_descriptions.jsonlines"
    for number, record in read_records(path):
        if _at(record, "split") == "test":
            image = _at(record, "image_file")
            yield Described(image, str(image), [_at(record, "description")], f"{path}, record {number}")


def _karpathy(folder: Path, file: str) -> Iterator[Described]:
    """The test split of COCO or Flickr30k by Karpathy, five captions for each image."""
    path = _annotations(folder, file)
    for number, record in read_records(path):
        if _at(record, "split") == "test":
            image, below = _at(record, "filename"), _at(record, "filepath")
            if isinstance(image, str) and image and isinstance(below, str):
                image = f"{below}/{image}"
            sentences = _at(record, "sentences")
            texts = [_at(one, "raw") for one in islice(sentences, CAPTIONS)] if isinstance(sentences, list) else []
            texts += [None] * (CAPTIONS - len(texts))
            yield Described(image, str(image), texts, f"{path}, record {number}")


def _annotations(folder: Path, name: str = "") -> Path:
    """The JSON file of a folder: the one of that name, or the only one."""
    found = _names(folder, ".json")
    if len(found) != 1 and folder / name not in found:
        there = f"{len(found)} .json files, {', '.join(path.name for path in found[:3])}" if found else "no .json file"
        raise ValueError(f"{folder} has {there}, where one with the annotations is needed" + (name and f", {name}"))
    return folder / name if folder / name in found else found[0]


def _names(folder: Path, ending: str) -> list[Path]:
    """A folder's own files with an ending, sorted; hidden ones are left out."""
    return sorted(path for path in folder.glob(f"*{ending}") if not is_hidden(path.name))


def _at(value: Any, *path: str | int) -> Any:
    """What is at nested keys and indices of JSON; None where there is nothing."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and step < len(value):
            value = value[step]
        else:
            return None
    return value


# Benchmarks of images with texts. Sizes are those of the papers and data sets; any other is another benchmark.
FORMATS: dict[str, Format] = {
    "sharegpt4v-1k": Format(lambda folder: islice(_sharegpt4v(folder), 1_000), 1_000, split="first 1,000"),
    "sharegpt4v-10k": Format(lambda folder: islice(_sharegpt4v(folder), 10_000), 10_000, split="first 10,000"),
    "dci": Format(_dci, 7_805, images=("densely_captioned_images/photos", "photos")),
    "iiw": Format(_iiw, 612),
    "urban-1k": Format(_urban, 1_000, images=("image",)),
    "docci": Format(_docci, 5_000, split="test"),
    "coco": Format(lambda folder: _karpathy(folder, "dataset_coco.json"), 5_000, "short", CAPTIONS, "test"),
    "flickr30k": Format(
        lambda folder: _karpathy(folder, "dataset_flickr30k.json"),
        1_000,
        "short",
        CAPTIONS,
        "test",
        ("flickr30k-images", "images"),
    ),
}
