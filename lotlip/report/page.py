"""Puts tables and figures on one page: `index.html`, and the same as Markdown with PNG and CSV beside it."""

from __future__ import annotations

import base64
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lotlip.core.files import atomic_write, write_json
from lotlip.data.records import DATA_DOCS
from lotlip.evaluate.score_names import Metric
from lotlip.report import attention_section, figures, findings, overview, results, sections, stages, tables
from lotlip.report.inputs import Ablation, ReportInputs, StageOutcome
from lotlip.report.reading_figures import reading_figures
from lotlip.report.tables import Cell, Table


@dataclass(frozen=True)
class Bar:
    """One system's number in the headline, as text and as a bar."""

    label: str
    cell: Cell
    colour: str

    @property
    def width(self) -> float:
        """Of the bar, in percent of its track."""
        return _on_track(self.cell.value or 0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where on the track the interval begins, and how long it is, in percent."""
        if self.cell.interval is None:
            return None
        low, high = map(_on_track, self.cell.interval)
        return low, high - low


def _on_track(share: float) -> float:
    return 100 * min(max(share, 0.0), 1.0)


def build_report(inputs: ReportInputs, out: Path) -> Path:
    """Writes `out/index.html` (one file, nothing loaded from outside), `out/report.md`, `out/findings.json`,
    `out/figures/*.png`, `out/tables/*.csv` and `out/data-docs`, the gates' pages. `out` is empty or not
    there. Returns the page's path.
    """
    context = _context(inputs)
    for name in ("figures", "tables", DATA_DOCS):
        (out / name).mkdir(parents=True)
    for stage in inputs.stages:
        if stage.data_docs:
            shutil.copytree(stage.data_docs, out / DATA_DOCS / stage.label)
    for figure in context["all_figures"]:
        if figure.png:
            (out / "figures" / f"{figure.slug}.png").write_bytes(figure.png)
    for table in context["all_tables"]:
        (out / "tables" / f"{table.slug}.csv").write_text(table.to_csv(), encoding="utf-8")
    write_json(out / "findings.json", {"test": findings.TEST, "findings": [one.as_json() for one in context["judged"]]})
    _render("report.md.j2", context, out / "report.md")
    page = out / "index.html"
    _render("page.html.j2", context, page)
    return page


def _render(template: str, context: dict[str, Any], path: Path) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("lotlip.report", "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["code"] = lambda text: Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704
    environment.filters["in_cell"] = lambda text: str(text).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")
    with atomic_write(path) as partial:
        partial.write_text(printable(environment.get_template(template).render(context)), encoding="utf-8")


# What HTML may not contain: control characters but for tab, line feed and carriage return, lone surrogates, and code
# points that are no characters.
_NOT_IN_HTML = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x10000, 0x110000, 0x10000))
    + "]"
)


def printable(text: str) -> str:
    """The text with replacement characters for what HTML may not contain, which captions from files may have."""
    return _NOT_IN_HTML.sub("\ufffd", text)


def _context(inputs: ReportInputs) -> dict[str, Any]:
    """What both templates show."""
    benchmarks: list[dict[str, Any]] = [
        {
            "name": name,
            "headline": headline(inputs, name),
            "ceiling": results.ceiling_note(inputs, name),
            "sections": sections.benchmark_sections(inputs, name),
            "every": sections.every_number(inputs, name),
            "figures": reading_figures(inputs, name),
            "attention": attention_section.attention_table(inputs, name),
            "seen": attention_section.attention_figures(inputs, name),
            "examples": overview.example_sections(inputs, name),
            "not_drawn": _not_drawn(inputs, name),
        }
        for name in results.benchmark_names(inputs)
    ]
    judged = findings.judge_all(inputs) if benchmarks else []
    loss = figures.loss_figure(inputs)
    context_figures = figures.context_figures(inputs)
    made = {
        "findings": findings.findings_table(judged),
        "overview": overview.overview_table(inputs),
        "failed_items": overview.failure_examples(inputs),
        "data": stages.statistics_table(inputs),
        "quality": stages.quality_table(inputs),
        "tower": stages.accuracy_table(inputs),
        "times": stages.stages_table(inputs),
        "failures": stages.failures_table(inputs),
        "cost": stages.cost_table(inputs),
        "training": stages.training_table(inputs),
        "protocol": stages.protocol_table(inputs),
    }
    other = {name: table if table.rows else None for name, table in made.items()}
    all_tables: list[Table] = [
        table
        for benchmark in benchmarks
        for table in [
            *(section.table for section in benchmark["sections"]),
            benchmark["every"],
            *([benchmark["attention"]] if benchmark["attention"] else []),
        ]
    ]
    return {
        "title": inputs.params.report.title,
        "note": inputs.params.report.note,
        "paths": inputs.params.paths,
        "tracking_uri": inputs.params.tracking.uri,
        "summary": summary(inputs),
        "missing": inputs.missing,
        "not_run": sections.told_not_run(inputs.not_run),
        "tally": findings.tally(judged) if judged else "",
        "data_first": overview.data_first(inputs, judged),
        "findings_not_run": findings.not_run(judged),
        "warnings": inputs.params.warnings,
        "judged": judged,
        "intervals": results.intervals_note(inputs.scored),
        "pictures": inputs.pictures,
        "stages": stage_kinds(inputs),
        "benchmarks": benchmarks,
        "loss": loss,
        "context_figures": context_figures,
        **other,
        "all_figures": [
            *(section.figure for benchmark in benchmarks for section in benchmark["sections"] if section.figure),
            *(figure for benchmark in benchmarks for figure in [*benchmark["figures"], *benchmark["seen"]]),
            *context_figures,
            *([loss] if loss else []),
        ],
        "all_tables": all_tables + [table for table in other.values() if table],
    }


def _not_drawn(inputs: ReportInputs, benchmark: str) -> list[str]:
    """A line for each picture of an ablation that could not be drawn, with its reason."""
    found = [(a.name, a.benchmarks[benchmark].not_drawn) for a in inputs.scored if benchmark in a.benchmarks]
    return [f"{name}, {what}: {reason}" for name, problems in found for what, reason in problems.items()]


def stage_kinds(inputs: ReportInputs) -> list[tuple[str, list[StageOutcome]]]:
    """The records, those of one stage together: (stage, its records)."""
    kinds: dict[str, list[StageOutcome]] = {}
    for record in inputs.stages:
        kinds.setdefault(record.stage or record.label, []).append(record)
    return list(kinds.items())


def headline(inputs: ReportInputs, benchmark: str) -> list[dict[str, Any]]:
    """A panel per kind of text, in it a group of bars per direction: R@1 of the systems, those that have it."""
    systems = inputs.systems
    palette = figures.colours(inputs)
    panels: dict[str, list[dict[str, Any]]] = {}
    for metric in results.main_metrics(results.metric_names(systems.values(), benchmark)):
        members = {name: a.benchmarks[benchmark] for name, a in systems.items() if benchmark in a.benchmarks}
        found = {name: result for name, result in members.items() if result.values(metric)}
        cells = tables.mark_best(
            [tables.score(result.values(metric), metric, result.interval(metric)) for result in found.values()], metric
        )
        guess = next((result.chance[metric] for result in found.values() if metric in result.chance), None)
        best = next((result.ceiling[metric] for result in found.values() if result.ceiling.get(metric, 1.0) < 1), None)
        column = results.metric_column(metric, main=True)
        bars = [Bar(name, cell, palette[systems[name].name]) for name, cell in zip(found, cells, strict=True)]
        group = {
            "title": column.label,
            "bars": bars,
            "chance": tables.percent(guess).text if guess else "",
            "ceiling": tables.percent(best).text if best else "",
        }
        panels.setdefault(column.group, []).append(group)
    return [{"title": title, "groups": members} for title, members in panels.items()]


def summary(inputs: ReportInputs) -> str:
    """What was done and what came out, in plain words; every number is read from the results."""
    count = sum(bool(ablation.benchmarks) for ablation in inputs.ablations)
    if not count:
        return "Nothing has been evaluated yet."
    image_tower = (
        "the image tower is frozen"
        if results.all_frozen(inputs.scored)
        else "the image tower is frozen or learns as well"
    )
    text = [
        f"{count} {'configuration was' if count == 1 else 'configurations were'} trained to match pictures with texts: "
        f"{image_tower}, the text tower learns to place a text where its picture is."
    ]
    systems = inputs.systems
    for benchmark in results.benchmark_names(inputs)[:1]:
        for metric, kind in (
            (Metric.LONG_TEXT_TO_IMAGE_R1, "a long text"),
            (Metric.SHORT_TEXT_TO_IMAGE_R1, "a short caption"),
        ):
            sentence = _found(systems, benchmark, metric)
            if sentence:
                text.append(f"Given {kind}, {sentence}.")
    if any(len(result.seeds) == 1 for ablation in inputs.ablations for result in ablation.benchmarks.values()):
        text.append("Some numbers come from a single seed: small differences between them may be chance.")
    return " ".join(text)


def _found(systems: Mapping[str, Ablation], benchmark: str, metric: Metric) -> str:
    """Text → image R@1 of each system that has one, as the end of a sentence."""
    measured = {name: a.benchmarks[benchmark] for name, a in systems.items() if benchmark in a.benchmarks}
    values = {name: result.values(metric) for name, result in measured.items() if result.values(metric)}
    if not values:
        return ""
    (first, share), *rest = [(name, tables.percent(statistics.fmean(v)).text) for name, v in values.items()]
    told = [f"{first} puts the right picture first in {share} of cases", *(f"{name} in {text}" for name, text in rest)]
    guess = next((result.chance[metric] for result in measured.values() if metric in result.chance), None)
    return ", ".join(told) + ("" if guess is None else f" (guessing: {tables.percent(guess).text})")
