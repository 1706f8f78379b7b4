"""The gate after each stage: Great Expectations suites over small tables of statistics, and what a person reads of it.

A stage's tables have a row per unit, and its `stage` table one row for all, read a partition at a time: a gate's
memory does not grow with the data (but for eight bytes a key, to see that none comes twice).
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lotlip import config
from lotlip.files import sha256_files
from lotlip.partitions import read_captions, read_table, totals
from lotlip.records import UnitReport

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


def _repeated(parts: Sequence[pd.Series]) -> int:
    """How many values come again, in any of the parts; 64-bit hashes stand for the values."""
    hashes = [pd.util.hash_pandas_object(part, index=False).to_numpy() for part in parts]
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    return len(every) - len(np.unique(every))


# --- one gate per stage -------------------------------------------------------------------------------------------


def gate_ingest(settings: config.Ingest, folder: Path, reports: Sequence[UnitReport], report: Path) -> list[Check]:
    """Every item is accounted for, every key is one image's, and captions and images are there.

    Raises:
        GateFailed: see `run_gate`, as for every gate below.
    """
    rows, keys = [], []
    for unit in _with_something(reports):
        table = read_table(folder, unit.name, ["key", "raw_caption", "width", "height", "offset", "size"])
        keys.append(table["key"])
        tar_bytes = (folder / f"{unit.name}.tar").stat().st_size
        rows.append(
            {
                "unit": unit.name,
                "rows_off": len(table) - unit.written,
                "empty_captions": _blank(table["raw_caption"]),
                "smallest_side": table[["width", "height"]].min(axis=None),
                "cut_images": int((table["offset"] + table["size"] > tar_bytes).sum()),
            }
        )
    failures, few_failures = _failures(totals(reports), settings.max_failure_share)
    train = sum(unit.written for unit in reports if unit.name.startswith("train/"))
    tables = {
        "stage": pd.DataFrame([{"stage": "ingest", "train": train, "repeated_keys": _repeated(keys), **failures}]),
        "units": pd.DataFrame(rows, columns=["unit", "rows_off", "empty_captions", "smallest_side", "cut_images"]),
    }
    suites = {
        "stage": [
            few_failures,
            _one("train", "the train split has images", low=1),
            _one("repeated_keys", "no key comes twice", high=0),
        ],
        "units": [
            _each("rows_off", "a partition's table has a row for every image written", 0, 0),
            _each("empty_captions", "a partition has no empty raw caption", high=0),
            _each("smallest_side", "images are at least 1 pixel wide and high", low=1),
            _each("cut_images", "a partition's tar has every image whole", high=0),
        ],
    }
    return run_gate("ingest", tables, suites, report)


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
    """One captioner's captions are there, are the image's alone, and are not the same over and over."""
    rows, keys, texts = [], [], []
    for unit in _with_something(reports):
        table = read_captions(folder, unit.name, ["key", "text", "sub_captions"])
        keys.append(table["key"])
        texts.append(table["text"])
        rows.append(
            {
                "unit": unit.name,
                "rows_off": len(table) - unit.written,
                "empty_texts": _blank(table["text"]),
                "unsplit": int((table["sub_captions"].map(len) == 0).sum()),
            }
        )
    failures, few_failures = _failures(totals(reports), settings.max_failure_share)
    captions = sum(unit.written for unit in reports)
    limit = settings.max_repeated_share
    stage = {
        "stage": "caption",
        "captions": captions,
        "repeated_keys": _repeated(keys),
        "repeated_share": _repeated(texts) / max(captions, 1),
        **failures,
    }
    tables = {
        "stage": pd.DataFrame([stage]),
        "units": pd.DataFrame(rows, columns=["unit", "rows_off", "empty_texts", "unsplit"]),
    }
    what = f"share of captions that repeat another word for word is at most {_percent(limit)}"
    suites = {
        "stage": [
            few_failures,
            _one("captions", "there are captions", low=1),
            _one("repeated_keys", "no image has two captions", high=0),
            _one("repeated_share", what, high=limit, percent=True),
        ],
        "units": [
            _each("rows_off", "a partition's table has a row for every caption written", 0, 0),
            _each("empty_texts", "a partition has no empty caption", high=0),
            _each("unsplit", "every caption of a partition has at least 1 sub-caption", high=0),
        ],
    }
    return run_gate("caption", tables, suites, report)


def gate_shard(
    settings: config.Shard, folder: Path, index: Mapping[str, Any], expected_samples: int, report: Path
) -> list[Check]:
    """The shards on disk are those of the index, and every sample that was planned is in one or has failed."""
    rows, keys = [], []
    for split in index["splits"].values():
        for shard in split["shards"]:
            row, shard_keys = _shard_row(settings, folder / f"{shard['name']}.tar", shard)
            rows.append(row)
            keys.append(shard_keys)
    failures, few_failures = _failures(index, settings.max_failure_share)
    stage = {
        "stage": "shard",
        "samples": index["written"] + index["failed"],
        "repeated_keys": _repeated(keys),
        "train": index["splits"].get("train", {}).get("samples", 0),
        **failures,
    }
    expected = f"samples written and failed are the {expected_samples} that were planned"
    largest = settings.samples_per_shard
    suites = {
        "stage": [
            few_failures,
            _one("samples", expected, expected_samples, expected_samples),
            _one("train", "the train split has samples", low=1),
            _one("repeated_keys", "no key comes twice", high=0),
        ],
        "shards": [
            _each("bytes_off", "a shard's file has the size that the index says", 0, 0),
            _each("hash_off", "a shard's file has the hash that the index says", high=0),
            _each("samples", f"a shard has from 1 to {largest} samples", 1, largest),
            _each("samples_off", "a shard has the samples that the index says", 0, 0),
            _each("incomplete", "every sample of a shard has all its parts", high=0),
        ],
    }
    columns = ["shard", "samples", "samples_off", "incomplete", "bytes_off", "hash_off"]
    tables = {"stage": pd.DataFrame([stage]), "shards": pd.DataFrame(rows, columns=columns)}
    return run_gate("shard", tables, suites, report)


def _shard_row(settings: config.Shard, path: Path, shard: Mapping[str, Any]) -> tuple[dict[str, Any], pd.Series]:
    """How a shard on disk differs from its line of the index, and its keys; no file is one of 0 bytes."""
    size = path.stat().st_size if path.is_file() else 0
    same = size == shard["bytes"] and sha256_files([path]) == shard["sha256"]
    members = pd.Series(_members(path) if same else [], dtype="str")
    parts = members.str.partition(".")[0].value_counts() if len(members) else pd.Series(dtype="int64")
    row = {
        "shard": shard["name"],
        "samples": shard["samples"],
        # a file that is not the index's is not worth opening
        "samples_off": len(parts) - shard["samples"] if same else None,
        "incomplete": int((parts != (3 if settings.store_features else 2)).sum()),
        "bytes_off": size - shard["bytes"],
        "hash_off": int(not same),
    }
    return row, pd.Series(parts.index, dtype="str")


def _members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


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
    """The page is there, shows its images, and needs no other file.

    Args:
        page: the HTML file.
        images: that it should show, at least.
        report: scratch folder.
    """
    found = _References()
    if page.is_file():
        found.feed(page.read_text(encoding="utf-8"))
    outside = ", ".join(found.outside[:SHOWN_ROWS])
    row = {
        "page": page.name,
        "bytes": page.stat().st_size if page.is_file() else 0,
        "images": found.images,
        "outside": len(found.outside),
    }
    checks = [
        _one("bytes", f"{page.name} is there and is not empty (bytes)", low=1),
        _one("images", f"{page.name} shows at least {images} images", low=images),
        _one("outside", f"{page.name} needs no other file", high=0, detail=outside),
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

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        for name, value in attrs:
            here = value is None or value.startswith(("data:", "#"))
            link = tag == "a" and value is not None and value.startswith(("http://", "https://"))
            if name in ("src", "href", "srcset") and not here and not link:
                self.outside.append(str(value))
            elif name == "style":
                self.outside += _LOADED_BY_STYLE.findall(value or "")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.outside += _LOADED_BY_STYLE.findall(data)


def _with_something(reports: Sequence[UnitReport]) -> list[UnitReport]:
    """Units that have a table to look at; of one that failed as a whole only its failures are there."""
    return [unit for unit in reports if unit.written]


def _blank(texts: pd.Series) -> int:
    return int((texts.fillna("").str.strip() == "").sum())
