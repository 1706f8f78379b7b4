"""Stage `ingest`: images and raw captions come in as partitions."""

from __future__ import annotations

from prefect import flow

from flows.stage import Stage, main
from lotlip.config import load_params
from lotlip.files import remove
from lotlip.partitions import finished_unit, write_index, write_partitions
from lotlip.records import Unit, UnitReport
from lotlip.repeats import unique_partitions
from lotlip.sources import open_source
from lotlip.sources.evaluation import image_hashes


@flow(name="ingest")
def ingest() -> None:
    """Writes a partition for each unit of the source."""
    params = load_params()
    config = params.ingest
    stage = Stage("ingest", params, config.model_dump(mode="json"))
    source = open_source(config.source, config.images)
    units, folder = source.units(config.partition_size), stage.scratch / "units"

    def write(unit: Unit) -> list[UnitReport]:
        return finished_unit(unit, folder) or write_partitions(unit, source.read(unit), folder, source.split)

    written = stage.fan_out(units, write, name=lambda unit: unit.name, size=lambda unit: len(unit.items))
    evaluation = image_hashes(config.evaluation_images, config.images)
    remove(stage.out)
    reports = unique_partitions(folder, written, stage.out, evaluation)
    index = write_index(stage.out, reports)
    with stage.clock.measure("gate"):
        from lotlip.validation import gate_ingest

        checks = gate_ingest(config, stage.out, reports, len(units), evaluation, stage.gate_report)
    stage.publish(params.paths.ingest)
    stage.record(index["read"], checks, index)


if __name__ == "__main__":
    main(ingest)
