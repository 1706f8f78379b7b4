"""The scores of an ablation, `metrics/<ablation>.json`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lotlip.core.record import Record

NOT_DRAWN = "not-drawn.json"  # in the folder of an ablation's pictures

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
