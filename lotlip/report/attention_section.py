"""The report's section "Where attention goes": a table of attention scores and the main systems' attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lotlip.figures.charts import Figure
from lotlip.figures.intervals import estimate
from lotlip.report.inputs import Ablation, BenchmarkResult, ReportInputs
from lotlip.report.tables import Cell, Column, ReportTable, estimate_cell, number, score, words

_SMALL, _SALIENT = "On small objects, %", "On the salient one"
_ENTROPY, _WORDS = "Entropy", "On salient words, %"
_RATIO = "_over_"
_COLUMNS = (
    Column("on_named_object", "named", _SMALL),
    Column("on_object_not_named", "not named", _SMALL),
    Column("on_named_object_over_chance", "÷ chance", _SMALL),
    Column("on_salient_object", "%", _SALIENT),
    Column("on_salient_object_over_chance", "÷ chance", _SALIENT),
    Column("cls_entropy", "[CLS]", _ENTROPY),
    Column("corner1_entropy", "Cor 1", _ENTROPY),
    Column("cls_on_salient_words", "[CLS]", _WORDS),
    Column("corner1_on_salient_words", "Cor 1", _WORDS),
)
# Score → the measured quantity it equals under uniform relevance and uniform attention over tokens.
_UNIFORM = {
    "on_named_object": "named_object_area",
    "on_object_not_named": "named_object_area",
    "on_salient_object": "salient_object_area",
    "cls_entropy": "length_entropy",
    "corner1_entropy": "length_entropy",
    "cls_on_salient_words": "salient_words_length",
    "corner1_on_salient_words": "salient_words_length",
}
_NOTE = (
    "Share of patch relevance, by gradient-weighted attention rollout, that falls on an object when the text names it "
    "or names another small object; chance is the object's share of the image. Brackets: 95 % confidence interval "
    "over scenes, for one seed; ±: half of the 95 % t interval over seeds. Attention over a long text, by attention "
    "rollout: its entropy over sub-captions, which is 1 when all have equal shares, and its share on the salient "
    "object's words. Last row: uniform relevance and uniform attention."
)
_FIGURES = {
    "relevance": (
        "relevance of patches",
        "Red: patches that support the text above, by gradient-weighted attention rollout; each map is scaled to its "
        "maximum. A circle marks the object that the text names, where that is known.",
    ),
    "reading": (
        "how a long text is read",
        "Share of attention on each sub-caption, by attention rollout without special tokens; by length: if each "
        "token had the same share. Entropy: 1 when all sub-captions have equal shares.",
    ),
}


def attention_table(inputs: ReportInputs, benchmark: str) -> ReportTable | None:
    """Returns the attention scores, a row per ablation; None where there are none. Empty columns are left out."""
    measured = [(a, a.benchmarks[benchmark]) for a in inputs.ablations if benchmark in a.benchmarks]
    measured = [(ablation, result) for ablation, result in measured if result.attention]
    columns = [column for column in _COLUMNS if any(_values(result, column.key) for _, result in measured)]
    if not columns:
        return None
    rows = [[words(a.name), *(_cell(result, column.key) for column in columns)] for a, result in measured]
    most_complete = max((result for _, result in measured), key=lambda result: sum(map(len, _all_values(result))))
    uniform = [number(1.0, "{:.2f}") if _RATIO in c.key else _cell(most_complete, _UNIFORM[c.key]) for c in columns]
    note = " ".join([_NOTE, *_left_out(measured)])
    header = [Column("ablation", "Ablation", numeric=False), *columns]
    slug, title = f"{benchmark}-attention", "Where attention goes"
    return ReportTable(slug, title, note, header, rows, [[Cell("uniform"), *uniform]])


def attention_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """Returns the main systems' attention maps, grouped by kind."""
    figures = []
    for kind, (title, note) in _FIGURES.items():
        for system, ablation in inputs.systems.items():
            png = ablation.benchmarks[benchmark].pictures.get(kind) if benchmark in ablation.benchmarks else None
            problem = ablation.benchmarks[benchmark].not_drawn.get(kind, "") if benchmark in ablation.benchmarks else ""
            if png or problem:
                slug = f"{benchmark}-attention-{kind}-{ablation.name}"
                figures.append(Figure(slug, f"{system}: {title}", note, "", png or b"", True, problem))
                note = ""  # only the first figure of a kind has the note
    return figures


def _values(result: BenchmarkResult, key: str) -> list[float]:
    """The value for each seed that has it."""
    return [values[key] for values in _all_values(result) if key in values]


def _all_values(result: BenchmarkResult) -> list[dict[str, float]]:
    return [result.attention[seed].get("values", {}) for seed in sorted(result.attention)]


def _cell(result: BenchmarkResult, key: str) -> Cell:
    """The mean over seeds with its interval; for a single seed's ratio, the interval over scenes."""
    values = _values(result, key)
    if not values or any(math.isnan(value) for value in values):
        return number(None)
    if _RATIO not in key and not key.endswith("_entropy"):
        return score(values, key)
    low, high = next(iter(result.attention.values())).get("intervals", {}).get(key, (None, None))
    cell = estimate_cell(estimate(values, (low, high)), 1, "{:.2f}")
    return replace(cell, text=f"{cell.text} {cell.span}".strip(), span="")  # on one line: the columns are narrow


def _left_out(measured: Sequence[tuple[Ablation, BenchmarkResult]]) -> list[str]:
    """Lists each reason why something was not measured, with the ablations that it applies to."""
    by_reason: dict[str, list[str]] = {}
    for ablation, result in measured:
        reasons = {reason for scores in result.attention.values() for reason in scores.get("left_out", {}).values()}
        for reason in sorted(reasons):
            by_reason.setdefault(reason, []).append(ablation.name)
    return [f"Not measured for {', '.join(names)}: {reason}." for reason, names in by_reason.items()]
