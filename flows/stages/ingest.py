"""Stage `ingest`: writes images and short captions as partitions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from prefect import flow

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import Stage, main
from lotlip.config.params import load_params
from lotlip.core.files import remove
from lotlip.data.duplicates import unique_partitions
from lotlip.data.index import UnitIndex, write_index
from lotlip.data.partitions import recorded_inputs
from lotlip.data.paths import check_inputs
from lotlip.data.records import Unit
from lotlip.ingest.evaluation_images import image_hashes, perceptual_hashes
from lotlip.ingest.partition import Ingesting
from lotlip.ingest.perceptual import near_copies
from lotlip.ingest.sources import Source, open_source
from lotlip.ingest.text_rules import left_out_by_texts


@flow(name="ingest")
def ingest() -> None:
    """Writes a partition for each unit of the source."""
    params = load_params()
    config = params.ingest
    check_inputs(config.inputs())
    stage = Stage("ingest", params, config.model_dump(mode="json"))
    folder = stage.scratch / "units"
    distance = config.max_evaluation_hash_distance if config.evaluation_images else None
    hashes = stage.scratch / "hashes"
    work = Ingesting(config.source, config.images, folder, None if distance is None else hashes)
    units = work.open().units(config.partition_size)
    written = stage.fan_out(units, work, name=lambda unit: unit.name, size=lambda unit: len(unit.items))
    _check_unchanged(open_source(config.source, config.images), units, config.partition_size, folder)
    evaluation = image_hashes(config.evaluation_images, config.images)
    copies = None
    if distance is not None:
        copies = near_copies(hashes, perceptual_hashes(config.evaluation_images), distance)
    remove(stage.out)
    by_texts = partial(left_out_by_texts, folder, config.texts) if config.texts.rules else None
    reports = unique_partitions(folder, written, stage.out, evaluation, copies, by_texts)
    index = write_index(stage.out, reports, UnitIndex)
    for kind, what in (
        ("duplicate-image", "exact copies of others"),
        ("near-evaluation", "similar to evaluation images"),
    ):
        if count := index.failure_kinds.get(kind):
            stage.log.info("ingest: %d of %d images left out: %s", count, index.read, what)
    with stage.clock.measure("gate"):
        from lotlip.ingest.gate import gate_ingest

        checks = gate_ingest(config, stage.out, reports, len(units), evaluation, stage.gate_report)
    stage.publish(params.paths.ingest)
    stage.record(index.read, checks, index)


def _check_unchanged(source: Source, units: Sequence[Unit], partition_size: int, folder: Path) -> None:
    """Checks that the source did not change while it was read, because DVC hashes it after this stage.

    Raises:
        StageFailed: an item was changed, added or removed.
    """

    def changed(unit: Unit) -> bool:
        before = recorded_inputs(unit.name, folder)
        return before is not None and before != source.state(unit)

    now = source.units(partition_size)
    with ThreadPoolExecutor() as pool:  # remote storage may be slow
        names = [unit.name for unit, differs in zip(units, pool.map(changed, units), strict=True) if differs]
    names += sorted({unit.name for unit in units} ^ {unit.name for unit in now})
    if names or now != units:
        shown = ", ".join(names[:5] or ["other items"]) + (", …" if len(names) > 5 else "")
        raise StageFailed(
            f"ingest.source changed while being read ({shown}); run the stage again when nothing writes to it. "
            "Only changed units are read again"
        )


if __name__ == "__main__":
    main(ingest)
