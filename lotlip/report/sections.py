"""The paper's comparisons, each as a table and a figure, and at the end whatever else was run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lotlip.evaluate.reference import REFERENCE, SOURCE
from lotlip.pretrain.config import PretrainConfig
from lotlip.report import figures, groups
from lotlip.report.inputs import Ablation, ReportInputs
from lotlip.report.results import (
    FLOPS,
    FLOPS_NOTE,
    flops_known,
    intervals_note,
    main_metrics,
    metric_names,
    results_table,
)
from lotlip.report.tables import Cell, Column, Table, gigaflops, number, words

FOLDED_FROM = 8  # rows of a table whose figure says the same
RUN_EVERYTHING = "make reproduce-all"

Lead = tuple[Column, list[Cell]]


@dataclass(frozen=True)
class Comparison:
    """One of the paper's tables or figures: which ablations are in it, and what tells them apart.

    Attributes:
        slug: its name in files, after the benchmark's.
        title, paper, note: of the table; `paper` says which of the paper's it is.
        choose: the ablations that belong in it, given all and the base.
        lead: the columns before the scores, given the chosen and the base.
        draw: its figure, given the inputs and a benchmark.
    """

    slug: str
    title: str
    paper: str
    note: str
    choose: Callable[[list[Ablation], PretrainConfig], list[Ablation]]
    lead: Callable[[list[Ablation], PretrainConfig], list[Lead]]
    draw: Callable[[ReportInputs, str], figures.Figure | None] | None = None


@dataclass(frozen=True)
class Section:
    """A comparison as it is shown.

    `folded` where the figure says most of it and the table is long; `not_run`: ablations that belong in it, too.
    """

    table: Table
    figure: figures.Figure | None = None
    not_run: Sequence[str] = ()

    @property
    def folded(self) -> bool:
        """Whether the table is shown on demand."""
        return self.figure is not None and len(self.table.rows) >= FOLDED_FROM


def benchmark_sections(inputs: ReportInputs, benchmark: str) -> list[Section]:
    """The paper's comparisons on one benchmark, then the ablations that are in none.

    A comparison shows what was run; with one row it compares nothing and is left out.
    """
    base, every = inputs.params.pretrain, inputs.scored
    metrics = main_metrics(metric_names(every, benchmark))
    seen: set[str] = set()
    sections = []
    for comparison in COMPARISONS:
        chosen = comparison.choose(every, base)
        if len(chosen) < 2:
            continue
        published = {
            f"{found.model} (published)": found.scores[benchmark] for found in REFERENCE if benchmark in found.scores
        }
        published = published if comparison.choose is groups.systems else {}
        notes = [comparison.note]
        notes += [f"Rows so named were {SOURCE}."] if published else []
        notes += [FLOPS_NOTE] if comparison.choose is groups.context_lengths and flops_known(chosen) else []
        table = results_table(
            f"{benchmark}-{comparison.slug}",
            comparison.title,
            " ".join(notes),
            chosen,
            comparison.lead(chosen, base),
            benchmark,
            metrics,
            published=published,
            paper=comparison.paper,
        )
        wanted = [a.name for a in comparison.choose(inputs.ablations, base)]
        not_run = [name for name in wanted if name in inputs.not_run]
        drawn = comparison.draw(inputs, benchmark) if comparison.draw else None
        sections.append(Section(table, drawn, not_run))
        seen |= {ablation.name for ablation in chosen}
    others = [ablation for ablation in every if ablation.name not in seen]
    if sections and others:  # the base beside them, to compare with
        others = [a for a in every if a in others or not groups.differences(a.config, base)]
    if others:
        note = "What each changes, against the base, which is the section pretrain of params.yaml."
        title = "Other ablations" if sections else "Ablations"
        lead = [_names(others), _changes(others, base)]
        sections.append(Section(results_table(f"{benchmark}-others", title, note, others, lead, benchmark, metrics)))
    return sections


def every_number(inputs: ReportInputs, benchmark: str) -> Table:
    """All metrics of all ablations that have results."""
    every = inputs.scored
    note = f"R@k and top-k in percent. {intervals_note(every)}".strip()
    metrics = metric_names(every, benchmark)
    return results_table(
        f"{benchmark}-all", "Every number", note, every, [_names(every)], benchmark, metrics, main=False
    )


def told_not_run(names: Sequence[str]) -> str:
    """One line on ablations that nothing is there of."""
    return f"Not run: {', '.join(names)}; `{RUN_EVERYTHING}` runs everything." if names else ""


# --- columns ------------------------------------------------------------------------------------------------------


def _column(key: str, label: str, texts: Iterable[object]) -> Lead:
    return Column(key, label, numeric=False), [words(text) for text in texts]


def _names(ablations: Sequence[Ablation]) -> Lead:
    return _column("ablation", "Ablation", [ablation.name for ablation in ablations])


def _corners(ablations: Sequence[Ablation], label: str = "m") -> Lead:
    return Column("corner_tokens", label), [number(a.config.text.corner_tokens) for a in ablations]


def _parts(ablations: Sequence[Ablation]) -> Lead:
    return Column("sub_captions", "k"), [number(a.config.long_texts.sub_captions) for a in ablations]


def _changes(ablations: Sequence[Ablation], base: PretrainConfig) -> Lead:
    return _column("changes", "Change", [groups.in_words(groups.differences(a.config, base)) for a in ablations])


def _weights(config: PretrainConfig) -> str:
    """What counts how much in the loss, as a person says it."""
    loss = config.loss
    shares = (
        "1/N for each feature"
        if loss.short_loss_fraction is None
        else f"{loss.short_loss_fraction:.0%} on raw captions"
    )
    weighted = (loss.short_loss_weight, loss.long_loss_weight) != (1, 1)
    return shares + (f", × {loss.short_loss_weight:g} raw, {loss.long_loss_weight:g} long" if weighted else "")


def _of_systems(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    leads = [_names(ablations), _column("system", "System", [groups.system(a.config, base) for a in ablations])]
    weights = [_weights(a.config) for a in ablations]
    return leads + ([_column("weights", "Loss weights", weights)] if len(set(weights)) > 1 else [])


def _of_corner_tokens(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    states = ["" if not a.config.text.corner_tokens else "off" if groups.masked_off(a) else "on" for a in ablations]
    return [_names(ablations), _corners(ablations), _column("corner_mask", "Mask", states)]


def _of_sub_captions(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    return [_names(ablations), _corners(ablations), _parts(ablations)]


def _of_context_lengths(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    lengths = [number(a.config.text.context_length) for a in ablations]
    leads = [_names(ablations), (Column("context_length", "Context"), lengths)]
    costs = [gigaflops(a.flops_per_text) for a in ablations]
    return leads + ([(FLOPS, costs)] if flops_known(ablations) else [])


def _of_registers(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    registers = Column("register_tokens", "Registers"), [number(a.config.text.register_tokens) for a in ablations]
    return [_names(ablations), registers, _corners(ablations, "Corner tokens")]


def _of_captioners(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    whose = [", ".join(a.config.long_texts.captioners) or "all" for a in ablations]
    return [_names(ablations), _column("captioners", "Captioners", whose)]


def _of_baselines(ablations: list[Ablation], base: PretrainConfig) -> list[Lead]:
    kinds = [groups.system(a.config, base) or groups.method(a) for a in ablations]
    towers = ["frozen" if a.config.image_tower.frozen else "trained" for a in ablations]
    return [
        _names(ablations),
        _column("method", "Method", kinds),
        _column("image_tower", "Image tower", towers),
        _column("contrast", "Contrast", [f"{a.config.loss.objective}, {a.config.similarity}" for a in ablations]),
        _parts(ablations),
    ]


COMPARISONS = (
    Comparison(
        "systems",
        "Systems",
        "Table 2",
        "LiT reads raw captions only; LoTLIP adds long texts and corner tokens. Long-CLIP goes on from a model of "
        "short texts, with stretched positions.",
        groups.systems,
        _of_systems,
    ),
    Comparison(
        "corner-tokens",
        "Corner tokens",
        "Table 3",
        "m: number of corner tokens. The mask keeps them and [CLS] from seeing one another.",
        groups.corner_tokens,
        _of_corner_tokens,
        figures.against_corner_tokens,
    ),
    Comparison(
        "sub-captions",
        "Sub-captions",
        "Figs. 2 and 5",
        "k: consecutive sub-captions in a long text; 0: raw captions only. m = 0 is LiT.",
        groups.sub_captions,
        _of_sub_captions,
        figures.against_sub_captions,
    ),
    Comparison(
        "context-length",
        "Context length",
        "Fig. 4",
        "Context: the most tokens that are read of a text, in training and here.",
        groups.context_lengths,
        _of_context_lengths,
    ),
    Comparison(
        "registers",
        "Register tokens",
        "Table 7",
        "As many learned tokens in one row as in the other: registers are masked as words are and get no loss.",
        groups.registers,
        _of_registers,
    ),
    Comparison(
        "captioners",
        "Captioners",
        "Table 9",
        "Whose captions the long texts are drawn from.",
        groups.captioners,
        _of_captioners,
    ),
    Comparison(
        "baselines",
        "Loss baselines",
        "",
        "What is contrasted and how, beside what else is like it here: CLIP trains the image tower, SigLIP contrasts "
        "pairs, FILIP compares token by token.",
        groups.baselines,
        _of_baselines,
    ),
)
