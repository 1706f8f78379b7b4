"""Stage `caption`: long captions of one captioner for every image. DVC runs it once per captioner."""

from __future__ import annotations

import sys

from prefect import flow

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import Stage, hash_of, main
from lotlip.caption.partition import Captioning
from lotlip.caption.quality import summarise
from lotlip.caption.store import Partition
from lotlip.config.params import load_params
from lotlip.core.files import sha256_tree
from lotlip.data.index import INDEX_FILE, CaptionIndex, Totals, UnitIndex, read_index, write_index
from lotlip.data.partitions import read_captions


@flow(name="caption", flow_run_name="caption-{captioner}")
def caption(captioner: str) -> None:
    """Writes a partition of captions for each partition of images.

    Args:
        captioner: name of the captioner in params.yaml.
    """
    params = load_params()
    config, source = params.caption, params.paths.ingest
    if captioner not in config.captioners:
        raise StageFailed(f"no captioner {captioner!r} in params.yaml; there are: {', '.join(config.captioners)}")
    settings = config.captioners[captioner]

    def inputs_now() -> dict[str, str]:
        return {"ingest": hash_of(source / INDEX_FILE), "path": sha256_tree(settings.path)}

    inputs = inputs_now()
    sections = [part.model_dump(mode="json") for part in (settings, config.rules(captioner))]
    settings_hashed = [*sections, config.tokenizer, config.sentence_ends]
    stage = Stage("caption", params, settings_hashed, inputs, captioner)
    work = Captioning(
        captioner, config, source, params.paths.caption_store, stage.out, params.compute.captioner(captioner)
    )
    author, store = work.author(), work.stored()
    store.describe()
    stage.log.info("existing captions are reused from %s", store.folder)
    units = [Partition(unit.name, unit.written, unit.sha256) for unit in read_index(source, UnitIndex).whole]
    reports = stage.fan_out(units, work, name=lambda unit: unit.name, size=lambda unit: unit.images, on_gpu=True)
    changed = [name for name, value in inputs_now().items() if value != inputs[name]]
    if changed:  # DVC hashes inputs after the stage, so it would record these captions for the changed inputs
        where = {"ingest": str(source), "path": str(settings.path)}
        raise StageFailed(f"{', '.join(where[name] for name in changed)} changed while being read; run the stage again")
    tables = (read_captions(stage.out, report.name) for report in reports if report.written)
    quality = summarise(tables, Totals.of(reports).failure_kinds)
    index = write_index(
        stage.out,
        reports,
        CaptionIndex,
        revision=author.revision,
        prompt=author.prompt,
        quality=quality,
        sentence_ends=config.sentence_ends,
    )
    with stage.clock.measure("gate"):
        from lotlip.caption.gate import gate_caption

        checks = gate_caption(config, stage.out, reports, stage.gate_report, captioner in config.rewriting)
    stage.publish(params.paths.captions / captioner)
    stage.record(index.read, checks, index, {"revision": author.revision, "quality": quality})


if __name__ == "__main__":
    main(caption, *sys.argv[1:])
