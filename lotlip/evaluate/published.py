"""Published benchmarks, which must have their published sizes; the error for an incomplete one says what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lotlip.core.files import sha256_json
from lotlip.core.paths import Paths
from lotlip.data.annotations import clean
from lotlip.data.keys import escapes_folder, printable
from lotlip.data.paths import find_images
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, Prompts
from lotlip.evaluate.config import PARTIAL_RUN, PublishedBenchmarkConfig
from lotlip.evaluate.formats import FORMATS, AnnotatedImage

IMAGENET_SIZE = 50_000
_IMAGENET_PER_CLASS = 50
_SHOWN = 3


def open_published(name: str, settings: PublishedBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """Opens the published benchmark of an entry of params.yaml; see `published_benchmark`."""
    return published_benchmark(settings.kind, settings.folder, settings.images, settings.partial, name)


def published_benchmark(
    kind: str, folder: Path, images: Path | None = None, partial: bool | int = False, name: str | None = None
) -> Benchmark:
    """Opens a published benchmark. Texts are read now, images when they are used.

    Args:
        kind: a name of `FORMATS`, or "imagenet".
        folder: folder of its annotations, in the layout of docs/benchmarks.md.
        images: folder of its images, if they are not in `folder`.
        partial: whether an incomplete benchmark is accepted; a number N also limits it to the first N available images.
            The name that scores are stored under then ends in "-partial".
        name: name that scores are stored under; default: the kind.

    Raises:
        ValueError: an image or text is missing or the size differs from the published one, and the run is not partial;
            an image is duplicated or outside its folder; an annotation file is missing or broken.
    """
    request = _Request(name or kind, partial)
    try:
        for path in (folder, images):
            if path and not path.is_dir():
                raise ValueError(f"the folder {path} does not exist; see docs/benchmarks.md for its layout")
        return _imagenet(request, images or folder) if kind == "imagenet" else _retrieval(request, kind, folder, images)
    except ValueError as error:
        raise ValueError(f"benchmark {request.name}: {error}") from error


@dataclass(frozen=True)
class _Request:
    """The name that scores are stored under, and how much of the benchmark is used."""

    name: str
    partial: bool | int

    def first(self, available: Sequence[Any]) -> Sequence[Any]:
        """Limits the available images to the requested number."""
        return available if isinstance(self.partial, bool) else available[: self.partial]

    def benchmark(self, files: Sequence[Path], size: int, gaps: Mapping[str, list[str]], **rest: Any) -> Benchmark:
        """Builds the benchmark.

        Args:
            files: the images.
            size: size of the published benchmark.
            gaps: kind of gap → a message for each missing item.
            rest: the other fields of the benchmark.
        """

        def read(number: int) -> bytes:
            try:
                return files[number].read_bytes()
            except OSError as error:
                raise ValueError(f"benchmark {self.name}: cannot read {files[number]} ({error})") from error

        if self.partial is False:
            return Benchmark(name=self.name, read=read, **rest)
        if not files:
            raise ValueError("no image has all its texts; a partial run needs at least one")
        missing = "".join(f", {len(lines):,} {what}" for what, lines in gaps.items() if lines)
        rest["about"] = {**rest["about"], "partial": f"{len(files):,} of {size:,} images{missing}"}
        return Benchmark(name=self.name + PARTIAL_RUN, read=read, **rest)


def _check(request: _Request, gaps: Mapping[str, list[str]], found: str, published: str, more: bool) -> None:
    """Rejects a benchmark with too many images and, unless the run is partial, one with gaps or too few.

    Args:
        request: whether the run is partial.
        gaps: kind of gap → a message for each missing item.
        found: the size found.
        published: the published size.
        more: whether the size found is larger than the published one.
    """
    if more:
        raise ValueError(f"there are {found}, more than the published {published}: this is another set or split")
    if request.partial is not False:
        return
    remedy = "complete it, or use a partial run (partial: true), whose scores are marked as such"
    for what, lines in gaps.items():
        if lines:
            shown = "; ".join(lines[:_SHOWN]) + (f"; … {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else "")
            raise ValueError(f"{len(lines):,} {what}: {shown}; {remedy}")
    if found != published:
        raise ValueError(f"there are {found}, but the published benchmark has {published}; {remedy}")


# --- images with texts --------------------------------------------------------------------------------------------


def _retrieval(request: _Request, kind: str, folder: Path, images: Path | None) -> Benchmark:
    form = FORMATS[kind]
    root = images or next((folder / name for name in form.images if (folder / name).is_dir()), folder)
    annotated = [_with_clean_texts(one) for one in form.read(folder)]
    _check_names(annotated)
    kept: list[AnnotatedImage] = []
    without_texts: list[str] = []
    without_image: list[str] = []
    for one in annotated:
        if not all(one.texts):
            count = sum(map(bool, one.texts))
            without_texts.append(f"{one.where} has {count} of {len(one.texts)} texts of {printable(one.name)}")
        elif not _is_file(root / one.path):
            without_image.append(f"{printable(str(root / one.path))}, named in {one.where}")
        else:
            kept.append(one)
    gaps = {"annotations missing": without_texts, "images missing": without_image}
    found = _size(len(annotated), sum(len(one.texts) for one in annotated))
    _check(request, gaps, found, _size(form.size, form.texts), more=len(annotated) > form.size)
    kept = list(request.first(kept))
    return request.benchmark(
        [root / one.path for one in kept],
        form.size,
        gaps,
        images=[one.name for one in kept],
        retrieval={
            form.kind: ImageTexts(
                [text for one in kept for text in one.texts],
                [image for image, one in enumerate(kept) for _ in one.texts],
            )
        },
        about={
            "split": form.split,
            **form.about,
            "version": sha256_json(sorted([one.name, *one.texts] for one in kept)),
        },
    )


def _size(images: int, texts: int) -> str:
    return f"{images:,} images with {texts:,} texts"


def _with_clean_texts(one: AnnotatedImage) -> AnnotatedImage:
    """Cleans texts; texts that are null, blank or of another type become empty."""
    return one._replace(texts=[clean(text) if isinstance(text, str) else "" for text in one.texts])


def _check_names(annotated: Sequence[AnnotatedImage]) -> None:
    """Rejects missing, duplicate and unsafe names, which are paths from an untrusted file."""
    first: dict[str, str] = {}
    for one in annotated:
        if not isinstance(one.name, str) or not one.name:
            raise ValueError(f"{one.where} names no image; correct or remove it")
        if escapes_folder(one.path):
            raise ValueError(f"{one.where} names {one.name!r}, which leads out of its folder; check who made this file")
        if one.name in first:
            raise ValueError(f"{one.where} names {one.name}, which {first[one.name]} also names; remove one of them")
        first[one.name] = one.where


def _is_file(path: Path) -> bool:
    """Whether there is a file. Symbolic links are accepted: they come from the user, not from the annotations."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


# --- ImageNet -----------------------------------------------------------------------------------------------------


def _imagenet(request: _Request, folder: Path) -> Benchmark:
    """Opens ImageNet's validation split, with a folder per class and CLIP's published prompts."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data import ImageNetInfo

    root = folder / "val" if (folder / "val").is_dir() else folder
    classes: dict[str, list[str]] = {synset: [] for synset in ImageNetInfo("imagenet-1k").label_names()}
    for path in find_images(root, "it should have a folder for each class, such as n01440764, with its images"):
        synset = path.split("/")[0]
        if synset not in classes:
            raise ValueError(f"{root / path} is not in the folder of an ImageNet-1k class, such as n01440764; move it")
        classes[synset].append(path)
    short = {synset: len(paths) for synset, paths in classes.items() if len(paths) < _IMAGENET_PER_CLASS}
    lines = [f"{root / synset} has {count} of {_IMAGENET_PER_CLASS} images" for synset, count in short.items()]
    gaps = {"classes incomplete": lines}
    number = sum(map(len, classes.values()))
    _check(request, gaps, f"{number:,} images", f"{IMAGENET_SIZE:,} images", more=number > IMAGENET_SIZE)
    # The first image of every class, then the second, …, so that the first N cover as many classes as possible.
    ordered = sorted(
        (place, label, path) for label, paths in enumerate(classes.values()) for place, path in enumerate(paths)
    )
    kept = request.first(ordered)
    images = [path for _, _, path in kept]
    labels = [label for _, label, _ in kept]
    prompts = [[template(name) for template in OPENAI_IMAGENET_TEMPLATES] for name in IMAGENET_CLASSNAMES]
    return request.benchmark(
        [root / path for path in images],
        IMAGENET_SIZE,
        gaps,
        images=images,
        retrieval={},
        prompts=Prompts(prompts, labels),
        about={"split": "val", "version": sha256_json([sorted(zip(images, labels, strict=True)), prompts])},
    )
