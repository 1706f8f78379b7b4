"""The report's section "Where attention goes": a table of the numbers, and the main systems' pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lotlip.figures.charts import Figure
from lotlip.figures.intervals import estimate
from lotlip.report.inputs import Ablation, Benchmark, ReportInputs
from lotlip.report.tables import Cell, Column, Table, estimate_cell, number, score, words

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
# What each would be if relevance were the same everywhere and each token read alike.
_EVEN = {
    "on_named_object": "named_object_area",
    "on_object_not_named": "named_object_area",
    "on_salient_object": "salient_object_area",
    "cls_entropy": "length_entropy",
    "corner1_entropy": "length_entropy",
    "cls_on_salient_words": "salient_words_length",
    "corner1_on_salient_words": "salient_words_length",
}
_NOTE = (
    "Relevance of patches, by gradient-weighted attention roll-out, that falls on an object when the text names it, or "
    "another small one; chance is the object's share of the picture. Brackets: 95 % confidence interval over scenes, "
    "for one seed; ±: half of the 95 % t interval over seeds. Attention over a long text, by roll-out: its entropy "
    "over sub-captions, 1 where all have equal shares, and its share on the salient object's words. Last row: all "
    "patches and all tokens alike."
)
_FIGURES = {
    "relevance": (
        "relevance of patches",
        "Red: patches that speak for the text above, by gradient-weighted attention roll-out; each map is full where "
        "it is largest. A circle marks the object that the text names, where that is known.",
    ),
    "reading": (
        "how a long text is read",
        "Share of attention on each sub-caption, by attention roll-out, special tokens left out; by length: if each "
        "token had the same share. Entropy: 1 where all sub-captions have equal shares.",
    ),
}


def attention_table(inputs: ReportInputs, benchmark: str) -> Table | None:
    """A row for each ablation that was looked into; columns that none has are left out."""
    looked = [(a, a.benchmarks[benchmark]) for a in inputs.ablations if benchmark in a.benchmarks]
    looked = [(ablation, result) for ablation, result in looked if result.attention]
    columns = [column for column in _COLUMNS if any(_values(result, column.key) for _, result in looked)]
    if not columns:
        return None
    rows = [[words(a.name), *(_cell(result, column.key) for column in columns)] for a, result in looked]
    fullest = max((result for _, result in looked), key=lambda result: sum(map(len, _all_values(result))))
    even = [number(1.0, "{:.2f}") if _RATIO in c.key else _cell(fullest, _EVEN[c.key]) for c in columns]
    note = " ".join([_NOTE, *_left_out(looked)])
    heads = [Column("ablation", "Ablation", numeric=False), *columns]
    return Table(f"{benchmark}-attention", "Where attention goes", note, heads, rows, [[Cell("even"), *even]])


def attention_figures(inputs: ReportInputs, benchmark: str) -> list[Figure]:
    """The main systems' pictures, those of one kind one after another."""
    figures = []
    for kind, (title, note) in _FIGURES.items():
        for system, ablation in inputs.systems.items():
            png = ablation.benchmarks[benchmark].pictures.get(kind) if benchmark in ablation.benchmarks else None
            problem = ablation.benchmarks[benchmark].not_drawn.get(kind, "") if benchmark in ablation.benchmarks else ""
            if png or problem:
                slug = f"{benchmark}-attention-{kind}-{ablation.name}"
                figures.append(Figure(slug, f"{system}: {title}", note, "", png or b"", True, problem))
                note = ""  # said once
    return figures


def _values(result: Benchmark, key: str) -> list[float]:
    """Of each seed that has it."""
    return [values[key] for values in _all_values(result) if key in values]


def _all_values(result: Benchmark) -> list[dict[str, float]]:
    return [result.attention[seed].get("values", {}) for seed in sorted(result.attention)]


def _cell(result: Benchmark, key: str) -> Cell:
    """The mean over seeds with its interval; of one seed's ratio, the interval over scenes."""
    values = _values(result, key)
    if not values or any(math.isnan(value) for value in values):
        return number(None)
    if _RATIO not in key and not key.endswith("_entropy"):
        return score(values, key)
    low, high = next(iter(result.attention.values())).get("intervals", {}).get(key, (None, None))
    cell = estimate_cell(estimate(values, (low, high)), 1, "{:.2f}")
    return replace(cell, text=f"{cell.text} {cell.span}".strip(), span="")  # in one line: the columns are narrow


def _left_out(looked: Sequence[tuple[Ablation, Benchmark]]) -> list[str]:
    """What could not be measured and why, once for all ablations that share a reason."""
    named: dict[str, list[str]] = {}
    for ablation, result in looked:
        reasons = {reason for seen in result.attention.values() for reason in seen.get("left_out", {}).values()}
        for reason in sorted(reasons):
            named.setdefault(reason, []).append(ablation.name)
    return [f"Left out of {', '.join(names)}: {reason}." for reason, names in named.items()]
