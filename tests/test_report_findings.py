"""The paper's tables and findings in the report, of ablations whose names say nothing. All numbers here are made up."""

import json
import math
from dataclasses import replace
from typing import get_args

import pytest

from lotlip.objectives.contrastive import feature_shares
from lotlip.report.config import FindingName, MeasureName
from lotlip.report.findings import (
    CONTRADICTS,
    FINDINGS,
    INCONCLUSIVE,
    NO_GAIN,
    NOT_RUN,
    ONE_SEED,
    SUPPORTS,
    evaluate_findings,
)
from lotlip.report.inputs import load_inputs
from lotlip.report.measures import LONG, MEASURES, Measure
from lotlip.report.page import build_report
from lotlip.report.sections import benchmark_sections
from lotlip.report.significance import holm, p_value
from lotlip.report.verdicts import note, tally
from tests.test_report import QUICK, Page, make_params, read_csv, write_project

BASELINE = {"text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}}
LIT_BY_K = ["short", "a1", "a2", "longs", "a4", "a5", "a6", "a7"]
LOTLIP_BY_K = ["b0", "b1", "b2", "base", "b4", "b5", "b6", "b7"]
CAPTIONERS = ("ib", "llava", "sv")


def corners(m, **text):
    return {"text": {"corner_tokens": m, **text}}


# Every ablation of the paper; "base" is LoTLIP.
PAPER = (
    {"short": BASELINE, "longs": corners(0), "base": {}, "weighed": {"loss": {"short_loss_weight": 2.0}}}
    | {f"m{m}": corners(m) for m in (1, 3, 4)}
    | {"open": corners(2, corner_mask=False)}
    | {f"a{k}": {**corners(0), "long_texts": {"sub_captions": k}} for k in (1, 2, 4, 5, 6, 7)}
    | {f"b{k}": {"long_texts": {"sub_captions": k}} for k in (0, 1, 2, 4, 5, 6, 7)}
    | {f"c{length}": {"text": {"context_length": length}} for length in (32, 64, 192)}
    | {f"r{m}": corners(0, register_tokens=m) for m in (1, 2, 4)}
    | {f"only-{name}": {"long_texts": {"captioners": [name]}} for name in CAPTIONERS}
    | {
        "trained": BASELINE | {"image_tower": {"frozen": False}},
        "pairs": BASELINE | {"image_tower": {"frozen": False}, "loss": {"objective": "siglip"}},
        "tokens": BASELINE | {"image_tower": {"frozen": False}, "similarity": "late-interaction"},
        "short-half": BASELINE | {"steps": 20},
        "longs-s10": corners(0) | {"loss": {"short_loss_fraction": 0.1}},
        "longs-s90": corners(0) | {"loss": {"short_loss_fraction": 0.9}},
        "base-s10": {"loss": {"short_loss_fraction": 0.1}},
        "base-equal": {"loss": {"short_loss_fraction": None}},
    }
)
STRETCHED = {
    "init_from": "short",
    "pretrain": corners(0, position_interpolation={"positions": 32, "keep": 8, "factor": 6})
    | {"loss": {"image_components": 8}},
}
FINETUNED = {
    "stretched": STRETCHED,
    "stretched-half": {"init_from": "short-half", "pretrain": STRETCHED["pretrain"] | {"steps": 20}},
}

SCORES = ["long", "short", "classification"]
METHODS = {"short": "LiT", "trained": "CLIP", "pairs": "SigLIP", "tokens": "FILIP"}
TABLES = {
    "systems": {"title": "Systems", "rows": {"short": "LiT", "longs": "", "stretched": "Long-CLIP", "base": "LoTLIP"}},
    "corner-tokens": {
        "title": "Corner tokens",
        "rows": ["longs", "m1", "base", "open", "m3", "m4"],
        "figure": {
            "kind": "scores",
            "x": ["text.corner_tokens", "text.register_tokens"],
            "lines": {"corner tokens": ["longs", "m1", "base", "m3", "m4"], "register tokens": ["longs", "r1", "r2"]},
        },
    },
    "sub-captions": {
        "title": "Sub-captions",
        "rows": [*LIT_BY_K, *LOTLIP_BY_K],
        "figure": {
            "kind": "scores",
            "x": "long_texts.sub_captions",
            "lines": {"LoTLIP": LOTLIP_BY_K, "LiT": LIT_BY_K},
        },
    },
    "context-length": {"title": "Context length", "rows": ["c32", "c64", "base", "c192"], "figure": {"kind": "cost"}},
    "short-share": {
        "title": "The short caption's share",
        "rows": ["longs-s10", "longs-s90", "base-s10", "base-equal"],
        "columns": ["loss.short_loss_fraction", *SCORES],
        "figure": {
            "kind": "scores",
            "x": "loss.short_loss_fraction",
            "lines": {"LoTLIP": ["base-s10", "base-equal"], "LiT": ["longs-s10", "longs-s90"]},
        },
    },
    "baselines": {"title": "Loss baselines", "rows": METHODS, "columns": ["loss.objective", *SCORES]},
}
ROLES = {
    "lit": "short",
    "lit_long": "longs",
    "long_clip": "stretched",
    "lotlip": "base",
    "no_mask": "open",
    "corner_tokens": ["longs", "m1", "base", "m3", "m4"],
    "lit_by_sub_captions": LIT_BY_K[1:],
    "lotlip_by_sub_captions": LOTLIP_BY_K[1:],
    "context_lengths": ["c32", "c64", "base", "c192"],
    "registers": ["r1", "r2", "r4"],
    "captioners": [f"only-{name}" for name in CAPTIONERS],
    "long_clip_equal_steps": "stretched-half",
    "lit_long_by_short_share": ["longs", "longs-s10", "longs-s90"],
    "lotlip_by_short_share": ["base", "base-s10", "base-equal"],
}


def paper_params(seeds=(0, 1, 2), ablations=PAPER, **changes):
    return make_params(
        pretrain={"seeds": list(seeds), "steps": 40, **QUICK},
        caption={"captioners": {name: {"kind": "table", "path": f"{name}.csv"} for name in CAPTIONERS}},
        ablations=ablations,
        tables=TABLES,
        **{"findings": ROLES, "finetune": FINETUNED if "short-half" in ablations else {}, **changes},
    )


def write_scores(root, params, long=None, short=None, top1=None):
    """A project whose ablations score 50 %, but for those given (percent), and a little more with each seed."""
    write_project(root, params)
    given = {"long": long or {}, "short": short or {}, "top1": top1 or {}}
    for name in params.names:
        config = params.ablation(name)
        seeds = {}
        for seed in config.seeds:
            value = {kind: (of.get(name, 50) + seed) / 100 for kind, of in given.items()}
            ways = ("image_to_text", "text_to_image")
            seeds[str(seed)] = {f"{kind}.{way}.r1": value[kind] for kind in ("long", "short") for way in ways}
            seeds[str(seed)]["classification.top1"] = value["top1"]
        found = {"protocol": {}, "chance": {}, "seeds": seeds}
        result = {"ablation": name, "config": config.model_dump(mode="json"), "fingerprints": {}}
        result["benchmarks"] = {"scenes": found}
        (root / params.paths.metrics / f"{name}.json").write_text(json.dumps(result))


def judged(root, params, **scores):
    write_scores(root, params, **scores)
    found = evaluate_findings(load_inputs(params, root))
    return {(one.finding.slug, one.measure.slug): one for one in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root, params = tmp_path_factory.mktemp("paper"), paper_params()
    write_scores(root, params)
    inputs = load_inputs(params, root)
    return inputs, build_report(inputs, root / "report").parent


# --- tables -------------------------------------------------------------------------------------------------------


def test_params_yaml_can_name_every_finding_and_measure():
    assert [finding.slug for finding in FINDINGS] == list(get_args(FindingName))
    assert [measure.slug for measure in MEASURES] == list(get_args(MeasureName))


@pytest.mark.slow
def test_every_table_of_the_paper_has_its_ablations(whole):
    inputs, _ = whole
    tables = {section.table.title: section.table for section in benchmark_sections(inputs, "scenes")}
    rows = {title: [row[0].text for row in table.rows] for title, table in tables.items()}
    others = rows.pop("Other ablations")
    assert rows == {declared["title"]: list(declared["rows"]) for declared in TABLES.values()}
    single = [f"only-{name}" for name in CAPTIONERS]
    assert others == ["base", "weighed", "r1", "r2", "r4", *single, "short-half", "base-equal", "stretched-half"]
    assert [row[1].text for row in tables["Loss baselines"].rows] == list(METHODS.values())


def test_the_page_of_many_ablations_is_whole_and_folds_what_its_figures_say(whole):
    _, report = whole
    text = (report / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids)
    assert "<summary>The numbers: 16 rows</summary>" in text and "<summary>The numbers: 6 rows" not in text
    assert "<summary>Training: 40 rows</summary>" in text
    assert '<span class="chip inconclusive">inconclusive</span>' in text
    assert "Thin lines are the other ablations" in text
    assert {"scenes-sub-captions.png", "scenes-corner-tokens.png", "scenes-context-length.png"} <= {
        path.name for path in (report / "figures").iterdir()
    }


# --- findings -----------------------------------------------------------------------------------------------------


def test_a_difference_that_is_the_same_in_every_seed_decides(tmp_path):
    found = judged(tmp_path, paper_params(), long={"short": 10}, short={"short": 60, "base": 45}, top1={"base": 55})
    teach = found["long-texts-teach-long", "long"]
    # seeds differ by a point each, but both sides alike: paired, the difference is 40 in all of them
    assert teach.by_seed == pytest.approx({0: 40, 1: 40, 2: 40})
    assert teach.weights == {"longs": 1.0, "short": -1.0} and teach.verdict == SUPPORTS
    assert found["long-texts-cost-short", "short"].verdict == SUPPORTS
    assert found["corner-tokens-win-short-back", "short"].verdict == CONTRADICTS
    assert found["corner-tokens-win-short-back", "classification"].verdict == SUPPORTS
    assert found["long-texts-cost-short", "classification"].verdict == INCONCLUSIVE  # 0 in every seed
    assert found["better-than-long-clip", "short"].weights == {"base": 1.0, "stretched": -1.0}
    assert not [one for one in found.values() if one.verdict == NOT_RUN]


def test_seeds_that_do_not_agree_cannot_tell(tmp_path):
    params = paper_params()
    write_scores(tmp_path, params, long={"base": 58})
    path = tmp_path / params.paths.metrics / "base.json"
    data = json.loads(path.read_text())
    data["benchmarks"]["scenes"]["seeds"]["2"]["long.text_to_image.r1"] = 0.38  # 50 % as the mean: −2 points
    path.write_text(json.dumps(data))
    found = {(one.finding.slug, one.measure.slug): one for one in evaluate_findings(load_inputs(params, tmp_path))}
    keep = found["corner-tokens-keep-long", "long"]
    assert keep.by_seed == pytest.approx({0: 8, 1: 8, 2: -3})
    # mean 4.333, deviation 6.351, t of two degrees of freedom 4.3027 over the root of three: ± 15.776
    assert (keep.difference.low, keep.difference.high) == pytest.approx((4.3333 - 15.776, 4.3333 + 15.776), abs=1e-3)
    assert keep.verdict == INCONCLUSIVE and keep.reason == ""


def test_one_seed_decides_nothing_and_says_why(tmp_path):
    found = judged(tmp_path, paper_params(seeds=[4]), long={"short": 10})
    one = found["long-texts-teach-long", "long"]
    assert one.verdict == one.holm_verdict == ONE_SEED and one.reason.startswith("one seed (4) has no interval")
    assert one.difference.value == pytest.approx(40) and one.difference.low is None
    results = list(found.values())
    count = len(results)
    assert tally(results) == f"{count} tests of the paper's findings have one seed, which decides nothing."
    several = [replace(results[0], verdict=SUPPORTS), *results[1:]]
    assert tally(several) == (
        "Of 1 test of the paper's findings, this run supports 1 and contradicts 0; 0 are inconclusive. "
        f"{count - 1} further tests of the paper's findings have one seed, which decides nothing."
    )
    assert tally(results[:2], [results[0], replace(results[1], verdict=NOT_RUN)]) == (
        "2 tests of the paper's findings have one seed, which decides nothing. "
        "1 test of the paper's findings has one stored seed, which decides nothing."
    )
    assert tally([replace(results[0], verdict=NOT_RUN)]).startswith("1 further test needs ablations")
    assert tally([results[0], replace(results[1], verdict=NOT_RUN)]).endswith(
        f"1 further test needs ablations or texts that were not run: {results[1].finding.slug}."
    )


def test_what_was_not_run_is_not_judged(tmp_path):
    found = judged(tmp_path, paper_params(ablations={"longs": corners(0), "base": {}}))
    verdicts = {slug: one.verdict for (slug, _), one in found.items()}
    assert verdicts.pop("corner-tokens-win-short-back") == verdicts.pop("corner-tokens-keep-long") == INCONCLUSIVE
    assert set(verdicts.values()) == {NOT_RUN}
    assert found["mask", "long"].reason == "needs LoTLIP with the mask − without it"


def test_slopes_are_of_least_squares_and_gains_level_off(tmp_path):
    rising = {"b1": 40, "b2": 44, "base": 51, "b7": 53}
    costs = {"a1": 49, "a2": 48, "longs": 47, "a4": 46, "a5": 45, "a6": 44, "a7": 43}
    lengths = {"c32": 20, "c64": 45, "c192": 50}
    found = judged(tmp_path, paper_params(), long={**rising, **lengths}, short=costs)
    slope = found["more-sub-captions-help-long", "long"]
    assert slope.weights == pytest.approx({"b1": -1.0, "b2": 0.0, "base": 1.0}) and slope.verdict == SUPPORTS
    assert slope.difference.value == pytest.approx(11)
    level = found["sub-captions-level-off", "long"]
    assert level.weights == {"base": 2.0, "b1": -1.0, "b7": -1.0}
    assert level.difference.value == pytest.approx((51 - 40) - (53 - 51))
    assert found["more-sub-captions-cost-more", "short"].difference.value == pytest.approx(6.0)
    assert found["longer-context-helps", "long"].difference.value == pytest.approx(30)
    # the half of the doublings from 32 to 192 is near 78
    assert found["context-levels-off", "long"].weights == {"c64": 2.0, "c32": -1.0, "c192": -1.0}
    assert found["corner-tokens-level-off", "long"].weights == {"base": 2.0, "longs": -1.0, "m4": -1.0}


def test_registers_are_compared_at_equal_number_and_captioners_with_mean_and_best(tmp_path):
    registers = {"r1": 41, "r2": 48, "r4": 40}
    alone = {"only-ib": 48, "only-llava": 52, "only-sv": 44}
    found = judged(tmp_path, paper_params(), long={**registers, **alone})
    assert found["better-than-registers", "long"].difference.value == pytest.approx((9 + 2 + 10) / 3)
    assert found["captioners-beat-mean", "long"].difference.value == pytest.approx(2)
    assert found["captioners-beat-mean", "long"].verdict == SUPPORTS
    best = found["captioners-beat-best", "long"]
    assert best.weights == {"base": 1.0, "only-llava": -1.0} and best.verdict == CONTRADICTS
    assert best.compares == "all captioners − best single captioner, chosen in hindsight"


@pytest.mark.slow
def test_long_clip_is_compared_at_equal_steps_only_if_they_are_equal(tmp_path):
    found = judged(tmp_path / "equal", paper_params(), long={"base": 52})
    assert found["better-than-long-clip-at-equal-steps", "long"].weights == {"base": 1.0, "stretched-half": -1.0}
    assert found["better-than-long-clip-at-equal-steps", "long"].verdict == SUPPORTS
    longer = {**PAPER, "short-half": BASELINE | {"steps": 21}}
    found = judged(tmp_path / "longer", paper_params(ablations=longer), long={"base": 52})
    assert found["better-than-long-clip-at-equal-steps", "long"].verdict == NOT_RUN


def test_each_system_is_compared_at_its_best_share(tmp_path):
    scores = {"long": {"longs-s10": 60, "base-equal": 57, "base-s10": 55}, "short": {"longs-s10": 45, "base-s10": 58}}
    found = judged(tmp_path, paper_params(), **scores)
    for measure, points in (("long", 55 - 60), ("short", 58 - 45)):
        best = found["better-than-long-texts-at-best-share", measure]
        # the means of long and short text: 56.5 against 53.5 of base-equal, and 52.5 against 50
        assert best.weights == {"base-s10": 1.0, "longs-s10": -1.0}
        assert best.difference.value == pytest.approx(points) and best.compares.endswith(", chosen in hindsight")


def test_the_best_is_chosen_on_the_validation_split_and_tested_on_the_others(tmp_path):
    benchmarks = {"scenes": {"kind": "scenes", "size": 100}, "chosen": {"kind": "scenes", "split": "val", "size": 50}}
    params = paper_params(evaluate={"benchmarks": benchmarks})
    write_scores(tmp_path, params, long={"base-s10": 58, "longs-s10": 60})
    for name in params.names:
        path = tmp_path / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        data["benchmarks"]["chosen"] = json.loads(json.dumps(data["benchmarks"]["scenes"]))
        if name in ("base-equal", "longs-s90"):
            for scores in data["benchmarks"]["chosen"]["seeds"].values():
                scores["short.text_to_image.r1"] += 0.3
        path.write_text(json.dumps(data))
    tested = {(one.finding.slug, one.measure.slug): one for one in evaluate_findings(load_inputs(params, tmp_path))}
    best = tested["better-than-long-texts-at-best-share", "long"]
    assert best.weights == {"base-equal": 1.0, "longs-s90": -1.0} and best.compares.endswith(", chosen on chosen")
    assert {tuple(one.benchmarks) for one in tested.values()} == {("scenes",)}


def test_findings_are_tested_on_the_declared_benchmarks_that_have_the_measure(tmp_path):
    params = paper_params(
        evaluate={"benchmarks": {"scenes": {"kind": "scenes", "size": 100}, "captions": {"kind": "held-out"}}}
    )
    write_scores(tmp_path, params)
    for name in params.names:
        path = tmp_path / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        data["benchmarks"]["captions"] = json.loads(json.dumps(data["benchmarks"]["scenes"]))
        for scores in data["benchmarks"]["captions"]["seeds"].values():
            del scores["classification.top1"]
            if name == "base-equal":
                scores["short.text_to_image.r1"] += 0.3
        path.write_text(json.dumps(data))

    def tested(*names, **other):
        findings = params.findings.model_copy(update={"benchmarks": list(names), "other_benchmarks": other})
        found = evaluate_findings(load_inputs(params.model_copy(update={"findings": findings}), tmp_path))
        best = next(one for one in found if one.finding.slug == "better-than-long-texts-at-best-share")
        apart.extend(one for one in found if one.apart)
        return {one.measure.slug: tuple(one.benchmarks) for one in found if not one.apart}, best.weights, note(found)

    apart = []

    benchmarks, best, text = tested("captions")
    assert benchmarks == {"long": ("captions",), "short": ("captions",), "classification": ("scenes",)}
    assert "base-equal" in best  # the best is chosen on the same benchmark
    assert text.endswith("Benchmarks: long text: captions; short text: captions; classification: scenes.")
    benchmarks, best, _ = tested("scenes")
    assert set(benchmarks.values()) == {("scenes",)} and "base-equal" not in best
    assert tested()[0] == {
        "long": ("scenes", "captions"),
        "short": ("scenes", "captions"),
        "classification": ("scenes",),
    }
    assert not apart
    benchmarks, _, text = tested("captions", mask={"long": ["scenes"]})
    assert benchmarks == {"long": ("captions",), "short": ("captions",), "classification": ("scenes",)}
    (mask,) = apart
    assert (mask.finding.slug, mask.measure.slug, mask.benchmarks) == ("mask", "long", ["scenes"])
    assert mask.compares.endswith(", on scenes")
    apart.clear()
    tested("captions", **{"long-texts-cost-short": {"classification": ["captions"]}})
    assert [(one.verdict, one.reason) for one in apart] == [(NOT_RUN, "captions has no classification")]
    assert text.endswith("Findings to which these are not fair name others (findings.other_benchmarks).")


def test_a_finding_without_scores_on_its_benchmarks_is_not_tested_on_others(tmp_path):
    benchmarks = {"scenes": {"kind": "scenes", "size": 100}, "captions": {"kind": "held-out"}}
    params = paper_params(evaluate={"benchmarks": benchmarks})
    write_scores(tmp_path, params)
    path = tmp_path / params.paths.metrics / "short.json"
    data = json.loads(path.read_text())
    data["benchmarks"]["captions"] = data["benchmarks"]["scenes"]
    path.write_text(json.dumps(data))
    findings = params.findings.model_copy(update={"benchmarks": ["captions"]})
    found = evaluate_findings(load_inputs(params.model_copy(update={"findings": findings}), tmp_path))
    assert {one.verdict for one in found} == {NOT_RUN}
    assert found[0].reason == "needs scores on captions of longs" and found[0].difference is None


def test_the_shown_share_of_the_loss_is_the_one_that_trains(whole):
    inputs, report = whole
    shares = {row["ablation"]: float(row["loss.short_loss_fraction"]) for row in read_csv(report, "scenes-short-share")}
    assert shares == pytest.approx({"longs-s10": 0.1, "longs-s90": 0.9, "base-s10": 0.1, "base-equal": 0.25})
    assert (report / "figures" / "scenes-short-share.png").is_file()
    for ablation in inputs.ablations:
        config = ablation.config
        features = 1 + (config.text.corner_tokens + 1 if config.long_texts.sub_captions else 0)
        first = feature_shares(features, config.loss.short_loss_fraction)[0].item()
        assert ablation.short_share == pytest.approx(first)


def with_noise(root, params, noise):
    """Adds noise to an ablation's R@1 on long text: ablation → points of each seed."""
    for name, points in noise.items():
        path = root / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        for scores, more in zip(data["benchmarks"]["scenes"]["seeds"].values(), points, strict=True):
            for way in ("image_to_text", "text_to_image"):
                scores[f"long.{way}.r1"] += more / 100
        path.write_text(json.dumps(data))


def test_verdicts_are_corrected_for_the_number_of_tests(tmp_path):
    params = paper_params(
        ablations={"short": BASELINE, "longs": corners(0), "base": {}, "open": corners(2, corner_mask=False)}
    )
    write_scores(tmp_path, params)
    with_noise(tmp_path, params, {"longs": [10, 11, 12.5], "base": [14, 14, 18], "open": [0, 0, 0.1]})
    tested = evaluate_findings(load_inputs(params, tmp_path))
    run = [one for one in tested if one.p is not None]
    p = {one.measure.slug + " " + one.finding.slug: one.p for one in run}
    assert {one.tests for one in run} == {len(run)} and len(run) == 8
    assert [one.p_holm for one in run] == pytest.approx(holm(list(p.values())))
    teach = next(one for one in run if one.finding.slug == "long-texts-teach-long")
    keep = next(one for one in run if one.finding.slug == "corner-tokens-keep-long")
    # t of 2 degrees of freedom is (33.5 / 3) / (1.258 / √3) = 15.37, so p = 1 − t / √(t² + 2)
    assert teach.p == pytest.approx(1 - 15.37 / math.sqrt(15.37**2 + 2), rel=1e-3)
    assert (teach.verdict, teach.holm_verdict) == (SUPPORTS, SUPPORTS if teach.p_holm < 0.05 else INCONCLUSIVE)
    assert (keep.verdict, keep.holm_verdict) == (SUPPORTS, INCONCLUSIVE)
    assert keep.p < 0.05 <= keep.p_holm
    low, high = keep.simultaneous_interval
    assert low < keep.interval[0] < keep.interval[1] < high and low < 0
    found = keep.as_json()
    assert (found["verdict"], found["verdict_holm"]) == (SUPPORTS, INCONCLUSIVE)
    assert found["detectable"] < found["detectable_corrected"]
    words = tally(tested)
    supported = sum(one.verdict == SUPPORTS for one in run)
    corrected = sum(one.holm_verdict == SUPPORTS for one in run)
    assert f"Of {len(run)} tests of the paper's findings, this run supports {supported} and contradicts" in words
    assert f"With Holm's correction, this run supports {corrected} and contradicts" in words and corrected < supported


def test_gains_and_losses_below_the_margin_do_not_matter(tmp_path):
    ablations = {"short": BASELINE, "longs": corners(0), "base": {}, "open": corners(2, corner_mask=False)}
    # Differences: base − longs −0.3 … −0.1, base − open −0.3 … 0.1, longs − short 0.2 … 0.4
    noise = {
        "short": [-0.6, -0.4, -0.3],
        "longs": [-0.3, -0.1, 0.1],
        "base": [-0.6, -0.2, 0.0],
        "open": [-0.3, -0.3, 0.3],
    }

    def verdicts(margin):
        params = paper_params(ablations=ablations, findings={**ROLES, "margin": margin})
        root = tmp_path / str(margin)
        write_scores(root, params)
        with_noise(root, params, noise)
        tested = evaluate_findings(load_inputs(params, root))
        return {one.finding.slug: one for one in tested if one.measure is LONG and one.p is not None}

    off, on = verdicts(0.0), verdicts(1.0)
    assert {slug: one.verdict for slug, one in off.items()} == {
        "long-texts-teach-long": SUPPORTS,
        "corner-tokens-keep-long": INCONCLUSIVE,
        "mask": INCONCLUSIVE,
    }
    assert {slug: one.verdict for slug, one in on.items()} == {
        "long-texts-teach-long": SUPPORTS,  # a gain, if a small one
        "corner-tokens-keep-long": SUPPORTS,  # a loss of less than a point
        "mask": NO_GAIN,
    }
    assert on["mask"].p == pytest.approx(p_value(list(on["mask"].by_seed.values()), 1.0)) and on["mask"].p < 0.05
    assert "1 shows no gain" in tally(list(on.values())) and "no gain" not in tally(list(off.values()))


def test_findings_are_told_on_the_page_in_markdown_and_as_files(whole):
    _, report = whole
    count = sum(len(finding.measures) for finding in FINDINGS)
    data = json.loads((report / "findings.json").read_text())
    assert len(data["findings"]) == count == len(read_csv(report, "findings"))
    teach = data["findings"][0]
    assert (teach["finding"], teach["measure"], teach["verdict"]) == ("long-texts-teach-long", "long", INCONCLUSIVE)
    assert teach["ablations"] == {"longs": 1.0, "short": -1.0} and teach["points"] == pytest.approx(0)
    for text in ((report / "index.html").read_text(), (report / "report.md").read_text()):
        assert f"; {count} are inconclusive" in text
        assert f"of the {count} tests would be expected to differ from 0 by chance" in text
        assert "longs − short" in text and "What could be detected" in text
        assert all(finding.where in text for finding in FINDINGS)


def test_several_benchmarks_are_one_measure_their_mean(tmp_path):
    params = paper_params(evaluate={"benchmarks": {"scenes": {"kind": "scenes", "size": 100}}})
    write_scores(tmp_path, params, long={"short": 10})
    for name in ("short", "longs"):
        path = tmp_path / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        ways = {f"long.{way}.r1": 0.5 for way in ("image_to_text", "text_to_image")}
        data["benchmarks"]["own"] = {"seeds": dict.fromkeys(("0", "1", "2"), ways)}
        path.write_text(json.dumps(data))
    found = evaluate_findings(load_inputs(params, tmp_path))
    teach = next(one for one in found if one.finding.slug == "long-texts-teach-long")
    assert teach.benchmarks == ["scenes", "own"]  # params.yaml's first
    assert teach.by_seed == pytest.approx(dict.fromkeys((0, 1, 2), (0 + 40 + 0) / 2), abs=1)


def test_a_number_that_is_none_is_not_averaged_over(tmp_path):
    params = paper_params()
    write_scores(tmp_path, params)
    ablation = load_inputs(params, tmp_path).ablations[0]
    ablation.benchmarks["scenes"].seeds[1]["long.text_to_image.r1"] = float("nan")
    assert LONG.seeds(ablation, ["scenes"]) == pytest.approx({0: 50, 2: 52})
    assert Measure("none", "none", ("no.such",)).seeds(ablation, ["scenes"]) == {}
