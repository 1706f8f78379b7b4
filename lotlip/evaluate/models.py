"""Loads models for evaluation: of this project, of transformers or of open_clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lotlip.core.device import choose_device
from lotlip.core.files import read_json
from lotlip.data.models import LOCAL, OPEN_CLIP
from lotlip.evaluate import baselines
from lotlip.evaluate.encoders import ACCEPTED, Encoder, LotlipEncoder, Runner
from lotlip.models.lotlip import LotlipModel


def open_encoder(
    model: str,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "fp32",
    on_batch: Callable[[int], object] = lambda _: None,
) -> Encoder:
    """Loads a model of any kind, with its own tokenizer, context length and preprocessing.

    No code from the model's repository is run, and pickles may contain only tensors.

    Args:
        model: a folder or a name, see `ACCEPTED`. The kind of a folder's model is read from its config.json (this
            project or transformers) or open_clip_config.json.
        batch_size: see `Runner`.
        device: "cpu", "cuda", or "auto" for cuda if available.
        precision: see `Runner`.
        on_batch: see `Runner`.

    Raises:
        ValueError: there is no such model, it is not a dual encoder, or an argument is invalid.
    """
    run = Runner(batch_size, choose_device(device), precision, on_batch)
    if model.startswith(OPEN_CLIP):
        return baselines.OpenClipEncoder(model, model.removeprefix(OPEN_CLIP), run)
    if Path(model).is_file():
        raise ValueError(f"{model} is a file; {ACCEPTED}; convert the authors' .pt file with `lotlip import-official`")
    folder = Path(model) if Path(model).is_dir() else baselines.from_hub(model)
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind == LotlipModel.config_class.model_type:
        return LotlipEncoder.open(folder, run)
    if kind:
        return baselines.TransformersEncoder(model, folder, run)
    if (folder / baselines.OPEN_CLIP_CONFIG).is_file():
        return baselines.OpenClipEncoder(model, f"{LOCAL}{folder}", run)
    raise ValueError(
        f"{model} has no model: there is neither a config.json with a model_type nor an "
        f"{baselines.OPEN_CLIP_CONFIG}; {ACCEPTED}"
    )
