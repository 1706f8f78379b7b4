"""The paper's findings, and the verdict of a set of seeds on each, by the same statistical test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lotlip.figures.intervals import Estimate, estimate
from lotlip.report.config import FindingName
from lotlip.report.contrasts import (
    Contrast,
    Roles,
    Weights,
    at_equal_steps,
    best_over_best,
    between,
    by_context_length,
    by_corner_tokens,
    by_sub_captions,
    corners_over_registers,
    first_to_last,
    fitted_change,
    levels_off,
    lotlip_value,
    middle_length,
    over_best_captioner,
    over_mean_captioner,
)
from lotlip.report.inputs import ReportInputs
from lotlip.report.measures import LONG, SHORT, TOP1, Measure
from lotlip.report.significance import ALPHA, half_interval, holm, p_value, smallest_detectable

SUPPORTS, CONTRADICTS, NO_GAIN = "supports", "contradicts", "no gain"
INCONCLUSIVE, ONE_SEED, NOT_RUN = "inconclusive", "one seed", "not run"
VERDICTS = (SUPPORTS, CONTRADICTS, NO_GAIN, INCONCLUSIVE, ONE_SEED, NOT_RUN)
TEST = (
    "Each finding is stated as a difference that is above 0 when the finding holds. The difference is taken within "
    "each seed, because the ablations of one seed see the samples in the same order and, where shapes allow, start "
    "from the same weights. Its 95 % t interval is over seeds, and its p value is that of the paired t test. An "
    "interval above 0 supports the finding, and one below 0 contradicts it. Differences smaller than the margin "
    "(findings.margin) do not matter: an interval that contains 0 and lies below the margin shows no gain, and a score "
    "is preserved if its interval lies above minus the margin. Otherwise the test is inconclusive. One seed has no "
    "interval and decides nothing. Holm's method corrects the p values for the number of tests that were run: a "
    "corrected p value below 0.05 decides. All seeds are evaluated on the same images, so the intervals do not include "
    "the variation between images."
)
_DECIMALS = 9  # of a difference in points; sums of equal scores differ from 0 by less


@dataclass(frozen=True)
class Finding:
    """A finding of the paper.

    Attributes:
        slug: name in files.
        says: the finding in words.
        where: tables and figures of the paper that show it.
        compares: the difference, in words, that is above 0 when the finding holds.
        measures: measures that the finding is tested in, separately.
        contrast: the difference as weights of ablations.
        chooses: whether the contrast chooses ablations by their scores.
        preserves: whether the finding also holds when nothing changes.
    """

    slug: FindingName
    says: str
    where: str
    compares: str
    measures: tuple[Measure, ...]
    contrast: Contrast
    chooses: bool = False
    preserves: bool = False


@dataclass(frozen=True)
class FindingResult:
    """The result of testing one finding in one measure.

    Attributes:
        finding, measure: what was tested.
        verdict: one of `VERDICTS`, not corrected for the number of tests.
        reason: why the test is inconclusive or was not run; empty if the interval decides.
        choice: how the ablations were chosen; empty if the finding does not choose.
        apart: whether `findings.other_benchmarks` names benchmarks that test it.
        weights: the ablations compared and their weights.
        benchmarks: benchmarks that the measure is averaged over.
        by_seed: seed → the difference, in percentage points.
        difference: its mean and interval; None if no seed has it.
        p: p value of the paired t test that decides: against 0, the margin or minus the margin; None if there is no
            interval.
        p_holm: the p value corrected for `tests`.
        tests: number of tests that were run.
    """

    finding: Finding
    measure: Measure
    verdict: str
    reason: str = ""
    choice: str = ""
    apart: bool = False
    weights: Weights = field(default_factory=dict)
    benchmarks: Sequence[str] = ()
    by_seed: Mapping[int, float] = field(default_factory=dict)
    difference: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None
    tests: int = 0

    @property
    def compares(self) -> str:
        """The difference in words, with the choice of ablations and other benchmarks if there were any."""
        where = f"on {', '.join(self.benchmarks)}" if self.apart and self.benchmarks else ""
        return ", ".join(text for text in (self.finding.compares, self.choice, where) if text)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval in points; None if there is none."""
        difference = self.difference
        if difference is None or difference.low is None or difference.high is None:
            return None
        return difference.low, difference.high

    @property
    def holm_verdict(self) -> str:
        """The verdict after Holm's correction, one of `VERDICTS`."""
        return INCONCLUSIVE if self.p_holm is not None and self.p_holm >= ALPHA else self.verdict

    @property
    def simultaneous_interval(self) -> tuple[float, float] | None:
        """The Bonferroni interval: all intervals of a report contain the true differences with 95 % probability."""
        if self.difference is None or self.difference.spread is None or not self.tests:
            return None
        half = half_interval(self.difference.spread, len(self.by_seed), ALPHA / self.tests)
        return self.difference.value - half, self.difference.value + half

    def detectable(self, alpha: float) -> float | None:
        """Returns the smallest difference that these seeds detect at a level, in points; None without an interval."""
        if self.difference is None or self.difference.spread is None:
            return None
        return smallest_detectable(self.difference.spread, len(self.by_seed), alpha)

    def as_json(self) -> dict[str, Any]:
        """Converts the finding and its result to JSON types."""
        return {
            "finding": self.finding.slug,
            "says": self.finding.says,
            "paper": self.finding.where,
            "measure": self.measure.slug,
            "compares": self.compares,
            **self.result_as_json(),
        }

    def result_as_json(self) -> dict[str, Any]:
        """Converts the result to JSON types."""
        difference, simultaneous = self.difference, self.simultaneous_interval
        return {
            "verdict": self.verdict,
            "verdict_holm": self.holm_verdict,
            "reason": self.reason,
            "ablations": dict(self.weights),
            "benchmarks": list(self.benchmarks),
            "points_by_seed": {str(seed): points for seed, points in self.by_seed.items()},
            "points": None if difference is None else difference.value,
            "spread": None if difference is None else difference.spread,
            "interval": None if self.interval is None else list(self.interval),
            "simultaneous_interval": None if simultaneous is None else list(simultaneous),
            "p": self.p,
            "p_holm": self.p_holm,
            "tests": self.tests,
            "detectable": self.detectable(ALPHA),
            "detectable_corrected": self.detectable(ALPHA / self.tests) if self.tests else None,
        }


# --- tests --------------------------------------------------------------------------------------------------------


def evaluate_findings(inputs: ReportInputs) -> list[FindingResult]:
    """Tests each finding in each of its measures, and corrects for the number of tests that were run."""
    tested = [evaluate_finding(finding, measure, inputs) for finding in FINDINGS for measure in finding.measures]
    p_values = [one.p for one in tested if one.p is not None]
    corrected = iter(holm(p_values))
    return [one if one.p is None else replace(one, p_holm=next(corrected), tests=len(p_values)) for one in tested]


def evaluate_finding(finding: Finding, measure: Measure, inputs: ReportInputs) -> FindingResult:
    """Tests one finding in one measure, as `TEST` describes, without the correction."""
    declared = inputs.params.findings.testing(finding.slug, measure.slug)
    roles = Roles(inputs, declared)
    result = FindingResult(
        finding,
        measure,
        NOT_RUN,
        choice=roles.choice if finding.chooses else "",
        apart=declared is not inputs.params.findings.benchmarks,
    )
    weights = finding.contrast(roles, measure)
    if not weights:
        return replace(result, reason=f"needs {finding.compares}")
    compared = inputs.chosen(weights)
    if unscored := roles.unscored(compared):
        reason = f"needs scores on {', '.join(declared)} of {', '.join(unscored)}"
        return replace(result, weights=weights, reason=reason)
    having = measure.benchmarks(compared)
    if result.apart and not set(declared) & set(having):
        return replace(result, weights=weights, reason=f"{', '.join(declared)} has no {measure.label}")
    benchmarks = roles.testing(having)
    result = replace(result, weights=weights, benchmarks=benchmarks)
    if not benchmarks:
        return replace(result, reason=f"no benchmark has {measure.label} for all compared ablations")
    scores = {ablation.name: measure.seeds(ablation, benchmarks) for ablation in compared}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    by_seed = {
        seed: round(sum(weight * scores[name][seed] for name, weight in weights.items()), _DECIMALS) for seed in shared
    }
    result = replace(result, verdict=INCONCLUSIVE, by_seed=by_seed)
    if not by_seed:
        return replace(result, reason="no seed has scores for all compared ablations")
    difference = estimate(list(by_seed.values()))
    result = replace(result, difference=difference)
    if difference.low is None or difference.high is None:
        reason = f"one seed ({shared[0]}) has no interval; at least two are needed"
        return replace(result, verdict=ONE_SEED, reason=reason)
    verdict, tested = _verdict(difference.low, difference.high, finding, inputs.params.findings.margin)
    return replace(result, verdict=verdict, p=p_value(list(by_seed.values()), tested))


def _verdict(low: float, high: float, finding: Finding, margin: float) -> tuple[str, float]:
    """Returns the verdict of an interval, and the difference that its test is against, in points."""
    least = -margin if finding.preserves else 0.0
    if low > least:
        return SUPPORTS, least
    if high < least:
        return CONTRADICTS, least
    if high < margin and not finding.preserves:
        return NO_GAIN, margin
    return INCONCLUSIVE, least


# --- findings -----------------------------------------------------------------------------------------------------

FINDINGS = (
    Finding(
        "long-texts-teach-long",
        "Training on long texts improves long-text understanding.",
        "Table 2, Fig. 2",
        "(LiT + long texts) − LiT",
        (LONG,),
        between("lit_long", "lit"),
    ),
    Finding(
        "long-texts-cost-short",
        "Training on long texts without corner tokens harms short-text understanding.",
        "Fig. 2",
        "LiT − (LiT + long texts)",
        (SHORT, TOP1),
        between("lit", "lit_long"),
    ),
    Finding(
        "more-sub-captions-cost-more",
        "Without corner tokens, more sub-captions per long text harm short-text understanding further.",
        "Fig. 2",
        "drop of LiT + long texts from the smallest k > 0 to the largest, on a fitted line",
        (SHORT, TOP1),
        fitted_change(by_sub_captions("lit_by_sub_captions"), sign=-1.0),
    ),
    Finding(
        "corner-tokens-win-short-back",
        "Corner tokens restore short-text understanding.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (SHORT, TOP1),
        between("lotlip", "lit_long"),
    ),
    Finding(
        "corner-tokens-keep-long",
        "Corner tokens preserve or improve long-text understanding.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts)",
        (LONG,),
        between("lotlip", "lit_long"),
        preserves=True,
    ),
    Finding(
        "better-than-long-clip",
        "LoTLIP outperforms Long-CLIP.",
        "Table 2",
        "LoTLIP − Long-CLIP, which is finetuned and so trained for longer",
        (LONG, SHORT),
        between("lotlip", "long_clip"),
    ),
    Finding(
        "better-than-long-clip-at-equal-steps",
        "LoTLIP outperforms Long-CLIP at equal steps.",
        "Table 2",
        "LoTLIP − Long-CLIP, both trained for the same number of steps in total",
        (LONG, SHORT),
        at_equal_steps("lotlip", "long_clip_equal_steps"),
    ),
    Finding(
        "better-than-long-texts-at-best-share",
        "LoTLIP outperforms LiT + long texts, each at its best share of the loss for the short caption.",
        "Tables 2 and 3",
        "LoTLIP − (LiT + long texts), each at the share with its best mean of the four recalls",
        (LONG, SHORT),
        best_over_best("lotlip_by_short_share", "lit_long_by_short_share"),
        chooses=True,
    ),
    Finding(
        "mask",
        "The attention mask between corner tokens, and between them and [CLS], helps.",
        "Table 3",
        "LoTLIP with the mask − without it",
        (LONG, SHORT),
        between("lotlip", "no_mask"),
    ),
    Finding(
        "corner-tokens-level-off",
        "The gain from more corner tokens levels off.",
        "Table 3",
        "gain from the smallest m to LoTLIP's − gain from there to the largest",
        (LONG, SHORT),
        levels_off(by_corner_tokens, lotlip_value),
    ),
    Finding(
        "more-sub-captions-help-long",
        "More sub-captions per long text improve long-text understanding.",
        "Fig. 5",
        "gain from the smallest k > 0 to LoTLIP's, on a fitted line",
        (LONG,),
        fitted_change(by_sub_captions("lotlip_by_sub_captions"), up_to_lotlip=True),
    ),
    Finding(
        "sub-captions-level-off",
        "The gain from more sub-captions levels off.",
        "Fig. 5",
        "gain from the smallest k > 0 to LoTLIP's − gain from there to the largest",
        (LONG,),
        levels_off(by_sub_captions("lotlip_by_sub_captions"), lotlip_value),
    ),
    Finding(
        "longer-context-helps",
        "A longer context improves long-text understanding.",
        "Fig. 4",
        "longest context − shortest context",
        (LONG,),
        first_to_last(by_context_length),
    ),
    Finding(
        "context-levels-off",
        "The gain from a longer context levels off.",
        "Fig. 4",
        "gain from the shortest context to the (geometric) middle − gain from there to the longest",
        (LONG,),
        levels_off(by_context_length, middle_length),
    ),
    Finding(
        "better-than-registers",
        "Corner tokens outperform the same number of register tokens.",
        "Table 7",
        "corner tokens − registers, mean over equal numbers of tokens",
        (LONG, SHORT),
        corners_over_registers,
    ),
    Finding(
        "captioners-beat-mean",
        "Several captioners outperform the average single captioner.",
        "Table 9",
        "all captioners − mean of single captioners",
        (LONG, SHORT),
        over_mean_captioner,
    ),
    Finding(
        "captioners-beat-best",
        "Several captioners outperform the best single captioner.",
        "Table 9",
        "all captioners − best single captioner",
        (LONG, SHORT),
        over_best_captioner,
        chooses=True,
    ),
)
