"""The declared tables of the report, and at the end the ablations that are in none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lotlip.core.differences import differences, format_differences, format_value
from lotlip.core.section import flatten
from lotlip.evaluate.reference import REFERENCE, SOURCE
from lotlip.evaluate.score_names import MAIN
from lotlip.report import figures
from lotlip.report.config import CHANGES, FLOPS, SCORES, ScoresFigureConfig, TableConfig
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.results import (
    FLOPS_COLUMN,
    FLOPS_NOTE,
    flops_known,
    intervals_note,
    metric_names,
    results_table,
)
from lotlip.report.tables import Cell, Column, Table, gigaflops, number, words

FOLDED_FROM = 8  # rows of a table whose figure says the same
RUN_EVERYTHING = "make reproduce-all"

Lead = tuple[Column, list[Cell]]


@dataclass(frozen=True)
class Section:
    """A table as it is shown.

    `folded` where the figure says most of it and the table is long; `not_run`: ablations that belong in it, too.
    """

    table: Table
    figure: figures.Figure | None = None
    not_run: Sequence[str] = ()

    @property
    def folded(self) -> bool:
        """Whether the table is shown on demand."""
        return self.figure is not None and len(self.table.rows) >= FOLDED_FROM


def benchmark_sections(inputs: ReportInputs, benchmark: str) -> list[Section]:
    """The declared tables on one benchmark, then the ablations that are in none.

    A table shows what was run; with one row it compares nothing and is left out.
    """
    sections, seen = [], set[str]()
    for slug, declared in inputs.params.tables.items():
        chosen = inputs.chosen(declared.rows)
        if len(chosen) < 2:
            continue
        table = _table(inputs, benchmark, slug, declared, chosen)
        asked = declared.figure
        drawn = (
            figures.scores_figure(inputs, benchmark, slug, declared, asked)
            if isinstance(asked, ScoresFigureConfig)
            else None
        )
        sections.append(Section(table, drawn, [name for name in declared.rows if name in inputs.not_run]))
        seen |= {ablation.name for ablation in chosen}
    others = [ablation for ablation in inputs.scored if ablation.name not in seen]
    if sections and others:  # `pretrain` as it is beside them, to compare with
        base = inputs.params.pretrain
        others = [a for a in inputs.scored if a.name not in seen or not differences(a.config.recipe(), base.recipe())]
    if others:
        rest = TableConfig(
            title="Other ablations" if sections else "Ablations",
            note="What each changes, against the section pretrain of params.yaml.",
            rows={ablation.name: "" for ablation in others},
        )
        sections.append(Section(_table(inputs, benchmark, "others", rest, others)))
    return sections


def _table(inputs: ReportInputs, benchmark: str, slug: str, declared: TableConfig, chosen: Sequence[Ablation]) -> Table:
    """A declared table of the `chosen` ablations, which are those of its rows that have results."""
    published = {
        f"{found.model} (published)": found.scores[benchmark]
        for found in REFERENCE
        if declared.published and benchmark in found.scores
    }
    with_flops = FLOPS in declared.columns and flops_known(chosen)
    notes = [declared.note, f"Rows so named were {SOURCE}." if published else "", FLOPS_NOTE if with_flops else ""]
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
            cells = [_setting(a, key) for a in chosen]
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
        published=published,
        paper=declared.paper,
    )


def _setting(ablation: Ablation, key: str) -> Cell:
    """A setting's value; a dash for null, and for the mask where there are no corner tokens."""
    value: Any = flatten(ablation.config.model_dump(mode="json")).get(key)
    if value is None or (key == "text.corner_mask" and not ablation.config.text.corner_tokens):
        return words(None)
    if isinstance(value, bool):
        return words("yes" if value else "no")
    return number(value, "{:,g}") if isinstance(value, (int, float)) else words(format_value(value))


def every_number(inputs: ReportInputs, benchmark: str) -> Table:
    """All metrics of all ablations that have results."""
    every = inputs.scored
    note = f"R@k and top-k in percent. {intervals_note(every)}".strip()
    metrics = metric_names(every, benchmark)
    return results_table(
        f"{benchmark}-all", "Every number", note, every, [_names(every)], benchmark, metrics, main=False
    )


def told_not_run(names: Sequence[str]) -> str:
    """One line on ablations that nothing is there of."""
    return f"Not run: {', '.join(names)}; `{RUN_EVERYTHING}` runs everything." if names else ""


def _names(ablations: Sequence[Ablation]) -> Lead:
    return Column("ablation", "Ablation", numeric=False), [words(ablation.name) for ablation in ablations]
