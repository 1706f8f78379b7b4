"""Sets up a model that writes long captions, and tries it on a few images: `lotlip init --captioner`."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import TypeAdapter

from lotlip.caption.captioners import open_captioner
from lotlip.caption.captioners.endpoint import EndpointCaptioner, served_models
from lotlip.caption.config import PRESETS, CaptionerConfig
from lotlip.config.params import Params
from lotlip.core.durations import in_words
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.importing.start import split_commit
from lotlip.init.look import items_of
from lotlip.init.source import captioner_name
from lotlip.report.look import Items

TRIED = 8  # images
TRIAL = "captioner-trial"  # folder of the page
_MODULES = "lotlip/caption/captioners"
# A server does not say which weights it has.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Trial:
    """Captions of a few images.

    Attributes:
        name: of the captioner in params.yaml.
        section: its entry.
        records: the images.
        captions: a caption or failure for each.
        seconds: per image, without loading the model.
        usage: tokens of a request and of an answer, as a server counted them; None: it did not.
    """

    name: str
    section: dict[str, Any]
    records: Sequence[ImageRecord]
    captions: Sequence[Caption | Failure]
    seconds: float
    usage: tuple[float, float] | None

    @property
    def texts(self) -> list[str]:
        """The captions that were written."""
        return [one.text for one in self.captions if isinstance(one, Caption)]

    def estimate(self, images: int) -> str:
        """What captioning so many images takes, in words."""
        written = [one.tokens for one in self.captions if isinstance(one, Caption)]
        if self.usage:
            sent, received = (images * tokens for tokens in self.usage)
            tokens = f"{sent:,.0f} tokens of images and prompts, and {received:,.0f} tokens of answers"
        else:
            received = sum(written) / len(written) * images
            tokens = f"{received:,.0f} tokens of captions, besides those of images and prompts"
        return (
            f"{len(written)} of {len(self.captions)} captioned, {self.seconds:.2g} s each; all {images:,} images take "
            f"about {in_words(self.seconds * images)}; {tokens}"
        )

    def items(self, params: Params) -> Items:
        """The images with their captions, for a page."""
        return Items(items_of(params, self.records, {self.name: self.captions}), "the", "the sample", [], [])


def captioner_section(named: str, model: str | None) -> tuple[str, dict[str, Any]]:
    """Returns the name and entry of a captioner in params.yaml.

    Args:
        named: address of a server, a preset, a model's folder, or OWNER/NAME@COMMIT on the hub.
        model: the model's name on the server; None: the only one.

    Raises:
        ValueError: it is none of these, or a server has several models or does not respond.
    """
    if re.match("https?://", named):
        path = f"{_MODULES}/endpoint.py"
        models = [model] if model else served_models(named)
        if len(models) != 1:
            raise ValueError(f"{named} lists {', '.join(models) or 'no model'}; name one with --captioner-model")
        section = {"kind": "endpoint", "path": path, "url": named, "model": models[0], "revision": UNKNOWN}
        return _name_of(models[0]), section
    if model:
        raise ValueError(f"--captioner-model is for a server, but --captioner {named} is not an address; remove it")
    path = f"{_MODULES}/transformers.py"
    if named in PRESETS:
        return _name_of(named), {"kind": "transformers", "preset": named, "path": path}
    if Path(named).is_dir():
        return _name_of(Path(named).resolve().name), {"kind": "transformers", "path": named, "model": named}
    name, commit = split_commit(named)
    if commit is None:
        raise ValueError(
            f"--captioner {named} is not the address of a server (http://…/v1), the folder of a model, a model of the "
            f"hub with its commit (OWNER/NAME@COMMIT), or one of {', '.join(PRESETS)}"
        )
    return _name_of(name), {"kind": "transformers", "path": path, "model": name, "revision": commit}


def _name_of(model: str) -> str:
    return captioner_name(model.split("/")[-1], 0)


def try_captioner(
    name: str, section: dict[str, Any], records: Sequence[ImageRecord], show: Callable[[str], object]
) -> Trial:
    """Captions up to `TRIED` images.

    Args:
        name: of the captioner.
        section: its entry in params.yaml.
        records: images, of which some are chosen, evenly spaced.
        show: prints a line.

    Raises:
        ValueError: the captioner cannot be used, or captions none of the images.
        OSError: a server does not respond.
    """
    chosen = list(records)[:: max(len(records) // TRIED, 1)][:TRIED]
    show(f"trying {name} on {len(chosen)} images")
    settings: Any = TypeAdapter(CaptionerConfig).validate_python(section)
    captioner = open_captioner(name, settings, "bert-base-uncased")
    captions = list(captioner.caption(chosen[:1]))  # loads the model, or asks the server whether it has it
    usage = captioner.endpoint.usage if isinstance(captioner, EndpointCaptioner) else deque[tuple[int, int]]()
    usage.clear()
    begun = time.monotonic()
    captions += captioner.caption(chosen[1:])
    seconds = (time.monotonic() - begun) / max(len(chosen) - 1, 1)
    failures = [one for one in captions if isinstance(one, Failure)]
    if len(failures) == len(captions):
        first = f"{failures[0].where}: {failures[0].reason}"
        raise ValueError(f"{name} captions none of {len(captions)} images, such as {first}")
    means = (mean(sent for sent, _ in usage), mean(received for _, received in usage)) if usage else None
    return Trial(name, section, chosen, captions, seconds, means)
