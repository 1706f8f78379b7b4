"""Gates: Great Expectations suites over small tables of numbers, and their reports."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lotlip.core.files import atomic_write

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

SHOWN_ROWS = 3

# Great Expectations keeps its context in a global, so one gate runs at a time.
_gate = threading.Lock()


@dataclass(frozen=True)
class Check:
    """One check of a gate, in words for a person.

    Attributes:
        what: the expectation: "share of items that failed is at most 1 %".
        observed: the measured value: "0.3 %".
        success: whether the expectation holds.
        key: the key of params.yaml that sets the limit, such as "ingest.max_failure_share"; empty if none does.
    """

    what: str
    observed: str
    success: bool
    key: str = ""


class GateFailed(RuntimeError):
    """A stage's results failed its gate; the message lists the failed checks and the report's path."""


def run_gate(
    stage: str, tables: Mapping[str, pd.DataFrame], suites: Mapping[str, Sequence[Expectation]], report: Path
) -> list[Check]:
    """Validates every table with its suite; writes `gate.md`, and Great Expectations' pages under `data_docs/`.

    Args:
        stage: name for the report.
        tables: table's name → its rows; the first column identifies a row.
        suites: table's name → expectations, each described in plain words by `meta["what"]`.
        report: scratch folder.

    Returns:
        One check per expectation, in order.

    Raises:
        GateFailed: an expectation does not hold, or could not be evaluated.
    """
    with _gate, atomic_write(report / "data_docs") as pages:  # those of an interrupted gate go
        pages.mkdir()
        checks = _validate(stage, tables, suites, pages)
    _write_report(stage, checks, report)
    failed = [check for check in checks if not check.success]
    if failed:
        lines = "\n".join(f"  - {check.what}: found {check.observed}{_limit(check)}" for check in failed)
        raise GateFailed(
            f"the gate after {stage} failed, nothing was published:\n{lines}\nReport: {report / 'gate.md'}"
        )
    return checks


def _limit(check: Check) -> str:
    """The end of a failed check's line: which key sets the limit."""
    return f"; {check.key} in params.yaml sets the limit" if check.key else ""


def _validate(
    stage: str, tables: Mapping[str, pd.DataFrame], suites: Mapping[str, Sequence[Expectation]], docs: Path
) -> list[Check]:
    """Validates every table and builds the pages."""
    context, gx = _context(docs)
    source = context.data_sources.add_pandas(stage)
    checks: list[Check] = []
    for name, suite in suites.items():
        table = tables[name].reset_index(drop=True)
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        expectations = context.suites.add(gx.ExpectationSuite(name, expectations=list(suite)))
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=f"{stage}-{name}", data=batch, suite=expectations)
        )
        id_column = str(table.columns[0])
        result = definition.run(
            batch_parameters={"dataframe": table},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [id_column]},
        )
        checks += [_check(item, id_column) for item in result.results]
    _write_pages(context)
    return checks


def _write_pages(context: Any) -> None:
    """Writes Great Expectations' pages, which takes three times as long as the validation itself."""
    context.build_data_docs(site_names=["gate"])


def _context(docs: Path) -> tuple[Any, Any]:
    """A Great Expectations context that writes only the pages in `docs` and makes no network requests."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which reads it
    import great_expectations as gx

    from lotlip.core.data_docs import site

    # it would log every temporary folder
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context: Any = gx.get_context(mode="ephemeral")  # Any: its annotations are narrower than what it accepts
    context.variables.progress_bars = {"globally": False}
    # Great Expectations would substitute environment variables for names after a dollar sign
    place = str(docs.resolve()).replace("$", r"\$")
    context.add_data_docs_site("gate", site(place))
    return context, gx


def _check(item: Any, id_column: str) -> Check:
    """One of Great Expectations' results as a check."""
    meta = item.expectation_config.meta or {}
    what = meta.get("what") or item.expectation_config.type
    key = str(meta.get("key", ""))
    if not item.result:
        return Check(what, f"could not be evaluated: {_reason(item.exception_info)}", False, key)
    show = in_percent if meta.get("percent") else _plain
    result = item.result
    if "observed_value" in result:
        detail = f" ({meta['detail']})" if meta.get("detail") else ""
        return Check(what, show(result["observed_value"]) + detail, bool(item.success), key)
    rows = result.get("unexpected_index_list") or []
    column = item.expectation_config.kwargs["column"]
    shown = ", ".join(f"{row[id_column]} ({show(row[column])})" for row in rows[:SHOWN_ROWS])
    more = ", …" if len(rows) > SHOWN_ROWS else ""
    observed = f"{len(rows)} of {result['element_count']} do not: {shown}{more}" if rows else "all do"
    return Check(what, observed, bool(item.success), key)


def _reason(exception: Mapping[str, Any]) -> str:
    """Why an expectation could not be evaluated; Great Expectations gives one message in all, or one per metric."""
    parts = [exception, *(part for part in exception.values() if isinstance(part, Mapping))]
    return next((part["exception_message"] for part in parts if part.get("exception_message")), "no reason given")


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "nothing"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_percent(value: Any) -> str:
    return f"{100 * value:.3g} %" if value is not None and np.isfinite(value) else _plain(value)


def _write_report(stage: str, checks: Sequence[Check], report: Path) -> None:
    passed = sum(check.success for check in checks)
    lines = [
        f"# Gate after {stage}: {'passed' if passed == len(checks) else 'FAILED'}",
        "",
        f"{passed} of {len(checks)} checks hold. Details: [Data Docs](data_docs/index.html).",
        "",
        "| | Check | Observed | Limit |",
        "|---|---|---|---|",
        *(
            f"| {'ok' if check.success else '**no**'} | {_cell(check.what)} | {_cell(check.observed)} "
            f"| {f'`{check.key}`' if check.key else ''} |"
            for check in checks
        ),
    ]
    report.mkdir(parents=True, exist_ok=True)
    (report / "gate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def each_value(
    column: str, what: str, low: float | None = None, high: float | None = None, **words: Any
) -> Expectation:
    """Expects every value of a column to be from `low` to `high`, inclusive; missing values are skipped.

    `words` are those of `one_value`.
    """
    from great_expectations import expectations as gxe

    meta = {"what": what, **words}
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high, meta=meta)


def one_value(column: str, what: str, low: float | None = None, high: float | None = None, **words: Any) -> Expectation:
    """Expects a one-row table to have a value from `low` to `high`, inclusive.

    `words` are for the report: `percent=True` shows the value as a percentage, `detail` is shown beside it, and `key`
    is the key of params.yaml that sets the limit.
    """
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnMaxToBeBetween(column=column, min_value=low, max_value=high, meta={"what": what, **words})


def max_share(column: str, what: str, limit: float, key: str, detail: str = "") -> Expectation:
    """Expects a one-row table to have a share of at most `limit`.

    Args:
        column: with the share.
        what: describes the counted items.
        limit: from 0 to 1.
        key: the key of params.yaml that sets the limit.
        detail: shown beside the value.
    """
    what = f"share of {what} is at most {in_percent(limit)}"
    return one_value(column, what, high=limit, percent=True, detail=detail, key=key)
