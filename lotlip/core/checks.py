"""What a gate is made of: Great Expectations over small tables of numbers, and what a person reads of it."""

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

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

SHOWN_ROWS = 3

# Great Expectations keeps its context in a global, so one gate runs at a time.
_gate = threading.Lock()


@dataclass(frozen=True)
class Check:
    """One thing that a gate looked at, in words for a person.

    Attributes:
        what: what should hold: "share of items that failed is at most 1 %".
        observed: what was found: "0.3 %".
        success: whether it holds.
        key: of params.yaml that sets the limit: "ingest.max_failure_share"; empty where nothing sets it.
    """

    what: str
    observed: str
    success: bool
    key: str = ""


class GateFailed(RuntimeError):
    """A stage's results are not good enough to go on; the message lists what was found and where the report is."""


def run_gate(
    stage: str, tables: Mapping[str, pd.DataFrame], suites: Mapping[str, Sequence[Expectation]], report: Path
) -> list[Check]:
    """Validates every table with its suite; writes `gate.md` and, under `data_docs/`, Great Expectations' pages.

    Args:
        stage: name for the report.
        tables: table's name → its rows; the first column says what a row is about.
        suites: table's name → expectations, each with `meta["what"]`: what should hold, in plain words.
        report: scratch folder.

    Returns:
        A check per expectation, in order.

    Raises:
        GateFailed: one of them does not hold, or could not be looked at.
    """
    with _gate:
        checks = _validate(stage, tables, suites, report / "data_docs")
    _write_report(stage, checks, report)
    failed = [check for check in checks if not check.success]
    if failed:
        lines = "\n".join(f"  - {check.what}: found {check.observed}{_limit(check)}" for check in failed)
        raise GateFailed(
            f"the gate after {stage} failed, nothing was published:\n{lines}\nReport: {report / 'gate.md'}"
        )
    return checks


def _limit(check: Check) -> str:
    """Where the limit of a check is set."""
    return f"; {check.key} in params.yaml sets the limit" if check.key else ""


def _validate(
    stage: str, tables: Mapping[str, pd.DataFrame], suites: Mapping[str, Sequence[Expectation]], docs: Path
) -> list[Check]:
    """Looks at every table; builds the pages."""
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
        about = str(table.columns[0])
        result = definition.run(
            batch_parameters={"dataframe": table},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [about]},
        )
        checks += [_check(item, about) for item in result.results]
    _write_pages(context)
    return checks


def _write_pages(context: Any) -> None:
    """Writes Great Expectations' pages, which takes thrice as long as all that they tell of."""
    context.build_data_docs(site_names=["gate"])


def _context(docs: Path) -> tuple[Any, Any]:
    """A context of Great Expectations that keeps nothing on disk but the pages in `docs`, and asks nobody."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which reads it
    import great_expectations as gx

    # it would tell of every temporary folder
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context: Any = gx.get_context(mode="ephemeral")  # its types are narrower than what it takes
    context.variables.progress_bars = {"globally": False}
    # Great Expectations would put variables of the environment in place of names after a dollar sign
    place = str(docs.resolve()).replace("$", r"\$")
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": place},
    }
    context.add_data_docs_site("gate", site)
    return context, gx


def _check(item: Any, about: str) -> Check:
    """One of Great Expectations' results, in words."""
    meta = item.expectation_config.meta or {}
    what = meta.get("what") or item.expectation_config.type
    key = str(meta.get("key", ""))
    if not item.result:
        return Check(what, f"could not be looked at: {_reason(item.exception_info)}", False, key)
    show = in_percent if meta.get("percent") else _plain
    found = item.result
    if "observed_value" in found:
        detail = f" ({meta['detail']})" if meta.get("detail") else ""
        return Check(what, show(found["observed_value"]) + detail, bool(item.success), key)
    rows = found.get("unexpected_index_list") or []
    column = item.expectation_config.kwargs["column"]
    shown = ", ".join(f"{row[about]} ({show(row[column])})" for row in rows[:SHOWN_ROWS])
    more = ", …" if len(rows) > SHOWN_ROWS else ""
    observed = f"{len(rows)} of {found['element_count']} do not: {shown}{more}" if rows else "all do"
    return Check(what, observed, bool(item.success), key)


def _reason(exception: Mapping[str, Any]) -> str:
    """Why an expectation could not be looked at; Great Expectations says it per metric, or at once."""
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
        "| | What should hold | Found | Limit |",
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


def each(column: str, what: str, low: float | None = None, high: float | None = None, **words: Any) -> Expectation:
    """In every row where the column has a value, it is from `low` to `high`; both count. `words` as of `one`."""
    from great_expectations import expectations as gxe

    meta = {"what": what, **words}
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high, meta=meta)


def one(column: str, what: str, low: float | None = None, high: float | None = None, **words: Any) -> Expectation:
    """A table's one value is there, and from `low` to `high`.

    `words` are for the person: `percent=True` shows the value so, `detail` is said beside it, `key` is the key of
    params.yaml that sets the limit.
    """
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnMaxToBeBetween(column=column, min_value=low, max_value=high, meta={"what": what, **words})


def share(column: str, what: str, limit: float, key: str, detail: str = "") -> Expectation:
    """A table's one value is there, and is a share of at most `limit`; `what` it is of, and `detail`, are in words.

    `key` is the key of params.yaml that sets the limit.
    """
    what = f"share of {what} is at most {in_percent(limit)}"
    return one(column, what, high=limit, percent=True, detail=detail, key=key)
