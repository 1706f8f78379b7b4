"""The declared tables of the report, followed by the ablations that are in none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lotlip.core.differences import differences, format_differences, format_value
from lotlip.core.section import flatten
from lotlip.evaluate.reference import REFERENCE, sources
from lotlip.evaluate.score_names import COUNTED_TEXTS, MAIN, SENTENCE_METRICS, SENTENCES
from lotlip.report import figures
from lotlip.report.config import CHANGES, FLOPS, SAMPLES, SCORES, SHORT_SHARE, ScoresFigureConfig, TableConfig
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.results import (
    FLOPS_COLUMN,
    FLOPS_NOTE,
    NOT_TRAINED_HERE,
    baseline_scores,
    flops_known,
    intervals_note,
    metric_names,
    results_table,
)
from lotlip.report.tables import Cell, Column, ReportTable, gigaflops, number, words

FOLDED_FROM = 8  # a table with a figure is folded from this many rows
RUN_EVERYTHING = "make reproduce-all"
_NAMED = 12  # most ablations that are listed by name as not run

Lead = tuple[Column, list[Cell]]


@dataclass(frozen=True)
class TableSection:
    """A table with its figure, and the ablations of the table that were not run."""

    table: ReportTable
    figure: figures.Figure | None = None
    not_run: Sequence[str] = ()

    @property
    def folded(self) -> bool:
        """Whether the table is collapsed: it is long, and a figure shows most of it."""
        return self.figure is not None and len(self.table.rows) >= FOLDED_FROM


def benchmark_sections(inputs: ReportInputs, benchmark: str) -> list[TableSection]:
    """Returns the declared tables for one benchmark, then a table of the ablations that are in none.

    A table shows the ablations that were run. With fewer than two of them it is left out, with published scores only if
    there are none.
    """
    sections, seen = [], set[str]()
    for slug, declared in inputs.params.tables.items():
        chosen = inputs.chosen(declared.rows)
        if len(chosen) < (1 if declared.published else 2):
            continue
        table = _table(inputs, benchmark, slug, declared, chosen)
        figure = (
            figures.scores_figure(inputs, benchmark, slug, declared, declared.figure)
            if isinstance(declared.figure, ScoresFigureConfig)
            else None
        )
        sections.append(TableSection(table, figure, [name for name in declared.rows if name in inputs.not_run]))
        seen |= {ablation.name for ablation in chosen}
    others = [ablation for ablation in inputs.scored if ablation.name not in seen]
    if sections and others:  # add the unchanged `pretrain` recipe for comparison
        base = inputs.params.pretrain
        others = [a for a in inputs.scored if a.name not in seen or not differences(a.config.recipe(), base.recipe())]
    if others:
        rest = TableConfig(
            title="Other ablations" if sections else "Ablations",
            note="Changes are relative to the section pretrain of params.yaml.",
            rows={ablation.name: "" for ablation in others},
        )
        sections.append(TableSection(_table(inputs, benchmark, "others", rest, others)))
    return sections


def _table(
    inputs: ReportInputs, benchmark: str, slug: str, declared: TableConfig, chosen: Sequence[Ablation]
) -> ReportTable:
    """Builds a declared table of the `chosen` ablations, those of its rows that have results."""
    references = [one for one in REFERENCE if declared.published and benchmark in one.scores]
    published = {f"{one.model} (published)": one.scores[benchmark] for one in references}
    baselines = baseline_scores(inputs, benchmark)
    with_flops = FLOPS in declared.columns and flops_known(chosen)
    notes = [
        declared.note,
        f"Rows marked {NOT_TRAINED_HERE} are models that were only scored." if baselines else "",
        f"Rows marked (published) are {sources(references)}." if published else "",
        FLOPS_NOTE if with_flops else "",
    ]
    metrics = {metric for column in declared.columns for metric in MAIN.get(column, (column,))}
    lead = [_names(chosen)]
    if any(declared.rows[a.name] for a in chosen):
        lead.append((Column("label", "Label", numeric=False), [words(declared.rows[a.name]) for a in chosen]))
    for key, label in declared.columns.items():
        if key == CHANGES:
            changes = [
                format_differences(differences(a.config.recipe(), inputs.params.pretrain.recipe())) for a in chosen
            ]
            lead.append((Column(key, label or "Change", numeric=False), [words(text) for text in changes]))
        elif key == FLOPS:
            lead += [(FLOPS_COLUMN, [gigaflops(a.flops_per_text) for a in chosen])] if with_flops else []
        elif key not in SCORES:
            heading = label or key.rpartition(".")[2].replace("_", " ").capitalize()
            images = key == SAMPLES
            cells = [number(inputs.training_images(a.config), "{:,g}") if images else _setting(a, key) for a in chosen]
            numeric = all(cell.value is not None for cell in cells)
            lead.append((Column(key, heading, numeric=numeric), cells))
    return results_table(
        f"{benchmark}-{slug}",
        declared.title,
        " ".join(note for note in notes if note),
        chosen,
        lead,
        benchmark,
        [metric for metric in metric_names(inputs.scored, benchmark) if metric in metrics],
        others=baselines | published,
        paper=declared.paper,
    )


def _setting(ablation: Ablation, key: str) -> Cell:
    """Formats a setting's value; null is a dash, and so is the mask of an ablation without corner tokens."""
    if key == SHORT_SHARE:
        return number(ablation.short_share, "{:.3g}")
    value: Any = flatten(ablation.config.model_dump(mode="json")).get(key)
    if value is None or (key == "text.corner_mask" and not ablation.config.text.corner_tokens):
        return words(None)
    if isinstance(value, bool):
        return words("yes" if value else "no")
    return number(value, "{:,g}") if isinstance(value, (int, float)) else words(format_value(value))


def all_metrics_table(inputs: ReportInputs, benchmark: str) -> ReportTable:
    """Returns all metrics of all ablations that have results, and of the baselines."""
    scored = inputs.scored
    note = f"R@k and top-k in percent. {intervals_note(scored)}".strip()
    metrics = metric_names(scored, benchmark)
    return results_table(
        f"{benchmark}-all",
        "All metrics",
        note,
        scored,
        [_names(scored)],
        benchmark,
        metrics,
        main=False,
        others=baseline_scores(inputs, benchmark),
    )


def sentence_table(inputs: ReportInputs, benchmark: str) -> ReportTable | None:
    """Returns the scores of growing prefixes and of changed sentences; None if there are none."""
    metrics = [metric for metric in metric_names(inputs.scored, benchmark) if metric in SENTENCE_METRICS]
    if not metrics:
        return None
    scored = [a for a in inputs.scored if benchmark in a.benchmarks]
    protocol = next((a.benchmarks[benchmark].protocol for a in scored), {})
    counted, texts = (protocol.get(key) for key in (COUNTED_TEXTS, "long_texts"))
    which = f"{counted:,} of {texts:,} long texts" if counted and texts else "long texts"
    note = (
        f"Over {which}, each with at least {SENTENCES} sentences. HiMo@2 and HiMo@3: share of texts whose similarity "
        "to their image grows with each of 2 or 3 prefixes of 1/K, 2/K, … of the sentences; HiMo@4: mean correlation "
        "of the number of the prefix, 1 … 4, and its similarity, times 100. Right: R@1 of the same texts unchanged, "
        "with two sentences swapped, and without the first sentence."
    )
    return results_table(
        f"{benchmark}-sentence-order",
        "More sentences, other sentences",
        note,
        scored,
        [_names(scored)],
        benchmark,
        metrics,
        others=baseline_scores(inputs, benchmark),
    )


def not_run_note(names: Sequence[str]) -> str:
    """Names or counts the ablations that were not run; empty if there are none."""
    few = len(names) <= _NAMED
    which = ", ".join(names) if few else f"{len(names)} other ablations of params.yaml"
    return f"Not run: {which}. To run all ablations, use `{RUN_EVERYTHING}`." if names else ""


def _names(ablations: Sequence[Ablation]) -> Lead:
    return Column("ablation", "Ablation", numeric=False), [words(ablation.name) for ablation in ablations]
