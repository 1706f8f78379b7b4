"""Writes the report: `index.html`, and the same content as Markdown with PNG and CSV files."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lotlip.core.files import write_json
from lotlip.data.records import DATA_DOCS
from lotlip.evaluate.score_names import Metric
from lotlip.report import attention_section, figures, findings, overview, results, sections, stages, tables, verdicts
from lotlip.report.findings import FindingResult
from lotlip.report.forest import forest_figure
from lotlip.report.inputs import Ablation, ReportInputs, StageOutcome
from lotlip.report.look import PAGE, write_look
from lotlip.report.reading_figures import reading_figures
from lotlip.report.rendering import render
from lotlip.report.stored import FINDINGS, STORED_RESULTS
from lotlip.report.tables import Cell, ReportTable

LOOK = "look"  # the folder of the look at the data


@dataclass(frozen=True)
class Bar:
    """One system's score in the headline, as text and as a bar."""

    label: str
    cell: Cell
    colour: str

    @property
    def width(self) -> float:
        """Width of the bar in percent of its track."""
        return _on_track(self.cell.value or 0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Start and length of the confidence interval in percent of the track."""
        if self.cell.interval is None:
            return None
        low, high = map(_on_track, self.cell.interval)
        return low, high - low


def _on_track(share: float) -> float:
    return 100 * min(max(share, 0.0), 1.0)


def build_report(inputs: ReportInputs, out: Path) -> Path:
    """Writes the report to `out`, which must be empty or missing, and returns the path of its page.

    It consists of `index.html` (self-contained), `report.md`, `findings.json`, `figures/*.png`, `tables/*.csv`,
    `data-docs`, the gates' Data Docs, and `look`, a page about the data.
    """
    context = _context(inputs)
    for name in ("figures", "tables", DATA_DOCS):
        (out / name).mkdir(parents=True)
    for stage in inputs.stages:
        if stage.data_docs:
            shutil.copytree(stage.data_docs, out / DATA_DOCS / stage.label)
    if inputs.look:
        write_look(inputs.look, out / LOOK)
    for figure in context["all_figures"]:
        if figure.png:
            (out / "figures" / f"{figure.slug}.png").write_bytes(figure.png)
    for table in context["all_tables"]:
        (out / "tables" / f"{table.slug}.csv").write_text(table.to_csv(), encoding="utf-8")
    write_json(out / FINDINGS, findings_file(inputs, context["finding_results"], context["stored_findings"]))
    render("report.md.j2", context, out / "report.md")
    page = out / PAGE
    render("page.html.j2", context, page)
    return page


def findings_file(
    inputs: ReportInputs, tested: Sequence[FindingResult], stored: Sequence[FindingResult]
) -> dict[str, Any]:
    """Returns the content of findings.json: the test, the stored results, and all verdicts with their numbers."""
    results = [one.as_json() for one in tested]
    for result, other in zip(results, stored, strict=bool(stored)):
        result["stored"] = other.result_as_json()
    about = inputs.stored.as_json() if inputs.stored else None
    return {"test": findings.TEST, STORED_RESULTS: about, "findings": results}


def _context(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the variables of both templates."""
    benchmarks: list[dict[str, Any]] = [
        {
            "name": name,
            "headline": headline(inputs, name),
            "ceiling": results.ceiling_note(inputs, name),
            "sections": sections.benchmark_sections(inputs, name),
            "all_metrics": sections.all_metrics_table(inputs, name),
            "figures": reading_figures(inputs, name),
            "sentences": sections.sentence_table(inputs, name),
            "attention": attention_section.attention_table(inputs, name),
            "attention_figures": attention_section.attention_figures(inputs, name),
            "examples": overview.example_sections(inputs, name),
            "not_drawn": _not_drawn(inputs, name),
        }
        for name in results.benchmark_names(inputs)
    ]
    finding_results = findings.evaluate_findings(inputs) if benchmarks else []
    with_stored = inputs.with_stored if benchmarks else None
    stored_findings = findings.evaluate_findings(with_stored) if with_stored else []
    forest = forest_figure(finding_results, stored_findings)
    loss = figures.loss_figure(inputs)
    context_figures = figures.context_figures(inputs)
    other_tables = {
        "findings": verdicts.findings_table(finding_results, stored_findings),
        "power": verdicts.power_table(finding_results, stored_findings),
        "overview": overview.overview_table(inputs),
        "failed_items": overview.failure_examples(inputs),
        "data": stages.statistics_table(inputs),
        "benchmark_texts": stages.benchmark_texts_table(inputs),
        "quality": stages.quality_table(inputs),
        "tower": stages.accuracy_table(inputs),
        "times": stages.stages_table(inputs),
        "failures": stages.failures_table(inputs),
        "cost": stages.cost_table(inputs),
        "training": stages.training_table(inputs),
        "protocol": stages.protocol_table(inputs),
        "baselines": stages.baselines_table(inputs),
    }
    shown_tables = {name: table if table.rows else None for name, table in other_tables.items()}
    all_tables: list[ReportTable] = [
        table
        for benchmark in benchmarks
        for table in [
            *(section.table for section in benchmark["sections"]),
            benchmark["all_metrics"],
            *(table for table in (benchmark["sentences"], benchmark["attention"]) if table),
        ]
    ]
    return {
        "title": inputs.params.report.title,
        "note": inputs.params.report.note,
        "paths": inputs.params.paths,
        "tracking_uri": inputs.params.tracking.uri,
        "summary": summary(inputs),
        "missing": inputs.missing,
        "not_run": sections.not_run_note(inputs.not_run),
        "tally": verdicts.tally(finding_results, stored_findings) if finding_results else "",
        "stored_note": inputs.stored.note if inputs.stored else "",
        "data_first": overview.data_first(inputs, finding_results),
        "findings_not_run": verdicts.not_run(finding_results),
        "warnings": inputs.params.warnings,
        "finding_results": finding_results,
        "stored_findings": stored_findings,
        "forest": forest,
        "intervals": results.intervals_note(inputs.scored),
        "pictures": inputs.pictures,
        "look": f"{LOOK}/{PAGE}" if inputs.look else "",
        "stages": records_by_stage(inputs),
        "benchmarks": benchmarks,
        "loss": loss,
        "context_figures": context_figures,
        **shown_tables,
        "all_figures": [
            *(section.figure for benchmark in benchmarks for section in benchmark["sections"] if section.figure),
            *(figure for benchmark in benchmarks for figure in benchmark["figures"] + benchmark["attention_figures"]),
            *context_figures,
            *(figure for figure in (loss, forest) if figure),
        ],
        "all_tables": all_tables + [table for table in shown_tables.values() if table],
    }


def _not_drawn(inputs: ReportInputs, benchmark: str) -> list[str]:
    """Lists the attention maps that could not be drawn, with reasons."""
    not_drawn = [(a.name, a.benchmarks[benchmark].not_drawn) for a in inputs.scored if benchmark in a.benchmarks]
    return [f"{name}, {what}: {reason}" for name, problems in not_drawn for what, reason in problems.items()]


def records_by_stage(inputs: ReportInputs) -> list[tuple[str, list[StageOutcome]]]:
    """Groups the records by stage: (stage, its records)."""
    by_stage: dict[str, list[StageOutcome]] = {}
    for record in inputs.stages:
        by_stage.setdefault(record.stage or record.label, []).append(record)
    return list(by_stage.items())


def headline(inputs: ReportInputs, benchmark: str) -> list[dict[str, Any]]:
    """Returns a panel per kind of text, with a group of bars per direction: R@1 of the main systems."""
    systems = inputs.systems
    palette = figures.colours(inputs)
    panels: dict[str, list[dict[str, Any]]] = {}
    for metric in results.main_metrics(results.metric_names(systems.values(), benchmark)):
        members = {name: a.benchmarks[benchmark] for name, a in systems.items() if benchmark in a.benchmarks}
        scored = {name: result for name, result in members.items() if result.values(metric)}
        cells = tables.mark_best(
            [tables.score(result.values(metric), metric, result.interval(metric)) for result in scored.values()], metric
        )
        chance = next((result.chance[metric] for result in scored.values() if metric in result.chance), None)
        ceiling = next((r.ceiling[metric] for r in scored.values() if r.ceiling.get(metric, 1.0) < 1), None)
        column = results.metric_column(metric, main=True)
        bars = [Bar(name, cell, palette[systems[name].name]) for name, cell in zip(scored, cells, strict=True)]
        group = {
            "title": column.label,
            "bars": bars,
            "chance": tables.percent(chance).text if chance else "",
            "ceiling": tables.percent(ceiling).text if ceiling else "",
        }
        panels.setdefault(column.group, []).append(group)
    return [{"title": title, "groups": members} for title, members in panels.items()]


def summary(inputs: ReportInputs) -> str:
    """Summarizes the run and its main results in a few sentences."""
    count = sum(bool(ablation.benchmarks) for ablation in inputs.ablations)
    if not count:
        return "Nothing has been evaluated yet."
    image_tower = (
        "the image tower is frozen" if results.all_frozen(inputs.scored) else "the image tower is frozen or trained"
    )
    text = [
        f"{count} {'configuration was' if count == 1 else 'configurations were'} trained to match images with texts: "
        f"{image_tower}; the text tower learns to embed a text close to its image."
    ]
    systems = inputs.systems
    names = results.benchmark_names(inputs)
    for benchmark in names[:1]:
        of_which = f" of {benchmark}" if len(names) > 1 else ""
        for metric, kind in (
            (Metric.LONG_TEXT_TO_IMAGE_R1, "a long text"),
            (Metric.SHORT_TEXT_TO_IMAGE_R1, "a short caption"),
        ):
            sentence = _retrieval_clause(systems, benchmark, metric)
            if sentence:
                text.append(f"Given {kind}{of_which}, {sentence}.")
    if any(len(result.seeds) == 1 for ablation in inputs.ablations for result in ablation.benchmarks.values()):
        text.append("Some scores come from a single seed, so small differences may be due to chance.")
    return " ".join(text)


def _retrieval_clause(systems: Mapping[str, Ablation], benchmark: str, metric: Metric) -> str:
    """States each system's text → image R@1, as a clause; empty if none has it."""
    measured = {name: a.benchmarks[benchmark] for name, a in systems.items() if benchmark in a.benchmarks}
    values = {name: result.values(metric) for name, result in measured.items() if result.values(metric)}
    if not values:
        return ""
    (first, share), *rest = [(name, tables.percent(statistics.fmean(v)).text) for name, v in values.items()]
    shares = [f"{first} ranks the correct image first in {share} of cases"]
    shares += [f"{name} in {text}" for name, text in rest]
    chance = next((result.chance[metric] for result in measured.values() if metric in result.chance), None)
    return ", ".join(shares) + ("" if chance is None else f" (chance: {tables.percent(chance).text})")
