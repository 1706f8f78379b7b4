"""Stage `evaluate`: scores every seed of one ablation. DVC runs it once per ablation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefect import flow

from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.stage import Stage, check_input, hash_of, main
from lotlip.config.params import load_params
from lotlip.core.files import sha256_files, write_json
from lotlip.data.index import INDEX_FILE
from lotlip.evaluate.records import BASELINES, START_SCORES, AblationScores, BenchmarkScores, StartScores, made_with
from lotlip.pretrain.records import RUN, Run

if TYPE_CHECKING:
    import pandas as pd

    from lotlip.pretrain.config import PretrainConfig


@flow(name="evaluate", flow_run_name="evaluate-{ablation}")
def evaluate(ablation: str) -> None:
    """Scores an ablation, writes the scores with their protocol, and logs them to MLflow.

    Args:
        ablation: name of the ablation in params.yaml.
    """
    params = load_params()
    config, paths = params.evaluate, params.paths
    folder = paths.models / ablation
    inputs = {"model": hash_of(folder / RUN), "ingest": hash_of(paths.ingest / INDEX_FILE)}
    # shards have no captions of test images, which a benchmark of kind held-out reads
    inputs |= {f"captions {name}": hash_of(paths.captions / name / INDEX_FILE) for name in params.caption.describing}
    start = None
    trained = params.ablation(ablation)
    # an ablation whose text tower is new did not come from the starting model
    is_new = params.pretrain.start is not None and not (trained.start or trained.text.pretrained)
    if config.max_short_text_loss is not None and not is_new:
        file = paths.metrics / BASELINES / START_SCORES
        inputs["start"] = hash_of(file)
        start = StartScores.load(file).short_text_r1
    stage = Stage("evaluate", params, config.model_dump(mode="json", exclude={"baselines"}), inputs, ablation)
    with stage.clock.measure("imports"):
        from lotlip.evaluate.ablation import combine, draw, summary
        from lotlip.evaluate.unit import Measuring
    for folder_read in [paths.image_tower, *(paths.captions / name for name in params.caption.captioners)]:
        check_input(folder_read)
    check_input(paths.shards, INDEX_FILE)
    run = Run.load(folder / RUN)
    work = Measuring(
        folder=folder,
        config=run.config,
        benchmarks=config.benchmarks,
        paths=paths,
        captioners=tuple(params.caption.describing),
        about={
            "image_tower_sha256": sha256_files([paths.image_tower / "model.safetensors"]),
            "command": f"python -m flows evaluate {ablation}",
        },
        device=params.compute.device,
        precision=config.precision,
        batch_size=params.compute.batch_size,
        max_conditioned_pairs=config.max_conditioned_pairs,
        out=stage.out,
        fingerprint=stage.fingerprint,
        features=SCRATCH / "features",
    )
    names, hashes = list(config.benchmarks), made_with(config, paths, params.caption.describing)
    for report in stage.fan_out(names, work, name=str, size=lambda _: 1, on_gpu=True):
        for failure in report.failures:
            raise StageFailed(f"benchmark {report.name} could not be scored: {failure.reason}")
    measured = combine(work.results(name) for name in names)
    scores = AblationScores(
        ablation=ablation,
        config=run.config,
        fingerprints=run.fingerprints,
        parameters=measured.parameters,
        text_tower_flops=measured.text_tower_flops,
        benchmarks={
            name: result.model_copy(update={"made_with": hashes[name]}) for name, result in measured.results.items()
        },
    )
    with stage.clock.measure("gate"):
        from lotlip.evaluate.gate import gate_evaluate

        checks = gate_evaluate(
            config, score_table(measured.results), stage.gate_report, start, learns_short_captions(trained)
        )
    scores.write(paths.metrics / f"{ablation}.json")
    write_json(paths.metrics / "summary" / f"{ablation}.json", summary(measured.results))
    figures = paths.metrics / "attention" / ablation
    benchmarks = [work.open(name) for name in names]
    for benchmark, problems in draw(folder, run.config, benchmarks, work.how, figures, measured.results).items():
        for what, reason in problems.items():
            stage.log.warning("evaluate-%s: %s of %s could not be drawn: %s", ablation, what, benchmark, reason)
    with stage.clock.measure("mlflow"):
        from lotlip.tracking.mlflow import Tracker
        from lotlip.tracking.store import warn_on_failure

        tracking = params.tracking
        with warn_on_failure(tracking.uri, stage.log.warning):
            tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
            tracker.log_scores(run, measured.results, folder, figures)
    stage.discard()
    stage.record(measured.texts, checks)


def learns_short_captions(config: PretrainConfig) -> bool:
    """Returns whether training reads short captions: HiMo-CLIP, DeBias-CLIP and FLAIR read long ones only."""
    if not config.long_texts.sub_captions:
        return True  # whatever the weight, which divides the loss between short and long
    loss = config.loss
    weight = loss.short_loss_weight if loss.short_loss_fraction is None else loss.short_loss_fraction
    return bool(weight) and config.short_texts.sampler in ("raw", "raw-or-rewrite")


def score_table(results: Mapping[str, BenchmarkScores]) -> pd.DataFrame:
    """Returns a row for each score that is a fraction, with columns benchmark, seed, metric, value and chance."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"benchmark": name, "seed": seed, "metric": metric, "value": scores[metric], "chance": chance}
            for name, result in results.items()
            for seed, scores in result.seeds.items()
            for metric, chance in result.chance.items()
        ]
    )


if __name__ == "__main__":
    main(evaluate, *sys.argv[1:])
