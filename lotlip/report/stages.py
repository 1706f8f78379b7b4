"""Background tables: data, image tower, training, time, failures and evaluation protocol."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lotlip.core.differences import differences, format_differences
from lotlip.report.inputs import Ablation, ReportInputs, StageOutcome
from lotlip.report.results import FLOPS_COLUMN, FLOPS_NOTE, all_frozen, benchmark_names, flops_known
from lotlip.report.tables import Cell, Column, ReportTable, duration, gigaflops, number, percent, words


def statistics_table(inputs: ReportInputs) -> ReportTable:
    """Returns the images, texts, sub-captions and tokens per text, for short captions and each captioner."""
    columns = [
        Column("captions", "Captions", numeric=False),
        Column("images", "Images"),
        Column("texts", "Texts"),
        Column("sub_captions_per_text", "Sub-captions per text"),
        Column("tokens_per_text", "Tokens per text"),
    ]
    patterns = {"images": "{:,.0f}", "texts": "{:,.0f}"}
    names = sorted(inputs.statistics, key=lambda name: (name != "raw", name))
    rows = [
        [words(name)] + [number(inputs.statistics[name].get(c.key), patterns.get(c.key, "{:.2f}")) for c in columns[1:]]
        for name in names
    ]
    splits = ", ".join(f"{count:,} in {split}" for split, count in inputs.splits.items())
    note = "Tokens are word pieces without special tokens." + (f" Samples in shards: {splits}." if splits else "")
    return ReportTable("data", "Caption statistics", note, columns, rows, paper="Table 6")


def benchmark_texts_table(inputs: ReportInputs) -> ReportTable:
    """Returns the images, texts, sub-captions and tokens per text of each benchmark, from its protocol."""
    columns = [
        Column("benchmark", "Benchmark", numeric=False),
        Column("kind", "Texts", numeric=False),
        Column("images", "Images"),
        Column("texts", "Texts"),
        Column("sub_captions_per_text", "Sub-captions per text"),
        Column("tokens_per_text", "Tokens per text"),
    ]
    rows = []
    for name in benchmark_names(inputs):
        about = next((a.benchmarks[name].protocol for a in inputs.scored if name in a.benchmarks), {})
        for kind in ("long", "short"):
            lengths = [about.get(f"{kind}_{column.key}") for column in columns[-2:]]
            if None in lengths:
                continue
            counts = [number(about.get("images")), number(about.get(f"{kind}_texts"))]
            rows.append([words(name), words(kind), *counts, *(number(length, "{:.2f}") for length in lengths)])
    note = "The texts that are scored. Tokens are word pieces without special tokens."
    return ReportTable("benchmark-texts", "Texts of the benchmarks", note, columns, rows, paper="Table 1")


def accuracy_table(inputs: ReportInputs) -> ReportTable:
    """Returns the image tower's accuracy per attribute, from the notes of its stage."""
    notes = next((stage.notes for stage in inputs.stages if stage.label == "image-tower"), {})
    accuracies = {name.partition(".")[2]: value for name, value in notes.items() if name.startswith("accuracy.")}
    columns = [Column("attribute", "Attribute", numeric=False), Column("accuracy", "Accuracy")]
    rows = [[words(name.replace("_", " ")), percent(value)] for name, value in accuracies.items()]
    note = "On held-out images."
    if all_frozen(inputs.ablations):
        note += " The tower is frozen afterwards."
    return ReportTable("image-tower", "Image tower: accuracy per attribute", note, columns, rows)


def quality_table(inputs: ReportInputs) -> ReportTable:
    """Returns the quality of each captioner's captions and the share that each rule dropped, from the stages' notes."""
    by_captioner = {
        stage.label.removeprefix("caption-"): stage.notes["quality"]
        for stage in inputs.stages
        if stage.label.startswith("caption-") and stage.notes.get("quality")
    }
    # Only rules that dropped a caption have a column.
    rules = list(
        dict.fromkeys(rule for each in by_captioner.values() for rule, count in each["filtered"].items() if count)
    )
    columns = [
        Column("captioner", "Captioner", numeric=False),
        Column("captions", "Captions"),
        Column("words", "Words, mean"),
        Column("words_p05", "5th pct."),
        Column("words_p95", "95th pct."),
        Column("repetition", "Repetition"),
        Column("agreement", "Agreement"),
        Column("truncated", "Truncated"),
        Column("dropped", "all", group="Dropped"),
        *(Column(rule, rule, group="Dropped") for rule in rules),
    ]
    rows = [
        [
            words(name),
            number(quality["captions"]),
            number(quality["words"]["mean"], "{:.1f}"),
            *(number(quality["words"][quantile]) for quantile in ("p05", "p95")),
            percent(quality["repetition"]["mean"]),
            percent(quality["agreement"]["mean"]),
            percent(quality["truncated_share"]),
            *(
                percent(count / max(quality["captions"], 1))
                for count in (sum(quality["filtered"].values()), *(quality["filtered"][rule] for rule in rules))
            ),
        ]
        for name, quality in by_captioner.items()
    ]
    note = (
        "Repetition is the mean share of a caption's 4-grams that occurred earlier in it. Agreement is the mean share "
        "of the short caption's content words that the caption contains. The rules are set in caption.quality of "
        "params.yaml. All columns except the dropped shares describe the captions that were kept."
    )
    return ReportTable("caption-quality", "Quality of long captions", note, columns, rows)


def stages_table(inputs: ReportInputs) -> ReportTable:
    """Returns the time, throughput, counts and orchestration overhead of each stage."""
    columns = [
        Column("stage", "Stage", numeric=False),
        Column("seconds", "Time"),
        Column("samples_per_second", "Samples/s"),
        Column("read", "Read"),
        Column("written", "Written"),
        Column("failed", "Failed"),
        Column("orchestration_seconds", "Orchestration"),
        Column("orchestration_share", "Share"),
    ]
    rows = [
        [
            words(stage.label),
            duration(stage.seconds),
            number(stage.samples_per_second, "{:,.0f}" if stage.samples_per_second >= 100 else "{:,.1f}"),
            *(number(stage.counts.get(key)) for key in ("read", "written", "failed")),
            duration(sum(stage.orchestration_seconds.values()) if stage.orchestration_seconds else math.nan),
            percent(stage.orchestration_share),
        ]
        for stage in inputs.stages
    ]
    note = "Time is wall-clock time. Orchestration is the overhead: imports, Prefect, the gate, MLflow."
    seconds = sum(stage.seconds for stage in inputs.stages if not math.isnan(stage.seconds))
    overhead = sum(sum(stage.orchestration_seconds.values()) for stage in inputs.stages)
    total = (
        [Cell("total"), duration(seconds)]
        + [Cell("")] * 4
        + [duration(overhead), percent(overhead / seconds if seconds else None)]
    )
    return ReportTable("stages", "Time", note, columns, rows, [total] if rows else [])


def training_table(inputs: ReportInputs) -> ReportTable:
    """Returns each ablation's training settings, parameters, cost per text and throughput."""
    counted = flops_known(inputs.ablations)
    columns = [
        Column("ablation", "Ablation", numeric=False),
        Column("changes", "Change", numeric=False),
        Column("seeds", "Seeds", numeric=False),
        Column("steps", "Steps"),
        Column("batch_size", "Batch"),
        Column("precision", "Precision", numeric=False),
        Column("context_length", "Context"),
        *([FLOPS_COLUMN] if counted else []),
        Column("text_parameters", "Text tower"),
        Column("image_parameters", "Image tower"),
        Column("samples_per_second", "Samples/s"),
        Column("data_wait_share", "Data wait"),
    ]
    rows = [
        [
            words(a.name),
            words(format_differences(differences(a.config.recipe(), inputs.params.pretrain.recipe()))),
            words(", ".join(map(str, a.config.seeds))),
            number(a.config.steps),
            number(a.config.batch_size),
            words(a.config.precision),
            number(a.config.text.context_length),
            *([gigaflops(a.flops_per_text)] if counted else []),
            _millions(a.parameters.get("text_tower")),
            _millions(a.parameters.get("image_tower")),
            number(_logged_mean(a, "samples_per_second")),
            percent(_logged_mean(a, "data_wait_share")),
        ]
        for a in inputs.ablations
    ]
    frozen = "; the image tower is frozen" if all_frozen(inputs.ablations) else ""
    notes = [
        f"Context is the context length in tokens; the towers' columns are numbers of parameters{frozen}.",
        "Data wait is the share of a step's time spent waiting for data.",
        *([FLOPS_NOTE] if counted else []),
    ]
    return ReportTable("training", "Training", " ".join(notes), columns, rows)


def cost_table(inputs: ReportInputs) -> ReportTable:
    """Returns the text tower's FLOPs, a column per context length; no rows if they are unknown."""
    towers = inputs.towers
    counts = {length: flops for ablation in towers for length, flops in ablation.text_tower_flops.items()}
    lengths = sorted(counts)
    columns = [Column("ablation", "Text tower of", numeric=False)]
    columns += [Column(str(length), f"{length} tokens") for length in lengths]
    rows = [[words(towers[0].name), *(gigaflops(counts[length]) for length in lengths)]] if towers else []
    return ReportTable("text-cost", "GFLOPs per text, by context length", FLOPS_NOTE, columns, rows)


def _millions(parameters: int | None) -> Cell:
    return number(None) if parameters is None else Cell(f"{parameters / 1e6:.1f}\u00a0M", parameters)


def _logged_mean(ablation: Ablation, key: str) -> float | None:
    """Mean over the logged steps of all seeds; None if nothing was logged."""
    logged = [entry[key] for history in ablation.history.values() for entry in history if key in entry]
    return statistics.fmean(logged) if logged else None


def failures_table(inputs: ReportInputs) -> ReportTable:
    """Returns the failures by stage and kind; no rows if nothing failed."""
    columns = [
        Column("stage", "Stage", numeric=False),
        Column("kind", "Kind", numeric=False),
        Column("count", "Items"),
    ]
    rows = [
        [words(stage.label), words(kind), number(count)]
        for stage in inputs.stages
        for kind, count in [*sorted(stage.failure_kinds.items()), ("not recorded", _unnamed_failures(stage))]
        if count
    ]
    return ReportTable("failures", "Failures", "Items that were skipped, each recorded with its reason.", columns, rows)


def _unnamed_failures(stage: StageOutcome) -> int:
    return stage.counts.get("failed", 0) - sum(stage.failure_kinds.values())


def protocol_table(inputs: ReportInputs) -> ReportTable:
    """Returns each benchmark's evaluation settings, with all values where ablations differ."""
    columns = [
        Column("benchmark", "Benchmark", numeric=False),
        Column("setting", "Setting", numeric=False),
        Column("value", "Value", numeric=False),
    ]
    rows = []
    for benchmark in benchmark_names(inputs):
        values: dict[str, dict[str, None]] = {}  # setting → its distinct values, in order
        for ablation in inputs.ablations:
            result = ablation.benchmarks.get(benchmark)
            for key, value in result.protocol.items() if result else ():
                values.setdefault(key, {})[_plain(value, ablation.name)] = None
        rows += [[words(benchmark), words(key.replace("_", " ")), words(" · ".join(v))] for key, v in values.items()]
    note = "Stored with the scores so that they can be reproduced. Several values mean that ablations differ."
    return ReportTable("protocol", "Evaluation", note, columns, rows)


def baselines_table(inputs: ReportInputs) -> ReportTable:
    """Returns what each baseline is and how it was scored; no rows without baselines."""
    settings = ("kind", "context_length", "image_size", "preprocessing", "text_preparation", "precision", "libraries")
    columns = [
        Column(key, key.replace("_", " ").capitalize(), numeric=False) for key in ("model", *settings, "weights")
    ]
    rows = []
    for baseline in inputs.baselines:
        about = next((result.protocol for result in baseline.benchmarks.values()), {})
        cells = (about.get(key) for key in settings)
        rows.append(list(map(words, [baseline.model, *cells, about.get("weights_sha256", "")[:12]])))
    note = "Each model has its own tokenizer and preprocessing. Weights: the first digits of their SHA-256."
    return ReportTable("baselines", "Models that were not trained here", note, columns, rows)


def _plain(value: Any, ablation: str) -> str:
    """Formats a setting's value. In commands, the ablation's name becomes a placeholder, so that they are the same."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    parts = str(value).split(" ")
    return " ".join("<ablation>" if part == ablation and len(parts) > 1 else part for part in parts)
