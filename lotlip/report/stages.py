"""Tables about what lies behind the results: data, image tower, training, time, failures, protocol."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lotlip.core.differences import differences, format_differences
from lotlip.report.inputs import Ablation, ReportInputs, StageOutcome
from lotlip.report.results import FLOPS_COLUMN, FLOPS_NOTE, all_frozen, benchmark_names, flops_known
from lotlip.report.tables import Cell, Column, Table, duration, gigaflops, number, percent, words


def statistics_table(inputs: ReportInputs) -> Table:
    """Images, texts, sub-captions and tokens per text, for short captions and each captioner."""
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
    note = "Tokens are word pieces, special tokens not counted." + (f" Samples in shards: {splits}." if splits else "")
    return Table("data", "Captions in numbers", note, columns, rows)


def accuracy_table(inputs: ReportInputs) -> Table:
    """The image tower's accuracy per attribute, from the notes of its stage."""
    notes = next((stage.notes for stage in inputs.stages if stage.label == "image-tower"), {})
    found = {name.partition(".")[2]: value for name, value in notes.items() if name.startswith("accuracy.")}
    columns = [Column("attribute", "Attribute", numeric=False), Column("accuracy", "Accuracy")]
    rows = [[words(name.replace("_", " ")), percent(value)] for name, value in found.items()]
    note = "On pictures that it was not trained on."
    if all_frozen(inputs.ablations):
        note += " The tower is frozen after this."
    return Table("image-tower", "What the image tower knows", note, columns, rows)


def quality_table(inputs: ReportInputs) -> Table:
    """What each captioner's captions are like, and the share that each rule dropped; from the notes of the stages."""
    found = {
        stage.label.removeprefix("caption-"): stage.notes["quality"]
        for stage in inputs.stages
        if stage.label.startswith("caption-") and stage.notes.get("quality")
    }
    # a column for each rule that dropped something
    rules = list(dict.fromkeys(rule for each in found.values() for rule, count in each["filtered"].items() if count))
    columns = [
        Column("captioner", "Captioner", numeric=False),
        Column("captions", "Captions"),
        Column("words", "Words, mean"),
        Column("words_p05", "5 %"),
        Column("words_p95", "95 %"),
        Column("repetition", "Repetition"),
        Column("agreement", "Agreement"),
        Column("truncated", "Cut off"),
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
        for name, quality in found.items()
    ]
    note = (
        "Repetition is the mean share of runs of four words that were there before in the caption, agreement that of "
        "the short caption's content words that the caption has. Rules are in caption.quality of params.yaml; all but "
        "the shares of what they dropped is of the captions that they kept."
    )
    return Table("caption-quality", "Quality of long captions", note, columns, rows)


def stages_table(inputs: ReportInputs) -> Table:
    """Time, throughput, counts and the orchestration's share, for each stage."""
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
    note = "Time is from start to end. Orchestration is what was not work on data: imports, Prefect, the gate, MLflow."
    whole = sum(stage.seconds for stage in inputs.stages if not math.isnan(stage.seconds))
    around = sum(sum(stage.orchestration_seconds.values()) for stage in inputs.stages)
    total = (
        [Cell("together"), duration(whole)]
        + [Cell("")] * 4
        + [duration(around), percent(around / whole if whole else None)]
    )
    return Table("stages", "Time", note, columns, rows, [total] if rows else [])


def training_table(inputs: ReportInputs) -> Table:
    """What each ablation was trained with: seeds, steps, lengths, sizes, and what a text costs."""
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
    frozen = ", the image tower is frozen" if all_frozen(inputs.ablations) else ""
    notes = [
        f"Context is the longest text in tokens; the towers' columns count parameters{frozen}.",
        "Data wait is the share of a step's time that training waited for data.",
        *([FLOPS_NOTE] if counted else []),
    ]
    return Table("training", "Training", " ".join(notes), columns, rows)


def cost_table(inputs: ReportInputs) -> Table:
    """Operations of the text tower, a column for each context length; no rows where they are not known."""
    towers = inputs.towers
    counts = {length: flops for ablation in towers for length, flops in ablation.text_tower_flops.items()}
    lengths = sorted(counts)
    columns = [Column("ablation", "Text tower of", numeric=False)]
    columns += [Column(str(length), f"{length} tokens") for length in lengths]
    rows = [[words(towers[0].name), *(gigaflops(counts[length]) for length in lengths)]] if towers else []
    return Table("text-cost", "GFLOPs per text, by context length", FLOPS_NOTE, columns, rows)


def _millions(parameters: int | None) -> Cell:
    return number(None) if parameters is None else Cell(f"{parameters / 1e6:.1f}\u00a0M", parameters)


def _logged_mean(ablation: Ablation, key: str) -> float | None:
    """Mean over all logged steps of all seeds; None where none was logged."""
    logged = [entry[key] for history in ablation.history.values() for entry in history if key in entry]
    return statistics.fmean(logged) if logged else None


def failures_table(inputs: ReportInputs) -> Table:
    """Failures by stage and kind; no rows when nothing failed."""
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
    return Table(
        "failures", "Failures", "Items that did not come through, each recorded with its reason.", columns, rows
    )


def _unnamed_failures(stage: StageOutcome) -> int:
    return stage.counts.get("failed", 0) - sum(stage.failure_kinds.values())


def protocol_table(inputs: ReportInputs) -> Table:
    """How each benchmark was measured; where ablations differ, all values."""
    columns = [
        Column("benchmark", "Benchmark", numeric=False),
        Column("setting", "Setting", numeric=False),
        Column("value", "Value", numeric=False),
    ]
    rows = []
    for benchmark in benchmark_names(inputs):
        values: dict[str, dict[str, None]] = {}  # setting → its different values, in order
        for ablation in inputs.ablations:
            result = ablation.benchmarks.get(benchmark)
            for key, value in result.protocol.items() if result else ():
                values.setdefault(key, {})[_plain(value, ablation.name)] = None
        rows += [[words(benchmark), words(key.replace("_", " ")), words(" · ".join(v))] for key, v in values.items()]
    note = "Kept beside the scores, so that they can be measured again. Several values: ablations differ in it."
    return Table("protocol", "Evaluation", note, columns, rows)


def _plain(value: Any, ablation: str) -> str:
    """A setting's value for a person; an ablation's own name in a command does not make it another command."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    parts = str(value).split(" ")
    return " ".join("<ablation>" if part == ablation and len(parts) > 1 else part for part in parts)
