"""Opens whatever can be scored: a model of this project, of transformers or of open_clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lotlip.core.device import choose_device
from lotlip.core.files import read_json
from lotlip.evaluate import baselines
from lotlip.evaluate.encoders import ACCEPTED, OPEN_CLIP, Encoder, LotlipEncoder, Runner
from lotlip.models.lotlip import LotlipModel


def open_encoder(
    model: str,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "fp32",
    on_batch: Callable[[int], object] = lambda _: None,
) -> Encoder:
    """A model of any kind, loaded and ready to be scored, with its own tokenizer, context length and preprocessing.

    Nothing that a model brings with it is run: no code of its repository, no pickle but tensors.

    Args:
        model: a folder or a name, as `ACCEPTED` says. What a folder has is told by its config.json (a model of this
            project's or of transformers') or its open_clip_config.json.
        batch_size: as of `Runner`.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        precision: as of `Runner`.
        on_batch: as of `Runner`.

    Raises:
        ValueError: there is no such model, it is no dual encoder, or an argument is wrong.
    """
    run = Runner(batch_size, choose_device(device), precision, on_batch)
    if model.startswith(OPEN_CLIP):
        return baselines.OpenClipEncoder(model, model.removeprefix(OPEN_CLIP), run)
    if Path(model).is_file():
        raise ValueError(f"{model} is a file; {ACCEPTED}; `lotlip import-official` makes a folder of the authors' .pt")
    folder = Path(model) if Path(model).is_dir() else baselines.from_hub(model)
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind == LotlipModel.config_class.model_type:
        return LotlipEncoder.open(folder, run)
    if kind:
        return baselines.TransformersEncoder(model, folder, run)
    if (folder / baselines.OPEN_CLIP_CONFIG).is_file():
        return baselines.OpenClipEncoder(model, f"local-dir:{folder}", run)
    raise ValueError(
        f"{model} has no model: neither a config.json with a model_type nor an {baselines.OPEN_CLIP_CONFIG} is there; "
        f"{ACCEPTED}"
    )
