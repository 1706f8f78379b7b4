"""Stage `pretrain`: trains all seeds of one ablation. DVC runs it once per ablation."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from prefect import flow

from flows.runtime.agent import announced
from flows.runtime.git import run_git
from flows.runtime.processes import launch, run_group
from flows.runtime.stage import Stage, check_input, hash_cache_of, hash_of, main
from lotlip.config.params import load_params
from lotlip.core.code import code_hash
from lotlip.core.files import Damaged, atomic_write, check_model, sha256_json, weights_hash
from lotlip.core.paths import Paths
from lotlip.data.index import INDEX_FILE, ShardIndex, read_index
from lotlip.data.models import STARTING_MODELS, local_hashes, model_hash
from lotlip.data.remote_shards import check_same
from lotlip.models.vision.spec import START
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.job import Job, Timing
from lotlip.pretrain.order import subset_counts
from lotlip.pretrain.records import HISTORY, RUN, Run, read_history

if TYPE_CHECKING:
    import pandas as pd


@flow(name="pretrain", flow_run_name="pretrain-{ablation}")
def pretrain(ablation: str) -> None:
    """Trains every seed of an ablation in separate processes, tracked by MLflow.

    Args:
        ablation: name of the ablation in params.yaml.
    """
    params = load_params()
    config, paths, compute = params.ablation(ablation), params.paths, params.training_compute(ablation)
    inputs = hash_inputs(config, paths)
    if compute.remote_shards:
        check_same(compute.remote_shards.url, paths.shards)
    starts = starting_weights(config)
    stage = Stage("pretrain", params, config.recipe(), {**inputs, **starts}, ablation)
    # DVC watches the model that an ablation of `finetune` starts from
    models = local_hashes([config.text.pretrained or ""] if ablation in params.ablations else [])
    for warning in params.warnings:
        if config.text.pretrained and warning.startswith(f"text.pretrained {config.text.pretrained} "):
            stage.log.warning("pretrain-%s: %s", ablation, warning)

    def fingerprint(seed: int) -> str:
        parts = [config.recipe(), inputs, starts.get(str(seed)), code_hash("pretrain")]
        return f"{sha256_json(parts)}-{ablation}-{seed}"

    run = Run(
        ablation=ablation,
        config=config.model_dump(mode="json"),
        data_hash=inputs["shards"],
        git_commit=git_commit(),
        fingerprints={str(seed): fingerprint(seed) for seed in config.seeds},
    )
    runs: dict[str, str] = {}  # empty if MLflow does not respond
    warnings: list[str] = []

    def warn(line: str) -> None:  # only once, because all seeds use the same server
        if not warnings:
            stage.log.warning(line)
        warnings.append(line)

    def on_line(line: str) -> None:
        if line.startswith(TRACKING_WARNING):
            warn(line.removeprefix(TRACKING_WARNING))
        else:
            stage.log.info(line)

    with stage.clock.measure("mlflow"):
        from lotlip.tracking.mlflow import Tracker
        from lotlip.tracking.sink import TRACKING_WARNING
        from lotlip.tracking.store import warn_on_failure

        tracking = params.tracking
        with warn_on_failure(tracking.uri, warn):
            runs = Tracker(tracking.uri, tracking.experiment, params.pretrain).ensure_runs(run)
    reused = reuse_seeds(paths.models / ablation, run.fingerprints, stage.out)
    if reused:
        stage.log.info("pretrain-%s: reusing trained seeds: %s", ablation, ", ".join(reused))
    run.write(stage.out / RUN)
    job_file = stage.scratch / "job.json"
    job = Job(
        ablation=ablation,
        config=config,
        compute=compute,
        seeds=[seed for seed in config.seeds if str(seed) not in reused],
        shards=paths.shards,
        image_tower=paths.image_tower,
        scratch=stage.scratch,
        out=stage.out,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri,
        run_ids=runs,
        git_commit=run.git_commit,
        data_hash=inputs["shards"],
    )
    job.write(job_file)
    if job.seeds:
        command = launch("lotlip.train", [str(job_file)], compute.processes, compute.launch)
        try:
            with announced(command, compute.launch):
                run_group(command, on_line, stage.scratch / "errors.log")
        except BaseException:
            if runs:
                with warn_on_failure(tracking.uri, warn):
                    tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
                    for seed, run_id in runs.items():
                        done = (stage.out / f"seed-{seed}" / HISTORY).is_file()
                        tracker.finish(run_id, "FINISHED" if done else "FAILED")
            raise
    if job.timing.is_file():  # something was trained
        stage.clock.add("imports", Timing.load(job.timing).imports)
    with stage.clock.measure("gate"):
        from lotlip.pretrain.gate import gate_pretrain

        samples = number_of_samples(read_index(paths.shards, ShardIndex).splits["train"].samples, config.samples)
        history = histories(stage.out, config.seeds)
        limit = compute.max_final_loss_share
        checks = gate_pretrain(config.seeds, limit, history, chance_loss(config), stage.gate_report)
    stage.publish(paths.models / ablation)
    with stage.clock.measure("mlflow"), warn_on_failure(tracking.uri, warn):
        tracker = Tracker(tracking.uri, tracking.experiment, params.pretrain)
        for seed, run_id in tracker.ensure_runs(run).items():  # again, because MLflow may not have responded before
            tracker.log_history(run_id, read_history(paths.models / ablation, seed))
            tracker.set_tags(run_id, {"model": str(paths.models / ablation)})
            tracker.finish(run_id)
    per_seed = config.steps * config.batch_size
    stage.record(
        per_seed * len(config.seeds),
        checks,
        notes={"epochs": per_seed / samples, STARTING_MODELS: models},
        processed=per_seed * len(job.seeds),
    )


def number_of_samples(available: int, subset: float | None) -> int:
    """Returns how many training images an ablation uses, by `pretrain.samples`."""
    return int(subset_counts(np.array([available]), subset).sum())


def hash_inputs(config: PretrainConfig, paths: Paths) -> dict[str, str]:
    """Returns the hashes of the data and models that all ablations read, by name."""
    hashes = {
        "shards": hash_of(paths.shards / INDEX_FILE),
        "image_tower": hash_of(paths.image_tower / "model.safetensors"),
    }
    if config.start:
        hashes["start"] = model_hash(paths.image_tower / START)
    return hashes


def starting_weights(config: PretrainConfig) -> dict[str, str]:
    """Returns seed → hash of the model that it starts from; empty if weights are random or from a hub.

    Of an ablation's models, the weights are hashed. Of any other folder, all files are: their format is not known.

    Raises:
        Damaged: a file of the initial model has changed since its stage wrote it.
        ValueError: the folder has no weights.
    """
    folder = Path(config.text.pretrained or "")
    if not config.text.pretrained or not folder.is_dir():
        return {}
    check_model(folder, hash_cache_of)
    models = {seed: folder / f"seed-{seed}" for seed in config.seeds}  # exist if it is an ablation's folder
    hashes = {str(seed): weights_hash(model) for seed, model in models.items() if model.is_dir()}
    if len(hashes) < len(models):
        if not any(file.suffix in (".safetensors", ".bin") for file in folder.rglob("*")):
            raise ValueError(
                f"text.pretrained {folder} has no weights (*.safetensors or *.bin); name the folder of a model"
            )
        whole = model_hash(folder)
        hashes = {str(seed): hashes.get(str(seed), whole) for seed in models}
    return hashes


def reuse_seeds(published: Path, fingerprints: dict[str, str], out: Path) -> list[str]:
    """Copies seeds of a published ablation that were trained with the same settings, inputs and code.

    Args:
        published: folder of the ablation.
        fingerprints: seed → requested fingerprint.
        out: output folder.

    Returns:
        The reused seeds.
    """
    if not (published / RUN).is_file():
        return []
    trained = Run.load(published / RUN).fingerprints
    same = [seed for seed, fingerprint in fingerprints.items() if trained.get(seed) == fingerprint]
    try:
        if same:
            check_input(published)
    except Damaged:
        return []
    for seed in same:
        if not (out / f"seed-{seed}").is_dir():
            with atomic_write(out / f"seed-{seed}") as partial:
                shutil.copytree(published / f"seed-{seed}", partial)
    return same


def histories(folder: Path, seeds: list[int]) -> pd.DataFrame:
    """Returns the training history of every seed in one table with the column `seed`."""
    import pandas as pd

    tables = [pd.DataFrame(read_history(folder, seed)).assign(seed=seed) for seed in seeds]
    return pd.concat(tables, ignore_index=True)


def chance_loss(config: PretrainConfig) -> float:
    """Computes the loss of guessing, summed over the weighted text features (paper, section 3.2).

    With softmax, all candidates in the batch are equally likely. With sigmoid, the bias alone predicts the fraction of
    matching pairs.
    """
    from lotlip.objectives.contrastive import feature_shares

    long_texts, loss = config.long_texts, config.loss
    long_features = long_texts.per_image * (config.text.corner_tokens + 1) if long_texts.sub_captions else 0
    raw, *others = feature_shares(1 + long_features, loss.short_loss_fraction).tolist()
    batch = config.batch_size
    one = math.log(batch)
    if loss.objective == "siglip":  # in each image's row, one of `batch` pairs matches
        one = -math.log(1 / batch) - (batch - 1) * math.log(1 - 1 / batch)
    terms = 2 if loss.text_components else 1  # of each long text
    chance = one * (loss.short_loss_weight * raw + terms * loss.long_loss_weight * sum(others))
    if loss.conditioned:  # an image's texts of one kind count once, and it meets one text of each other image
        own = (1 if raw * loss.short_loss_weight else 0) + (long_features if loss.long_loss_weight else 0)
        meets = own + batch - 1
        pooled = -batch * (own * math.log(own / meets) + (batch - 1) * math.log(1 - own / meets)) / meets
        chance = (1 - loss.conditioned.weight) * chance + loss.conditioned.weight * pooled
    return chance


def git_commit() -> str:
    """Returns the checked-out commit, with "-dirty" if code or params.yaml differ from it.

    It is "unknown" outside a repository and without the program git, as in slim containers.
    """
    if shutil.which("git") is None:
        return "unknown"
    head = run_git("rev-parse", "HEAD")
    if head.returncode:
        return "unknown"
    changed = run_git("diff", "--quiet", "HEAD", "--", "lotlip", "flows", "params.yaml")
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


if __name__ == "__main__":
    main(pretrain, *sys.argv[1:])
