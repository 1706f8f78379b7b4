"""Settings of the report: its page, tables and figures, and the ablations that test the paper's findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lotlip.core.section import Name, NonNegative, Section, flatten, nearest
from lotlip.evaluate.score_names import MAIN, Metric

VALIDATION = "val"  # split of a benchmark that only chooses ablations
CHANGES, FLOPS = "changes", "flops"  # columns computed by the report
# Keys of `pretrain` whose null is shown as the number that it stands for: of images, and 1/N.
SAMPLES, SHORT_SHARE = "samples", "loss.short_loss_fraction"
SCORES = (*MAIN, *map(str, Metric))
COLUMNS = (CHANGES, FLOPS, *SCORES)  # valid in addition to the keys of `pretrain`
MeasureName = Literal["long", "short", "classification"]
FindingName = Literal[
    "long-texts-teach-long",
    "long-texts-cost-short",
    "more-sub-captions-cost-more",
    "corner-tokens-win-short-back",
    "corner-tokens-keep-long",
    "better-than-long-clip",
    "better-than-long-clip-at-equal-steps",
    "better-than-long-texts-at-best-share",
    "mask",
    "corner-tokens-level-off",
    "more-sub-captions-help-long",
    "sub-captions-level-off",
    "longer-context-helps",
    "context-levels-off",
    "better-than-registers",
    "captioners-beat-mean",
    "captioners-beat-best",
]
# Pairs of roles whose ablations are subtracted from one another.
COMPARED = (
    ("lit", "lit_long"),
    ("lotlip", "lit_long"),
    ("lotlip", "long_clip"),
    ("lotlip", "long_clip_equal_steps"),
    ("lotlip", "no_mask"),
    ("lotlip", "captioners"),
    ("lotlip_by_short_share", "lit_long_by_short_share"),
    ("corner_tokens", "registers"),
)
# Role → the setting that its ablations differ in. Findings map each value to one ablation.
SERIES = {
    "corner_tokens": "text.corner_tokens",
    "registers": "text.register_tokens",
    "lit_by_sub_captions": "long_texts.sub_captions",
    "lotlip_by_sub_captions": "long_texts.sub_captions",
    "context_lengths": "text.context_length",
}
RESERVED = ("all", "others", "attention", "hard-negatives", "sentences")  # names of the built-in tables and figures


class ReportConfig(Section):
    """Settings of the report page."""

    title: str = Field("LoTLIP", description="title of the page")
    note: str = Field("", description="note at the top of the page")
    stored_results: Path | None = Field(
        None,
        description="table of results of more seeds, whose verdicts are shown beside this run's; "
        "`python -m flows.store_results` writes it (docs/report.md)",
    )
    contact_sheet: NonNegative = Field(12, description="number of images shown with their captions")


def _labelled(given: Any) -> Any:
    """Converts a list such as ["a", {"b": "label"}] to a mapping, name → label."""
    if not isinstance(given, list):
        return given
    if not all(isinstance(item, (str, dict)) for item in given):
        raise ValueError('must be a list of names, each with an optional label: [lit, lotlip: "m = 2"]')
    pairs = [pair for item in given for pair in (item.items() if isinstance(item, dict) else [(item, "")])]
    names = [name for name, _ in pairs]
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(f"contains duplicates: {', '.join(repeated)}")
    return dict(pairs)


def _listed(given: Any) -> Any:
    """Wraps a single name in a list."""
    return [given] if isinstance(given, str) else given


class ScoresFigureConfig(Section):
    """A figure of long-text R@1, short-text R@1 and classification accuracy against a setting, one panel each."""

    kind: Literal["scores"]
    x: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = Field(
        description="key of `pretrain` on the x axis, such as text.corner_tokens; several keys are summed. "
        "`samples` is the number of training images; null of `loss.short_loss_fraction` is 1/N"
    )
    x_label: str = Field("", description="label of the x axis; default: the keys")
    x_scale: Literal["linear", "log"] = Field("linear", description="scale of the x axis")
    lines: dict[str, list[Name]] = Field(
        default_factory=dict, description="label → ablations of a line; default: one line through all rows of the table"
    )


class CostFigureConfig(Section):
    """A figure of long-text R@1 and the text tower's FLOPs against the context length, and of R@1 against FLOPs."""

    kind: Literal["cost"]


class TableConfig(Section):
    """A table of ablations for each benchmark.

    It is shown once at least two of its ablations have scores; with `published`, one is enough.
    """

    title: str = Field(description="heading of the table")
    paper: str = Field("", description="table or figure of the paper that it reproduces")
    note: str = Field("", description="text above the table")
    rows: Annotated[dict[Name, str], BeforeValidator(_labelled), Field(min_length=1)] = Field(
        description="ablations in display order, each with an optional label"
    )
    columns: Annotated[dict[str, str], BeforeValidator(_labelled), Field(min_length=1)] = Field(
        default_factory=lambda: dict.fromkeys([CHANGES, *MAIN], ""),
        description="settings and scores, each with an optional label: a key of `pretrain`; `changes`: all settings "
        "that differ from `pretrain`; `samples`: number of training images; `flops`: FLOPs per text; "
        "`long`, `short`: R@1 in both directions; "
        "`classification`: top-1; or the name of one score. Scores are the last columns and have fixed labels",
    )
    published: bool = Field(False, description="add published scores on the same benchmark")
    figure: ScoresFigureConfig | CostFigureConfig | None = Field(
        None, discriminator="kind", description="figure shown with the table"
    )


class FindingsConfig(Section):
    """The ablations that test the paper's findings, by role; a finding with an empty role is not tested."""

    lit: Name | None = Field(None, description="trained on short captions only")
    lit_long: Name | None = Field(None, description="also trained on long texts, without corner tokens")
    long_clip: Name | None = Field(None, description="Long-CLIP: finetuned with interpolated positions")
    long_clip_equal_steps: Name | None = Field(
        None, description="Long-CLIP, trained for as many steps as `lotlip`, with those of the ablation it starts from"
    )
    lotlip: Name | None = Field(None, description="LoTLIP: trained on long texts with corner tokens")
    no_mask: Name | None = Field(None, description="`lotlip` without the attention mask of corner tokens")
    corner_tokens: list[Name] = Field(default_factory=list, description="LoTLIP by number of corner tokens")
    lit_by_sub_captions: list[Name] = Field(default_factory=list, description="`lit_long` by number of sub-captions")
    lotlip_by_sub_captions: list[Name] = Field(default_factory=list, description="LoTLIP by number of sub-captions")
    lit_long_by_short_share: list[Name] = Field(
        default_factory=list, description="`lit_long` by the short caption's share of the loss"
    )
    lotlip_by_short_share: list[Name] = Field(
        default_factory=list, description="LoTLIP by the short caption's share of the loss"
    )
    context_lengths: list[Name] = Field(default_factory=list, description="LoTLIP by context length")
    registers: list[Name] = Field(default_factory=list, description="with register tokens instead of corner tokens")
    captioners: list[Name] = Field(default_factory=list, description="LoTLIP with long texts of a single captioner")
    margin: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="smallest difference that matters, in points: smaller gains count as none, and smaller losses as "
        "preserved; 0: every difference matters",
    )

    benchmarks: list[Name] = Field(
        default_factory=list,
        description="benchmarks that test the findings. A measure that none of them has, or every measure if the list "
        "is empty, is tested on all benchmarks except those of the split `val`",
    )
    other_benchmarks: dict[FindingName, dict[MeasureName, Annotated[list[Name], Field(min_length=1)]]] = Field(
        default_factory=dict,
        description="finding → measure → benchmarks that test it instead, because the texts of `benchmarks` favour one "
        "of its ablations",
    )

    def testing(self, finding: str, measure: str) -> list[str]:
        """Returns the benchmarks that test a finding in a measure; empty: all that have the measure."""
        by_measure = {str(slug): given for slug, given in self.other_benchmarks.items()}.get(finding, {})
        return {str(slug): names for slug, names in by_measure.items()}.get(measure, self.benchmarks)

    def roles(self) -> Iterator[tuple[str, list[str]]]:
        """Yields each role and its ablations."""
        for role in type(self).model_fields:
            if role in ("margin", "benchmarks", "other_benchmarks"):
                continue
            given = getattr(self, role)
            yield role, given if isinstance(given, list) else [given] if given else []


def declaration_problems(
    tables: Mapping[str, TableConfig],
    findings: FindingsConfig,
    ablations: Mapping[str, Section],
    benchmarks: Mapping[str, str | None],
) -> list[str]:
    """Lists the problems of the declared tables and findings, one line each.

    Args:
        tables: name → table.
        findings: role → ablations.
        ablations: name → resolved training settings.
        benchmarks: name → split, if the benchmark has one.
    """
    settings = {name: flatten(config.model_dump(mode="json")) for name, config in ablations.items()}
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    names: list[tuple[str, str]] = [(f"findings.{role}", name) for role, given in findings.roles() for name in given]
    testing = [("findings.benchmarks", name) for name in findings.benchmarks] + [
        (f"findings.other_benchmarks.{finding}.{measure}", name)
        for finding, by_measure in findings.other_benchmarks.items()
        for measure, given in by_measure.items()
        for name in given
    ]
    problems = [
        f"{place}: no benchmark {name!r}{nearest(name, benchmarks)} (there are: {', '.join(benchmarks)})"
        for place, name in testing
        if name not in benchmarks
    ] + [
        f"{place}: {name} is of the split {VALIDATION}, which only chooses ablations; name another one"
        for place, name in testing
        if benchmarks.get(name) == VALIDATION
    ]
    problems += _role_problems(findings, settings)
    for slug, table in tables.items():
        place, figure = f"tables.{slug}", table.figure
        if slug in RESERVED:
            problems.append(f"{place}: this name is reserved by the report; choose another name")
        names += [(f"{place}.rows", name) for name in table.rows]
        problems += [
            f"{place}.columns: no setting or score {column!r}{nearest(column, [*COLUMNS, *keys])} "
            f"(there are: {', '.join(COLUMNS)} and the keys of pretrain)"
            for column in table.columns
            if column not in COLUMNS and column not in keys
        ]
        if not isinstance(figure, ScoresFigureConfig):
            continue
        names += [(f"{place}.figure.lines.{line}", name) for line, given in figure.lines.items() for name in given]
        drawn = [name for given in figure.lines.values() for name in given] or list(table.rows)
        for key in figure.x:
            if key not in keys:
                problems.append(f"{place}.figure.x: no key {key!r} in pretrain{nearest(key, keys)}")
                continue
            values = {name: settings[name].get(key) for name in drawn if name in settings}
            problems += [
                f"{place}.figure.x: {key} is {value!r} in ablation {name}, not a number"
                for name, value in values.items()
                if not _is_number(value)
                if key not in (SAMPLES, SHORT_SHARE) or value is not None
            ]
        places: dict[str, list[Any]] = {
            name: [settings[name].get(key) for key in figure.x] for name in drawn if name in settings
        }
        problems += [
            f"{place}.figure.x_scale: log shows only values above 0, but {' + '.join(figure.x)} is {sum(values)} in "
            f"ablation {name}; leave the ablation out, or use linear"
            for name, values in places.items()
            if figure.x_scale == "log" and all(map(_is_number, values)) and sum(values) <= 0
        ]
    return problems + [
        f"{place}: no ablation {name!r}{nearest(name, settings)} (there are: {', '.join(settings)})"
        for place, name in names
        if name not in settings
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _role_problems(findings: FindingsConfig, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lists the ablations that would count twice in a finding, or be replaced by another one of their role.

    Args:
        findings: role → ablations.
        settings: ablation → its training settings, flat.
    """
    roles = dict(findings.roles())
    problems = [
        f"findings.{role}: contains duplicates: {', '.join(repeated)}"
        for role, given in roles.items()
        if (repeated := [name for name in dict.fromkeys(given) if given.count(name) > 1])
    ]
    problems += [
        f"findings.{one} and findings.{other} both name {name}, which would be compared with itself; remove it from "
        "one of them"
        for one, other in COMPARED
        for name in dict.fromkeys(roles[one])
        # the series of corner tokens and of registers may both start from an ablation with neither
        if name in roles[other] and settings.get(name, {}).get(SERIES.get(other, "")) != 0
    ]
    for role, key in SERIES.items():
        first: dict[Any, str] = {}  # value → the first ablation that has it
        for name in dict.fromkeys(name for name in roles[role] if name in settings):
            value = settings[name].get(key)
            # equal ablations are one setting: a change of `pretrain` may make the base equal to another one
            if settings[first.setdefault(value, name)] != settings[name]:
                problems.append(
                    f"findings.{role}: {first[value]} and {name} both have {key} {value}; keep the one that differs "
                    f"from the others only in {key}"
                )
    return problems
