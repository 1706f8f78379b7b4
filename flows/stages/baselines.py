"""Stage `baselines`: scores the models of `evaluate.baselines`, which are not trained here, once for all ablations."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from prefect import flow

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import Stage, check_input, hash_of, main
from lotlip.config.params import load_params
from lotlip.core.files import check_model
from lotlip.core.paths import Paths
from lotlip.data.index import INDEX_FILE
from lotlip.evaluate.config import baseline_hashes
from lotlip.evaluate.records import (
    BASELINE_SCORES,
    BASELINES,
    START_SCORES,
    Baseline,
    BaselineResult,
    Baselines,
    StartScores,
)
from lotlip.evaluate.score_names import MAIN
from lotlip.models.vision.spec import START


@flow(name="baselines")
def baselines() -> None:
    """Scores all baselines on all benchmarks. Without any it writes empty files, which later stages read."""
    params = load_params()
    config, paths = params.evaluate, params.paths
    addresses = {name: address_of(name, paths) for name in config.baselines}
    hashes = baseline_hashes(config.baselines)
    inputs = {"ingest": hash_of(paths.ingest / INDEX_FILE), **hashes}
    settings = config.model_dump(mode="json", include={"baselines", "benchmarks", "precision"})
    stage = Stage("baselines", params, settings, inputs)
    models: dict[str, dict[str, BaselineResult]] = {name: {} for name in config.baselines}
    items = 0
    if models:
        with stage.clock.measure("imports"):
            from lotlip.evaluate.benchmarks import open_benchmark
            from lotlip.evaluate.compare import compare
            from lotlip.evaluate.models import open_encoder
        for folder in [paths.image_tower, *(paths.captions / name for name in params.caption.captioners)]:
            check_input(folder)
        for address in addresses.values():
            check_model(Path(address))
        benchmarks = [
            open_benchmark(name, each, paths, params.caption.describing) for name, each in config.benchmarks.items()
        ]
        compute = params.compute
        # All models are opened before any is scored, so that a wrong name fails early.
        encoders = [
            (name, open_encoder(address, compute.batch_size, compute.device, config.precision))
            for name, address in addresses.items()
        ]

        def log_start(model: str, benchmark: str, count: int) -> None:
            nonlocal items
            items += count
            stage.log.info("baselines: %s on %s, %d images and texts", model, benchmark, count)

        for one in compare(encoders, benchmarks, "python -m flows baselines", log_start):
            result = BaselineResult(
                protocol=dict(one.protocol), chance=one.chance, ceiling=one.ceiling, scores=dict(one.scores.values)
            )
            models[one.model][one.benchmark] = result
    scored = [Baseline(model=name, sha256=hashes.get(name), benchmarks=found) for name, found in models.items()]
    Baselines(models=scored).write(stage.out / BASELINE_SCORES)
    StartScores(short_text_r1=short_text_r1(models.get(START, {}))).write(stage.out / START_SCORES)
    stage.publish(paths.metrics / BASELINES)
    stage.record(items, [])


def address_of(name: str, paths: Paths) -> str:
    """Returns the name that a baseline's model is loaded by.

    Raises:
        StageFailed: it is `start`, and there is no such model.
    """
    if name != START:
        return name
    folder = paths.image_tower / START
    if not folder.is_dir():
        raise StageFailed(
            f"evaluate.baselines names {START}, but {folder} does not exist: {START} needs pretrain.start and "
            f"image_tower: {{kind: start}}; set both, or remove {START} from evaluate.baselines"
        )
    return folder.as_posix()


def short_text_r1(results: dict[str, BaselineResult]) -> dict[str, float]:
    """Returns R@1 on short text, the mean of both directions, of each benchmark that has short texts."""
    return {
        benchmark: fmean(result.scores[metric] for metric in MAIN["short"])
        for benchmark, result in results.items()
        if set(MAIN["short"]) <= result.scores.keys()
    }


if __name__ == "__main__":
    main(baselines)
