"""The scores of an ablation, `metrics/<ablation>.json`, and of models not trained here, `metrics/baselines/`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lotlip.core.record import Record

NOT_DRAWN = "not-drawn.json"  # in the folder of an ablation's pictures
BASELINES = "baselines"  # folder in `paths.metrics`
BASELINE_SCORES, START_SCORES = "scores.json", "start.json"  # files in it

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
    examples: dict[str, dict[str, list[dict[str, Any]]]] = Field({})

    @property
    def limited(self) -> bool:
        """Whether repeated texts or images keep every model from a full score."""
        return min(self.ceiling.values(), default=1.0) < 1


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
