"""Stage `pretrain`: trains one ablation, all its seeds. DVC runs it once for each ablation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow

from flows.runtime.agent import announced
from flows.runtime.processes import launch, run_group
from flows.runtime.stage import Stage, hash_of, main, memory_of
from lotlip.config.params import load_params
from lotlip.core.files import check_model, read_json, sha256_files, write_json
from lotlip.pretrain.config import PretrainConfig


@flow(name="pretrain", flow_run_name="pretrain-{ablation}")
def pretrain(ablation: str) -> None:
    """Trains every seed of an ablation in processes of their own, tracked by MLflow.

    Args:
        ablation: its name in params.yaml.
    """
    params = load_params()
    config, paths = params.ablation(ablation), params.paths
    settings = config.model_dump(mode="json", exclude={"launch"})  # which decides no result
    data = hash_of(paths.shards / "index.json")
    inputs = {"shards": data, "image_tower": hash_of(paths.image_tower / "model.safetensors")}
    if config.text.pretrained:  # on the hub its name says which it is; a folder may be written anew
        check_model(Path(config.text.pretrained), memory_of)
        inputs["pretrained"] = sha256_files(sorted(Path(config.text.pretrained).rglob("*.safetensors")))
    stage = Stage("pretrain", params, config.deciding(), inputs, ablation)
    for warning in params.warnings:
        if config.text.pretrained and warning.startswith(f"text.pretrained {config.text.pretrained} "):
            stage.log.warning("pretrain-%s: %s", ablation, warning)
    run = {
        "ablation": ablation,
        "config": settings,
        "data_hash": data,
        "git_commit": git_commit(),
        "fingerprints": {str(seed): f"{stage.fingerprint}-{ablation}-{seed}" for seed in config.seeds},
    }
    runs: dict[str, str] = {}  # none where MLflow does not answer
    warnings: list[str] = []

    def warn(line: str) -> None:  # once: each seed meets the same server
        if not warnings:
            stage.log.warning(line)
        warnings.append(line)

    def on_line(line: str) -> None:
        if line.startswith(TRACKING_WARNING):
            warn(line.removeprefix(TRACKING_WARNING))
        else:
            stage.log.info(line)

    with stage.clock.measure("mlflow"):
        from lotlip.tracking.mlflow import TRACKING_WARNING, Tracker, tolerated

        tracking = params.tracking
        with tolerated(tracking.uri, warn):
            runs = Tracker(tracking.uri, tracking.experiment, params.pretrain).ensure_runs(run)
    write_json(stage.out / "run.json", run)
    job_file = stage.scratch / "job.json"
    job = {
        "ablation": ablation,
        "config": settings,
        "shards": str(paths.shards),
        "image_tower": str(paths.image_tower),
        "scratch": str(stage.scratch),
        "out": str(stage.out),
        "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri,
        "run_ids": runs,
        "git_commit": run["git_commit"],
    }
    write_json(job_file, job)
    command = launch("lotlip.train", [str(job_file)], config.processes, config.launch)
    try:
        with announced(command, config.launch):
            run_group(command, on_line, stage.scratch / "errors.log")
    except BaseException:
        if runs:
            with tolerated(tracking.uri, warn):
                tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
                for seed, run_id in runs.items():
                    done = (stage.out / f"seed-{seed}" / "history.json").is_file()
                    tracker.finish(run_id, "FINISHED" if done else "FAILED")
        raise
    timing = read_json(stage.scratch / "timing.json")
    stage.clock.add("imports", timing["imports"])
    with stage.clock.measure("gate"):
        from lotlip.pretrain.gate import gate_pretrain

        samples = read_json(paths.shards / "index.json")["splits"]["train"]["samples"]
        history = histories(stage.out, config.seeds)
        checks = gate_pretrain(config, history, chance_loss(config), stage.gate_report)
    stage.publish(paths.models / ablation)
    with stage.clock.measure("mlflow"), tolerated(tracking.uri, warn):
        tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
        for seed, run_id in tracker.ensure_runs(run).items():  # anew: MLflow may not have answered before
            tracker.log_history(run_id, read_json(paths.models / ablation / f"seed-{seed}" / "history.json"))
            tracker.set_tags(run_id, {"model": str(paths.models / ablation)})
            tracker.finish(run_id)
    trained = len(config.seeds) * config.steps * config.batch_size
    stage.record(trained, checks, notes={"epochs": config.steps * config.batch_size / samples})


def histories(folder: Path, seeds: list[int]) -> Any:
    """The curves of every seed in one table (pandas.DataFrame) with the column `seed`."""
    import pandas as pd

    tables = [pd.DataFrame(read_json(folder / f"seed-{seed}" / "history.json")).assign(seed=seed) for seed in seeds]
    return pd.concat(tables, ignore_index=True)


def chance_loss(config: PretrainConfig) -> float:
    """The loss of guessing, summed over the weighted text features (paper, section 3.2).

    Softmax: every one of the batch is as likely. Sigmoid: the bias alone says how many of the pairs belong together.
    """
    from lotlip.objectives.contrastive import feature_shares

    long_texts, loss = config.long_texts, config.loss
    long_features = long_texts.per_image * (config.text.corner_tokens + 1) if long_texts.sub_captions else 0
    raw, *others = feature_shares(1 + long_features, loss.short_loss_fraction).tolist()
    batch = config.batch_size
    one = math.log(batch)
    if loss.objective == "siglip":  # each image's row: one pair of `batch` belongs together
        one = -math.log(1 / batch) - (batch - 1) * math.log(1 - 1 / batch)
    return one * (loss.short_loss_weight * raw + loss.long_loss_weight * sum(others))


def git_commit() -> str:
    """The commit that is checked out, with "-dirty" where code or params.yaml differ from it; "unknown" outside git."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "lotlip", "flows", "params.yaml"], check=False)
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


if __name__ == "__main__":
    main(pretrain, *sys.argv[1:])
