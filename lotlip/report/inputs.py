"""The report's inputs, read from the outputs of the other stages; missing inputs are listed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lotlip.core.checks import Check
from lotlip.core.record import RecordT, read_record
from lotlip.data.index import INDEX_FILE, ShardIndex, UnitIndex
from lotlip.data.records import DATA_DOCS
from lotlip.data.stage_record import StageRecord
from lotlip.evaluate.records import (
    BASELINE_SCORES,
    BASELINES,
    NOT_DRAWN,
    OUTDATED,
    AblationScores,
    Baseline,
    Baselines,
    BenchmarkScores,
    NotDrawn,
    made_with,
)
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.records import HISTORY, History, read_history
from lotlip.report.config import CostFigureConfig
from lotlip.report.look import Look, jpeg, look_of
from lotlip.report.stored import StoredResults, load_stored, outdated

if TYPE_CHECKING:
    from lotlip.config.params import Params

CAPTION_SAMPLE = 10_000  # short captions whose words are counted


class BenchmarkResult(BenchmarkScores):
    """One ablation's results on one benchmark, with figures.

    Attributes:
        pictures: name → PNG of the first seed's attention maps.
        example_images: index of an image in `examples` → JPEG.
        not_drawn: figure that could not be drawn → reason.
    """

    pictures: dict[str, bytes] = Field({})
    example_images: dict[int, bytes] = Field({})
    not_drawn: dict[str, str] = Field({})

    def values(self, metric: str) -> list[float]:
        """Returns the metric's value for each seed that has the metric, in the order of seeds."""
        return [self.seeds[seed][metric] for seed in sorted(self.seeds) if metric in self.seeds[seed]]

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Returns the metric's bootstrap interval for a single seed; None for several, which have a t interval."""
        return self.intervals.get(next(iter(self.seeds)), {}).get(metric) if len(self.seeds) == 1 else None


@dataclass(frozen=True)
class Ablation:
    """Settings and results of one ablation.

    Attributes:
        name: name in params.yaml.
        config: its settings in params.yaml.
        parameters: part of the model → number of parameters.
        text_tower_flops: tokens per text → FLOPs of the text tower per text; empty if unknown.
        benchmarks: benchmark → results; without those of other settings or data than the current ones.
        history: seed → logged steps, each with "step", "loss", …
    """

    name: str
    config: PretrainConfig
    parameters: dict[str, int] = field(default_factory=dict)
    text_tower_flops: dict[int, int] = field(default_factory=dict)
    benchmarks: dict[str, BenchmarkResult] = field(default_factory=dict)
    history: dict[int, History] = field(default_factory=dict)

    @property
    def flops_per_text(self) -> int | None:
        """The text tower's FLOPs for a text that fills the ablation's context; None if unknown."""
        return self.text_tower_flops.get(self.config.text.context_length)

    @property
    def short_share(self) -> float:
        """The short caption's share of the loss; the paper's 1/N of N text features if none is set."""
        config = self.config
        long_texts = config.long_texts.per_image if config.long_texts.sub_captions else 0
        features = 1 + long_texts * (1 + config.text.corner_tokens)
        fraction = config.loss.short_loss_fraction
        return 1 / features if fraction is None or features == 1 else fraction


class StageOutcome(StageRecord):
    """A stage's record of its last run, with the files that belong to it.

    Attributes:
        label: the record's file name: "ingest", "caption-llava", "pretrain-lotlip", …
        data_docs: folder of its Great Expectations Data Docs; None if it has none.
    """

    label: str
    data_docs: Path | None = None

    @property
    def failed_checks(self) -> list[Check]:
        """The gate's checks that failed."""
        return [check for check in self.gate if not check.success]

    @property
    def pages(self) -> dict[str, str]:
        """Table that the gate checked → its page in `data_docs`; these pages load nothing from the web."""
        if self.data_docs is None:
            return {}
        pages = (page.relative_to(self.data_docs) for page in sorted(self.data_docs.glob("validations/*/**/*.html")))
        return {page.parts[1]: page.as_posix() for page in pages}

    @property
    def orchestration_share(self) -> float:
        """Orchestration as a fraction of the stage's duration; NaN if unknown."""
        known = self.orchestration_seconds and self.seconds > 0
        return sum(self.orchestration_seconds.values()) / self.seconds if known else math.nan


@dataclass(frozen=True)
class Picture:
    """A picture of the contact sheet: JPEG bytes, its short caption, and captioner → long caption."""

    key: str
    jpeg: bytes
    short_caption: str
    long_captions: dict[str, str]


@dataclass(frozen=True)
class ReportInputs:
    """All inputs of the report.

    Attributes:
        params: params.yaml.
        ablations: all ablations of params.yaml, in its order.
        stages: the available stage records, in the order of stages.
        splits: split → number of samples.
        statistics: "raw" or a captioner → statistics of its texts.
        pictures: the contact sheet.
        missing: messages about missing or outdated inputs.
        not_run: ablations without any output. This is not an error: the default set runs few ablations.
        ingest: index.json of the ingest stage; None if missing.
        caption_words: "captions", the number of short captions read, and quantiles of their word counts: "p05",
            "median", "p95"; empty if there are none.
        baselines: scored models that were not trained here, in the order of params.yaml.
        look: a look at the data; None if ingest has not finished.
        stored: results of more seeds; None if `report.stored_results` names none.
    """

    params: Params
    ablations: list[Ablation]
    stages: list[StageOutcome]
    splits: dict[str, int]
    statistics: dict[str, dict[str, float]]
    pictures: list[Picture]
    missing: list[str]
    not_run: list[str] = field(default_factory=list)
    ingest: UnitIndex | None = None
    caption_words: dict[str, float] = field(default_factory=dict)
    baselines: list[Baseline] = field(default_factory=list)
    look: Look | None = None
    stored: StoredResults | None = None

    @property
    def with_stored(self) -> ReportInputs | None:
        """The same inputs with the stored scores instead of this run's; None if there are none that can be used."""
        if not self.stored or not self.stored.rows:
            return None
        scores: dict[str, dict[str, BenchmarkResult]] = {name: {} for name in self.params.names}
        for row in self.stored.rows:
            scores[row.ablation].setdefault(row.benchmark, BenchmarkResult()).seeds[row.seed] = row.scores
        ablations = [
            Ablation(name, self.params.ablation(name), benchmarks=in_order(found, self.params.evaluate.names))
            for name, found in scores.items()
        ]
        return replace(self, ablations=ablations)

    @property
    def scored(self) -> list[Ablation]:
        """The ablations that have results."""
        return [ablation for ablation in self.ablations if ablation.benchmarks]

    def chosen(self, names: Iterable[str]) -> list[Ablation]:
        """Returns the named ablations that have results, in the order of the names."""
        scored = {ablation.name: ablation for ablation in self.scored}
        return [scored[name] for name in names if name in scored]

    def training_images(self, config: PretrainConfig) -> float:
        """Returns the number of images that an ablation is trained on, or its share of all if their number is unknown.

        A number in `pretrain.samples` is always known.
        """
        subset = 1.0 if config.samples is None else float(config.samples)
        if config.samples is not None and subset >= 1:
            return subset
        total = self.splits.get("train")
        return subset if total is None else max(round(subset * total), 1)

    @property
    def systems(self) -> dict[str, Ablation]:
        """The main systems, shown in headlines and examples: the paper's systems, by their roles in `findings`.

        If `findings` declares none, the first ablations under their own names.
        """
        findings, named = self.params.findings, {ablation.name: ablation for ablation in self.ablations}
        roles = {
            "LiT": findings.lit,
            "LiT + long texts": findings.lit_long,
            "Long-CLIP": findings.long_clip,
            "LoTLIP": findings.lotlip,
        }
        declared = {system: named[name] for system, name in roles.items() if name}
        return declared or {ablation.name: ablation for ablation in (self.scored or self.ablations)[: len(roles)]}

    @property
    def towers(self) -> list[Ablation]:
        """Ablations whose text-tower FLOPs are shown against the context length.

        These are the rows of tables with a figure of kind `cost`, or else the first ablation with counted FLOPs.
        """
        tables = [t for t in self.params.tables.values() if isinstance(t.figure, CostFigureConfig)]
        counted = [ablation for ablation in self.ablations if ablation.text_tower_flops]
        return [a for a in counted if any(a.name in table.rows for table in tables)] or counted[:1]


def load_inputs(params: Params, root: Path) -> ReportInputs:
    """Reads the outputs of the stages below `root`.

    A missing input adds a message to `missing`; a broken file is an error.

    Raises:
        ValueError: a file is not what its stage writes.
    """
    missing: list[str] = []
    not_run = [name for name in params.names if not _was_run(params, root, name)]
    current = made_with(params.evaluate, params.paths, params.caption.describing, root)
    ablations = [
        Ablation(name, params.ablation(name)) if name in not_run else _ablation(params, root, name, current, missing)
        for name in params.names
    ]
    stages = _stages(params, root, not_run, missing)
    index = _optional(root, params.paths.shards / INDEX_FILE, "data statistics", missing, ShardIndex)
    return ReportInputs(
        params=params,
        ablations=ablations,
        stages=stages,
        splits={split: entry.samples for split, entry in index.splits.items()} if index else {},
        statistics=index.statistics if index else {},
        pictures=_pictures(params, root, missing),
        missing=missing,
        not_run=not_run,
        ingest=_optional(root, params.paths.ingest / INDEX_FILE, "ingest's index", [], UnitIndex),
        caption_words=_caption_words(root / params.paths.ingest),
        baselines=_baselines(params, root, missing),
        look=look_of(params, root) if (root / params.paths.ingest / INDEX_FILE).is_file() else None,
        stored=load_stored(params, root, missing),
    )


def _caption_words(ingest: Path) -> dict[str, float]:
    """Quantiles of the word count of the first `CAPTION_SAMPLE` short captions."""
    import lotlip.data.partitions as partitions

    counts: list[int] = []
    for name in partitions.unit_names(ingest):
        captions = partitions.read_table(ingest, name, ["short_caption"])["short_caption"]
        counts += [len(caption.split()) for caption in captions]
        if len(counts) >= CAPTION_SAMPLE:
            break
    if not counts:
        return {}
    ordered = sorted(counts)
    quantiles = {"p05": 0.05, "median": 0.5, "p95": 0.95}
    values = {name: float(ordered[round(share * (len(ordered) - 1))]) for name, share in quantiles.items()}
    return {"captions": float(len(ordered)), **values}


def _was_run(params: Params, root: Path, name: str) -> bool:
    """Whether an ablation has any output: metrics, a model, or a stage record."""
    labels = (f"{stage}-{name}.json" for stage in ("pretrain", "evaluate"))
    paths = [params.paths.metrics / f"{name}.json", params.paths.models / name]
    return any((root / path).exists() for path in [*paths, *(params.paths.stages / label for label in labels)])


def _optional(root: Path, path: Path, what: str, missing: list[str], kind: type[RecordT]) -> RecordT | None:
    """Reads a file's record; if there is no file, adds a message to `missing` and returns None."""
    if (root / path).exists():
        return kind.load(root / path)
    missing.append(f"{what}: {path} does not exist")
    return None


def _ablation(params: Params, root: Path, name: str, current: Mapping[str, str], missing: list[str]) -> Ablation:
    """Reads an ablation's outputs; `current` is the result of `made_with`."""
    wanted = params.ablation(name)
    history = _history(root / params.paths.models / name, wanted.seeds, name, missing)
    found = _optional(root, params.paths.metrics / f"{name}.json", f"metrics of {name}", missing, AblationScores)
    if found is None:
        return Ablation(name, wanted, history=history)
    if problem := outdated(params, root, name, found):
        missing.append(f"metrics of {name}: {problem}; rerun its evaluate stage")
        return Ablation(name, wanted, history=history)
    drawn = root / params.paths.metrics / "attention" / name
    not_drawn = read_record(drawn / NOT_DRAWN, NotDrawn) if (drawn / NOT_DRAWN).is_file() else {}
    left_out = [name for name, result in found.benchmarks.items() if result.is_outdated(current.get(name))]
    if left_out:
        missing.append(f"metrics of {name} on {', '.join(left_out)}: {OUTDATED}; rerun its evaluate stage")
    benchmarks = {
        benchmark: BenchmarkResult(
            **dict(result),
            pictures=attention_pictures(drawn, benchmark),
            example_images=_example_images(drawn / "images" / benchmark),
            not_drawn=not_drawn.get(benchmark, {}),
        )
        for benchmark, result in in_order(found.benchmarks, params.evaluate.names).items()
        if benchmark not in left_out
    }
    for benchmark, result in benchmarks.items():
        absent = sorted(set(wanted.seeds) - set(result.seeds))
        if absent:
            missing.append(f"metrics of {name} on {benchmark}: none for seed {', '.join(map(str, absent))}")
    missing += [
        f"metrics of {name}: none on {other}" for other in params.evaluate.names if other not in found.benchmarks
    ]
    return Ablation(name, wanted, found.parameters, found.text_tower_flops, benchmarks, history)


def _baselines(params: Params, root: Path, missing: list[str]) -> list[Baseline]:
    if not params.evaluate.baselines:
        return []
    path = params.paths.metrics / BASELINES / BASELINE_SCORES
    found = _optional(root, path, "scores of the baselines", missing, Baselines)
    scored = {one.model: one for one in found.models} if found else {}
    if found:
        absent = [name for name in params.evaluate.baselines if name not in scored]
        missing += [f"scores of the baseline {name}: there are none; rerun the stage baselines" for name in absent]
    return [scored[name] for name in params.evaluate.baselines if name in scored]


def in_order(results: Mapping[str, Any], benchmarks: Sequence[str]) -> dict[str, Any]:
    """Sorts results by the order of benchmarks in params.yaml, other benchmarks last; JSON files sort them by name.

    Args:
        results: benchmark → results.
        benchmarks: benchmarks in the order of params.yaml.
    """
    names = [*(name for name in benchmarks if name in results), *sorted(set(results) - set(benchmarks))]
    return {name: results[name] for name in names}


def attention_pictures(folder: Path, benchmark: str) -> dict[str, bytes]:
    """Reads the attention maps that the evaluate stage drew for a benchmark, name → PNG.

    Files are named <benchmark>-<name>.png; only the benchmark may contain hyphens.
    """
    named = {file: file.stem.rpartition("-") for file in sorted(folder.glob("*.png"))}
    return {kind: file.read_bytes() for file, (of, _, kind) in named.items() if of == benchmark}


def _example_images(folder: Path) -> dict[int, bytes]:
    """Reads the images of example retrievals, index → JPEG."""
    return {int(file.stem): file.read_bytes() for file in sorted(folder.glob("*.jpg"))}


def _history(folder: Path, seeds: list[int], name: str, missing: list[str]) -> dict[int, History]:
    there = [seed for seed in seeds if (folder / f"seed-{seed}" / HISTORY).exists()]
    absent = [str(seed) for seed in seeds if seed not in there]
    if absent:
        missing.append(f"loss curve of {name}: no {HISTORY} for seed {', '.join(absent)}")
    return {seed: read_history(folder, seed) for seed in there}


def _stages(params: Params, root: Path, not_run: list[str], missing: list[str]) -> list[StageOutcome]:
    names = [name for name in params.names if name not in not_run]
    labels = [
        "ingest",
        "image-tower",
        *(f"caption-{name}" for name in params.caption.captioners),
        "shard",
        *(f"pretrain-{name}" for name in names),
        *(["baselines"] if params.evaluate.baselines else []),
        *(f"evaluate-{name}" for name in names),
    ]
    paths = {label: root / params.paths.stages / f"{label}.json" for label in labels}
    absent = [label for label, path in paths.items() if not path.exists()]
    if absent:
        missing.append(f"records of stages: {', '.join(absent)}")
    records = []
    for label, path in paths.items():
        if path.exists():
            pages = path.parent / DATA_DOCS / label
            record, docs = StageRecord.load(path), pages if (pages / "index.html").is_file() else None
            records.append(StageOutcome(**dict(record), label=label, data_docs=docs))
    return records


# --- contact sheet ------------------------------------------------------------------------------------------------


def _pictures(params: Params, root: Path, missing: list[str]) -> list[Picture]:
    """Returns the first pictures of the test split, rendered or scaled for the page, with their captions."""
    import lotlip.data.partitions as partitions

    if params.report.contact_sheet == 0:
        return []
    ingest = root / params.paths.ingest
    names = partitions.unit_names(ingest, "test")
    if not names:
        missing.append(f"contact sheet: {params.paths.ingest / 'test'} has no partition")
    no_captions: dict[str, None] = {}  # messages, in order and without duplicates
    pictures: list[Picture] = []
    for name in names:
        rows = partitions.read_table(ingest, name).head(params.report.contact_sheet - len(pictures)).to_dict("records")
        captions = _long_captions(params, root, name, no_captions)
        for row in rows:
            image = partitions.read_image(ingest, name, row["offset"], row["size"])
            scene = row.get("scene")
            picture = jpeg(image, scene if isinstance(scene, str) else None)
            pictures.append(Picture(row["key"], picture, row["short_caption"], captions.get(row["key"], {})))
        if len(pictures) == params.report.contact_sheet:
            break
    missing += no_captions
    return pictures


def _long_captions(params: Params, root: Path, name: str, no_captions: dict[str, None]) -> dict[str, dict[str, str]]:
    """Reads a partition's long captions, key → captioner → caption; adds missing captioners to `no_captions`."""
    import lotlip.data.partitions as partitions

    captions: dict[str, dict[str, str]] = {}
    for captioner in params.caption.describing:
        folder = root / params.paths.captions / captioner
        if not (folder / f"{name}.parquet").exists():
            no_captions[f"contact sheet: no captions of {captioner} for {name}"] = None
            continue
        table = partitions.read_captions(folder, name, ["key", "text"])
        for key, text in zip(table["key"], table["text"], strict=True):
            captions.setdefault(key, {})[captioner] = text
    return captions
