"""Stage `evaluate`: scores every seed of one ablation. DVC runs it once for each ablation."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from prefect import flow

from flows.stage import Stage, hash_of, main
from lotlip.config import load_params
from lotlip.files import read_json, sha256_files, whole, write_json


@flow(name="evaluate", flow_run_name="evaluate-{ablation}")
def evaluate(ablation: str) -> None:
    """Writes the scores of an ablation with the protocol that they were measured by, and sends them to MLflow.

    Args:
        ablation: its name in params.yaml.
    """
    params = load_params()
    config, paths = params.evaluate, params.paths
    folder = paths.models / ablation
    inputs = {"model": hash_of(folder / "run.json"), "ingest": hash_of(paths.ingest / "index.json")}
    stage = Stage("evaluate", params, config.model_dump(mode="json"), inputs, ablation)
    with stage.clock.measure("imports"):
        from lotlip.data.tokenizer import token_counts
        from lotlip.evaluation.attention_scores import attention_scores
        from lotlip.evaluation.benchmarks import open_benchmark
        from lotlip.evaluation.encoders import LotlipEncoder
        from lotlip.evaluation.evaluate import chances, images_of, protocol, unseen_share
        from lotlip.evaluation.evaluate import evaluate as score
        from lotlip.evaluation.flops import flops_by_context
        from lotlip.evaluation.reading import read_to_the_end
        from lotlip.models.saving import load_model
        from lotlip.report.attention import attention_pictures
    run = read_json(folder / "run.json")
    seeds = run["config"]["seeds"]
    vocabulary = read_json(paths.shards / "index.json")["vocabulary"]
    results: dict[str, dict[str, Any]] = {}
    texts = 0
    parameters: dict[str, int] = {}
    flops: dict[int, int] = {}
    images: dict[str, Any] = {}
    pictures: dict[str, bytes] = {}
    frozen = params.ablation(ablation).image_tower.frozen
    benchmarks = [
        open_benchmark(name, settings, paths, list(params.caption.captioners))
        for name, settings in config.benchmarks.items()
    ]
    for seed in seeds:
        model, tokenizer = load_model(folder / f"seed-{seed}")
        parameters = {"text_tower": count_parameters(model.text), "image_tower": count_parameters(model.image_tower)}
        flops = flops or flops_by_context(model.config)
        encoder = LotlipEncoder(model, tokenizer, config.batch_size)
        for benchmark in benchmarks:
            name = benchmark.name
            if name not in images or not frozen:  # all seeds share a frozen tower
                images[name] = encoder.images(images_of(benchmark))
            if name not in results:
                unseen = unseen_share(benchmark, run["config"]["text"]["tokenizer"], vocabulary)
                about = {
                    "model": folder.as_posix(),
                    **protocol(encoder, benchmark),
                    "unseen_token_share": unseen,
                    "image_tower_sha256": sha256_files([paths.image_tower / "model.safetensors"]),
                    "command": f"python -m flows.evaluate {ablation}",
                }
                results[name] = {
                    "protocol": about,
                    "chance": chances(benchmark),
                    "seeds": {},
                    "intervals": {},
                    "attention": {},
                    "weights_sha256": {},
                }
            found = score(encoder, benchmark, images[name])
            results[name]["seeds"][str(seed)] = dict(found.values)
            results[name]["intervals"][str(seed)] = {metric: list(ends) for metric, ends in found.intervals.items()}
            if benchmark.scenes:
                pieces = partial(token_counts, run["config"]["text"]["tokenizer"])
                reading = read_to_the_end(encoder, benchmark.scenes, images[name], pieces)
                results[name].setdefault("reading", {})[str(seed)] = reading.to_json()
            results[name]["weights_sha256"][str(seed)] = sha256_files([folder / f"seed-{seed}" / "model.safetensors"])
            results[name]["attention"][str(seed)] = attention_scores(model, tokenizer, benchmark).to_json()
            if seed == seeds[0]:
                drawn = attention_pictures(model, tokenizer, benchmark)
                pictures |= {f"{name}-{kind}.png": png for kind, png in drawn.items()}
            texts += sum(len(asked.texts) for asked in benchmark.retrieval.values())
        stage.log.info("evaluate-%s: seed %s done", ablation, seed)
    scores = {
        "ablation": ablation,
        "config": run["config"],
        "parameters": parameters,
        "text_tower_flops": flops,
        "benchmarks": results,
    }
    with stage.clock.measure("gate"):
        from lotlip.validation import gate_evaluate

        checks = gate_evaluate(config, score_table(results), stage.gate_report)
    seen = paths.metrics / "attention" / ablation
    with whole(seen) as unfinished:
        unfinished.mkdir()
        for file, png in pictures.items():
            (unfinished / file).write_bytes(png)
    write_json(paths.metrics / f"{ablation}.json", scores)
    with stage.clock.measure("mlflow"):
        from lotlip.tracking import Tracker

        Tracker(params.tracking.uri, params.tracking.experiment).log_scores(run, results, folder, seen)
    stage.discard()
    stage.record(texts, checks)


def count_parameters(module: Any) -> int:
    """Of a torch module."""
    return sum(parameter.numel() for parameter in module.parameters())


def score_table(results: dict[str, dict[str, Any]]) -> Any:
    """The scores that are shares, a row for each (pandas.DataFrame): benchmark, seed, metric, value, chance."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"benchmark": name, "seed": seed, "metric": metric, "value": scores[metric], "chance": chance}
            for name, result in results.items()
            for seed, scores in result["seeds"].items()
            for metric, chance in result["chance"].items()
        ]
    )


if __name__ == "__main__":
    main(evaluate, *sys.argv[1:])
