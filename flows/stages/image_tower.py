"""Stage `image-tower`: the pretrained image tower."""

from __future__ import annotations

import time

from prefect import flow

from flows.runtime.stage import Stage, main
from lotlip.config.params import load_params


@flow(name="image-tower")
def image_tower() -> None:
    """Trains or loads the image tower of `image_tower.kind`."""
    params = load_params()
    config = params.image_tower
    stage = Stage("image-tower", params, config.model_dump(mode="json"))
    with stage.clock.measure("imports"):
        import torch

        from lotlip.image_tower.towers import make_tower
        from lotlip.models.vision.image_tower import save_image_tower
    for warning in params.warnings:
        stage.log.warning("image-tower: %s", warning)
    calls: list[tuple[float, int]] = []  # time and step; the first step comes when the scenes have been drawn

    def progress(step: int, steps: int, loss: float) -> None:
        calls.append((time.monotonic(), step))
        (started, first), now = calls[0], calls[-1][0]
        left = f", {(now - started) / (step - first) * (steps - step):.0f} s left" if step > first else ""
        stage.log.info("image-tower: step %d of %d, loss %.3f%s", step, steps, loss, left)

    result = make_tower(config, progress)
    tower = result.tower
    save_image_tower(tower, stage.out)
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
    stage.record(result.samples, checks, notes={f"accuracy.{name}": value for name, value in result.accuracy.items()})


if __name__ == "__main__":
    main(image_tower)
