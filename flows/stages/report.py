"""Stage `report`: one page with all tables and figures."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.runtime.stage import Stage, check_input, main
from lotlip.config.params import load_params
from lotlip.core.files import remove


@flow(name="report")
def report() -> None:
    """Builds the report from the outputs of the other stages."""
    params = load_params()
    settings = params.model_dump(mode="json", include={"report", "tables", "findings"})
    stage = Stage("report", params, settings)
    with stage.clock.measure("imports"):
        from lotlip.report.inputs import load_inputs
        from lotlip.report.page import build_report
        from lotlip.report.plots import write_plots
    paths = params.paths
    for folder in [paths.ingest, *(paths.captions / name for name in params.caption.captioners)]:
        check_input(folder)
    for folder in [*(paths.models / name for name in params.names), paths.image_tower]:
        check_input(folder)
    check_input(paths.shards, "index.json")
    inputs = load_inputs(params, Path())
    remove(stage.out)
    page = build_report(inputs, stage.out)
    write_plots(inputs, stage.out / "plots")
    with stage.clock.measure("gate"):
        from lotlip.report.gate import gate_report

        gate_report(page, len(inputs.pictures), stage.gate_report)
    stage.publish(params.paths.report)
    stage.log.info("report: open %s", (params.paths.report / page.name).resolve())


if __name__ == "__main__":
    main(report)
