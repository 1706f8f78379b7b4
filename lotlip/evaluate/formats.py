"""Annotation formats of published benchmarks: readers that yield each image with its texts.

Readers do not validate. `lotlip.evaluate.published` reports missing texts, duplicate images and unsafe paths.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lotlip.core.listing import is_hidden
from lotlip.data.annotations import dci_annotations, read_records

CAPTIONS = 5  # captions per image of COCO and Flickr30k; a few images of COCO have six or seven


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
        captions: minimum number of texts per image.
        total: number of texts, if images have different numbers; None: all have `captions`.
        kind: kind of the texts: "long" or "short".
        split: the split that is read.
        images: possible names of the folder of images below the benchmark's folder; if none exists, images are in the
            benchmark's folder.
        about: entries for the protocol that name a variant.
    """

    read: Callable[[Path], Iterator[AnnotatedImage]]
    size: int
    kind: Literal["long", "short"] = "long"
    captions: int = 1
    split: str = "all"
    images: tuple[str, ...] = ("images",)
    total: int | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def texts(self) -> int:
        """Number of texts of all images."""
        return self.captions * self.size if self.total is None else self.total


def _sharegpt4v(folder: Path) -> Iterator[AnnotatedImage]:
    """ShareGPT4V: a JSON list in a file of any name."""
    path = _annotations(folder)
    for number, record in read_records(path):
        image = _at(record, "image")
        yield AnnotatedImage(image, str(image), [_at(record, "conversations", 1, "value")], f"{path}, record {number}")


def _dci(folder: Path, separator: str = "\n") -> Iterator[AnnotatedImage]:
    """Densely Captioned Images; the text is the annotators' caption of the whole image, in two parts."""
    inner = folder / "densely_captioned_images"
    for path in dci_annotations((inner if inner.is_dir() else folder) / "splits.json"):
        if not path.is_file():
            yield AnnotatedImage(path.name, "", [None], str(path))
            continue
        for _, record in read_records(path):
            parts = [_at(record, field) for field in ("short_caption", "extra_caption")]
            text = separator.join(parts) if all(isinstance(part, str) for part in parts) else None
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


def _long_dci(folder: Path) -> Iterator[AnnotatedImage]:
    """Long-DCI: a table with tabs between its columns `filepath` and `title`."""
    path = _existing(folder / "dci_long.csv")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines, delimiter="\t"), start=1):
            image = record.get("filepath")
            yield AnnotatedImage(image, str(image), [record.get("title")], f"{path}, record {number}")


def _coco_val2017(folder: Path, captions: int | None = CAPTIONS) -> Iterator[AnnotatedImage]:
    """COCO's val2017, from its own annotation file, with the first `captions` of each image, or all."""
    path = folder / "captions_val2017.json"
    path = _existing(path if path.is_file() else folder / "annotations" / path.name)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    texts: dict[Any, list[Any]] = {}
    for caption in _at(found, "annotations") or ():
        texts.setdefault(_at(caption, "image_id"), []).append(_at(caption, "caption"))
    for number, record in enumerate(_at(found, "images") or (), start=1):
        image = _at(record, "file_name")
        own = _padded(texts.get(_at(record, "id"), []), captions)
        yield AnnotatedImage(image, str(image), own, f"{path}, image {number}")


def _flickr30k_all(folder: Path) -> Iterator[AnnotatedImage]:
    """All of Flickr30k, from its own file of captions: `<image>#<number>`, a tab, the caption."""
    path = _existing(folder / "results_20130124.token")
    texts: dict[str, list[Any]] = {}
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            texts.setdefault(name.partition("#")[0], []).append(text)
    for image, own in texts.items():
        yield AnnotatedImage(image, image, _padded(own, CAPTIONS), f"{path}, {image}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; see docs/benchmarks.md for the layout")
    return path


def _padded(texts: list[Any], captions: int | None) -> list[Any]:
    """Limits the texts to `captions`, None for no limit, and adds None for each that is missing of five."""
    return texts[:captions] + [None] * (CAPTIONS - len(texts))


def _karpathy(folder: Path, file: str, captions: int | None = CAPTIONS) -> Iterator[AnnotatedImage]:
    """Karpathy's test split of COCO or Flickr30k, with the first `captions` of each image, or all."""
    path = _annotations(folder, file)
    for number, record in read_records(path):
        if _at(record, "split") == "test":
            image, below = _at(record, "filename"), _at(record, "filepath")
            if isinstance(image, str) and image and isinstance(below, str):
                image = f"{below}/{image}"
            sentences = _at(record, "sentences")
            texts = [_at(one, "raw") for one in sentences] if isinstance(sentences, list) else []
            yield AnnotatedImage(image, str(image), _padded(texts, captions), f"{path}, record {number}")


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


_DCI_IMAGES = ("densely_captioned_images/photos", "photos")
_FLICKR30K_IMAGES = ("flickr30k-images", "images")
_COCO = "dataset_coco.json"
_FIRST, _ALL = {"captions": f"the first {CAPTIONS} of each image"}, {"captions": "all of each image"}

# Retrieval benchmarks, with the sizes of the papers and data sets.
FORMATS: dict[str, Format] = {
    "sharegpt4v-1k": Format(lambda folder: islice(_sharegpt4v(folder), 1_000), 1_000, split="first 1,000"),
    "sharegpt4v-10k": Format(lambda folder: islice(_sharegpt4v(folder), 10_000), 10_000, split="first 10,000"),
    "dci": Format(_dci, 7_805, images=_DCI_IMAGES, about={"parts_joined_by": "a newline"}),
    "dci-no-separator": Format(
        lambda folder: _dci(folder, ""), 7_805, images=_DCI_IMAGES, about={"parts_joined_by": "nothing"}
    ),
    "long-dci": Format(_long_dci, 7_602, images=("photos", "images")),
    "iiw": Format(_iiw, 612),
    "urban-1k": Format(_urban, 1_000, images=("image",)),
    "docci": Format(_docci, 5_000, split="test"),
    "coco": Format(partial(_karpathy, file=_COCO), 5_000, "short", CAPTIONS, "test", about=_FIRST),
    "coco-all-captions": Format(
        partial(_karpathy, file=_COCO, captions=None), 5_000, "short", CAPTIONS, "test", total=25_010, about=_ALL
    ),
    "coco-val2017": Format(
        _coco_val2017, 5_000, "short", CAPTIONS, "val2017", images=("val2017", "images"), about=_FIRST
    ),
    "coco-val2017-all-captions": Format(
        partial(_coco_val2017, captions=None),
        5_000,
        "short",
        CAPTIONS,
        "val2017",
        ("val2017", "images"),
        total=25_014,
        about=_ALL,
    ),
    "flickr30k": Format(
        partial(_karpathy, file="dataset_flickr30k.json"), 1_000, "short", CAPTIONS, "test", _FLICKR30K_IMAGES
    ),
    "flickr30k-all": Format(_flickr30k_all, 31_783, "short", CAPTIONS, "all", _FLICKR30K_IMAGES),
}
