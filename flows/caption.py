"""Stage `caption`: one captioner's long captions for every image. DVC runs it once for each captioner."""

from __future__ import annotations

import sys

from prefect import flow

from flows.stage import Stage, StageFailed, hash_of, main
from lotlip.captioning import open_captioner
from lotlip.config import load_params
from lotlip.files import sha256_tree
from lotlip.partitions import finished, read_index, read_records, unit_names, write_captions, write_index
from lotlip.records import UnitReport


@flow(name="caption", flow_run_name="caption-{captioner}")
def caption(captioner: str) -> None:
    """Writes a partition of captions for each partition of images.

    Args:
        captioner: its name in params.yaml.
    """
    params = load_params()
    config, source = params.caption, params.paths.ingest
    if captioner not in config.captioners:
        raise StageFailed(f"no captioner {captioner!r} in params.yaml; there are: {', '.join(config.captioners)}")
    settings = config.captioners[captioner]
    inputs = {"ingest": hash_of(source / "index.json"), "path": sha256_tree(settings.path)}
    stage = Stage("caption", params, settings.model_dump(mode="json"), inputs, captioner)
    author = open_captioner(captioner, settings, config.tokenizer)
    sizes = {unit["name"]: unit["written"] for unit in read_index(source)["units"]}

    def write(name: str) -> list[UnitReport]:
        done = finished(name, stage.out)
        return [done or write_captions(name, author.caption(read_records(source, name)), sizes[name], stage.out)]

    reports = stage.fan_out(unit_names(source), write, name=str, size=lambda name: sizes[name])
    index = write_index(stage.out, reports, revision=author.revision, prompt=author.prompt)
    with stage.clock.measure("gate"):
        from lotlip.validation import gate_caption

        checks = gate_caption(config, stage.out, reports, stage.gate_report)
    stage.publish(params.paths.captions / captioner)
    stage.record(index["read"], checks, index, {"revision": author.revision})


if __name__ == "__main__":
    main(caption, *sys.argv[1:])
