"""Stage `ingest`: images and raw captions come in as partitions."""

from __future__ import annotations

from prefect import flow

from flows.stage import Stage, main
from lotlip.config import load_params
from lotlip.partitions import finished_unit, write_index, write_partitions
from lotlip.records import Unit, UnitReport
from lotlip.sources import open_source


@flow(name="ingest")
def ingest() -> None:
    """Writes a partition for each unit of the source."""
    params = load_params()
    config = params.ingest
    stage = Stage("ingest", params, config.model_dump(mode="json"))
    source = open_source(config.source)
    units = source.units(config.partition_size)

    def write(unit: Unit) -> list[UnitReport]:
        return finished_unit(unit, stage.out) or write_partitions(unit, source.read(unit), stage.out, source.split)

    reports = stage.fan_out(units, write, name=lambda unit: unit.name, size=lambda unit: len(unit.items))
    index = write_index(stage.out, reports)
    with stage.clock.measure("gate"):
        from lotlip.validation import gate_ingest

        checks = gate_ingest(config, stage.out, reports, stage.gate_report)
    stage.publish(params.paths.ingest)
    stage.record(index["read"], checks, index)


if __name__ == "__main__":
    main(ingest)
