"""Stage `image-tower`: the pretrained image tower."""

from __future__ import annotations

import time

from prefect import flow

from flows.runtime.stage import Stage, main
from lotlip.config.params import load_params
from lotlip.data.models import STARTING_MODELS, local_hashes
from lotlip.image_tower.config import StartTowerConfig
from lotlip.models.vision.spec import START


@flow(name="image-tower")
def image_tower() -> None:
    """Trains or loads the image tower of `image_tower.kind`."""
    params = load_params()
    config = params.image_tower
    start = params.pretrain.start if isinstance(config, StartTowerConfig) else None
    settings = config.model_dump(mode="json") | ({"start": start} if start else {})
    named = [start] if start else [getattr(config, key, None) for key in ("model", "checkpoint")]
    models = local_hashes(str(name) for name in named if name)
    stage = Stage("image-tower", params, settings, models)
    with stage.clock.measure("imports"):
        import torch

        from lotlip.image_tower.towers import TowerResult, make_tower
        from lotlip.models.vision.image_tower import save_image_tower
    for warning in params.warnings:
        stage.log.warning("image-tower: %s", warning)
    calls: list[tuple[float, int]] = []  # time and step; the first step comes when the scenes have been drawn

    def progress(step: int, steps: int, loss: float) -> None:
        calls.append((time.monotonic(), step))
        (started, first), now = calls[0], calls[-1][0]
        left = f", {(now - started) / (step - first) * (steps - step):.0f} s left" if step > first else ""
        stage.log.info("image-tower: step %d of %d, loss %.3f%s", step, steps, loss, left)

    if start:
        from lotlip.importing.start import open_start
        from lotlip.models.saving import save_whole_model

        opened = open_start(start)
        model = opened.build()
        result = TowerResult(model.image_tower)
        save_image_tower(result.tower, stage.out)
        save_whole_model(model, opened.tokenizer, stage.out / START, {"name": start, "source": start})
    else:
        result = make_tower(config, progress)
        save_image_tower(result.tower, stage.out)
    tower = result.tower
    size = tower.spec.image_size
    with torch.inference_mode():
        features = tower(torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))).numpy()
    if features.shape != (16, tower.width):
        raise ValueError(
            f"the image tower {tower.spec.model} gives features of shape {list(features.shape)} for 16 images instead "
            f"of [16, {tower.width}]; choose another model or image_tower.pooling"
        )
    with stage.clock.measure("gate"):
        from lotlip.image_tower.gate import gate_image_tower

        checks = gate_image_tower(config, result.accuracy, features, stage.gate_report)
    stage.publish(params.paths.image_tower)
    notes = {f"accuracy.{name}": value for name, value in result.accuracy.items()}
    stage.record(result.samples, checks, notes={**notes, STARTING_MODELS: models})


if __name__ == "__main__":
    main(image_tower)
