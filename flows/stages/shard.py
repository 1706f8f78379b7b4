"""Stage `shard`: writes images, captions and features of the frozen tower as WebDataset tars."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from prefect import flow

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import Stage, hash_of, main
from lotlip.config.params import load_params
from lotlip.core.files import sha256_json
from lotlip.data.index import INDEX_FILE, CaptionIndex, UnitIndex, read_index
from lotlip.data.partitions import unit_names
from lotlip.data.text import SentenceEnds
from lotlip.data.token_ids import vocabulary
from lotlip.data.tokenizer import count_tokens
from lotlip.shard.sharding import Sharding, ShardUnit
from lotlip.shard.shards import ShardPlan, plan_shards, shard_statistics, write_shard_index

SPLITS = ("train", "val")  # evaluation reads the test split from ingest's output


@flow(name="shard")
def shard() -> None:
    """Writes the shards of the training and validation splits, and their index."""
    params = load_params()
    config, ingest, ends = params.shard, params.paths.ingest, params.caption.sentence_ends
    tokenizer = params.pretrain.text.tokenizer
    captions = {name: params.paths.captions / name for name in params.caption.captioners}
    inputs = {"ingest": hash_of(ingest / INDEX_FILE)}
    inputs |= {f"captions {name}": hash_of(folder / INDEX_FILE) for name, folder in captions.items()}
    for name, folder in captions.items():
        check_sentence_ends(name, folder, ends)
    if config.store_features:
        inputs["image_tower"] = hash_of(params.paths.image_tower / "model.safetensors")
    rewriters = params.caption.rewriting
    stage = Stage("shard", params, [config.model_dump(mode="json"), ends, *rewriters], inputs)
    if config.store_features:
        with stage.clock.measure("imports"):
            import lotlip.shard.features  # noqa: F401 - for the units
    plans = {
        split: plan_shards(ingest, captions, split, config.samples_per_shard, config.seed, config.max_bytes)
        for split in SPLITS
    }
    indexes = {str(ingest): read_index(ingest, UnitIndex)}
    indexes |= {str(folder): read_index(folder, CaptionIndex) for folder in captions.values()}
    partitions = {folder: {unit.name: unit.sha256 for unit in index.units} for folder, index in indexes.items()}

    def sources_of(plan: ShardPlan) -> str:
        return sha256_json({name: [hashes[unit] for unit in plan.partitions] for name, hashes in partitions.items()})

    all_plans = [plan for split in SPLITS for plan in plans[split]]
    compute = params.compute
    work = Sharding(
        ingest=ingest,
        captions=tuple(captions.items()),
        out=stage.out,
        image_tower=params.paths.image_tower if config.store_features else None,
        tokenizer=tokenizer,
        sentence_ends=ends,
        device=compute.device,
        precision=config.precision,
        batch_size=compute.batch_size,
        fingerprint=stage.fingerprint,
    )
    done = stage.fan_out(
        [ShardUnit(plan, sources_of(plan)) for plan in all_plans],
        work,
        name=lambda unit: unit.plan.name,
        size=lambda unit: len(unit.plan),
        on_gpu=config.store_features,
    )
    by_name = {report.name: report for report in done}
    reports = {split: [by_name[plan.name] for plan in plans[split]] for split in SPLITS}
    tars = [stage.out / f"{report.name}.tar" for report in reports["train"] if report.written]
    index = write_shard_index(
        stage.out,
        reports,
        shard_statistics(ingest, captions, "train", count_tokens(tokenizer), ends),
        features=config.store_features,
        tokenizer=tokenizer,
        vocabulary=vocabulary(tars, tokenizer, ends),
        sentence_ends=ends,  # training and the models use the shards' setting
        rewriters=rewriters,
    )
    with stage.clock.measure("gate"):
        from lotlip.data.inspection import held_out_images
        from lotlip.data.separation import separation
        from lotlip.shard.gate import gate_shard

        expected = sum(map(len, all_plans))
        held_out = held_out_images(ingest, unit_names(ingest))
        # Raw pixels show the background of generated scenes, which is part of their captions, so there they always win.
        compared = config.store_features and params.ingest.source.kind != "scenes"
        separated = separation(stage.out, index) if compared else None
        checks = gate_shard(config, stage.out, index, expected, held_out, separated, stage.gate_report)
    if separated and separated.warning:
        stage.log.warning("shard: %s", separated.warning)
    stage.publish(params.paths.shards)
    stage.record(index.written, checks, index, notes={"separation": asdict(separated)} if separated else {})


def check_sentence_ends(captioner: str, folder: Path, expected: SentenceEnds) -> None:
    """Checks that a captioner's captions were split with the setting of params.yaml.

    Args:
        captioner: name of the captioner.
        folder: folder of its captions.
        expected: `caption.sentence_ends`.

    Raises:
        StageFailed: they were split with another setting.
    """
    actual = read_index(folder, CaptionIndex).sentence_ends
    if actual != expected:
        raise StageFailed(
            f"{folder} was split with sentence_ends {actual!r}, but caption.sentence_ends in params.yaml is "
            f"{expected!r}; run `python -m flows caption {captioner}` again"
        )


if __name__ == "__main__":
    main(shard)
