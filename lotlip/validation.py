"""The gate after each stage: Great Expectations suites over small tables of statistics, and what a person reads of it.

A stage's tables have a row per unit, and its `stage` table one row for all, read a partition at a time: a gate's
memory does not grow with the data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lotlip import config
from lotlip.captioning.quality import RULES, Agreement
from lotlip.gate import SHOWN_ROWS, Check, each, in_percent, one, run_gate, share
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

ENOUGH_CAPTIONS = 30  # of a partition, for its mean length to say something


def _failures(
    found: Mapping[str, Any], limit: float, stage: str, apart: Collection[str] = ()
) -> tuple[dict[str, float], Expectation]:
    """The share of a stage's items that failed, and what it may be.

    Args:
        found: by `totals`, or an index that has them.
        limit: `max_failure_share` of the stage.
        stage: its section of params.yaml.
        apart: kinds of failures that do not count, since they have a limit of their own.
    """
    kinds = {kind: count for kind, count in found["failure_kinds"].items() if kind not in apart}
    failed = sum(kinds.values()) / found["read"] if found["read"] else 0.0
    key = f"{stage}.max_failure_share"
    return {"failure_share": failed}, share("failure_share", "items that failed", limit, key, _counts(kinds))


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _fact(fact: Fact) -> Expectation:
    return each(fact.column, fact.what, fact.low, fact.high)


def _rows(rows: Sequence[Mapping[str, Any]], facts: Sequence[Fact], about: str, *more: str) -> pd.DataFrame:
    """Rows of numbers as a table, which has its columns though it may have no rows; None is a gap."""
    numbers = [*(fact.column for fact in facts), *more]
    return pd.DataFrame(rows, columns=[about, *numbers]).astype(dict.fromkeys(numbers, float))


def _repeated(folder: Path, names: Sequence[str], column: str) -> int:
    """How many values of a column come again, in any of the partitions."""
    return count_repeats(hashes(read_table(folder, name, [column])[column]) for name in names)


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
    again = {column: _repeated(folder, whole, column) for column in ("key", "sha256", "raw_caption")}
    found = totals(reports)
    failures, few_failures = _failures(found, settings.max_failure_share, "ingest", LEFT_OUT)
    left_out = {kind: count for kind, count in found["failure_kinds"].items() if kind in LEFT_OUT}
    stage = {
        "stage": "ingest",
        "left_out": sum(left_out.values()) / max(found["read"], 1),
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
            share(
                "left_out",
                "images left out as copies or evaluation images",
                settings.max_left_out_share,
                "ingest.max_left_out_share",
                _counts(left_out),
            ),
            share(
                "broken_units",
                "source files that are broken or cut off",
                settings.max_broken_unit_share,
                "ingest.max_broken_unit_share",
            ),
            one("train", "the train split has images", low=1),
            one("repeated_keys", "no key comes twice", high=0),
            one("repeated_images", "no image comes twice", high=0),
            share(
                "repeated_captions",
                "raw captions that repeat another",
                settings.max_repeated_caption_share,
                "ingest.max_repeated_caption_share",
            ),
            share(
                "constant_share",
                "images looked at that are one colour all over",
                settings.max_constant_share,
                "ingest.max_constant_share",
            ),
        ],
        "units": [_fact(fact) for fact in PARTITION],
    }
    return run_gate("ingest", {"stage": pd.DataFrame([stage]), "units": table}, suites, report)


# Kinds of failures of images that are left out on purpose.
LEFT_OUT = ("duplicate-image", "evaluation", "near-evaluation")

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
        one("not_finite", "features have no NaN or infinity", high=0),
        one("spread", "features differ from picture to picture (largest standard deviation is above 0)", low=1e-6),
    ]
    if isinstance(settings, config.ScenesTower):
        stage["accuracy"] = float(np.mean(list(accuracy.values()))) if accuracy else None
        detail = ", ".join(f"{name} {in_percent(value)}" for name, value in accuracy.items())
        what = f"mean accuracy over attributes is at least {in_percent(settings.min_accuracy)}"
        checks.append(
            one(
                "accuracy", what, low=settings.min_accuracy, percent=True, detail=detail, key="image_tower.min_accuracy"
            )
        )
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
        measured = read_captions(
            folder, unit.name, ["words", "truncated", "reasoning", "own_agreement", "next_agreement"]
        )
        agreements[unit.name] = Agreement.of(measured)
        enough = len(measured) >= ENOUGH_CAPTIONS
        row["words"] = float(measured["words"].astype(float).mean()) if enough else None
        row["truncated"] = int(measured["truncated"].eq(True).sum())
        row["reasoning"] = int(measured["reasoning"].fillna("").ne("").sum())
    names = list(agreements)
    table = _rows(rows, CAPTIONS, "unit", "words", "truncated", "reasoning")
    table["length_ratio"] = _from_median(table["words"])
    captions = sum(unit.written for unit in reports)
    found = totals(reports)
    filtered = {rule: count for rule, count in found["failure_kinds"].items() if rule in RULES}
    failures, few_failures = _failures(found, settings.max_failure_share, "caption", RULES)
    missing = [unit.name for unit in reports if not unit.written and (not unit.sha256 or unit.read >= ENOUGH_CAPTIONS)]
    swapped, agreeing = _swapped(agreements, settings.min_agreement_ratio)
    written = captions + sum(filtered.values())
    stage = {
        "stage": "caption",
        "captions": captions,
        "filtered_share": sum(filtered.values()) / max(written, 1),
        "reasoning_share": (table["reasoning"].sum() + filtered.get("reasoning", 0)) / max(written, 1),
        "truncated_share": table["truncated"].sum() / max(captions, 1),
        "missing_share": len(missing) / max(len(reports), 1),
        "repeated_keys": _repeated(folder, names, "key"),
        "repeated_share": _repeated(folder, names, "text") / max(captions, 1),
        "swapped": len(swapped),
        **failures,
    }
    shares = {
        "filtered_share": ("captions that quality's rules drop", "max_filtered_share"),
        "reasoning_share": ("captions that show the model's reasoning", "max_reasoning_share"),
        "truncated_share": ("captions that are cut off", "max_truncated_share"),
        "missing_share": ("partitions without any caption", "max_missing_partitions"),
        "repeated_share": ("captions that repeat another word for word", "max_repeated_share"),
    }
    details = {
        "filtered_share": _counts(filtered),
        "missing_share": _names(missing),
    }
    lengths = f"a partition's mean length is within {settings.max_length_ratio:g} times the median partition's"
    suites = {
        "stage": [
            few_failures,
            one("captions", "there are captions", low=1),
            one("repeated_keys", "no image has two captions", high=0),
            *(
                share(name, what, getattr(settings, limit), f"caption.{limit}", details.get(name, ""))
                for name, (what, limit) in shares.items()
            ),
            one(
                "swapped",
                f"captions are their own images': they share {settings.min_agreement_ratio:g} times as many words with "
                "their raw captions as with the next ones' (partitions that do not)",
                high=0,
                detail=agreeing,
                key="caption.min_agreement_ratio",
            ),
        ],
        "units": [
            *(_fact(fact) for fact in CAPTIONS),
            each("length_ratio", lengths, high=settings.max_length_ratio, key="caption.max_length_ratio"),
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
    failures, few_failures = _failures(index, settings.max_failure_share, "shard")
    table = _rows(rows, SHARD, "shard", "samples", "uncaptioned")
    samples = index["written"]
    stage = {
        "stage": "shard",
        "samples": samples + index["failed"],
        "repeated_keys": count_repeats(hashes(read_keys(path)) for path in whole),
        "train": index["splits"].get("train", {}).get("samples", 0),
        "widths": len({width for row in rows for width in row["widths"]}),
        "uncaptioned": table["uncaptioned"].sum() / max(samples, 1),
        **failures,
    }
    expected = f"samples written and failed are the {expected_samples} that were planned"
    largest = settings.samples_per_shard
    key = "shard.max_uncaptioned_share"
    described = [share("uncaptioned", "samples without a long caption", settings.max_uncaptioned_share, key)]
    suites = {
        "stage": [
            few_failures,
            one("samples", expected, expected_samples, expected_samples),
            one("train", "the train split has samples", low=1),
            one("repeated_keys", "no key comes twice", high=0),
            one("widths", "all features have one width (as many as this)", high=1),
            *(described if set(index["statistics"]) - {"raw"} else []),  # where there are captioners
        ],
        "shards": [
            *(_fact(fact) for fact in SHARD),
            each("samples", f"a shard has from 1 to {largest} samples", 1, largest),
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
    lowest = f"mean loss of a seed's last 10 % of rows is at most {in_percent(limit)} of guessing's ({guess_loss:.4g})"
    suites = {
        "stage": [one("untrained", "every seed has a curve", high=0)],
        "steps": [
            each("not_finite", "loss and temperature are numbers at every step", high=0),
            each("advance", "steps go up", low=1),
            each("temperature", "the temperature is above 0 and at most 100", np.nextafter(0, 1), 100),
        ],
        "seeds": [each("final_share", lowest, high=limit, percent=True, key="pretrain.max_final_loss_share")],
    }
    return run_gate("pretrain", tables, suites, report)


def _final_loss(losses: pd.Series) -> float:
    return float(losses.tail(max(len(losses) // 10, 1)).mean())


# What is held against chance of a benchmark: the first of these that it has.
TOLD_APART = (
    ("short.image_to_text.r1", "short.text_to_image.r1"),
    ("long.image_to_text.r1", "long.text_to_image.r1"),
    ("classification.top1",),
)


def gate_evaluate(settings: config.Evaluate, scores: pd.DataFrame, report: Path) -> list[Check]:
    """Scores are shares, and each benchmark's images are told apart better than by chance.

    By short text, since a model that learned anything knows it; by long text or classes where there is no short text.

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
    held = {name: _told_apart(set(rows["metric"])) for name, rows in scores.groupby("benchmark")}
    pairs = zip(scores["benchmark"], scores["metric"], strict=True)
    told_apart = named[np.array([metric in held[benchmark] for benchmark, metric in pairs], dtype=bool)]
    unmeasured = [str(name) for name, metrics in held.items() if not metrics]
    lowest = settings.min_score_over_chance
    tables = {
        "stage": pd.DataFrame([{"stage": "evaluate", "scores": len(scores), "unmeasured": len(unmeasured)}]),
        "scores": named,
        "told_apart": told_apart,
    }
    suites = {
        "stage": [
            one("scores", "something was measured", low=1),
            one("unmeasured", "every benchmark has R@1 or top-1 accuracy", high=0, detail=", ".join(unmeasured)),
        ],
        "scores": [
            each("unknown", "every score is a number", high=0),
            each("value", "every score is from 0 to 1", 0, 1),
        ],
        "told_apart": [
            each(
                "over_chance",
                f"R@1 of short text (or of long, or top-1) is at least {lowest:g} times chance",
                lowest,
                key="evaluate.min_score_over_chance",
            )
        ],
    }
    return run_gate("evaluate", tables, suites, report)


def _told_apart(metrics: Set[str]) -> tuple[str, ...]:
    """Which of a benchmark's metrics are held against chance."""
    return next((family for family in TOLD_APART if metrics & set(family)), ())


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
        one("bytes", f"{page.name} is there and is not empty (bytes)", low=1),
        one("images", f"{page.name} shows at least {images} images", low=images),
        one("outside", f"{page.name} needs no other file", high=0, detail=outside),
        one(
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
