"""The gate after each stage: Great Expectations suites over small tables of statistics, and what a person reads of it.

A stage's tables have a row per unit, and its `stage` table one row for all, read a partition at a time: a gate's
memory does not grow with the data.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lotlip import config
from lotlip.captioning.quality import RULES, Agreement
from lotlip.inspection import (
    CAPTIONS,
    PARTITION,
    SHARD,
    Fact,
    held_out_images,
    inspect_captions,
    inspect_partition,
    inspect_shard,
    read_keys,
)
from lotlip.partitions import read_captions, read_table, totals
from lotlip.records import Failure, UnitReport
from lotlip.repeats import count_repeats, hashes

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

SHOWN_ROWS = 3
ENOUGH_CAPTIONS = 30  # of a partition, for its mean length to say something

# Great Expectations keeps its context in a global, so one gate runs at a time.
_gate = threading.Lock()


@dataclass(frozen=True)
class Check:
    """One thing that a gate looked at, in words for a person.

    Attributes:
        what: what should hold: "share of items that failed is at most 1 %".
        observed: what was found: "0.3 %".
        success: whether it holds.
    """

    what: str
    observed: str
    success: bool


class GateFailed(RuntimeError):
    """A stage's results are not good enough to go on; the message lists what was found and where the report is."""


# --- any gate -----------------------------------------------------------------------------------------------------


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
        lines = "\n".join(f"  - {check.what}: found {check.observed}" for check in failed)
        raise GateFailed(
            f"the gate after {stage} failed, nothing was published:\n{lines}\nReport: {report / 'gate.md'}"
        )
    return checks


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
    context.build_data_docs(site_names=["gate"])
    return checks


def _context(docs: Path) -> tuple[Any, Any]:
    """A context of Great Expectations that keeps nothing on disk but the pages in `docs`, and asks nobody."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, which reads it
    import great_expectations as gx

    # it would tell of every temporary folder
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context: Any = gx.get_context(mode="ephemeral")  # its types are narrower than what it takes
    context.variables.progress_bars = {"globally": False}
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
    }
    context.add_data_docs_site("gate", site)
    return context, gx


def _check(item: Any, about: str) -> Check:
    """One of Great Expectations' results, in words."""
    meta = item.expectation_config.meta or {}
    what = meta.get("what") or item.expectation_config.type
    if not item.result:
        return Check(what, f"could not be looked at: {_reason(item.exception_info)}", False)
    show = _percent if meta.get("percent") else _plain
    found = item.result
    if "observed_value" in found:
        detail = f" ({meta['detail']})" if meta.get("detail") else ""
        return Check(what, show(found["observed_value"]) + detail, bool(item.success))
    rows = found.get("unexpected_index_list") or []
    column = item.expectation_config.kwargs["column"]
    shown = ", ".join(f"{row[about]} ({show(row[column])})" for row in rows[:SHOWN_ROWS])
    more = ", …" if len(rows) > SHOWN_ROWS else ""
    observed = f"{len(rows)} of {found['element_count']} do not: {shown}{more}" if rows else "all do"
    return Check(what, observed, bool(item.success))


def _reason(exception: Mapping[str, Any]) -> str:
    """Why an expectation could not be looked at; Great Expectations says it per metric, or at once."""
    parts = [exception, *(part for part in exception.values() if isinstance(part, Mapping))]
    return next((part["exception_message"] for part in parts if part.get("exception_message")), "no reason given")


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "nothing"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.3g} %" if value is not None and np.isfinite(value) else _plain(value)


def _write_report(stage: str, checks: Sequence[Check], report: Path) -> None:
    passed = sum(check.success for check in checks)
    lines = [
        f"# Gate after {stage}: {'passed' if passed == len(checks) else 'FAILED'}",
        "",
        f"{passed} of {len(checks)} checks hold. Details: [Data Docs](data_docs/index.html).",
        "",
        "| | What should hold | Found |",
        "|---|---|---|",
        *(
            f"| {'ok' if check.success else '**no**'} | {_cell(check.what)} | {_cell(check.observed)} |"
            for check in checks
        ),
    ]
    report.mkdir(parents=True, exist_ok=True)
    (report / "gate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- expectations, with their words -------------------------------------------------------------------------------


def _each(column: str, what: str, low: float | None = None, high: float | None = None, **words: Any) -> Expectation:
    """In every row where the column has a value, it is from `low` to `high`; both count. `words` as of `_one`."""
    from great_expectations import expectations as gxe

    meta = {"what": what, **words}
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high, meta=meta)


def _one(column: str, what: str, low: float | None = None, high: float | None = None, **words: Any) -> Expectation:
    """A table's one value is there, and from `low` to `high`.

    `words` are for the person: `percent=True` shows the value so, `detail` is said beside it.
    """
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnMaxToBeBetween(column=column, min_value=low, max_value=high, meta={"what": what, **words})


def _failures(found: Mapping[str, Any], limit: float) -> tuple[dict[str, float], Expectation]:
    """The share of a stage's items that failed (by `totals`, or by an index that has them), and what it may be."""
    share = found["failed"] / found["read"] if found["read"] else 0.0
    detail = ", ".join(f"{count} {kind}" for kind, count in found["failure_kinds"].items())
    what = f"share of items that failed is at most {_percent(limit)}"
    return {"failure_share": share}, _one("failure_share", what, high=limit, percent=True, detail=detail)


def _share(column: str, what: str, limit: float) -> Expectation:
    """A table's one value is there, and a share of at most `limit`."""
    return _one(column, f"share of {what} is at most {_percent(limit)}", high=limit, percent=True)


def _fact(fact: Fact) -> Expectation:
    return _each(fact.column, fact.what, fact.low, fact.high)


def _rows(rows: Sequence[Mapping[str, Any]], facts: Sequence[Fact], about: str, *more: str) -> pd.DataFrame:
    """Rows of numbers as a table, which has its columns though it may have no rows; None is a gap."""
    numbers = [*(fact.column for fact in facts), *more]
    return pd.DataFrame(rows, columns=[about, *numbers]).astype(dict.fromkeys(numbers, float))


def _repeated(folder: Path, names: Sequence[str], column: str, values: int) -> int:
    """How many values of a column come again, in any of the partitions, of about so many."""
    return count_repeats(len(names), lambda part: hashes(read_table(folder, names[part], [column])[column]), values)


# --- one gate per stage -------------------------------------------------------------------------------------------


def gate_ingest(
    settings: config.Ingest,
    folder: Path,
    reports: Sequence[UnitReport],
    units: int,
    evaluation: Collection[str],
    report: Path,
) -> list[Check]:
    """Every item is accounted for, every key and image comes once, and none that is evaluated on is trained on.

    Args:
        settings: the stage's.
        folder: where the partitions are.
        reports: of all partitions, and of units that failed as a whole.
        units: how many there were to read.
        evaluation: hashes of images, beside the held-out splits', that must not be trained on.
        report: scratch folder.

    Raises:
        GateFailed: see `run_gate`, as for every gate below.
    """
    there = _with_something(reports)
    names = [unit.name for unit in there]
    held_out = held_out_images(folder, names) | set(evaluation)
    rows = [inspect_partition(folder, unit.name, unit.written, held_out) for unit in there]
    table = _rows(rows, PARTITION, "unit", "opened", "constant")
    whole = table.loc[table["missing_files"] == 0, "unit"].tolist()
    written = sum(unit.written for unit in reports)
    again = {column: _repeated(folder, whole, column, written) for column in ("key", "sha256", "raw_caption")}
    failures, few_failures = _failures(totals(reports), settings.max_failure_share)
    stage = {
        "stage": "ingest",
        "train": sum(unit.written for unit in reports if unit.name.startswith("train/")),
        "repeated_keys": again["key"],
        "repeated_images": again["sha256"],
        "repeated_captions": again["raw_caption"] / max(written, 1),
        "constant_share": table["constant"].sum() / max(table["opened"].sum(), 1),
        "broken_units": sum(failure.kind in BROKEN_UNIT for failure in _one_each(reports)) / max(units, 1),
        **failures,
    }
    suites = {
        "stage": [
            few_failures,
            _share("broken_units", "source files that are broken or cut off", settings.max_broken_unit_share),
            _one("train", "the train split has images", low=1),
            _one("repeated_keys", "no key comes twice", high=0),
            _one("repeated_images", "no image comes twice", high=0),
            _share("repeated_captions", "raw captions that repeat another", settings.max_repeated_caption_share),
            _share("constant_share", "images looked at that are one colour all over", settings.max_constant_share),
        ],
        "units": [_fact(fact) for fact in PARTITION],
    }
    return run_gate("ingest", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


# Kinds of failures that tell of a whole file of the source; its items were not all counted.
BROKEN_UNIT = ("unit", "truncated", "unreadable-shard")


def _one_each(reports: Sequence[UnitReport]) -> Iterator[Failure]:
    """The failures, but one alone for a unit that failed as a whole."""
    for unit in reports:
        yield from unit.failures[:1] if not unit.sha256 else unit.failures


def gate_image_tower(
    settings: config.ScenesTower | config.TimmTower, accuracy: Mapping[str, float], features: np.ndarray, report: Path
) -> list[Check]:
    """The tower's features tell pictures apart, and the demo's tower has learned its attributes.

    Args:
        settings: the stage's.
        accuracy: attribute → share told right, on scenes it was not trained on; empty for a tower from elsewhere.
        features: of a few different pictures, [n, D].
        report: scratch folder.
    """
    spread = float(features.std(axis=0).max()) if np.isfinite(features).all() else None
    stage: dict[str, Any] = {"stage": "image_tower", "not_finite": int((~np.isfinite(features)).sum())}
    checks = [
        _one("not_finite", "features have no NaN or infinity", high=0),
        _one("spread", "features differ from picture to picture (largest standard deviation is above 0)", low=1e-6),
    ]
    if isinstance(settings, config.ScenesTower):
        stage["accuracy"] = float(np.mean(list(accuracy.values()))) if accuracy else None
        detail = ", ".join(f"{name} {_percent(value)}" for name, value in accuracy.items())
        what = f"mean accuracy over attributes is at least {_percent(settings.min_accuracy)}"
        checks.append(_one("accuracy", what, low=settings.min_accuracy, percent=True, detail=detail))
    table = pd.DataFrame([{**stage, "spread": spread}])
    return run_gate("image_tower", {"stage": table}, {"stage": checks}, report)


def gate_caption(
    settings: config.CaptionStage, folder: Path, reports: Sequence[UnitReport], report: Path
) -> list[Check]:
    """One captioner's captions are there, are the images' own, and are neither broken nor the same over and over."""
    rows, agreements = [], {}
    for unit in _with_something(reports):
        row = inspect_captions(folder, unit.name, unit.written)
        rows.append(row)
        if row["missing_files"]:
            continue
        measured = read_captions(folder, unit.name, ["words", "truncated", "own_agreement", "next_agreement"])
        agreements[unit.name] = Agreement.of(measured)
        enough = len(measured) >= ENOUGH_CAPTIONS
        row["words"] = float(measured["words"].astype(float).mean()) if enough else None
        row["truncated"] = int(measured["truncated"].eq(True).sum())
    names = list(agreements)
    table = _rows(rows, CAPTIONS, "unit", "words", "truncated")
    table["length_ratio"] = _from_median(table["words"])
    captions = sum(unit.written for unit in reports)
    found = totals(reports)
    filtered = {rule: count for rule, count in found["failure_kinds"].items() if rule in RULES}
    others = {kind: count for kind, count in found["failure_kinds"].items() if kind not in RULES}
    failures, few_failures = _failures(
        {**found, "failed": sum(others.values()), "failure_kinds": others}, settings.max_failure_share
    )
    missing = [unit.name for unit in reports if not unit.written and (not unit.sha256 or unit.read >= ENOUGH_CAPTIONS)]
    swapped, agreeing = _swapped(agreements, settings.min_agreement_ratio)
    written = captions + sum(filtered.values())
    stage = {
        "stage": "caption",
        "captions": captions,
        "filtered_share": sum(filtered.values()) / max(written, 1),
        "truncated_share": table["truncated"].sum() / max(captions, 1),
        "missing_share": len(missing) / max(len(reports), 1),
        "repeated_keys": _repeated(folder, names, "key", captions),
        "repeated_share": _repeated(folder, names, "text", captions) / max(captions, 1),
        "swapped": len(swapped),
        **failures,
    }
    shares = {
        "filtered_share": ("captions that quality's rules drop", settings.max_filtered_share),
        "truncated_share": ("captions that are cut off", settings.max_truncated_share),
        "missing_share": ("partitions without any caption", settings.max_missing_partitions),
        "repeated_share": ("captions that repeat another word for word", settings.max_repeated_share),
    }
    details = {
        "filtered_share": ", ".join(f"{count} {rule}" for rule, count in filtered.items()),
        "missing_share": _names(missing),
    }
    lengths = f"a partition's mean length is within {settings.max_length_ratio:g} times the median partition's"
    suites = {
        "stage": [
            few_failures,
            _one("captions", "there are captions", low=1),
            _one("repeated_keys", "no image has two captions", high=0),
            *(
                _one(
                    name,
                    f"share of {what} is at most {_percent(limit)}",
                    high=limit,
                    percent=True,
                    detail=details.get(name, ""),
                )
                for name, (what, limit) in shares.items()
            ),
            _one(
                "swapped",
                f"captions are their own images': they share {settings.min_agreement_ratio:g} times as many words with "
                "their raw captions as with the next ones' (partitions that do not)",
                high=0,
                detail=agreeing,
            ),
        ],
        "units": [
            *(_fact(fact) for fact in CAPTIONS),
            _each("length_ratio", lengths, high=settings.max_length_ratio),
        ],
    }
    return run_gate("caption", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


def _from_median(means: pd.Series) -> pd.Series:
    """How many times a partition's mean is the median of all, or the other way round; none where it has none."""
    means = means.astype(float)
    ratio = means / means.median()
    return pd.concat([ratio, 1 / ratio], axis=1).max(axis=1, skipna=False)


def _swapped(agreements: Mapping[str, Agreement], ratio: float) -> tuple[list[str], str]:
    """Partitions whose captions are certainly not their images' own (or "all together"), and what was found."""
    together = sum(agreements.values(), Agreement())
    verdicts = {name: agreement.is_own(ratio) for name, agreement in agreements.items()}
    swapped = [name for name, own in verdicts.items() if own is False]
    if not swapped and together.is_own(ratio) is False:
        swapped = ["all together"]
    unknown = [name for name, own in verdicts.items() if own is None]
    parts = [str(together), *([_names(swapped)] if swapped else [])]
    if unknown:
        parts.append(f"could not tell for {len(unknown)} of {len(verdicts)} partitions: few captions to compare")
    return swapped, "; ".join(parts)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_ROWS]) + (", …" if len(names) > SHOWN_ROWS else "")


def gate_shard(
    settings: config.Shard,
    folder: Path,
    index: Mapping[str, Any],
    expected_samples: int,
    held_out: Collection[str],
    report: Path,
) -> list[Check]:
    """The shards on disk are those of the index, and every sample that was planned is in one or has failed.

    Args:
        settings: the stage's.
        folder: where the shards are.
        index: their index.json.
        expected_samples: that were planned.
        held_out: hashes of the images that must not be trained on.
        report: scratch folder.
    """
    shards = [shard for split in index["splits"].values() for shard in split["shards"]]
    rows = [inspect_shard(folder, shard, settings.store_features, held_out) for shard in shards]
    whole = [folder / f"{row['shard']}.tar" for row in rows if row["places_off"] == 0]
    failures, few_failures = _failures(index, settings.max_failure_share)
    table = _rows(rows, SHARD, "shard", "samples", "uncaptioned")
    samples = index["written"]
    stage = {
        "stage": "shard",
        "samples": samples + index["failed"],
        "repeated_keys": count_repeats(len(whole), lambda shard: hashes(read_keys(whole[shard])), samples),
        "train": index["splits"].get("train", {}).get("samples", 0),
        "widths": len({width for row in rows for width in row["widths"]}),
        "uncaptioned": table["uncaptioned"].sum() / max(samples, 1),
        **failures,
    }
    expected = f"samples written and failed are the {expected_samples} that were planned"
    largest = settings.samples_per_shard
    described = [_share("uncaptioned", "samples without a long caption", settings.max_uncaptioned_share)]
    suites = {
        "stage": [
            few_failures,
            _one("samples", expected, expected_samples, expected_samples),
            _one("train", "the train split has samples", low=1),
            _one("repeated_keys", "no key comes twice", high=0),
            _one("widths", "all features have one width (as many as this)", high=1),
            *(described if set(index["statistics"]) - {"raw"} else []),  # where there are captioners
        ],
        "shards": [
            *(_fact(fact) for fact in SHARD),
            _each("samples", f"a shard has from 1 to {largest} samples", 1, largest),
        ],
    }
    return run_gate("shard", {"stage": pd.DataFrame([stage]), "shards": table}, suites, report)


def gate_pretrain(settings: config.Pretrain, history: pd.DataFrame, guess_loss: float, report: Path) -> list[Check]:
    """Training was sound at every step that was logged, and learned something.

    Args:
        settings: of the ablation.
        history: columns seed, step, loss, temperature, learning_rate, samples_per_second; a row per logged step.
        guess_loss: what guessing would lose.
        report: scratch folder.
    """
    places = zip(history["seed"], history["step"], strict=True)
    steps = history.assign(place=[f"seed {seed} step {step}" for seed, step in places])
    steps["not_finite"] = (~np.isfinite(history[["loss", "temperature"]].astype(float))).sum(axis=1)
    steps["advance"] = history.groupby("seed")["step"].diff()
    trained = [seed for seed in settings.seeds if (history["seed"] == seed).any()]
    final = [_final_loss(history.loc[history["seed"] == seed, "loss"]) / guess_loss for seed in trained]
    seeds = pd.DataFrame({"seed": [f"seed {seed}" for seed in trained], "final_share": final})
    limit = settings.max_final_loss_share
    tables = {
        "stage": pd.DataFrame([{"stage": "pretrain", "untrained": len(settings.seeds) - len(trained)}]),
        "steps": steps[["place", "not_finite", "advance", "temperature"]],
        "seeds": seeds,
    }
    lowest = f"mean loss of a seed's last 10 % of rows is at most {_percent(limit)} of guessing's ({guess_loss:.4g})"
    suites = {
        "stage": [_one("untrained", "every seed has a curve", high=0)],
        "steps": [
            _each("not_finite", "loss and temperature are numbers at every step", high=0),
            _each("advance", "steps go up", low=1),
            _each("temperature", "the temperature is above 0 and at most 100", np.nextafter(0, 1), 100),
        ],
        "seeds": [_each("final_share", lowest, high=limit, percent=True)],
    }
    return run_gate("pretrain", tables, suites, report)


def _final_loss(losses: pd.Series) -> float:
    return float(losses.tail(max(len(losses) // 10, 1)).mean())


SHORT_RECALL = ("short.image_to_text.r1", "short.text_to_image.r1")


def gate_evaluate(settings: config.Evaluate, scores: pd.DataFrame, report: Path) -> list[Check]:
    """Scores are shares, and short text is told apart better than by chance.

    Args:
        settings: the stage's.
        scores: columns benchmark, seed, metric, value, chance; a row per score.
        report: scratch folder.
    """
    names = zip(scores["benchmark"], scores["metric"], scores["seed"], strict=True)
    named = pd.DataFrame(
        {
            "score": [f"{benchmark} {metric} seed {seed}" for benchmark, metric, seed in names],
            "value": scores["value"].astype(float),
            "unknown": scores["value"].isna().astype(int),
            "over_chance": scores["value"] / scores["chance"],
        }
    )
    short = named[scores["metric"].isin(SHORT_RECALL)]
    lowest = settings.min_score_over_chance
    tables = {
        "stage": pd.DataFrame([{"stage": "evaluate", "short": len(short)}]),
        "scores": named,
        "short": short,
    }
    suites = {
        "stage": [_one("short", "R@1 of short text was measured", low=1)],
        "scores": [
            _each("unknown", "every score is a number", high=0),
            _each("value", "every score is from 0 to 1", 0, 1),
        ],
        "short": [_each("over_chance", f"R@1 of short text is at least {lowest:g} times chance", low=lowest)],
    }
    return run_gate("evaluate", tables, suites, report)


def gate_report(page: Path, images: int, report: Path) -> list[Check]:
    """The page is there, shows its images, needs no other file, and its links to files lead somewhere.

    Args:
        page: the HTML file.
        images: that it should show, at least.
        report: scratch folder.
    """
    found = _References()
    if page.is_file():
        found.feed(page.read_text(encoding="utf-8"))
    outside = ", ".join(found.outside[:SHOWN_ROWS])
    broken = [link for link in found.links if not (page.parent / link).is_file()][:SHOWN_ROWS]
    row = {
        "page": page.name,
        "bytes": page.stat().st_size if page.is_file() else 0,
        "images": found.images,
        "outside": len(found.outside),
        "broken_links": len(broken),
    }
    checks = [
        _one("bytes", f"{page.name} is there and is not empty (bytes)", low=1),
        _one("images", f"{page.name} shows at least {images} images", low=images),
        _one("outside", f"{page.name} needs no other file", high=0, detail=outside),
        _one(
            "broken_links", f"{page.name} links to files that are there", high=0, detail=", ".join(broken[:SHOWN_ROWS])
        ),
    ]
    return run_gate("report", {"stage": pd.DataFrame([row])}, {"stage": checks}, report)


# What a style sheet loads, but for what the page itself has.
_LOADED_BY_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?(?!data:|\#|url)([^"')\s]+)""")


class _References(HTMLParser):
    """Counts a page's images, and collects what it needs from elsewhere; links to web sites need nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.outside: list[str] = []
        self.links: list[str] = []  # to files beside it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value is not None and not value.startswith(("data:", "#")):
                web = value.startswith(("http://", "https://"))
                if tag != "a":
                    self.outside.append(value)
                elif not web:
                    self.links.append(value)
            elif name == "style":
                self.outside += _LOADED_BY_STYLE.findall(value or "")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.outside += _LOADED_BY_STYLE.findall(data)


def _with_something(reports: Sequence[UnitReport]) -> list[UnitReport]:
    """Units that have a table to look at; of one that failed as a whole only its failures are there."""
    return [unit for unit in reports if unit.written]
