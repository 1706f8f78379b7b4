"""The command `lotlip init`."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lotlip.core.durations import in_words
from lotlip.core.files import atomic_write, check_free, check_replaceable
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.importing.start import StartingModel, open_start
from lotlip.init.captioner import TRIAL, TRIED, captioner_section, try_captioner
from lotlip.init.inspection import Inspection, describe, inspect, text_lengths
from lotlip.init.look import write_page
from lotlip.init.params import checked, fit, params_text
from lotlip.init.source import NO_LONG_CAPTIONS, Columns, find_source, relative_to
from lotlip.plan.plan import Gpu, Plan
from lotlip.plan.plan import plan as make_plan
from lotlip.report.look import look_of

FEWEST = 20  # usable images; with fewer, often no image is held out


def init(
    data: Path,
    images: Path | None,
    start: str | None,
    columns: tuple[str | None, str | None, Sequence[str]],
    out: Path,
    force: bool,
    show: Callable[[str], object],
    captioner: tuple[str, str | None] | None = None,
) -> None:
    """Looks at own data and writes a params.yaml that trains on it.

    Args:
        data: a table, tars or a folder.
        images: folder that the paths in a table start from; None: to be found.
        start: name of the starting model, see `lotlip.importing.start.ACCEPTED`; None: none.
        columns: names of the columns of images, short captions and long captions; None: to be found.
        out: file to write.
        force: whether an existing file may be replaced, which is then kept under another name.
        show: prints a line.
        captioner: a model that is to write long captions, and its name on a server, as `captioner_section` takes them;
            None: none.

    Raises:
        ValueError: the data, the starting model or the captioner cannot be used, or there are too few images.
        OSError: the captioner's server does not respond.
        ForeignFileError: the file exists.
    """
    check_free(out, lambda _: False, force)
    if captioner:
        name, section = captioner_section(*captioner)
        check_replaceable(out.parent / TRIAL)
    source = find_source(data, images, Columns(*columns))
    for line in source.found:
        if not (captioner and line == NO_LONG_CAPTIONS):
            show(line)
    opened = _open(start, show) if start else None
    tokenizer = opened.tokenizer if opened else open_tokenizer("clip" if start else "bert-base-uncased")
    found = inspect(source, tokenizer.full_lengths)
    if found.usable < FEWEST:
        unusable = f" ({sum(found.failures.values())} cannot: {'; '.join(found.examples)})" if found.failures else ""
        raise ValueError(
            f"{data} has {found.usable} images that can be used{unusable}, but training and scoring on held-out images "
            f"need at least {FEWEST}; add images with captions"
        )
    trial = None
    if captioner:
        trial = try_captioner(name, section, found.records, show)
        source = replace(source, captioners={**source.captioners, name: section})
        tried = text_lengths(trial.texts, found.sentence_ends, tokenizer.full_lengths)
        found = replace(found, tried={name: tried})
    recall, chance = _try(opened, found, show) if opened else (1.0, 0.0)
    settings = fit(found, opened, start, recall > chance)
    title = f"LoTLIP on {data.name}"
    text = params_text(source, start, found, settings, title)
    for line in describe(found, settings.context_length):
        show(line)
    if opened:
        knows = "" if recall > chance else ": no better than chance, so both towers are trained from its weights"
        show(f"  {'the starting model finds':<34}{recall:.0%} of {len(found.records)} images by their captions{knows}")
    suggested = f"context_length {settings.context_length}, batch_size {settings.batch_size}, steps {settings.steps}"
    show(f"  {'suggested':<34}{suggested}")
    params = checked(text, str(out))
    if opened or not start:
        planned = make_plan(
            params,
            params.ablation("lotlip"),
            params.training_compute("lotlip"),
            _this_machine(),
            images=round(found.usable * (1 - settings.test_share - settings.val_share)),
        )
        show(f"  {'estimate':<34}{_estimate(planned)}")
    if trial:
        show(f"  {'estimate of captioning':<34}{trial.estimate(found.usable)}")
        page = write_page(look_of(params, Path(), trial.items(params), TRIED), out.parent / TRIAL)
        show(f"  {'captions next to the short ones':<34}{page}")
    if out.exists():
        show(f"the old {out} was copied to {_keep(out)}")
    there = relative_to(out.parent)
    with atomic_write(out) as partial:
        text = params_text(source.in_terms_of(there), there(start) if start else None, found, settings, title)
        partial.write_text(text, encoding="utf-8")
    show(f"written to {out}; to train and score on held-out images{_command(out)}")


def _command(out: Path) -> str:
    """What trains on a file of parameters: `lotlip run` reads params.yaml in the current folder."""
    here = out.parent.resolve() == Path.cwd()
    if out.name == "params.yaml":
        return ": lotlip run" if here else f": cd {shlex.quote(str(out.parent))} && lotlip run"
    return f", name it params.yaml and, in {'this folder' if here else out.parent}: lotlip run"


def _open(start: str, show: Callable[[str], object]) -> StartingModel | None:
    try:
        return open_start(start)
    except ValueError as error:
        if Path(start).exists() or not start.count("/") == 1:
            raise
        show(f"warning: {start} cannot be read now, so it is assumed to be a CLIP: {error}")
        return None


def _try(start: StartingModel, found: Inspection, show: Callable[[str], object]) -> tuple[float, float]:
    """Tries a starting model on some images.

    Returns:
        R@1, mean of both directions, and the highest value that is likely by chance.
    """
    from lotlip.evaluate.encoders import LotlipEncoder, Runner

    show(f"trying {start.name} on {len(found.records)} images")
    images, captions = zip(*((record.image, record.short_caption) for record in found.records), strict=True)
    run = Runner(16, "cuda" if torch.cuda.is_available() else "cpu")
    encoder = LotlipEncoder(start.build(), start.tokenizer, run)
    similarity = encoder.images(images) @ encoder.texts(captions)[0].T
    own = torch.arange(len(images))
    hits = [(similarity.argmax(dim) == own).sum().item() for dim in (0, 1)]
    # two directions with one expected hit each, and three standard deviations
    return sum(hits) / (2 * len(images)), (2 + 3 * 2**0.5) / (2 * len(images))


def _this_machine() -> Gpu:
    """The GPU, or this CPU with its measured speed in matrix products."""
    if torch.cuda.is_available():
        return Gpu(memory=float(torch.cuda.get_device_properties(0).total_memory))
    size = 1024
    factor = torch.ones(size, size)
    factor @ factor  # warms up
    begun = time.perf_counter()
    for _ in range(4):
        factor @ factor
    peak = 4 * 2 * size**3 / (time.perf_counter() - begun)
    return Gpu(memory=_cpu_memory(), peak=peak)


def _cpu_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().total)


def _estimate(planned: Plan) -> str:
    place = "of this GPU" if torch.cuda.is_available() else "of this machine"
    used, needed = sum(planned.memory.values()), in_words(planned.seconds + planned.feature_seconds)
    fits = f"; does not fit: {planned.remedy}" if planned.remedy else ""
    return f"{used / 1e9:.1f} GB of {planned.gpu.memory / 1e9:.0f} GB {place}, training takes about {needed}{fits}"


def _keep(path: Path) -> Path:
    """Copies a file to a free name beside it."""
    numbers = range(1, 1000)
    free = next(place for number in numbers if not (place := path.with_name(f"{path.name}.old-{number}")).exists())
    shutil.copyfile(path, free)
    return free
