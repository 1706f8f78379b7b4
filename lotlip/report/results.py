"""Tables of scores: ablations down, what they differ in and what was measured across."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lotlip.evaluate.ceiling import repeats_in_words
from lotlip.evaluate.score_names import MAIN_METRICS, RECALLS, Metric
from lotlip.figures.intervals import OVER_PICTURES, OVER_SEEDS
from lotlip.report.inputs import Ablation, Benchmark, ReportInputs
from lotlip.report.tables import Cell, Column, Table, mark_best, number, score

FAMILIES = {"long": "Long text", "short": "Short text", "classification": "Classification"}
FLOPS_COLUMN = Column("flops_per_text", "GFLOPs per text")
FLOPS_NOTE = (
    "GFLOPs: the text tower's billions of floating-point operations on one text that fills the context, "
    "two for a multiply-add."
)
BEST_POSSIBLE = "best possible"
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def benchmark_names(inputs: ReportInputs) -> list[str]:
    """Benchmarks that have a result, in params.yaml's order, then any others."""
    found = {name for ablation in inputs.ablations for name in ablation.benchmarks}
    wanted = [name for name in inputs.params.evaluate.names if name in found]
    return [*wanted, *sorted(found - set(wanted))]


def metric_names(ablations: Iterable[Ablation], benchmark: str) -> list[str]:
    """All metrics of a benchmark in the order of `Metric`, then any others."""
    names = {name for a in ablations for seed in _results(a, benchmark).seeds.values() for name in seed}
    return [*(name for name in Metric if name in names), *sorted(names - set(Metric))]


def main_metrics(names: Iterable[str]) -> list[str]:
    """The ones for the paper's tables: first-place recall and accuracy."""
    return [name for name in names if name in MAIN_METRICS]


def metric_column(metric: str, main: bool) -> Column:
    """A metric's column; in the main tables the heading has the R@1 that its columns share."""
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
    return stat.replace("_", " ")


def _results(ablation: Ablation, benchmark: str) -> Benchmark:
    return ablation.benchmarks.get(benchmark, Benchmark())


def results_table(
    slug: str,
    title: str,
    note: str,
    ablations: Sequence[Ablation],
    lead: Sequence[tuple[Column, Sequence[Cell]]],
    benchmark: str,
    metrics: Sequence[str],
    main: bool = True,
    published: Mapping[str, Mapping[str, float]] | None = None,
    paper: str = "",
) -> Table:
    """Ablations down, the `lead` columns and then metrics across; below them guessing, the best possible
    score where repeats lower it, and `published` models.
    """
    found = [_results(a, benchmark) for a in ablations]
    scores = [
        mark_best([score(result.values(metric), metric, result.interval(metric)) for result in found], metric)
        for metric in metrics
    ]
    columns = [column for column, _ in lead] + [metric_column(metric, main) for metric in metrics]
    rows = [list(row) for row in zip(*[cells for _, cells in lead], *scores, strict=True)]
    guess = next((result.chance for result in found if result.chance), None)
    best = next((result.ceiling for result in found if result.limited), None)
    known = {"guessing": guess, BEST_POSSIBLE: best, **(published or {})}
    blank = [Cell("") for _ in lead[1:]]
    references = [
        [
            Cell(name),
            *blank,
            *(score([values[metric]], metric) if metric in values else number(None) for metric in metrics),
        ]
        for name, values in known.items()
        if values
    ]
    return Table(slug, title, note, columns, rows, references, paper)


def intervals_note(ablations: Iterable[Ablation]) -> str:
    """What the intervals beside the scores are; empty where there are none."""
    results = [result for ablation in ablations for result in ablation.benchmarks.values()]
    several = any(len(result.seeds) > 1 for result in results)
    alone = any(len(result.seeds) == 1 and result.intervals for result in results)
    return " ".join([OVER_SEEDS] * several + [OVER_PICTURES] * alone)


def ceiling_note(inputs: ReportInputs, benchmark: str) -> str:
    """What repeated texts and images mean for a benchmark's scores; empty where nothing is repeated."""
    result = next((a.benchmarks[benchmark] for a in inputs.scored if _results(a, benchmark).limited), None)
    if result is None:
        return ""
    recalls = ", ".join(
        f"{metric_column(metric, main=False).group.lower()} {100 * value:.1f} %"
        for metric, value in result.ceiling.items()
        if metric in RECALLS and value < 1
    )
    text = f"The benchmark has {repeats_in_words(result.protocol)}: no model can tell these apart."
    return f"{text} The best possible R@1 is therefore below 100 %: {recalls}." if recalls else text


def flops_known(ablations: Iterable[Ablation]) -> bool:
    """Whether any has the operations on a text that fills its context."""
    return any(ablation.flops_per_text is not None for ablation in ablations)


def all_frozen(ablations: Iterable[Ablation]) -> bool:
    """Whether none trains its image tower."""
    return all(ablation.config.image_tower.frozen for ablation in ablations)
