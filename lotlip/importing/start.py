"""Starting models: complete dual encoders of other libraries, read as models of this project."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lotlip.core.files import read_json
from lotlip.data.models import LOCAL, OPEN_CLIP
from lotlip.data.tokenizer import TextTokenizer
from lotlip.data.weights import check_finite, check_weights
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.vision.image_tower import load_weights

ACCEPTED = (
    "a starting model is the folder or hub name of a CLIP or SigLIP model of transformers, open_clip:NAME:TAG_OR_FILE, "
    "the folder of a model saved by open_clip, a checkpoint in the layout of OpenAI's CLIP, Long-CLIP or LoTLIP, or "
    "the folder of a model of this project"
)
_COMMIT = re.compile(r"(?P<name>.+)@(?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class StartingModel:
    """A complete dual encoder, as a model of this project.

    Attributes:
        name: as it was given.
        config: its configuration; without corner tokens, unless it was trained with some.
        tokenizer: its tokenizer.
        read_weights: reads the weights, fp32, by the names of `LotlipModel`.
    """

    name: str
    config: LotlipConfig
    tokenizer: TextTokenizer
    read_weights: Callable[[], Mapping[str, Tensor]]

    def build(self) -> LotlipModel:
        """Returns the model in evaluation mode.

        Raises:
            ValueError: weights are missing, unexpected, damaged or not finite.
        """
        model = LotlipModel(self.config)
        load_weights(model, self.read_weights(), self.name)
        check_finite(model.named_parameters(), f"of {self.name}")
        return model.eval()


def open_start(name: str, tokenizer: str | None = None, local_files_only: bool = False) -> StartingModel:
    """Opens a starting model. Its weights are read later.

    Args:
        name: see `ACCEPTED`; a name on the hub may end in @COMMIT.
        tokenizer: name of the tokenizer, as `lotlip.data.tokenizer.word_pieces` takes it; None: the model's own.
        local_files_only: whether to use local files and the hub's cache only.

    Raises:
        ValueError: there is no such model, or it cannot be a starting model.
    """
    # imported one by one: open_clip alone takes more than a second
    name, revision = split_commit(name)
    if name.startswith(OPEN_CLIP):
        from lotlip.importing import open_clip

        return open_clip.open_start(name.removeprefix(OPEN_CLIP), tokenizer)
    path = Path(name)
    if path.is_file():
        from lotlip.importing import openai

        return openai.open_start(path, tokenizer)
    if path.is_dir():
        check_weights(path)
        if not (path / "config.json").is_file():
            if (path / "open_clip_config.json").is_file():
                from lotlip.importing import open_clip

                return open_clip.open_start(f"{LOCAL}{path}", tokenizer)
            seeds = sorted(path.glob("seed-*"))
            hint = f"; name one of its seeds, such as {seeds[0]}" if seeds else f"; {ACCEPTED}"
            raise ValueError(f"{name} has no model (config.json is missing){hint}")
        if read_json(path / "config.json").get("model_type") == LotlipConfig.model_type:
            if tokenizer is not None:
                raise ValueError(f"{name} is a model of this project, which has its own tokenizer; remove --tokenizer")
            from lotlip.importing import ours

            return ours.open_start(path)
    from lotlip.importing import transformers

    return transformers.open_start(name, revision, tokenizer, local_files_only)


def split_commit(name: str) -> tuple[str, str | None]:
    """Splits NAME@COMMIT.

    >>> split_commit("openai/clip-vit-base-patch16")
    ('openai/clip-vit-base-patch16', None)
    """
    match = _COMMIT.fullmatch(name)
    return (match["name"], match["revision"]) if match else (name, None)
