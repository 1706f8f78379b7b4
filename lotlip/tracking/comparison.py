"""Content for MLflow's pages: descriptions of runs; charts and columns of comparisons, based on what the runs have.

MLflow's comparison page takes its columns, order, filter, grouping and charts from a "shared view", a tag of the
experiment that a URL names. MLflow does not document the tag's format. Everything that this project knows about it is
in this module; it was read from the page of the pinned version, and tests/test_comparison.py checks it in a browser.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from lotlip.core.differences import differences, format_differences
from lotlip.core.section import flatten
from lotlip.evaluate.records import BenchmarkScores
from lotlip.evaluate.score_names import MAIN, Metric
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.records import Run

SHARED_VIEW = "mlflow.sharedViewState."  # prefix of the tag's name, before the view's name
_DEFLATED = "deflate;"

# Parameters and their titles, in the order of charts.
PARAMETER_TITLES = {
    "text.corner_tokens": "corner tokens",
    "text.corner_mask": "mask",
    "long_texts.sub_captions": "sub-captions",
    "text.context_length": "context length",
}
OTHERS = 4  # maximum number of other parameters with charts
RECALLS = [metric for family in ("long", "short") for metric in reversed(MAIN[family])]  # text → image first
CURVES = ("train.loss", "train.in_batch_recall", "train.temperature", "train.samples_per_second")


@dataclass(frozen=True)
class ComparedRun:
    """The parts of a run that decide how it is compared."""

    parameters: Mapping[str, str]
    metrics: Collection[str]
    tags: Mapping[str, str]


def sweep_filter(sweep: str) -> str:
    """MLflow's filter for the runs of a sweep. Each has a tag with the sweep's name, so a run may belong to several."""
    return f"tags.`sweep.{sweep}` LIKE '%'"


def view_name(sweep: str | None) -> str:
    """Name of a sweep's view, or of the view of all runs."""
    return f"sweep-{sweep}" if sweep else "comparison"


def address(server: str, experiment_id: str, sweep: str | None, mode: str = "CHART") -> str:
    """URL of the page that shows a view.

    Args:
        server: MLflow's URL.
        experiment_id: of the runs.
        sweep: whose runs are shown; None: all runs.
        mode: "CHART" or "TABLE".
    """
    query = f"workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={quote(view_name(sweep), safe='')}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def view(runs: Sequence[ComparedRun], sweep: str | None = None) -> str:
    """A shared view of runs, in the format of MLflow's page.

    The sections are: R@1 of every run; R@1 against each parameter that differs between runs, and against all of them
    at once (parallel coordinates); curves; and, collapsed, every other metric. The seeds of an ablation are averaged,
    unless two runs have the same ablation and seed.

    Args:
        runs: to compare.
        sweep: whose runs are shown; None: all runs.
    """
    names = sorted({name for run in runs for name in run.metrics})
    recalls = _recalls(names)
    varied = _varied(runs)
    sections: list[tuple[str, list[dict[str, Any]]]] = [("R@1", [_card("BAR", metricKey=name) for name in recalls])]
    if len(varied) > 1:
        sections.append(("R@1 by everything that differs", [_parallel(varied, recalls)]))
    sections += [
        (f"R@1 by {PARAMETER_TITLES.get(key, key)}", [_scatter(key, name) for name in recalls]) for key in varied
    ]
    sections.append(("Training", [_line(name) for name in CURVES if name in names]))
    sections = [(title, cards) for title, cards in sections if cards]
    columns = [
        *(f"tags.`{name}`" for name in ("ablation", "seed")),
        *(f"params.`{key}`" for key in varied),
        *(f"metrics.`{name}`" for name in recalls),
        *(f"metrics.`{name}`" for name in names if name.endswith(Metric.CLASSIFICATION_TOP1)),
    ]
    order = recalls[0] if recalls else None
    state = {
        "searchFilter": sweep_filter(sweep) if sweep else "",
        "orderByKey": f"metrics.`{order}`" if order else "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": _averaged(runs),
        "isAccordionReordered": True,  # otherwise the page sorts sections by name
        "compareRunSections": [
            *(_section(title, columns=min(2, len(cards))) for title, cards in sections),
            # the page puts a chart here for every metric without one
            *(_section(title, display=False, isReordered=False) for title in ("Model metrics", "System metrics")),
        ],
        "compareRunCharts": [
            card | {"uuid": f"{title}: {number}", "metricSectionId": title}
            for title, cards in sections
            for number, card in enumerate(cards)
        ],
    }
    return encode(state)


def run_note(
    trained: Run,
    seed: str,
    base: PretrainConfig | None = None,
    results: Mapping[str, BenchmarkScores] | None = None,
) -> str:
    """Describes a run in plain words, as Markdown.

    Args:
        trained: run.json of the ablation.
        seed: of the run.
        base: settings that ablations differ from; None: differences are not listed.
        results: benchmark → results, as in metrics/<ablation>.json. The main scores are listed with their 95 %
            intervals and, if repeated texts or images lower it, the best possible score. As separate metrics these
            would add three charts each.
    """
    config = flatten(trained.config)
    m, k = config.get("text.corner_tokens", 0), config.get("long_texts.sub_captions", 0)
    corners = (
        f"{m} corner tokens {'behind' if config.get('text.corner_mask') else 'without'} the mask"
        if m
        else "no corner tokens"
    )
    texts = f"long texts of {k} sub-captions" if k else "only short captions"
    parts = [f"`{trained.ablation}`, seed {seed}: {corners}, {texts}."]
    try:
        settings = PretrainConfig.model_validate(trained.config)
    except ValidationError:  # from another version of lotlip
        settings = None
    if base and settings:
        changes = format_differences(differences(settings.recipe(), base.recipe()))
        parts.append(f"Differences from `pretrain` of params.yaml: {changes}.")
    rows = []
    limited = any(result.limited for result in (results or {}).values())
    for benchmark, result in (results or {}).items():
        scores, intervals = result.seeds[int(seed)], result.intervals.get(int(seed), {})
        for metric in [*RECALLS, Metric.CLASSIFICATION_TOP1]:
            if metric in scores:
                between = " – ".join(f"{100 * end:.1f}" for end in intervals.get(metric, ()))
                row = f"| {benchmark}.{metric} | {100 * scores[metric]:.1f} | {between} |"
                rows.append(row + (f" {100 * result.ceiling.get(metric, 1.0):.1f} |" if limited else ""))
    if rows:
        heads = ["| score | % | 95 % interval |", "|---|---|---|"]
        heads = [heads[0] + " best possible |", heads[1] + "---|"] if limited else heads
        parts.append("\n".join([*heads, *rows]))
    return "\n\n".join(parts)


def encode(state: Mapping[str, Any]) -> str:
    """Encodes a view's state as the tag's value."""
    packed = zlib.compress(json.dumps(state, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode(), 9)
    return _DEFLATED + base64.b64encode(packed).decode()


def decode(value: str) -> dict[str, Any]:
    """Decodes a tag's value."""
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(value.removeprefix(_DEFLATED))))
    return state


def _recalls(names: Sequence[str]) -> list[str]:
    """Names of R@1 on long and short text of every benchmark, long text first."""
    return [name for metric in RECALLS for name in names if name.partition(".")[2] == metric]


def _varied(runs: Sequence[ComparedRun]) -> list[str]:
    """Parameters that differ between runs, except the seed; those with a title come first."""
    values: dict[str, set[str]] = {}
    for key in {key for run in runs for key in run.parameters} - {"seed", "seeds"}:
        values[key] = {run.parameters[key] for run in runs if key in run.parameters}
    different = sorted(key for key, distinct in values.items() if len(distinct) > 1)
    titled = [key for key in PARAMETER_TITLES if key in different]
    return titled + [key for key in different if key not in PARAMETER_TITLES][:OTHERS]


def _averaged(runs: Sequence[ComparedRun]) -> dict[str, Any] | None:
    """The grouping of runs: by ablation, averaging seeds, unless that would mix runs with other settings."""
    seeds = Counter((run.tags.get("ablation"), run.tags.get("seed")) for run in runs)
    ablations = {ablation for ablation, _ in seeds}
    if len(ablations) == len(seeds) or seeds.most_common(1)[0][1] > 1:
        return None
    return {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "ablation"}]}


def _section(title: str, **settings: Any) -> dict[str, Any]:
    return {"uuid": title, "name": title, "display": True, "isReordered": True} | settings


def _card(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "runsCountToCompare": 100, "deleted": False, "isGenerated": False} | settings


def _line(metric: str) -> dict[str, Any]:
    return _card(
        "LINE",
        metricKey=metric,
        selectedMetricKeys=[metric],
        lineSmoothness=0,
        xAxisScaleType="linear",
        scaleType="linear",
        range={},
        xAxisKey="step",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        ignoreOutliers=False,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _scatter(parameter: str, metric: str) -> dict[str, Any]:
    return _card("SCATTER", xaxis={"key": parameter, "type": "PARAM"}, yaxis={"key": metric, "type": "METRIC"})


def _parallel(parameters: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    return _card("PARALLEL", selectedParams=parameters, selectedMetrics=metrics, showAllRuns=True)
