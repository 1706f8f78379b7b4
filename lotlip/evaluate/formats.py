"""Annotation formats of published benchmarks: readers that yield each image with its texts.

Readers do not validate. `lotlip.evaluate.published` reports missing texts, duplicate images and unsafe paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lotlip.core.listing import is_hidden
from lotlip.data.annotations import dci_annotations, read_records

CAPTIONS = 5  # captions per image of COCO and Flickr30k; the few further ones are ignored


class AnnotatedImage(NamedTuple):
    """One image of a benchmark, as read from its annotations.

    Attributes:
        name: name of the image, independent of the benchmark's location; not a string if the annotation has none.
        path: path of the image below the folder of images.
        texts: texts in order; a value that is not a string is a missing text.
        where: position of the annotation, for messages.
    """

    name: Any
    path: str
    texts: list[Any]
    where: str


@dataclass(frozen=True)
class Format:
    """The layout and published size of a benchmark.

    Attributes:
        read: folder → annotated images, in the order of the annotations.
        size: number of images.
        texts: number of texts per image.
        kind: kind of the texts: "long" or "short".
        split: the split that is read.
        images: possible names of the folder of images below the benchmark's folder; if none exists, images are in the
            benchmark's folder.
    """

    read: Callable[[Path], Iterator[AnnotatedImage]]
    size: int
    kind: Literal["long", "short"] = "long"
    texts: int = 1
    split: str = "all"
    images: tuple[str, ...] = ("images",)


def _sharegpt4v(folder: Path) -> Iterator[AnnotatedImage]:
    """ShareGPT4V: a JSON list in a file of any name."""
    path = _annotations(folder)
    for number, record in read_records(path):
        image = _at(record, "image")
        yield AnnotatedImage(image, str(image), [_at(record, "conversations", 1, "value")], f"{path}, record {number}")


def _dci(folder: Path) -> Iterator[AnnotatedImage]:
    """Densely Captioned Images; the text is the annotators' caption of the whole image."""
    inner = folder / "densely_captioned_images"
    for path in dci_annotations((inner if inner.is_dir() else folder) / "splits.json"):
        if not path.is_file():
            yield AnnotatedImage(path.name, "", [None], str(path))
            continue
        for _, record in read_records(path):
            parts = [_at(record, field) for field in ("short_caption", "extra_caption")]
            text = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
            image = _at(record, "image")
            yield AnnotatedImage(image, str(image), [text], str(path))


# Parts of ImageInWords → folder that the script of the method's authors copies their images to.
_IIW = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def _iiw(folder: Path) -> Iterator[AnnotatedImage]:
    """ImageInWords: its three human-written parts; images are in the part's folder or in that of `_IIW`."""
    for part, images in _IIW.items():
        path = folder / part / "data.jsonl"
        below = part if _files(folder / part, ".jpg") else images
        for number, record in read_records(path):
            image = _at(record, "image") or _at(record, "image/key")
            if isinstance(image, str) and image:
                image = image if ".jpg" in image else f"{image}.jpg"
                name = f"{part}/{image}"
            else:
                name = None
            yield AnnotatedImage(name, f"{below}/{image}", [_at(record, "IIW")], f"{path}, record {number}")


def _urban(folder: Path) -> Iterator[AnnotatedImage]:
    """Urban-1k: the text is the first line of a file per image, as in its authors' and the method's evaluation."""
    images = {path.stem for path in _files(folder / "image", ".jpg")}
    texts = {path.stem: path for path in _files(folder / "caption", ".txt")}
    for stem in sorted(images | set(texts)):
        text = _first_line(texts[stem]) if stem in texts else None
        yield AnnotatedImage(f"{stem}.jpg", f"{stem}.jpg", [text], str(folder / "caption" / f"{stem}.txt"))


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")[0]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _docci(folder: Path) -> Iterator[AnnotatedImage]:
    """DOCCI's test split."""
    path = folder / "docci_descriptions.jsonlines"
    for number, record in read_records(path):
        if _at(record, "split") == "test":
            image = _at(record, "image_file")
            yield AnnotatedImage(image, str(image), [_at(record, "description")], f"{path}, record {number}")


def _karpathy(folder: Path, file: str) -> Iterator[AnnotatedImage]:
    """Karpathy's test split of COCO or Flickr30k, with five captions per image."""
    path = _annotations(folder, file)
    for number, record in read_records(path):
        if _at(record, "split") == "test":
            image, below = _at(record, "filename"), _at(record, "filepath")
            if isinstance(image, str) and image and isinstance(below, str):
                image = f"{below}/{image}"
            sentences = _at(record, "sentences")
            texts = [_at(one, "raw") for one in islice(sentences, CAPTIONS)] if isinstance(sentences, list) else []
            texts += [None] * (CAPTIONS - len(texts))
            yield AnnotatedImage(image, str(image), texts, f"{path}, record {number}")


def _annotations(folder: Path, name: str = "") -> Path:
    """Finds the JSON file of a folder: the one called `name`, or the only one."""
    files = _files(folder, ".json")
    if len(files) != 1 and folder / name not in files:
        count = f"{len(files)} .json files, {', '.join(path.name for path in files[:3])}" if files else "no .json file"
        raise ValueError(f"{folder} has {count}; it must have one with the annotations" + (name and f", {name}"))
    return folder / name if folder / name in files else files[0]


def _files(folder: Path, suffix: str) -> list[Path]:
    """Lists the files of a folder with a suffix, sorted, without hidden ones."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not is_hidden(path.name))


def _at(value: Any, *path: str | int) -> Any:
    """Returns the JSON value at nested keys and indices, or None."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and step < len(value):
            value = value[step]
        else:
            return None
    return value


# Retrieval benchmarks, with the sizes of the papers and data sets.
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
