"""The scores of an ablation, `metrics/<ablation>.json`, and of models not trained here, `metrics/baselines/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from lotlip.core.files import sha256_json
from lotlip.core.paths import Paths
from lotlip.core.record import Record
from lotlip.data.index import INDEX_FILE, CaptionIndex, UnitIndex
from lotlip.evaluate.config import EvaluateConfig

NOT_DRAWN = "not-drawn.json"  # in the folder of an ablation's pictures
BASELINES = "baselines"  # folder in `paths.metrics`
BASELINE_SCORES, START_SCORES = "scores.json", "start.json"  # files in it

OUTDATED = "the benchmark, its data or evaluate.precision has changed since"

# Benchmark → what could not be drawn → why.
NotDrawn = dict[str, dict[str, str]]


class BenchmarkScores(Record):
    """One ablation's results on one benchmark. Files of earlier versions lack what has a default.

    Attributes:
        protocol: how it was measured: sizes, context length, precision, …
        chance: metric → the value that guessing has.
        ceiling: recall → the best that repeated texts and images allow; empty where it is not known.
        seeds: seed → metric → value; fractions, except ranks.
        intervals: seed → metric → ends of the value's 95 % confidence interval, for those that have one.
        attention: seed → where attention goes: "values" and "intervals" by name, and "left_out", with reasons.
        reading: seed → what `lotlip.evaluate.reading.Reading` says; left out where images are no scenes.
        weights_sha256: seed → hash of its model's weights.
        made_with: hash of the benchmark's settings and data, of `made_with`.
        examples: kind of text → the first seed's "best" and "worst" retrievals, as of
            `lotlip.evaluate.examples.retrieval_examples`.
    """

    protocol: dict[str, Any] = Field({})
    chance: dict[str, float] = Field({})
    ceiling: dict[str, float] = Field({})
    seeds: dict[int, dict[str, float]] = Field({})
    intervals: dict[int, dict[str, tuple[float, float]]] = Field({})
    attention: dict[int, dict[str, Any]] = Field({})
    reading: dict[int, dict[str, Any]] = Field({}, exclude_if=lambda reading: not reading)
    weights_sha256: dict[int, str] = Field({})
    made_with: str = Field("", exclude_if=lambda made_with: not made_with)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = Field({})

    @property
    def limited(self) -> bool:
        """Whether repeated texts or images keep every model from a full score."""
        return min(self.ceiling.values(), default=1.0) < 1

    def is_outdated(self, current: str | None) -> bool:
        """Whether the scores were made with something else than `current`; False if either is unknown."""
        return bool(self.made_with and current) and self.made_with != current


class AblationScores(Record):
    """All that was measured of an ablation.

    Attributes:
        ablation: its name in params.yaml.
        config: `PretrainConfig` that it was trained with, as JSON, as in `run.json`.
        fingerprints: seed → of the run that was measured, as in `run.json`.
        parameters: part of the model → number of parameters.
        text_tower_flops: tokens of a text → floating-point operations of the text tower on it; empty when not known.
        benchmarks: benchmark's name → results.
    """

    ablation: str
    config: dict[str, Any]
    fingerprints: dict[str, str]
    parameters: dict[str, int] = Field({})
    text_tower_flops: dict[int, int] = Field({})
    benchmarks: dict[str, BenchmarkScores]


def made_with(config: EvaluateConfig, paths: Paths, captioners: Sequence[str], root: Path = Path()) -> dict[str, str]:
    """Returns benchmark → hash of what decides its scores besides the model.

    It covers the benchmark's settings, the precision, and the images and captions of the benchmark's split. A benchmark
    whose split is not on this machine is left out.

    Args:
        config: section `evaluate` of params.yaml.
        paths: locations of the images and captions.
        captioners: captioners whose captions may be texts.
        root: of the project.
    """
    indexes = {root / paths.ingest / INDEX_FILE: UnitIndex}
    indexes |= {root / paths.captions / name / INDEX_FILE: CaptionIndex for name in captioners}
    units = [kind.load(file).units for file, kind in indexes.items()] if all(map(Path.is_file, indexes)) else None
    hashes = {}
    for name, settings in zip(config.names, config.benchmarks.values(), strict=True):
        split = config.splits[name]
        if split and units is None:
            continue
        data = [[unit.sha256 for unit in of if unit.name.startswith(f"{split}/")] for of in units or () if split]
        # a limit, which changes no score
        benchmark = settings.model_dump(mode="json", exclude_defaults=True, exclude={"max_unseen_tokens"})
        hashes[name] = sha256_json([benchmark, config.precision, config.max_conditioned_pairs, data])
    return hashes


class BaselineResult(Record):
    """A baseline's results on one benchmark.

    Attributes:
        protocol: see `BenchmarkScores`.
        chance: see `BenchmarkScores`.
        ceiling: see `BenchmarkScores`.
        scores: metric → value; fractions, except ranks.
    """

    protocol: dict[str, Any]
    chance: dict[str, float]
    ceiling: dict[str, float]
    scores: dict[str, float]


class Baseline(Record):
    """A model that is not trained here, and its scores.

    Attributes:
        model: its name in params.yaml.
        sha256: hash of its files if they are on this machine; None for a model from a hub, and for `start`.
        benchmarks: benchmark's name → results.
    """

    model: str
    sha256: str | None
    benchmarks: dict[str, BaselineResult]


class Baselines(Record):
    """`scores.json`: all baselines, in the order of params.yaml."""

    models: list[Baseline]


class StartScores(Record):
    """`start.json`: what the gate of `evaluate` compares with.

    It is a file of its own so that another baseline leaves the scores of ablations up to date.

    Attributes:
        short_text_r1: benchmark → R@1 on short text of the model that training starts from, the mean of both
            directions; empty if `start` is not among the baselines.
    """

    short_text_r1: dict[str, float]
