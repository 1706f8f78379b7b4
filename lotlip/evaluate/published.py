"""The benchmarks that the field uses, held to their published sizes; what is missing is an error that says which."""

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
from lotlip.evaluate.benchmarks import Benchmark, Prompts, Texts
from lotlip.evaluate.config import PARTIAL_RUN, PublishedBenchmarkConfig
from lotlip.evaluate.formats import FORMATS, Described, Format

IMAGENET_SIZE = 50_000
_IMAGENET_PER_CLASS = 50
_SHOWN = 3


def open_published(name: str, settings: PublishedBenchmarkConfig, paths: Paths, captioners: list[str]) -> Benchmark:
    """The published benchmark that an entry of params.yaml describes; raises as `published_benchmark` does."""
    return published_benchmark(settings.kind, settings.folder, settings.images, settings.partial, name)


def published_benchmark(
    kind: str, folder: Path, images: Path | None = None, partial: bool | int = False, name: str | None = None
) -> Benchmark:
    """Reads a published benchmark's texts; its images stay on disk until they are asked for.

    Args:
        kind: which: a name of `FORMATS`, or "imagenet".
        folder: of its annotations; docs/benchmarks.md has the layouts.
        images: folder of its images, where they are not in `folder` as the layouts have it.
        partial: take what is there and leave out the rest; a number: of that, the first so many images. The name that
            the scores are filed under then ends in "-partial".
        name: that scores are filed under; the kind where none is given.

    Raises:
        ValueError: an image or a text is missing or the size is not the published one, and the run is not partial;
            an image comes twice or leads out of its folder; a file of annotations is not there or broken.
    """
    asked = _Asked(name or kind, partial)
    try:
        for wanted in (folder, images):
            if wanted and not wanted.is_dir():
                raise ValueError(f"the folder {wanted} is not there; docs/benchmarks.md says what belongs there")
        return _imagenet(asked, images or folder) if kind == "imagenet" else _retrieval(asked, kind, folder, images)
    except ValueError as error:
        raise ValueError(f"benchmark {asked.name}: {error}") from error


@dataclass(frozen=True)
class _Asked:
    """What was asked for: the name of the scores, and how much of the benchmark."""

    name: str
    partial: bool | int

    def first(self, found: Sequence[Any]) -> Sequence[Any]:
        """As much of what is there as was asked for."""
        return found if isinstance(self.partial, bool) else found[: self.partial]

    def benchmark(self, files: Sequence[Path], size: int, gaps: Mapping[str, list[str]], **rest: Any) -> Benchmark:
        """The benchmark of these images.

        Args:
            files: the images that are taken.
            size: of the published benchmark.
            gaps: what is missing → a line for each.
            rest: fields of the benchmark, but for its name and its images' bytes.
        """

        def read(number: int) -> bytes:
            try:
                return files[number].read_bytes()
            except OSError as error:
                raise ValueError(f"benchmark {self.name}: {files[number]} cannot be read ({error})") from error

        if self.partial is False:
            return Benchmark(name=self.name, read=read, **rest)
        if not files:
            raise ValueError("no image is there with all its texts; a partial run needs one at least")
        missing = "".join(f", {len(lines):,} {what}" for what, lines in gaps.items() if lines)
        rest["about"] = {**rest["about"], "partial": f"{len(files):,} of {size:,} images{missing}"}
        return Benchmark(name=self.name + PARTIAL_RUN, read=read, **rest)


def _check(asked: _Asked, gaps: Mapping[str, list[str]], found: str, published: str, more: bool) -> None:
    """Refuses what cannot be compared: gaps and other sizes, but in a partial run; too many in any.

    Args:
        asked: whether the run is partial.
        gaps: what is missing → a line for each.
        found: the size that there is.
        published: the size that there should be.
        more: whether it is more than was published.
    """
    if more:
        raise ValueError(f"there are {found}, more than the {published} published: this is another set or split")
    if asked.partial is not False:
        return
    remedy = "complete it, or ask for a partial run (partial: true), whose scores say so"
    for what, lines in gaps.items():
        if lines:
            shown = "; ".join(lines[:_SHOWN]) + (f"; … {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else "")
            raise ValueError(f"{len(lines):,} {what}: {shown}; {remedy}")
    if found != published:
        raise ValueError(f"there are {found}, but {published} were published; {remedy}")


# --- images with texts --------------------------------------------------------------------------------------------


def _retrieval(asked: _Asked, kind: str, folder: Path, images: Path | None) -> Benchmark:
    form = FORMATS[kind]
    root = images or next((folder / name for name in form.images if (folder / name).is_dir()), folder)
    described = [_with_clean_texts(one) for one in form.read(folder)]
    _check_names(described)
    kept: list[Described] = []
    textless: list[str] = []
    unseen: list[str] = []
    for one in described:
        if not all(one.texts):
            have = sum(map(bool, one.texts))
            textless.append(f"{one.where} has {have} of {form.texts} texts of {printable(one.name)}")
        elif not _is_file(root / one.path):
            unseen.append(f"{printable(str(root / one.path))}, named in {one.where}")
        else:
            kept.append(one)
    gaps = {"annotations missing": textless, "images missing": unseen}
    _check(asked, gaps, _size(len(described), form), _size(form.size, form), more=len(described) > form.size)
    kept = list(asked.first(kept))
    return asked.benchmark(
        [root / one.path for one in kept],
        form.size,
        gaps,
        images=[one.name for one in kept],
        retrieval={
            form.kind: Texts(
                [text for one in kept for text in one.texts],
                [image for image, one in enumerate(kept) for _ in one.texts],
            )
        },
        about={"split": form.split, "version": sha256_json(sorted([one.name, *one.texts] for one in kept))},
    )


def _size(images: int, form: Format) -> str:
    return f"{images:,} images with {images * form.texts:,} texts"


def _with_clean_texts(one: Described) -> Described:
    """Without texts that are none: null, blank, or of another type."""
    return one._replace(texts=[clean(text) if isinstance(text, str) else "" for text in one.texts])


def _check_names(described: Sequence[Described]) -> None:
    """Names are paths out of somebody's file: they may lead anywhere."""
    first: dict[str, str] = {}
    for one in described:
        if not isinstance(one.name, str) or not one.name:
            raise ValueError(f"{one.where} names no image; mend it or remove it")
        if escapes_folder(one.path):
            raise ValueError(f"{one.where} names {one.name!r}, which leads out of its folder; find out who made it")
        if one.name in first:
            raise ValueError(f"{one.where} names {one.name}, as {first[one.name]} did before; remove one of them")
        first[one.name] = one.where


def _is_file(path: Path) -> bool:
    """Links count: who laid the benchmark out made them, not its annotations."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


# --- ImageNet -----------------------------------------------------------------------------------------------------


def _imagenet(asked: _Asked, folder: Path) -> Benchmark:
    """ImageNet's validation split, a folder for each class, by the prompts that CLIP was published with."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data import ImageNetInfo

    root = folder / "val" if (folder / "val").is_dir() else folder
    classes: dict[str, list[str]] = {synset: [] for synset in ImageNetInfo("imagenet-1k").label_names()}
    for path in find_images(root, "it should have a folder for each class, such as n01440764, with its images"):
        synset = path.split("/")[0]
        if synset not in classes:
            raise ValueError(f"{root / path} is in no folder of a class of ImageNet-1k, such as n01440764; move it")
        classes[synset].append(path)
    short = {synset: len(paths) for synset, paths in classes.items() if len(paths) < _IMAGENET_PER_CLASS}
    lines = [f"{root / synset} has {count} of {_IMAGENET_PER_CLASS} images" for synset, count in short.items()]
    gaps = {"classes incomplete": lines}
    number = sum(map(len, classes.values()))
    _check(asked, gaps, f"{number:,} images", f"{IMAGENET_SIZE:,} images", more=number > IMAGENET_SIZE)
    # The first of every class, then the second, …: so the first N are of as many classes as can be.
    ordered = sorted(
        (place, label, path) for label, paths in enumerate(classes.values()) for place, path in enumerate(paths)
    )
    kept = asked.first(ordered)
    images = [path for _, _, path in kept]
    labels = [label for _, label, _ in kept]
    prompts = [[template(name) for template in OPENAI_IMAGENET_TEMPLATES] for name in IMAGENET_CLASSNAMES]
    return asked.benchmark(
        [root / path for path in images],
        IMAGENET_SIZE,
        gaps,
        images=images,
        retrieval={},
        prompts=Prompts(prompts, labels),
        about={"split": "val", "version": sha256_json([sorted(zip(images, labels, strict=True)), prompts])},
    )
