"""What was measured, as the paper's tables: systems, corner tokens, sub-captions, and whatever else was run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lotlip.config import Pretrain
from lotlip.evaluation.reference import REFERENCE, SOURCE
from lotlip.report import groups
from lotlip.report.inputs import Ablation, Benchmark, ReportInputs
from lotlip.report.tables import Cell, Column, Table, gigaflops, mark_best, number, score, words

FAMILIES = {"long": "Long text", "short": "Short text", "classification": "Classification"}
FLOPS = Column("flops_per_text", "GFLOPs per text")
FLOPS_NOTE = (
    "GFLOPs: the text tower's billions of floating-point operations on one text that fills the context, "
    "two for a multiply-add."
)
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def benchmark_names(inputs: ReportInputs) -> list[str]:
    """Benchmarks that have a result, in params.yaml's order, then any others."""
    found = {name for ablation in inputs.ablations for name in ablation.benchmarks}
    wanted = [name for name in inputs.params.evaluate.names if name in found]
    return [*wanted, *sorted(found - set(wanted))]


def metric_names(ablations: Iterable[Ablation], benchmark: str) -> list[str]:
    """All metrics of a benchmark: long text, short text, others, classification; each image → text first."""
    names = {name for a in ablations for seed in _results(a, benchmark).seeds.values() for name in seed}
    order = ["long", "short"]

    def place(name: str) -> tuple[Any, ...]:
        family, *rest = name.split(".")
        rank = order.index(family) if family in order else 3 if family == "classification" else 2
        digits = "".join(filter(str.isdigit, rest[-1])) if rest else ""
        return rank, family, rest[:-1], not digits, int(digits or 0), name

    return sorted(names, key=place)


def main_metrics(names: Iterable[str]) -> list[str]:
    """The ones for the paper's tables: first-place recall and accuracy."""
    return [name for name in names if name.rpartition(".")[2] in ("r1", "top1")]


def metric_column(metric: str, main: bool) -> Column:
    """A metric's column; in the main tables the heading has the R@1 that its columns share."""
    family, *rest = metric.split(".")
    stat = _stat_words(rest[-1]) if rest else family
    direction = " ".join(DIRECTIONS.get(part, part) for part in rest[:-1])
    heading = FAMILIES.get(family, family.replace("_", " ").capitalize())
    if main and direction:
        return Column(metric, direction, f"{heading}, {stat}")
    return Column(metric, stat, f"{heading}, {direction}" if direction else heading)


def _stat_words(stat: str) -> str:
    if stat[0] == "r" and stat[1:].isdigit():
        return f"R@{stat[1:]}"
    if stat.startswith("top") and stat[3:].isdigit():
        return f"top-{stat[3:]}"
    return stat.replace("_", " ")


def _results(ablation: Ablation, benchmark: str) -> Benchmark:
    return ablation.benchmarks.get(benchmark, Benchmark({}, {}, {}))


def results_table(
    slug: str,
    title: str,
    note: str,
    ablations: Sequence[Ablation],
    lead: Sequence[tuple[Column, Sequence[Cell]]],
    benchmark: str,
    metrics: Sequence[str],
    main: bool = True,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """Ablations down, the `lead` columns and then metrics across; guessing and `published` models are references."""
    found = [_results(a, benchmark) for a in ablations]
    scores = [
        mark_best([score(result.values(metric), metric, result.interval(metric)) for result in found], metric)
        for metric in metrics
    ]
    columns = [column for column, _ in lead] + [metric_column(metric, main) for metric in metrics]
    rows = [list(row) for row in zip(*[cells for _, cells in lead], *scores, strict=True)]
    guess = next((result.chance for result in found if result.chance), None)
    known = {**({"guessing": guess} if guess else {}), **(published or {})}
    blank = [Cell("") for _ in lead[1:]]
    references = [
        [
            Cell(name),
            *blank,
            *(score([values[metric]], metric) if metric in values else number(None) for metric in metrics),
        ]
        for name, values in known.items()
    ]
    return Table(slug, title, note, columns, rows, references)


def flops_known(ablations: Iterable[Ablation]) -> bool:
    """Whether any has the operations on a text that fills its context."""
    return any(ablation.flops_per_text is not None for ablation in ablations)


def benchmark_tables(inputs: ReportInputs, benchmark: str) -> list[Table]:
    """The paper's tables for one benchmark, then every number there is; each ablation is in one of them at least."""
    base, every = inputs.params.pretrain, inputs.ablations
    everything = metric_names(every, benchmark)
    metrics = main_metrics(everything)

    def table(
        slug: str,
        title: str,
        note: str,
        chosen: list[Ablation],
        lead: list[tuple[Column, list[Cell]]],
        published: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Table:
        return results_table(f"{benchmark}-{slug}", title, note, chosen, lead, benchmark, metrics, published=published)

    published = {
        f"{found.model} (published)": found.scores[benchmark] for found in REFERENCE if benchmark in found.scores
    }

    systems = groups.systems(every, base)
    corners = groups.corner_tokens(every, base)
    parts = groups.sub_captions(every, base)
    contexts = groups.context_lengths(every, base)
    m = Column("corner_tokens", "m")
    candidates = [
        (
            systems,
            table(
                "systems",
                "Systems",
                "LiT reads raw captions only; LoTLIP adds long texts and corner tokens."
                + (f" Rows so named were {SOURCE}." if published else ""),
                systems,
                [_names(systems), _column("system", "System", [groups.system(a.config, base) for a in systems])]
                + ([_weights(systems)] if _weights_differ(systems) else []),
                published,
            ),
        ),
        (
            corners,
            table(
                "corner-tokens",
                "Corner tokens",
                "m: number of corner tokens. The mask keeps them and [CLS] from seeing one another.",
                corners,
                [_names(corners), (m, [number(a.config.text.corner_tokens) for a in corners]), _masks(corners)],
            ),
        ),
        (
            parts,
            table(
                "sub-captions",
                "Sub-captions",
                "k: consecutive sub-captions in a long text; 0: raw captions only. m = 0 is LiT.",
                parts,
                [
                    _names(parts),
                    (m, [number(a.config.text.corner_tokens) for a in parts]),
                    (Column("sub_captions", "k"), [number(a.config.long_texts.sub_captions) for a in parts]),
                ],
            ),
        ),
        (
            contexts,
            table(
                "context-length",
                "Context length",
                "Context: the most tokens that are read of a text, in training and here."
                + (f" {FLOPS_NOTE}" if flops_known(contexts) else ""),
                contexts,
                [
                    _names(contexts),
                    (Column("context_length", "Context"), [number(a.config.text.context_length) for a in contexts]),
                ]
                + ([(FLOPS, [gigaflops(a.flops_per_text) for a in contexts])] if flops_known(contexts) else []),
            ),
        ),
    ]
    # one row compares nothing
    shown = [(chosen, made) for chosen, made in candidates if len(chosen) > 1]
    seen = {ablation.name for chosen, _ in shown for ablation in chosen}
    others = [ablation for ablation in every if ablation.name not in seen]
    if shown and others:  # the base beside them, to compare with
        others = [a for a in every if a in others or not groups.differences(a.config, base)]
    tables = [made for _, made in shown]
    if others:
        note = "What each changes, against the base, which is the section pretrain of params.yaml."
        title = "Other ablations" if shown else "Ablations"
        tables.append(table("others", title, note, others, [_names(others), _changes(others, base)]))
    full = "Mean over seeds with their standard deviation; of one seed, the 95 % interval. R@k and top-k in percent."
    tables.append(
        results_table(
            f"{benchmark}-all", "Every number", full, every, [_names(every)], benchmark, everything, main=False
        )
    )
    return tables


def _column(key: str, label: str, texts: Iterable[object]) -> tuple[Column, list[Cell]]:
    return Column(key, label, numeric=False), [words(text) for text in texts]


def _names(ablations: Sequence[Ablation]) -> tuple[Column, list[Cell]]:
    return _column("ablation", "Ablation", [ablation.name for ablation in ablations])


def _masks(ablations: Sequence[Ablation]) -> tuple[Column, list[Cell]]:
    states = ["" if not a.config.text.corner_tokens else "off" if groups.masked_off(a) else "on" for a in ablations]
    return _column("corner_mask", "Mask", states)


def _changes(ablations: Sequence[Ablation], base: Pretrain) -> tuple[Column, list[Cell]]:
    return _column("changes", "Change", [groups.in_words(groups.differences(a.config, base)) for a in ablations])


def _weights(ablations: Sequence[Ablation]) -> tuple[Column, list[Cell]]:
    weights = [a.config.loss for a in ablations]
    return _column("weights", "Loss weights", [f"{w.raw_weight:g} raw, {w.long_weight:g} long" for w in weights])


def _weights_differ(ablations: Sequence[Ablation]) -> bool:
    return len({(a.config.loss.raw_weight, a.config.loss.long_weight) for a in ablations}) > 1
