"""Tables of scores, with ablations as rows and settings and metrics as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lotlip.evaluate.ceiling import repeats_in_words
from lotlip.evaluate.score_names import MAIN_METRICS, RECALLS, Metric
from lotlip.figures.intervals import OVER_IMAGES, OVER_SEEDS
from lotlip.report.inputs import Ablation, BenchmarkResult, ReportInputs
from lotlip.report.tables import Cell, Column, ReportTable, mark_best, number, score

FAMILIES = {
    "long": "Long text",
    "short": "Short text",
    "conditioned-long": "Long text, conditioned",
    "conditioned-short": "Short text, conditioned",
    "reranked-long": "Long text, re-ranked",
    "reranked-short": "Short text, re-ranked",
    "prefixes": "Growing prefixes",
    "unchanged": "Unchanged",
    "swapped": "Sentences 1 and 4 swapped",
    "deleted": "Sentence 1 deleted",
    "classification": "Classification",
}
FLOPS_COLUMN = Column("flops_per_text", "GFLOPs per text")
FLOPS_NOTE = (
    "GFLOPs: billions of floating-point operations of the text tower for one text that fills the context; a "
    "multiply-add counts as two."
)
BEST_POSSIBLE = "best possible"
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


NOT_TRAINED_HERE = "(not trained here)"


def baseline_label(model: str) -> str:
    """Returns the name of a baseline in tables."""
    return f"{model} {NOT_TRAINED_HERE}"


def baseline_scores(inputs: ReportInputs, benchmark: str) -> dict[str, dict[str, float]]:
    """Returns the rows of the baselines: label → metric → value."""
    return {
        baseline_label(one.model): one.benchmarks[benchmark].scores
        for one in inputs.baselines
        if benchmark in one.benchmarks
    }


def benchmark_names(inputs: ReportInputs) -> list[str]:
    """Returns the benchmarks that have results, in the order of params.yaml, then any others."""
    names = {name for ablation in inputs.ablations for name in ablation.benchmarks}
    declared = [name for name in inputs.params.evaluate.names if name in names]
    return [*declared, *sorted(names - set(declared))]


def metric_names(ablations: Iterable[Ablation], benchmark: str) -> list[str]:
    """Returns all metrics of a benchmark in the order of `Metric`, then any others."""
    names = {name for a in ablations for seed in _results(a, benchmark).seeds.values() for name in seed}
    return [*(name for name in Metric if name in names), *sorted(names - set(Metric))]


def main_metrics(names: Iterable[str]) -> list[str]:
    """Returns the metrics of the paper's tables: R@1 and accuracy."""
    return [name for name in names if name in MAIN_METRICS]


def metric_column(metric: str, main: bool) -> Column:
    """Returns a metric's column; in the main tables, its group heading includes the statistic, such as R@1."""
    family, *rest = metric.split(".")
    stat = _stat_words(rest[-1]) if rest else family
    direction = " ".join(DIRECTIONS.get(part, part) for part in rest[:-1])
    heading = FAMILIES.get(family, family.replace("_", " ").capitalize())
    if main and direction:
        return Column(metric, direction, f"{heading}, {stat}")
    return Column(metric, stat, f"{heading}, {direction}" if direction else heading)


def _stat_words(stat: str) -> str:
    if stat[0] == "r" and stat[1:].isdigit():
        return f"R@{stat[1:]}"
    if stat.startswith("top") and stat[3:].isdigit():
        return f"top-{stat[3:]}"
    if stat.startswith("himo"):
        return f"HiMo@{stat[4:]}"
    return stat.replace("_", " ")


def _results(ablation: Ablation, benchmark: str) -> BenchmarkResult:
    return ablation.benchmarks.get(benchmark, BenchmarkResult())


def results_table(
    slug: str,
    title: str,
    note: str,
    ablations: Sequence[Ablation],
    lead: Sequence[tuple[Column, Sequence[Cell]]],
    benchmark: str,
    metrics: Sequence[str],
    main: bool = True,
    others: Mapping[str, Mapping[str, float]] | None = None,
    paper: str = "",
) -> ReportTable:
    """Returns a table with a row per ablation, the `lead` columns and a column per metric.

    Reference rows at the end show chance, the best possible score if repeats lower it, and
    `others`: models that are no ablations.
    """
    by_ablation = [_results(a, benchmark) for a in ablations]
    scores = [
        mark_best([score(result.values(metric), metric, result.interval(metric)) for result in by_ablation], metric)
        for metric in metrics
    ]
    columns = [column for column, _ in lead] + [metric_column(metric, main) for metric in metrics]
    rows = [list(row) for row in zip(*[cells for _, cells in lead], *scores, strict=True)]
    # the first ablation may lack metrics that others have
    chance = {m: value for result in reversed(by_ablation) for m, value in result.chance.items()}
    ceiling = {m: value for result in reversed(by_ablation) if result.limited for m, value in result.ceiling.items()}
    reference_scores = {"chance": chance, BEST_POSSIBLE: ceiling, **(others or {})}
    blank = [Cell("") for _ in lead[1:]]
    references = [
        [
            Cell(name),
            *blank,
            *(score([values[metric]], metric) if metric in values else number(None) for metric in metrics),
        ]
        for name, values in reference_scores.items()
        if values
    ]
    return ReportTable(slug, title, note, columns, rows, references, paper)


def intervals_note(ablations: Iterable[Ablation]) -> str:
    """Describes the intervals of the scores; empty if there are none."""
    results = [result for ablation in ablations for result in ablation.benchmarks.values()]
    several = any(len(result.seeds) > 1 for result in results)
    single = any(len(result.seeds) == 1 and result.intervals for result in results)
    return " ".join([OVER_SEEDS] * several + [OVER_IMAGES] * single)


def ceiling_note(inputs: ReportInputs, benchmark: str) -> str:
    """Explains how repeated texts and images limit a benchmark's scores; empty if nothing is repeated."""
    result = next((a.benchmarks[benchmark] for a in inputs.scored if _results(a, benchmark).limited), None)
    if result is None:
        return ""
    recalls = ", ".join(
        f"{metric_column(metric, main=False).group.lower()} {100 * value:.1f} %"
        for metric, value in result.ceiling.items()
        if metric in RECALLS and value < 1
    )
    text = f"The benchmark has {repeats_in_words(result.protocol)}, which no model can tell apart."
    return f"{text} The best possible R@1 is therefore below 100 %: {recalls}." if recalls else text


def flops_known(ablations: Iterable[Ablation]) -> bool:
    """Whether any ablation has FLOPs for a text that fills its context."""
    return any(ablation.flops_per_text is not None for ablation in ablations)


def all_frozen(ablations: Iterable[Ablation]) -> bool:
    """Whether all ablations freeze the image tower."""
    return all(ablation.config.image_tower.frozen for ablation in ablations)
