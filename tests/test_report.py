"""The report, from files as the stages write them. All numbers here are made up."""

import csv
import io
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from lotlip.config.params import Params
from lotlip.core.differences import differences, format_differences
from lotlip.data.index import CaptionIndex, ShardIndex, SplitEntry, UnitIndex, write_index
from lotlip.data.records import Failure, UnitReport
from lotlip.evaluate.records import made_with
from lotlip.evaluate.reference import REFERENCE
from lotlip.evaluate.score_names import MAIN_METRICS, SENTENCE_METRICS
from lotlip.figures.charts import SMALL, Line, Point, draw_lines, in_millions, render
from lotlip.figures.intervals import Estimate
from lotlip.report.figures import colours, context_figures
from lotlip.report.inputs import load_inputs
from lotlip.report.page import build_report
from lotlip.report.plots import write_plots
from lotlip.report.reading_figures import reading_figures
from lotlip.report.sections import all_metrics_table, benchmark_sections, not_run_note, sentence_table
from lotlip.report.stages import benchmark_texts_table, cost_table, quality_table, training_table
from lotlip.report.tables import Cell, duration, gigaflops, mark_best, percent, score

# Names say nothing on purpose: tables and findings name their ablations.
WAYS = ("image_to_text", "text_to_image")
ABLATIONS = {
    "alpha": {"text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}},
    "beta": {"text": {"corner_tokens": 0}},
    "gamma": {},
    "delta": {"text": {"corner_tokens": 4}},
    "epsilon": {"text": {"corner_mask": False}},
    "zeta": {"long_texts": {"sub_captions": 1}},
    "eta": {"loss": {"short_loss_weight": 2.0}},
    "theta": {"optimizer": {"learning_rate": 0.002}, "text": {"context_length": 64}},
}

SCORES = ["long", "short", "classification"]
TABLES = {
    "systems": {
        "title": "Systems",
        "paper": "Table 2",
        "rows": {"alpha": "LiT", "beta": "LiT + long texts", "gamma": "LoTLIP", "eta": "LoTLIP, short twice"},
        "columns": SCORES,
        "published": True,
    },
    "corner-tokens": {
        "title": "Corner tokens",
        "rows": ["beta", "gamma", "epsilon", "delta"],
        "columns": [{"text.corner_tokens": "m"}, {"text.corner_mask": "Mask"}, *SCORES],
        "figure": {
            "kind": "scores",
            "x": "text.corner_tokens",
            "x_label": "m",
            "lines": {"corner tokens": ["beta", "gamma", "delta"], "no mask": ["epsilon"]},
        },
    },
    "sub-captions": {
        "title": "Sub-captions",
        "rows": ["alpha", "beta", "zeta", "gamma"],
        "columns": [{"text.corner_tokens": "m"}, {"long_texts.sub_captions": "k"}, *SCORES],
        "figure": {
            "kind": "scores",
            "x": "long_texts.sub_captions",
            "lines": {"LoTLIP": ["zeta", "gamma"], "LiT": ["alpha", "beta"]},
        },
    },
    "context-length": {
        "title": "Context length",
        "rows": ["kappa", "gamma", "iota"],
        "columns": [{"text.context_length": "Context"}, "flops", *SCORES],
        "figure": {"kind": "cost"},
    },
}
FINDINGS = {"lit": "alpha", "lit_long": "beta", "lotlip": "gamma"}


def known(given, names):
    """The given ablations that are among `names`; a number stays."""
    if isinstance(given, float):
        return given
    if isinstance(given, str):
        return given if given in names else None
    return (
        {one: given[one] for one in given if one in names} if isinstance(given, dict) else [*filter(names.get, given)]
    )


def known_tables(tables, names):
    """Declared tables without ablations that are not among `names`."""
    kept = {}
    for slug, table in tables.items():
        if rows := known(table["rows"], names):
            kept[slug] = {**table, "rows": rows}
            if lines := table.get("figure", {}).get("lines"):
                lines = {label: line for label, given in lines.items() if (line := known(given, names))}
                kept[slug]["figure"] = {**table["figure"], "lines": lines}
    return kept


# settings of `pretrain` beside seeds and steps
QUICK = {"text": {"config": {"hidden_size": 64}}, "optimizer": {"warmup_steps": 2}}


def make_params(tables=TABLES, findings=FINDINGS, **changes) -> Params:
    names = dict.fromkeys([*changes.get("ablations", ABLATIONS), *changes.get("finetune", {})], True)
    data = {
        "ingest": {"source": {"kind": "folder", "path": "pictures"}},
        "image_tower": {"kind": "scenes"},
        "caption": {"captioners": {"llava": {"kind": "table", "path": "llava.csv"}}},
        "pretrain": {"seeds": [0, 1], "steps": 40, **QUICK},
        "evaluate": {"benchmarks": {"scenes": {"kind": "scenes", "size": 100}}},
        "report": {"title": "A report", "note": "These are <made-up> numbers.", "contact_sheet": 2},
        "ablations": ABLATIONS,
        "tables": known_tables(tables, names),
        "findings": {role: found for role, given in findings.items() if (found := known(given, names))},
    }
    return Params.model_validate({**data, **changes})


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def metrics_of(place, seed):
    """Made-up metrics that grow with the ablation's place."""
    noise = random.Random(100 * place + seed)
    found = {}
    for family, top in (("long", 0.6), ("short", 0.8)):
        for way in ("image_to_text", "text_to_image"):
            r1 = top * (place + 1) / 10 + noise.uniform(-0.02, 0.02)
            found |= {f"{family}.{way}.r1": r1, f"{family}.{way}.r5": r1 + 0.1, f"{family}.{way}.r10": r1 + 0.15}
            found[f"{family}.{way}.median_rank"] = 9.0 - place
    return found | {"classification.top1": 0.9 - place / 100, "classification.top5": 0.99}


def write_stages(root, params):
    """A record for every stage, as the flows leave them."""
    names = ["ingest", "image-tower", *(f"caption-{c}" for c in params.caption.captioners), "shard"]
    names += [f"{stage}-{name}" for stage in ("pretrain", "evaluate") for name in params.ablations]
    for n, label in enumerate(names):
        stage = label if label == "image-tower" else label.partition("-")[0]
        record = {
            "stage": stage,
            "name": label.removeprefix(stage).lstrip("-") or None,
            "seconds": 20.0 + n,
            "work_seconds": 16.0 + n,
            "samples": 1000,
            "samples_per_second": 1000 / (16.0 + n),
            "orchestration_seconds": {"imports": 2.0, "prefect": 1.5, "gate": 0.5},
            "counts": {"read": 1000, "written": 997, "failed": 3} if stage == "ingest" else {},
            "failure_kinds": {"unreadable": 2, "empty": 1} if stage == "ingest" else {},
            "gate": [{"what": f"{label} keeps its promise", "observed": "all 1000 rows", "success": True}],
            "notes": {"accuracy.salient_shape": 0.934, "accuracy.colour": 0.881} if stage == "image-tower" else {},
        }
        write_json(root / params.paths.stages / f"{label}.json", record)


def write_pictures(root, params, count=3):
    """The first test partition: images in a tar at known offsets, their table, and captions."""
    folder, blob, rows = root / params.paths.ingest / "test", b"", []
    folder.mkdir(parents=True)
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (640, 480), (40 * i, 90, 160)).save(file, "PNG")
        row = {"key": f"p{i}", "extension": "png", "short_caption": f"picture <{i}>", "width": 640, "height": 480}
        rows.append({**row, "sha256": "", "scene": None, "offset": len(blob), "size": len(file.getvalue())})
        blob += file.getvalue()
    (folder / "part-00000.tar").write_bytes(blob)
    pd.DataFrame(rows).to_parquet(folder / "part-00000.parquet")
    (folder / "part-00000.json").write_text("{}")
    for captioner in params.caption.captioners:
        folder = root / params.paths.captions / captioner / "test"
        folder.mkdir(parents=True)
        captions = [
            {"key": f"p{i}", "captioner": captioner, "text": f"{captioner} on p{i}. And more."} for i in range(count)
        ]
        pd.DataFrame(captions).to_parquet(folder / "part-00000.parquet")


def flops_of(length):
    """Made-up operations of a text tower on a text."""
    return length * (50_000_000 + 90_000 * length)


def write_project(root, params, metrics=metrics_of, flops=()):
    """Everything that the stages leave behind for `params`; without `flops`, the lengths, as they left it long ago."""
    for place, name in enumerate(params.ablations):
        config = params.ablation(name)
        benchmarks = {
            benchmark: {
                "protocol": {
                    "images": 1000,
                    "context_length": config.text.context_length,
                    "command": f"evaluate {name}",
                },
                "chance": {key: 0.001 for key in metrics(place, 0) if key.endswith("r1")},
                "seeds": {str(seed): metrics(place, seed) for seed in config.seeds},
            }
            for benchmark in params.evaluate.benchmarks
        }
        result = {
            "ablation": name,
            "config": config.model_dump(mode="json"),
            "fingerprints": {},
            "benchmarks": benchmarks,
        }
        parameters = {"text_tower": 4_000_000, "image_tower": 800_000}
        if flops:
            lengths = sorted({*flops, config.text.context_length})
            result["text_tower_flops"] = {str(length): flops_of(length) for length in lengths}
        write_json(root / params.paths.metrics / f"{name}.json", {**result, "parameters": parameters})
        for seed in config.seeds:
            steps = range(1, config.steps + 1, 10)
            history = [
                {
                    "step": step,
                    "loss": (1 + place / 8) * (1 + 3 * math.exp(-step / 80)),
                    "samples_per_second": 900.0 + step,
                    "data_wait_share": 0.25,
                }
                for step in steps
            ]
            write_json(root / params.paths.models / name / f"seed-{seed}" / "history.json", history)
    write_stages(root, params)
    raw = {"images": 8000, "texts": 8000, "sub_captions_per_text": 1.0, "tokens_per_text": 9.81}
    long = {"images": 8000, "texts": 8000, "sub_captions_per_text": 6.42, "tokens_per_text": 83.5}
    splits = {"train": SplitEntry(samples=8000, shards=[]), "val": SplitEntry(samples=500, shards=[])}
    statistics = {"raw": raw} | dict.fromkeys(params.caption.captioners, long)
    folder = root / params.paths.shards
    write_index(folder, [], ShardIndex, splits=splits, statistics=statistics, features=True, vocabulary=[])
    write_pictures(root, params)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root, params = tmp_path_factory.mktemp("project"), make_params()
    write_project(root, params)
    return root, params


@pytest.fixture(scope="module")
def report(project):
    root, params = project
    page = build_report(load_inputs(params, root), root / "report")
    assert page == root / "report" / "index.html"
    return page.parent


@pytest.fixture
def inputs(project):
    root, params = project
    return load_inputs(params, root)


@pytest.fixture
def without_figures(monkeypatch):
    """Leaves figures out, nine tenths of a report's time, where words and tables are tested."""
    draw_only(monkeypatch)


def draw_only(monkeypatch, *slugs):
    """Leaves all other figures out."""
    monkeypatch.setattr(
        "lotlip.figures.charts.render",
        lambda slug, size, *draws: render(slug, size, *draws) if slug in slugs else ("", b""),
    )


def tables(inputs):
    return [*(section.table for section in benchmark_sections(inputs, "scenes")), all_metrics_table(inputs, "scenes")]


def table(inputs, slug):
    return next(t for t in tables(inputs) if t.slug == f"scenes-{slug}")


def rows_of(inputs, slug):
    return [row[0].text for row in table(inputs, slug).rows]


def read_csv(report, slug):
    with (report / "tables" / f"{slug}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- the page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags and what they load, and that every tag is closed in order."""

    VOID = {"meta", "img", "br", "path", "use", "line", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.anchors, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "action"):
                (self.anchors if value.startswith("#") else self.loads).append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def test_page_is_whole_and_loads_nothing(report):
    text = (report / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.loads)
    assert len(page.loads) == 2, "report.contact_sheet is 2"
    assert "script" not in page.tags and "link" not in page.tags
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://", re.sub(r'"data:[^"]*"', "", text))


def test_ids_are_unique_and_links_lead_somewhere(report):
    page = Page((report / "index.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids)


@pytest.mark.parametrize("file", ["index.html", "report.md"])
def test_everything_is_told(report, file):
    text = (report / file).read_text()
    for name in ABLATIONS:
        assert name in text
    for piece in ("A report", "chance", "salient shape", "93.4\u00a0%", "unreadable", "9.81", "llava", "make ui"):
        assert piece in text
    assert "Missing or outdated" not in text


def test_words_are_escaped(report):
    text = (report / "index.html").read_text()
    assert "These are &lt;made-up&gt; numbers." in text
    assert "picture &lt;0&gt;" in text and "picture &lt;2&gt;" not in text
    assert "llava on p1. And more." in text
    assert "ingest keeps its promise" in text and "all 1000 rows" in text


def test_markdown_refers_to_files_that_are_there(report):
    text = (report / "report.md").read_text()
    files = re.findall(r"\]\((?!index)([^)]+)\)", text)
    assert {path.partition("/")[0] for path in files} == {"figures", "tables", "findings.json"}
    assert all((report / path).stat().st_size > 0 for path in files)
    assert {path.name for path in (report / "figures").iterdir()} == {
        "scenes-sub-captions.png",
        "scenes-corner-tokens.png",
        "loss.png",
        "findings.png",
    }


def test_markdown_tables_have_equal_rows(report):
    blocks = re.findall(r"(?:^\|.*\n)+", (report / "report.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) >= 8
    assert "| evaluate &lt;ablation> |" in "".join(blocks)
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", block.splitlines()[1])


@pytest.mark.slow
def test_same_inputs_give_the_same_bytes(report, inputs, tmp_path):
    build_report(inputs, tmp_path)
    for path in ("index.html", "report.md", "figures/loss.png", "tables/scenes-all.csv"):
        assert (tmp_path / path).read_bytes() == (report / path).read_bytes()


@pytest.mark.usefixtures("without_figures")
def test_a_report_is_not_built_into_a_folder_that_holds_one(inputs, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").write_text("an earlier figure")
    with pytest.raises(FileExistsError):
        build_report(inputs, tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*.png")] == ["an earlier figure"]


def test_pictures_are_small(inputs):
    pictures = [Image.open(io.BytesIO(picture.jpeg)) for picture in inputs.pictures]
    assert [picture.size for picture in pictures] == [(320, 240)] * 2
    assert pictures[1].getpixel((160, 120)) == pytest.approx((40, 90, 160), abs=3)


def test_scene_is_drawn_anew(project, tmp_path):
    from lotlip.demo.world import generate_scene

    params = make_params()
    write_pictures(tmp_path, params)
    path = tmp_path / params.paths.ingest / "test" / "part-00000.parquet"
    rows = pd.read_parquet(path)
    rows["scene"] = [json.dumps(generate_scene(0, "test", n).to_json()) for n in range(len(rows))]
    rows.to_parquet(path)
    picture = Image.open(io.BytesIO(load_inputs(params, tmp_path).pictures[0].jpeg))
    assert picture.size == (320, 320)
    assert len(picture.getcolors(320 * 320)) > 50, "not the plain picture of the tar"


# --- which ablation is in which table -----------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_tables_have_the_declared_rows_and_columns(inputs):
    systems, corners = table(inputs, "systems"), table(inputs, "corner-tokens")
    assert rows_of(inputs, "systems") == ["alpha", "beta", "gamma", "eta"]
    assert [row[1].text for row in systems.rows] == ["LiT", "LiT + long texts", "LoTLIP", "LoTLIP, short twice"]
    assert (systems.paper, [column.label for column in systems.columns[:2]]) == ("Table 2", ["Ablation", "Label"])
    assert rows_of(inputs, "corner-tokens") == ["beta", "gamma", "epsilon", "delta"]
    assert [column.label for column in corners.columns[:3]] == ["Ablation", "m", "Mask"]
    assert [row[1].text for row in corners.rows] == ["0", "2", "2", "4"]
    assert [row[2].text for row in corners.rows] == ["–", "yes", "no", "yes"]  # without corner tokens it masks nothing
    assert [column.key for column in corners.columns[3:]] == [
        *(f"{family}.{way}.r1" for family in ("long", "short") for way in WAYS),
        "classification.top1",
    ]
    assert rows_of(inputs, "sub-captions") == ["alpha", "beta", "zeta", "gamma"]
    assert rows_of(inputs, "others") == ["gamma", "theta"]  # the base beside them
    assert table(inputs, "others").rows[1][1].text == "text.context_length = 64, optimizer.learning_rate = 0.002"
    assert rows_of(inputs, "all") == list(ABLATIONS)


def test_columns_are_any_setting_and_any_score(project):
    root, _ = project
    columns = ["optimizer.learning_rate", "loss.objective", "long_texts.captioners", "short.text_to_image.r5", "long"]
    tables = {"own": {"title": "Own", "rows": ["theta", "gamma"], "columns": columns}}
    found = table(load_inputs(make_params(tables=tables), root), "own")
    assert [column.key for column in found.columns] == [
        "ablation",
        *columns[:3],
        *(f"long.{way}.r1" for way in WAYS),
        "short.text_to_image.r5",
    ]
    assert [column.label for column in found.columns[1:3]] == ["Learning rate", "Objective"]
    assert [cell.text for cell in found.rows[0][1:4]] == ["0.002", "infonce", "[]"]


def test_scores_that_one_ablation_has_are_columns_with_dashes_for_the_others(tmp_path):
    """The chance is that of the ablation that has them."""
    own = "conditioned-long.text_to_image.r1"

    def metrics(place, seed):
        return metrics_of(place, seed) | ({own: 0.5 + seed / 10} if place == 1 else {})

    tables = {"own": {"title": "Own", "rows": ["alpha", "beta"], "columns": ["long", own]}}
    inputs = made(tmp_path, {"alpha": {}, "beta": {"text": {"corner_tokens": 1}}}, metrics=metrics, tables=tables)
    for slug in ("own", "all"):
        found = table(inputs, slug)
        place = [column.key for column in found.columns].index(own)
        assert found.columns[place].group.startswith("Long text, conditioned, ")
        assert found.rows[0][place].text == "–" and found.rows[1][place].value == pytest.approx(0.55)
        (chance,) = (row for row in found.references if row[0].text == "chance")
        assert chance[place].value == 0.001


def test_without_declared_tables_all_ablations_are_in_one(project):
    root, _ = project
    inputs = load_inputs(make_params(tables={}, findings={}), root)
    assert [t.slug for t in tables(inputs)] == ["scenes-others", "scenes-all"]
    assert rows_of(inputs, "others") == list(ABLATIONS)
    assert list(inputs.systems) == ["alpha", "beta", "gamma", "delta"]  # headlines show the first four


@pytest.mark.slow
def test_a_figures_x_axis_is_the_sum_of_its_keys(project):
    root, _ = project
    figure = {"kind": "scores", "x": ["text.corner_tokens", "long_texts.sub_captions"]}
    tables = {"own": {"title": "Own", "rows": ["alpha", "gamma", "delta"], "figure": figure}}
    (section, _) = benchmark_sections(load_inputs(make_params(tables=tables), root), "scenes")
    assert section.figure.title == "Scores against own"
    words = drawn_words(section.figure)
    assert {"0", "5", "7", "text.corner_tokens + long_texts.sub_captions"} <= set(words)


@pytest.mark.slow
@pytest.mark.parametrize("x_scale", ["linear", "log"])
def test_data_scale_is_in_images(tmp_path, monkeypatch, x_scale):
    """Of 8,000 training images."""
    draw_only(monkeypatch, "scenes-scale")
    scales = {"small": {"samples": 0.125}, "thousands": {"samples": 2000}, "half": {"samples": 0.5}, "gamma": {}}
    figure = {"kind": "scores", "x": "samples", "x_label": "training images", "x_scale": x_scale}
    declared = {"title": "Data scale", "rows": list(scales), "columns": ["samples", "long"], "figure": figure}
    params = make_params(tables={"scale": declared}, ablations=scales, findings={})
    write_project(tmp_path, params)
    (section, *_) = benchmark_sections(load_inputs(params, tmp_path), "scenes")
    assert [row[1].text for row in section.table.rows] == ["1,000", "2,000", "4,000", "8,000"]
    words = drawn_words(section.figure)
    assert [word for word in words if word.endswith(",000")] == 3 * ["1,000", "2,000", "4,000", "8,000"]
    ticks = tick_places(section.figure)
    doublings = [later - earlier for earlier, later in itertools.pairwise(ticks[:4])]
    ratios = [distance / doublings[0] for distance in doublings]
    assert ratios == pytest.approx([1, 1, 1] if x_scale == "log" else [1, 2, 4], rel=0.01)


def test_a_figure_leaves_out_an_ablation_that_was_trained_without_a_number_on_its_axis(tmp_path):
    values = {"none": 0.0, "some": 0.1, "more": 0.3}
    ablations = {name: {"text": {"weight_decay": value}} for name, value in values.items()}
    declared = {"title": "Decay", "rows": list(values), "figure": {"kind": "scores", "x": "text.weight_decay"}}
    params = make_params(tables={"decay": declared}, ablations=ablations, findings={})
    write_project(tmp_path, params)
    path = tmp_path / params.paths.metrics / "none.json"
    data = json.loads(path.read_text())
    for config in ({**data["config"]["text"], "weight_decay": None}, {"corner_tokens": 2}):
        data["config"]["text"] = config
        write_json(path, data)
        inputs = load_inputs(params, tmp_path)
        assert any(line.startswith("metrics of none: params.yaml has changed since") for line in inputs.missing)
        (section, *_) = benchmark_sections(inputs, "scenes")
        assert [row[0].text for row in section.table.rows] == ["some", "more"]
        assert {"0.1", "0.3"} <= set(drawn_words(section.figure)) and "0" not in drawn_words(section.figure)


def tick_places(figure):
    """Horizontal places of numbers in thousands, which are the x axis's ticks, panel by panel."""
    return [float(place) for place in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>\d+,000</text>', figure.svg)]


def test_data_scale_without_shards_is_a_share(tmp_path):
    scales = {"small": {"samples": 0.25}, "gamma": {}}
    declared = {"title": "Data scale", "rows": list(scales), "columns": ["samples", "long"]}
    params = make_params(tables={"scale": declared}, ablations=scales, findings={})
    write_project(tmp_path, params)
    (tmp_path / params.paths.shards / "index.json").unlink()
    (section, *_) = benchmark_sections(load_inputs(params, tmp_path), "scenes")
    assert [row[1].text for row in section.table.rows] == ["0.25", "1"]


def test_large_numbers_are_in_millions():
    assert list(map(in_millions, (0.5, 7, 8000, 3_000_000, 12.5e6))) == ["0.5", "7", "8,000", "3M", "12.5M"]


def test_seeds_are_no_difference():
    changes = {"gamma": {"seeds": [5]}, "beta": {"text": {"corner_tokens": 0}, "optimizer": {"betas": [0.8, 0.9]}}}
    params = make_params(ablations=changes)
    found = {name: differences(params.ablation(name).recipe(), params.pretrain.recipe()) for name in params.ablations}
    assert found == {"gamma": {}, "beta": {"text.corner_tokens": 0, "optimizer.betas": [0.8, 0.9]}}
    assert format_differences(found["gamma"]) == "the base"
    assert format_differences(found["beta"]) == "text.corner_tokens = 0, optimizer.betas = [0.8, 0.9]"


@pytest.mark.usefixtures("without_figures")
def test_nothing_is_left_out_when_all_differ(tmp_path):
    odd = {name: {"optimizer": {"weight_decay": n / 10}} for n, name in enumerate(("one", "two", "six"))}
    params = make_params(ablations=odd)
    write_project(tmp_path, params)
    inputs = load_inputs(params, tmp_path)
    assert [t.slug for t in tables(inputs)] == ["scenes-others", "scenes-all"]
    assert rows_of(inputs, "others") == list(odd)
    build_report(inputs, tmp_path / "report")


def test_systems_keep_their_colours(inputs):
    chosen = colours(inputs)
    assert (chosen["alpha"], chosen["beta"], chosen["gamma"]) == ("#64748b", "#d97706", "#4f46e5")
    assert len(set(chosen.values())) == len(ABLATIONS)


def test_any_difference_can_be_said():
    differs = {
        "some.new_key": None,
        "flag": True,
        "many": [1, 2.5],
        "names": ["a", "b"],
        "none": [],
        "text.words": "plain",
    }
    assert format_differences(differs) == (
        "some.new_key = null, flag = true, many = [1, 2.5], names = [a, b], none = [], text.words = plain"
    )
    params = make_params(
        ablations={"odd": {"optimizer": {"betas": [0.8, 0.9]}, "text": {"config": {"hidden_size": 32}}}}
    )
    assert format_differences(differences(params.ablation("odd").recipe(), params.pretrain.recipe())) == (
        "text.config.hidden_size = 32, optimizer.betas = [0.8, 0.9]"
    )


@pytest.mark.usefixtures("without_figures")
def test_a_tower_that_learns_is_not_called_frozen(tmp_path):
    params = make_params(ablations={"locked": {}, "open": {"image_tower": {"frozen": False}}})
    write_project(tmp_path, params)
    inputs = load_inputs(params, tmp_path)
    assert "frozen" not in training_table(inputs).note
    page = build_report(inputs, tmp_path / "report").read_text()
    assert "the image tower is frozen or trained" in page and "frozen afterwards" not in page


# --- context length -----------------------------------------------------------------------------------------------

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)
SERIES = {"gamma": {}, "iota": {"text": {"context_length": 192}}, "kappa": {"text": {"context_length": 77}}}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A project whose ablations differ in the context length, and its report with one figure."""
    root, params = tmp_path_factory.mktemp("series"), make_params(ablations=ABLATIONS | SERIES)
    write_project(root, params, flops=LENGTHS)
    inputs = load_inputs(params, root)
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "scenes-context-length")
        return inputs, build_report(inputs, root / "report").parent


def made(tmp_path, ablations, flops=LENGTHS, metrics=metrics_of, **changes):
    params = make_params(ablations=ablations, **changes)
    write_project(tmp_path, params, metrics, flops)
    return load_inputs(params, tmp_path)


def drawn_words(figure):
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)


@pytest.mark.usefixtures("without_figures")
def test_context_lengths_have_a_table_with_what_they_cost(series):
    inputs, _ = series
    found = table(inputs, "context-length")
    assert rows_of(inputs, "context-length") == ["kappa", "gamma", "iota"]  # theta differs in more
    assert [column.key for column in found.columns[:3]] == ["ablation", "text.context_length", "flops_per_text"]
    assert [row[1].text for row in found.rows] == ["77", "128", "192"]
    assert [row[2].value for row in found.rows] == [flops_of(length) for length in (77, 128, 192)]
    assert [row[2].text for row in found.rows] == ["4.38", "7.87", "12.9"]
    assert rows_of(inputs, "others") == ["gamma", "theta"]


@pytest.mark.slow
def test_recall_and_cost_are_drawn_side_by_side(series):
    inputs, _ = series
    (figure,) = context_figures(inputs)
    assert (figure.slug, figure.title) == ("scenes-context-length", "Context length: recall and cost")
    words = drawn_words(figure)
    assert {"long text, R@1 (%)", "GFLOPs per text", "image → text", "text → image"} <= set(words)
    assert words.count("context length, tokens") == 2
    # both panels have the same places: where was trained, and a little further, to 1.5 × 192
    assert all(words.count(place) == 2 for place in ("64", "77", "128", "192", "256"))
    assert "384" not in words and "512" not in words
    assert "Cost: the text tower of gamma" in figure.note and "A dot marks" in figure.note


def test_cost_is_on_the_page_and_in_files(series):
    inputs, report = series
    text = (report / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert "#context-length" in page.anchors and {anchor[1:] for anchor in page.anchors} <= set(page.ids)
    assert "Context length: recall and cost" in text
    markdown = (report / "report.md").read_text()
    assert "![Context length: recall and cost](figures/scenes-context-length.png)" in markdown
    assert (report / "figures" / "scenes-context-length.png").stat().st_size > 0
    (costs,) = read_csv(report, "text-cost")
    assert costs.pop("ablation") == "gamma"
    assert {int(length): int(flops) for length, flops in costs.items()} == {
        length: flops_of(length) for length in sorted({*LENGTHS, 77})
    }
    rows = {row["ablation"]: row for row in read_csv(report, "training")}
    assert int(rows["iota"]["flops_per_text"]) == flops_of(192)
    assert int(rows["theta"]["flops_per_text"]) == flops_of(64)
    assert "a multiply-add counts as two" in training_table(inputs).note


@pytest.mark.slow
def test_one_context_length_has_a_cost_and_no_recall(tmp_path, monkeypatch):
    inputs = made(tmp_path, {"gamma": {}, "theta": ABLATIONS["theta"]})
    (figure,) = context_figures(inputs)
    assert (figure.slug, figure.title) == ("context-length", "Context length: cost")
    words = drawn_words(figure)
    assert words.count("context length, tokens") == 1 and "512" in words
    assert not any("R@1" in word for word in words) and "ecall" not in figure.note
    draw_only(monkeypatch)
    assert "scenes-context-length" not in [t.slug for t in tables(inputs)]
    text = build_report(inputs, tmp_path / "report").read_text()
    assert "Context length: cost" in text and "recall and cost" not in text


# --- prefixes and changed sentences -------------------------------------------------------------------------------


def metrics_of_sentences(place, seed):
    """Made-up metrics with the scores of prefixes and of changed sentences."""
    return metrics_of(place, seed) | dict.fromkeys(SENTENCE_METRICS, 0.1 * place + seed / 100)


@pytest.mark.usefixtures("without_figures")
def test_scores_of_sentences_have_a_table(tmp_path):
    params = make_params()
    write_project(tmp_path, params, metrics_of_sentences)
    for name in params.ablations:
        path = tmp_path / params.paths.metrics / f"{name}.json"
        found = json.loads(path.read_text())
        found["benchmarks"]["scenes"]["protocol"] |= {"long_texts": 1000, "long_texts_of_4_sentences": 987}
        path.write_text(json.dumps(found))
    inputs = load_inputs(params, tmp_path)
    table = sentence_table(inputs, "scenes")
    assert [column.key for column in table.columns[1:]] == list(SENTENCE_METRICS)
    headings = [(group, span) for group, span, _ in table.header_groups[1:]]
    assert headings == [
        ("Growing prefixes", 3),
        ("Unchanged, R@1", 2),
        ("Sentences 1 and 4 swapped, R@1", 2),
        ("Sentence 1 deleted, R@1", 2),
    ]
    assert [column.label for column in table.columns[1:4]] == ["HiMo@2", "HiMo@3", "HiMo@4"]
    assert "987 of 1,000 long texts, each with at least 4 sentences" in table.note
    assert table.rows[2][0].text == "gamma" and table.rows[2][1].value == pytest.approx(0.205)
    page = build_report(inputs, tmp_path / "out").read_text()
    assert "Sentences 1 and 4 swapped" in page and table.title in page
    assert (tmp_path / "out" / "tables" / f"{table.slug}.csv").read_text().splitlines()[3].startswith("gamma,0.205")


@pytest.mark.usefixtures("without_figures")
def test_texts_of_benchmarks_are_described_as_in_table_1(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    path = tmp_path / params.paths.metrics / "alpha.json"
    found = json.loads(path.read_text())
    lengths = {"long_texts": 1000, "long_sub_captions_per_text": 10.156, "long_tokens_per_text": 239.73}
    found["benchmarks"]["scenes"]["protocol"] |= lengths
    path.write_text(json.dumps(found))
    found_table = benchmark_texts_table(load_inputs(params, tmp_path))
    assert [[cell.text for cell in row] for row in found_table.rows] == [
        ["scenes", "long", "1,000", "1,000", "10.16", "239.73"]
    ]
    assert found_table.paper == "Table 1"
    assert "Texts of the benchmarks" in build_report(load_inputs(params, tmp_path), tmp_path / "out").read_text()


@pytest.mark.usefixtures("without_figures")
def test_without_scores_of_sentences_there_is_no_table(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    inputs = load_inputs(params, tmp_path)
    assert sentence_table(inputs, "scenes") is None
    assert "HiMo" not in build_report(inputs, tmp_path / "out").read_text()


# --- reading to the end -------------------------------------------------------------------------------------------


def reading_of(place, seed):
    """Made-up answers: accuracy falls towards the end of the text, recall rises with its length."""

    def share(value):
        return {"value": value, "interval": [value - 0.02, value + 0.04]}

    best = 0.7 + place / 100 + seed / 10
    return {
        "hard_negatives": {
            "scenes": 50,
            "accuracy": share(best - 0.1),
            "by_position": [
                {"position": n + 1, "tokens_before": 30 + 10 * n, "accuracy": share(best - n / 10)} for n in range(3)
            ],
            "by_attribute": [{"attribute": "colour", "scenes": 50, "accuracy": share(best - 0.1)}],
        },
        "lengths": [
            {
                "sentences": n + 1,
                "images": 1000,
                "tokens": 11 * (n + 1),
                "image_to_text": share(n / 5),
                "text_to_image": share(n / 6),
            }
            for n in range(5)
        ],
    }


@pytest.mark.slow
def test_reading_to_the_end_is_drawn_and_told(tmp_path, monkeypatch):
    params = make_params()
    write_project(tmp_path, params)
    for place, name in enumerate(params.ablations):
        path = tmp_path / params.paths.metrics / f"{name}.json"
        found = json.loads(path.read_text())
        found["benchmarks"]["scenes"]["reading"] = {str(seed): reading_of(place, seed) for seed in (0, 1)}
        write_json(path, found)
    inputs = load_inputs(params, tmp_path)
    hard, lengths = reading_figures(inputs, "scenes")
    assert {"LiT", "LiT + long texts", "LoTLIP", "accuracy (%)", "1", "2", "3"} <= set(drawn_words(hard))
    # alpha, beta and gamma, the mean of seeds 0 and 1
    accuracies = "LiT 75.0 % and 55.0 %; LiT + long texts 76.0 % and 56.0 %; LoTLIP 77.0 % and 57.0 %"
    assert f"(after 30 word pieces on average) and at the last (50): {accuracies}." in hard.note
    assert "By the changed attribute, LoTLIP: colour 67.0 %." in hard.note
    assert {"LiT", "LiT + long texts", "LoTLIP", "R@1 (%)", "5"} <= set(drawn_words(lengths))
    assert "(11 word pieces on average) and with all sentences (55)" in lengths.note
    assert "LoTLIP 0.0 % and 66.7 %" in lengths.note
    assert "Retrieval is among 1,000 images." in lengths.note
    draw_only(monkeypatch, hard.slug, lengths.slug)
    report = build_report(inputs, tmp_path / "report").parent
    for figure in (hard, lengths):
        assert (report / "figures" / f"{figure.slug}.png").stat().st_size > 0
        assert f"![{figure.title}](figures/{figure.slug}.png)\n\n{figure.note}" in (report / "report.md").read_text()
        assert figure.title in (report / "index.html").read_text()


def test_where_no_model_was_asked_to_read_nothing_is_drawn(inputs):
    assert reading_figures(inputs, "scenes") == []


def test_without_counted_operations_nothing_is_said_of_them(inputs, report):
    assert context_figures(inputs) == [] and cost_table(inputs).rows == []
    for file in ("index.html", "report.md"):
        text = (report / file).read_text()
        assert "GFLOP" not in text and "multiply-add" not in text and "Context length" not in text
    assert "flops_per_text" not in read_csv(report, "training")[0]


@pytest.mark.slow
def test_recall_is_drawn_without_cost(tmp_path, monkeypatch):
    inputs = made(tmp_path, SERIES, flops=())
    (figure,) = context_figures(inputs)
    assert figure.title == "Context length: recall"
    assert "GFLOPs per text" not in drawn_words(figure) and "Cost" not in figure.note
    draw_only(monkeypatch)
    assert "flops_per_text" not in [column.key for column in table(inputs, "context-length").columns]
    assert "GFLOP" not in build_report(inputs, tmp_path / "report").read_text()


def test_lengths_without_long_texts_are_drawn_by_cost_alone(tmp_path):
    inputs = made(tmp_path, SERIES, metrics=lambda place, seed: {"short.text_to_image.r1": 0.1 * place})
    assert [figure.title for figure in context_figures(inputs)] == ["Context length: cost"]


@pytest.mark.usefixtures("without_figures")
def test_each_benchmark_has_its_own_recall(tmp_path):
    benchmarks = {"scenes": {"kind": "scenes", "size": 100}, "own": {"kind": "held-out"}}
    inputs = made(tmp_path, SERIES, evaluate={"benchmarks": benchmarks})
    found = [(figure.slug, figure.title) for figure in context_figures(inputs)]
    assert found == [
        ("scenes-context-length", "Context length: recall and cost on scenes"),
        ("own-context-length", "Context length: recall and cost on own"),
    ]


@pytest.mark.usefixtures("without_figures")
def test_the_tower_whose_cost_is_drawn_is_named(tmp_path):
    """The base's where it was run; else the first there is."""
    wide = {"text": {"config": {"hidden_size": 128}}}
    assert cost_table(made(tmp_path / "with", {"wide": wide, **SERIES})).rows[0][0].text == "gamma"
    inputs = made(tmp_path / "without", {"wide": wide, "lit": {"text": {"corner_tokens": 0}}})
    assert cost_table(inputs).rows[0][0].text == "wide"
    assert "the text tower of wide" in context_figures(inputs)[0].note


@pytest.mark.usefixtures("without_figures")
def test_one_counted_length_is_no_curve(tmp_path):
    inputs = made(tmp_path, {"gamma": {}}, flops=(128,))
    assert context_figures(inputs) == []
    text = build_report(inputs, tmp_path / "report").read_text()
    assert "GFLOPs per text" in text and Page(text).open == []


@pytest.mark.usefixtures("without_figures")
def test_a_context_that_was_not_counted_is_a_dash(tmp_path):
    inputs = made(tmp_path, SERIES)
    path = tmp_path / inputs.params.paths.metrics / "kappa.json"
    write_json(path, {**json.loads(path.read_text()), "text_tower_flops": {"32": 5}})
    inputs = load_inputs(inputs.params, tmp_path)
    assert [row[2].text for row in table(inputs, "context-length").rows] == ["–", "7.87", "12.9"]
    assert len(context_figures(inputs)) == 1


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (None, "–"),
        (22_354_329_600, "22.4"),
        (108_900_000, "0.109"),
        (11_000_000_000, "11.0"),
        (99_960_000_000, "100"),
        (330_400_000_000, "330"),
        (1_234_500_000_000, "1,234"),
    ],
)
def test_gigaflops(flops, text):
    assert gigaflops(flops).text == text


# --- numbers ------------------------------------------------------------------------------------------------------


def test_several_seeds_have_their_mean_and_half_of_its_t_interval():
    cell = score([0.40, 0.42, 0.47], "long.text_to_image.r1")
    # sample standard deviation: sqrt((9 + 1 + 16) / 2) = 3.606; t of two degrees of freedom: 4.303, over sqrt(3)
    assert cell.text == "43.0 ± 9.0"
    assert cell.value == pytest.approx(0.43) and cell.spread == pytest.approx(0.0360555)
    assert cell.interval == pytest.approx((0.43 - 0.0895666, 0.43 + 0.0895666), abs=1e-6)
    assert score([0.4], "long.text_to_image.r1") == Cell("40.0", 0.4)
    assert score([3.5, 4.5], "long.text_to_image.median_rank").text == "4.0 ± 6.4"  # 12.706 / 2
    assert score([], "long.text_to_image.r1").text == "–"


def test_best_goes_by_mean_and_ties_share():
    def best(values, metric="short.text_to_image.r1"):
        return [cell.best for cell in mark_best([score(v, metric) for v in values], metric)]

    assert best([[0.5], [0.7, 0.5], [0.61]]) == [False, False, True]
    assert best([[0.5001], [0.5004], [0.4]]) == [True, True, False]  # 50.0 and 50.0 look the same
    assert best([[4.0], [2.0], []], "long.text_to_image.median_rank") == [False, True, False]
    assert best([[0.5], []]) == [False, False]  # alone is not best


@pytest.mark.usefixtures("without_figures")
def test_best_is_bold_in_page_and_markdown(inputs, report):
    column = [c.key for c in table(inputs, "systems").columns].index("long.text_to_image.r1")
    cells = [row[column] for row in table(inputs, "systems").rows]
    assert [cell.best for cell in cells] == [False, False, False, True]  # eta
    assert f"<b>{cells[3].text}</b>" in (report / "index.html").read_text()
    assert f"| **{cells[3].text}** |" in (report / "report.md").read_text()
    assert f"<b>{cells[0].text}</b>" not in (report / "index.html").read_text()


def test_csv_has_all_numbers_unrounded(report):
    rows = {row["ablation"]: row for row in read_csv(report, "scenes-all")}
    assert list(rows) == [*ABLATIONS, "chance"]
    for place, name in enumerate(ABLATIONS):
        for metric, value in metrics_of(place, 0).items():
            values = [value, metrics_of(place, 1)[metric]]
            assert float(rows[name][metric]) == pytest.approx(sum(values) / 2, rel=1e-12)
            assert float(rows[name][f"{metric}.std"]) == pytest.approx(
                abs(values[0] - values[1]) / math.sqrt(2), abs=1e-12
            )
    assert float(rows["chance"]["long.text_to_image.r1"]) == 0.001


def test_csv_of_data_and_stages(report):
    assert [float(row["tokens_per_text"]) for row in read_csv(report, "data")] == [9.81, 83.5]
    assert "Caption statistics (paper: Table 6)" in (report / "report.md").read_text()
    stages = {row["stage"]: row for row in read_csv(report, "stages")}
    assert float(stages["ingest"]["orchestration_share"]) == pytest.approx(4 / 20)
    assert float(stages["total"]["seconds"]) == pytest.approx(sum(20.0 + n for n in range(len(stages) - 1)))
    assert [(row["kind"], row["count"]) for row in read_csv(report, "failures")] == [
        ("empty", "1"),
        ("unreadable", "2"),
    ]


def test_training_is_told(report):
    rows = {row["ablation"]: row for row in read_csv(report, "training")}
    assert rows["delta"]["changes"] == "text.corner_tokens = 4" and rows["gamma"]["changes"] == "the base"
    assert int(rows["gamma"]["text_parameters"]) == 4_000_000
    assert rows["gamma"]["seeds"] == "0, 1" and float(rows["gamma"]["steps"]) == 40
    assert float(rows["gamma"]["samples_per_second"]) == 900 + (1 + 11 + 21 + 31) / 4
    assert float(rows["gamma"]["data_wait_share"]) == 0.25


def test_protocol_is_told_once(report):
    rows = [(row["benchmark"], row["setting"], row["value"]) for row in read_csv(report, "protocol")]
    assert rows == [
        ("scenes", "images", "1,000"),
        ("scenes", "context length", "128 · 64"),
        ("scenes", "command", "evaluate <ablation>"),
    ]


def test_summary_has_the_systems_numbers(inputs, report):
    text = (report / "report.md").read_text()
    for name, place in (("LiT", 0), ("LoTLIP", 2)):
        mean = sum(metrics_of(place, seed)["long.text_to_image.r1"] for seed in (0, 1)) / 2
        assert re.search(
            rf"Given a long text,.*?{name} (?:ranks the correct image first )?in {100 * mean:.1f}\u00a0%", text
        )
    assert "single seed" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds).text == text


def test_nan_is_a_dash():
    assert percent(math.nan).text == "–" and percent(None).text == "–" and percent(0.005).text == "0.5\u00a0%"


# --- what is not there --------------------------------------------------------------------------------------------


def test_nothing_at_all_still_gives_a_page(tmp_path):
    params = make_params()
    inputs = load_inputs(params, tmp_path)
    text = build_report(inputs, tmp_path / "report").read_text()
    assert "Nothing has been evaluated yet." in text
    for piece in ("data statistics", "contact sheet", "records of stages: ingest"):
        assert any(piece in line for line in inputs.missing)
        assert piece in text
    assert Page(text).open == []
    assert inputs.not_run == list(ABLATIONS)
    assert f"Not run: {', '.join(ABLATIONS)}. To run all ablations, use <code>make reproduce-all</code>." in text


def test_many_ablations_that_were_not_run_are_counted():
    names = [f"a{number}" for number in range(13)]
    assert (
        not_run_note(names)
        == "Not run: 13 other ablations of params.yaml. To run all ablations, use `make reproduce-all`."
    )
    assert not_run_note(names[1:]).startswith("Not run: a1, a2, a3") and not_run_note([]) == ""


@pytest.mark.usefixtures("without_figures")
def test_what_was_not_run_is_one_line_and_no_error(tmp_path):
    few = {name: ABLATIONS[name] for name in ("alpha", "beta", "gamma", "delta")}
    write_project(tmp_path, make_params(ablations=few))
    inputs = load_inputs(make_params(), tmp_path)
    assert inputs.missing == [] and inputs.not_run == ["epsilon", "zeta", "eta", "theta"]
    assert rows_of(inputs, "corner-tokens") == ["beta", "gamma", "delta"]
    shown = {section.table.slug: section.not_run for section in benchmark_sections(inputs, "scenes")}
    assert shown == {"scenes-systems": ["eta"], "scenes-corner-tokens": ["epsilon"], "scenes-sub-captions": ["zeta"]}
    page = build_report(inputs, tmp_path / "report")
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert "Missing or outdated" not in text
        assert "Not run: epsilon, zeta, eta, theta. " in text and "Not run: epsilon." in text


@pytest.mark.usefixtures("without_figures")
def test_missing_pieces_are_named_and_the_rest_is_shown(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    (tmp_path / params.paths.metrics / "gamma.json").unlink()
    (tmp_path / params.paths.stages / "shard.json").unlink()
    (tmp_path / params.paths.models / "zeta" / "seed-1" / "history.json").unlink()
    inputs = load_inputs(params, tmp_path)
    assert inputs.missing == [
        "metrics of gamma: metrics/gamma.json does not exist",
        "loss curve of zeta: no history.json for seed 1",
        "records of stages: shard",
    ]
    assert rows_of(inputs, "systems") == ["alpha", "beta", "eta"]
    text = build_report(inputs, tmp_path / "report").read_text()
    assert all(line in text for line in inputs.missing)


@pytest.mark.slow
def test_metric_family_may_be_absent(tmp_path):
    params = make_params()
    write_project(
        tmp_path,
        params,
        lambda place, seed: {"short.text_to_image.r1": 0.1 * place, "short.text_to_image.r5": math.nan},
    )
    inputs = load_inputs(params, tmp_path)
    text = build_report(inputs, tmp_path / "report").read_text()
    assert "Long text, R@1" not in text and "Short text, R@1" in text
    assert table(inputs, "all").rows[0][-1].text == "–"


@pytest.mark.usefixtures("without_figures")
def test_metrics_of_another_configuration_are_named_and_left_out(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    path = tmp_path / params.paths.metrics / "gamma.json"
    data = json.loads(path.read_text())
    data["config"]["text"]["corner_tokens"] = 3
    write_json(path, data)
    broken = tmp_path / params.paths.metrics / "beta.json"
    write_json(broken, {**json.loads(broken.read_text()), "config": {"no such": "key"}})
    fewer = tmp_path / params.paths.metrics / "delta.json"
    data = json.loads(fewer.read_text())
    data["config"]["seeds"] = [0]
    del data["benchmarks"]["scenes"]["seeds"]["1"]
    write_json(fewer, data)
    inputs = load_inputs(params, tmp_path)
    assert inputs.missing == [
        "metrics of beta: beta was trained by another version of lotlip; rerun its evaluate stage",
        "metrics of gamma: params.yaml has changed since gamma was trained; rerun its evaluate stage",
        "metrics of delta on scenes: none for seed 1",
    ]
    assert rows_of(inputs, "corner-tokens") == ["epsilon", "delta"]
    assert build_report(inputs, tmp_path / "report").is_file()


def write_units(folder, kind, sha256="test"):
    units = [UnitReport(f"{split}/part-00000", 3, 3, sha, 1) for split, sha in (("train", "x"), ("test", sha256))]
    write_index(folder, units, kind)


@pytest.fixture
def scored_data(tmp_path):
    """A project whose scores, but for those of gamma, say what they were made with."""
    params = make_params(
        evaluate={
            "benchmarks": {
                "scenes": {"kind": "scenes", "size": 100},
                "coco": {"kind": "coco", "folder": "coco"},
            }
        }
    )
    write_project(tmp_path, params)
    write_units(tmp_path / params.paths.ingest, UnitIndex)
    write_units(tmp_path / params.paths.captions / "llava", CaptionIndex)
    hashes = made_with(params.evaluate, params.paths, params.caption.describing, tmp_path)
    for name in set(params.names) - {"gamma"}:
        path = tmp_path / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        for benchmark, result in data["benchmarks"].items():
            result["made_with"] = hashes[benchmark]
        write_json(path, data)
    return tmp_path, params


def outdated_scores(root, params):
    """Benchmark → ablations that the report has, and its messages about the others."""
    inputs = load_inputs(params, root)
    shown = {name: [a.name for a in inputs.scored if name in a.benchmarks] for name in params.evaluate.names}
    return shown, inputs.missing


@pytest.mark.parametrize(
    ("change", "outdated"),
    [
        (lambda evaluate: evaluate.update(precision="bf16"), {"scenes", "coco"}),
        (lambda evaluate: evaluate["benchmarks"]["scenes"].update(size=99), {"scenes"}),
        (lambda evaluate: evaluate["benchmarks"]["scenes"].update(max_unseen_tokens=0.5), set()),
        (lambda evaluate: evaluate.update(min_score_over_chance=3.0, baselines=["some/clip"]), set()),
    ],
)
def test_scores_of_other_settings_of_evaluate_are_left_out_by_benchmark(scored_data, change, outdated):
    root, params = scored_data
    data = params.model_dump(mode="json", exclude_unset=True)
    change(data["evaluate"])
    shown, missing = outdated_scores(root, Params.model_validate(data))
    every = list(params.names)
    assert shown == {name: ["gamma"] if name in outdated else every for name in ("scenes", "coco")}
    lines = [line for line in missing if line.endswith("has changed since; rerun its evaluate stage")]
    assert len(lines) == (len(every) - 1 if outdated else 0)
    if outdated:
        where = ", ".join(name for name in ("scenes", "coco") if name in outdated)
        assert lines[0].startswith(f"metrics of alpha on {where}: the benchmark, its data or evaluate.precision")


@pytest.mark.parametrize(("folder", "kind"), [("ingest", UnitIndex), ("captions", CaptionIndex)])
def test_scores_on_other_data_are_left_out_unless_the_benchmark_has_its_own(scored_data, folder, kind):
    root, params = scored_data
    place = root / params.paths.ingest if folder == "ingest" else root / params.paths.captions / "llava"
    write_units(place, kind, "other")
    shown, _ = outdated_scores(root, params)
    assert shown == {"scenes": ["gamma"], "coco": list(params.names)}
    (place / "index.json").unlink()  # not on this machine, so nothing can be compared
    assert outdated_scores(root, params)[0]["scenes"] == list(params.names)


@pytest.mark.usefixtures("without_figures")
def test_several_benchmarks_repeat_the_tables(tmp_path):
    params = make_params(
        evaluate={"benchmarks": {"scenes": {"kind": "scenes", "size": 100}, "own": {"kind": "held-out"}}}
    )
    write_project(tmp_path, params)
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    ids = Page(page.read_text()).ids
    assert {"scenes-systems", "own-systems", "results-own"} <= set(ids)
    assert "Given a long text of scenes, " in page.read_text()  # the summary has one benchmark, and names it
    assert len(ids) == len(set(ids))


def test_benchmarks_stand_in_the_order_of_params_yaml(tmp_path):
    benchmarks = {"held-out": {"kind": "held-out"}, "coco": {"kind": "coco", "folder": "coco"}}
    params = make_params(evaluate={"benchmarks": benchmarks})
    write_project(tmp_path, params)
    path = tmp_path / params.paths.metrics / "gamma.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # as the stages write it
    assert [list(ablation.benchmarks) for ablation in load_inputs(params, tmp_path).ablations] == [
        ["held-out", "coco"] for _ in ABLATIONS
    ]


@pytest.mark.usefixtures("without_figures")
def test_failed_check_is_shown_open(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    path = tmp_path / params.paths.stages / "ingest.json"
    record = json.loads(path.read_text())
    record["gate"].append({"what": "keys are unique", "observed": "2 repeated", "success": False})
    write_json(path, record)
    text = build_report(load_inputs(params, tmp_path), tmp_path / "report").read_text()
    assert re.search(r"<details class=\"stage\" open><summary>ingest — <span class=\"no\">1 of 2 failed", text)


@pytest.mark.usefixtures("without_figures")
def test_many_records_of_one_stage_are_folded_and_open_where_one_failed(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    path = tmp_path / params.paths.stages / "pretrain-eta.json"
    record = json.loads(path.read_text())
    record["gate"][0]["success"] = False
    write_json(path, record)
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    text = page.read_text()
    assert '<details class="stage"><summary>evaluate, 8 runs — <span class="yes">all passed' in text
    assert '<details class="stage" open><summary>pretrain, 8 runs — <span class="no">1 failed' in text
    assert "- pretrain, 8 runs: failed in pretrain-eta" in (page.parent / "report.md").read_text()


@pytest.mark.usefixtures("without_figures")
def test_failures_without_a_kind_are_not_lost(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    path = tmp_path / params.paths.stages / "shard.json"
    counts = {"read": 9, "written": 4, "failed": 5}
    write_json(path, {**json.loads(path.read_text()), "counts": counts, "failure_kinds": {"missing": 3}})
    report = build_report(load_inputs(params, tmp_path), tmp_path / "report").parent
    found = [(row["kind"], int(row["count"])) for row in read_csv(report, "failures") if row["stage"] == "shard"]
    assert found == [("missing", 3), ("not recorded", 2)]


def test_broken_json_is_an_error_that_names_the_file(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    (tmp_path / params.paths.metrics / "gamma.json").write_text("{")
    with pytest.raises(ValueError, match=r"gamma\.json is not JSON"):
        load_inputs(params, tmp_path)


@pytest.mark.usefixtures("without_figures")
def test_pages_of_the_gates_come_with_the_report(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    pages = tmp_path / params.paths.stages / "data-docs" / "ingest"
    pages.mkdir(parents=True)
    (pages / "index.html").write_text("what the gate looked at")
    (pages / "validations/units/__none__/2026").mkdir(parents=True)
    (pages / "validations/units/__none__/2026/ingest-units.html").touch()
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    assert '<a href="data-docs/ingest/index.html">index</a>' in page.read_text()
    assert '<a href="data-docs/ingest/validations/units/__none__/2026/ingest-units.html">units</a>' in page.read_text()
    assert "data-docs/shard" not in page.read_text()
    assert (page.parent / "data-docs/ingest/index.html").read_text() == "what the gate looked at"


@pytest.mark.usefixtures("without_figures")
def test_the_quality_of_captions_stands_in_a_table_by_captioner(tmp_path):
    params = make_params()
    write_project(tmp_path, params)
    assert quality_table(load_inputs(params, tmp_path)).rows == []
    path = tmp_path / params.paths.stages / "caption-llava.json"
    spread = {"mean": 80.25, "p05": 20.0, "median": 81.0, "p95": 140.0}
    quality = {"captions": 200, "filtered": {"refusal": 0, "short": 5}, "truncated_share": 0.125, "words": spread}
    quality |= {"repetition": {**spread, "mean": 0.05}, "agreement": dict.fromkeys(spread)}
    write_json(path, {**json.loads(path.read_text()), "notes": {"quality": quality}})
    (row,) = quality_table(load_inputs(params, tmp_path)).rows
    expected = ["llava", "200", "80.2", "20", "140", "5.0 %", "–", "12.5 %", "2.5 %", "2.5 %"]
    assert [cell.text.replace("\u00a0", " ") for cell in row] == expected
    build_report(load_inputs(params, tmp_path), tmp_path / "report")
    assert "Quality of long captions" in (tmp_path / "report" / "index.html").read_text()


# --- intervals ----------------------------------------------------------------------------------------------------


def with_intervals(tmp_path, seeds):
    """The report of a project whose R@1 have made-up intervals."""
    params = make_params(pretrain={"seeds": seeds, "steps": 40, **QUICK})
    write_project(tmp_path, params)
    for name in params.ablations:
        file = tmp_path / params.paths.metrics / f"{name}.json"
        found = json.loads(file.read_text())
        for result in found["benchmarks"].values():
            result["intervals"] = {
                seed: {metric: [value / 2, value * 1.5] for metric, value in scores.items() if metric.endswith("r1")}
                for seed, scores in result["seeds"].items()
            }
        write_json(file, found)
    build_report(load_inputs(params, tmp_path), tmp_path / "report")
    return tmp_path / "report"


@pytest.mark.usefixtures("without_figures")
def test_a_lone_seeds_scores_are_shown_with_their_intervals(tmp_path):
    report = with_intervals(tmp_path, [3])
    value = metrics_of(0, 3)["long.text_to_image.r1"]
    span = f"[{50 * value:.1f}, {150 * value:.1f}]"
    assert f"{100 * value:.1f}<small>{span}</small>" in (report / "index.html").read_text()
    assert f"| {100 * value:.1f} {span} |" in (report / "report.md").read_text()
    row = read_csv(report, "scenes-all")[0]
    assert float(row["long.text_to_image.r1.low"]) == pytest.approx(value / 2)
    assert float(row["long.text_to_image.r1.high"]) == pytest.approx(value * 1.5)
    assert "long.text_to_image.median_rank.low" not in row


@pytest.mark.usefixtures("without_figures")
def test_several_seeds_have_an_interval_over_seeds_whatever_the_pictures_say(tmp_path):
    report = with_intervals(tmp_path, [0, 1])
    values = [metrics_of(0, seed)["long.text_to_image.r1"] for seed in (0, 1)]
    mean, half = sum(values) / 2, 12.7062 * abs(values[0] - values[1]) / 2
    page = (report / "index.html").read_text()
    assert f">{100 * mean:.1f} ± {100 * half:.1f}<" in page
    assert "t interval over seeds" in page and "bootstrap" not in page
    row = read_csv(report, "scenes-all")[0]
    assert float(row["long.text_to_image.r1.low"]) == pytest.approx(mean - half, abs=1e-5)
    assert float(row["long.text_to_image.r1.high"]) == pytest.approx(mean + half, abs=1e-5)


@pytest.mark.usefixtures("without_figures")
def test_the_headline_has_a_whisker_where_the_interval_is(tmp_path):
    page = (with_intervals(tmp_path, [3]) / "index.html").read_text()
    value = metrics_of(0, 3)["long.text_to_image.r1"]
    assert f'class="whisker" style="left: {50 * value:.2f}%; width: {100 * value:.2f}%"' in page
    assert "bootstrap interval of a single seed" in page and "t interval over seeds (" not in page


def test_a_value_at_the_very_end_of_its_interval_is_drawn():
    ends = Estimate(99.5, 98.0, 99.5 - 1e-14)
    line = Line("all", "#000000", [Point(1, ends), Point(2, Estimate(99.0, 99.0 + 1e-14, 100.0))])
    svg, _ = render("ends", SMALL, lambda axes: draw_lines(axes, [line], [1, 2], "m", "R@1 (%)"))
    assert "R@1 (%)" in svg


def test_an_interval_of_ranks_is_no_percentage():
    assert score([4.0], "long.text_to_image.mean_rank", (3.5, 4.75)).span == "[3.5, 4.8]"
    assert score([0.4], "long.text_to_image.r1", (0.35, 0.475)).span == "[35.0, 47.5]"


# --- own data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The report of a folder of pictures with one ablation, and hostile texts in its captions and reasons."""
    root = tmp_path_factory.mktemp("own")
    params = make_params(
        ablations={"lit": {"text": {"corner_tokens": 0}, "long_texts": {"sub_captions": 0}}},
        evaluate={"benchmarks": {"own": {"kind": "held-out"}}},
        caption={"captioners": {}},
    )
    write_project(root, params)
    file = root / params.paths.metrics / "lit.json"
    found = json.loads(file.read_text())
    result = found["benchmarks"]["own"]
    result["protocol"] |= {"short_texts": 288, "repeated_short_texts": 142, "repeated_images": 0}
    result["ceiling"] = {f"short.{way}.r1": 0.5069 for way in WAYS}
    one = {"text": "a <b>dog</b>\x00\x1b \ud800", "image": 0, "rank": 1.0, "found": [0, 1]}
    result["examples"] = {"short": {"best": [one], "worst": [{**one, "text": "a lost cat", "image": 2, "rank": 77.5}]}}
    write_json(file, found)
    folder = root / params.paths.metrics / "attention" / "lit"
    write_json(folder / "not-drawn.json", {"own": {"relevance": "no ink"}})
    (folder / "images" / "own").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (60, 40), (90 * number, 20, 60)).save(folder / "images" / "own" / f"{number}.jpg")
    failures = [
        {"kind": kind, "key": "", "where": f"my-images/{kind}-{n}.jpg", "reason": f"reason\x00 {n}"}
        for kind, count in (("unreadable", 5), ("duplicate", 3), ("duplicate-image", 2))
        for n in range(count)
    ]
    reports = [
        UnitReport("train/part-00000", 712, 702, "a", 1, [Failure(**failure) for failure in failures]),
        UnitReport("test/part-00000", 288, 288, "b", 1),
    ]
    write_index(root / params.paths.ingest, reports, UnitIndex)
    return build_report(load_inputs(params, root), root / "report").parent


def test_a_report_on_own_data_starts_with_the_data_then_what_the_model_can_do(own):
    page = Page((own / "index.html").read_text())
    parts = ["data-section", "failure-examples", "pictures", "results-own", "examples-own", "attention-own", "curves"]
    places = [page.ids.index(part) for part in [*parts, "gates", "protocol-section"]]
    assert places == sorted(places)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids)


def test_findings_that_were_not_run_are_one_sentence(own):
    page = (own / "index.html").read_text()
    assert "the-findings" not in page and "not-run" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "further tests need ablations" in page and "further tests need ablations" in (own / "report.md").read_text()


def test_the_data_are_told_with_failures_splits_copies_and_the_ceiling(own):
    page = (own / "index.html").read_text()
    for piece in ("my-images/unreadable-2.jpg", "my-images/duplicate-0.jpg", "images in split test", "142 of 288"):
        assert piece in page
    assert "my-images/unreadable-3.jpg" not in page, "three of each kind"
    rows = {row["what"]: row["count"] for row in read_csv(own, "overview")}
    assert float(rows["images in split test"]) == 288
    assert float(rows["of these, duplicate images or keys"]) == 5


def test_examples_have_their_rank_and_pictures_and_what_failed_is_named(own):
    page = (own / "index.html").read_text()
    assert "a lost cat" in page and "77.5" in page
    assert page.count('class="correct"') == 2  # the text's own image, and the same image among the retrieved ones
    assert "lit, relevance: no ink" in page


def test_a_page_has_no_characters_that_html_may_not_have(own):
    for file in ("index.html", "report.md"):
        text = (own / file).read_bytes().decode("utf-8")
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", text)
    page = (own / "index.html").read_text()
    assert "a &lt;b&gt;dog&lt;/b&gt;\ufffd\ufffd \ufffd" in page
    assert "reason\ufffd 0" in page


def test_a_tower_of_scenes_is_warned_of(own):
    assert "image_tower.kind is scenes" in (own / "index.html").read_text()


# --- what repeated texts allow ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_the_best_possible_score_and_the_repeats_are_beside_the_scores(tmp_path):
    params = make_params(report={"contact_sheet": 0})
    write_project(tmp_path, params)
    for name in params.ablations:
        file = tmp_path / params.paths.metrics / f"{name}.json"
        found = json.loads(file.read_text())
        result = found["benchmarks"]["scenes"]
        result["protocol"] |= {"short_texts": 288, "repeated_short_texts": 142, "repeated_images": 0}
        result["ceiling"] = {f"short.{way}.r{k}": 0.5069 if k == 1 else 1.0 for way in WAYS for k in (1, 5)}
        write_json(file, found)
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert "142 of 288 short texts" in text and "50.7 %" in text
    assert "chance 0.1\u00a0%, best possible 50.7\u00a0%" in page.read_text()
    rows = {row["ablation"]: row for row in read_csv(tmp_path / "report", "scenes-systems")}
    assert float(rows["best possible"]["short.image_to_text.r1"]) == 0.5069


def test_nothing_is_said_of_the_best_possible_score_where_nothing_is_repeated(report):
    assert "best possible" not in (report / "index.html").read_text()


# --- baselines ----------------------------------------------------------------------------------------------------


def write_baselines(root, params, *names):
    """Made-up scores of models that are not trained here."""
    models = [
        {
            "model": name,
            "sha256": None,
            "benchmarks": {
                benchmark: {
                    "protocol": {"kind": f"kind of {name}", "context_length": 77, "weights_sha256": "ab" * 32},
                    "chance": {},
                    "ceiling": {},
                    "scores": metrics_of(6, 9),
                }
                for benchmark in params.evaluate.benchmarks
            },
        }
        for name in names
    ]
    write_json(root / params.paths.metrics / "baselines" / "scores.json", {"models": models})


@pytest.mark.usefixtures("without_figures")
def test_baselines_are_rows_of_every_table_of_scores_without_intervals(tmp_path):
    evaluate = {"benchmarks": {"scenes": {"kind": "scenes", "size": 100}}, "baselines": ["start", "some/clip"]}
    params = make_params(evaluate=evaluate)
    write_project(tmp_path, params)
    write_baselines(tmp_path, params, "some/clip", "gone/from-params", "start")
    inputs = load_inputs(params, tmp_path)
    build_report(inputs, tmp_path / "report")
    expected, labels = metrics_of(6, 9), ["start (not trained here)", "some/clip (not trained here)"]
    for table in ("systems", "corner-tokens", "all"):
        rows = {row["ablation"]: row for row in read_csv(tmp_path / "report", f"scenes-{table}")}
        assert [name for name in rows if "not trained here" in name] == labels
        for label in labels:
            assert float(rows[label]["long.text_to_image.r1"]) == expected["long.text_to_image.r1"]
            assert not rows[label]["long.text_to_image.r1.low"]
            assert not rows[label]["long.text_to_image.r1.std"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Models that were not trained here" in page and "kind of some/clip" in page
    assert "Rows marked (not trained here) are models that were only scored." in page
    assert "gone/from-params" not in page
    write_plots(inputs, tmp_path / "plots")
    with (tmp_path / "plots" / "scores.csv").open() as file:
        plotted = [row for row in csv.DictReader(file) if row["ablation"] == labels[0]]
    assert {row["metric"]: float(row["percent"]) for row in plotted} == {
        f"scenes.{metric}": round(100 * expected[metric], 4) for metric in MAIN_METRICS
    }


def test_a_baseline_without_scores_is_named_as_missing(tmp_path):
    evaluate = {"benchmarks": {"scenes": {"kind": "scenes", "size": 100}}, "baselines": ["start", "some/clip"]}
    params = make_params(evaluate=evaluate)
    write_project(tmp_path, params)
    assert (
        "scores of the baselines: metrics/baselines/scores.json does not exist" in load_inputs(params, tmp_path).missing
    )
    write_baselines(tmp_path, params, "start")
    inputs = load_inputs(params, tmp_path)
    assert "scores of the baseline some/clip: there are none; rerun the stage baselines" in inputs.missing
    assert [one.model for one in inputs.baselines] == ["start"]


# --- published scores ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_published_scores_stand_below_those_measured_on_the_same_benchmark(tmp_path):
    benchmarks = {name: {"kind": "held-out"} for name in ("urban-1k", "mine")}
    params = make_params(evaluate={"benchmarks": benchmarks})
    write_project(tmp_path, params)
    build_report(load_inputs(params, tmp_path), tmp_path / "report")
    rows = {row["ablation"]: row for row in read_csv(tmp_path / "report", "urban-1k-systems")}
    published = [reference for reference in REFERENCE if "urban-1k" in reference.scores]
    names = ["chance", *(f"{reference.model} (published)" for reference in published)]
    assert list(rows)[-len(names) :] == names and names[1] == "CLIP B/32, 400M (published)"
    assert float(rows["LoTLIP B/16, 100M (published)"]["long.text_to_image.r1"]) == 0.848
    assert not any("published" in row["ablation"] for row in read_csv(tmp_path / "report", "mine-systems"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "were not measured here" in text and "arXiv 2602.22419 (DeBias-CLIP B/16)" in text
    assert "FLAIR" not in text  # it was published on COCO only


def test_one_ablation_stands_beside_published_scores(tmp_path):
    declared = {"title": "Own", "rows": {"beta": "Ours"}, "columns": SCORES}
    for published in (True, False):
        tables = {"own": {**declared, "published": published}}
        params = make_params(
            tables, ablations={"beta": {}}, evaluate={"benchmarks": {"urban-1k": {"kind": "held-out"}}}
        )
        write_project(tmp_path / f"{published}", params)
        (section,) = benchmark_sections(load_inputs(params, tmp_path / f"{published}"), "urban-1k")
        assert section.table.title == ("Own" if published else "Ablations")
        rows = [row[0].text for row in [*section.table.rows, *section.table.references]]
        assert rows[0] == "beta" and ("DeBias-CLIP B/16 (published)" in rows) is published


def files_of_a_launched_run(root, **training):
    few = {name: ABLATIONS[name] for name in ("alpha", "gamma")}
    params = make_params(ablations=few, compute={"training": training})
    write_project(root, params)
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch)  # figures show numbers that the tables have, too
        report = build_report(load_inputs(params, root), root / "report").parent
    return {path.relative_to(report): path.read_bytes() for path in report.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def launched_here(tmp_path_factory):
    return files_of_a_launched_run(tmp_path_factory.mktemp("local"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        {"kind": "hostfile", "path": "infra/deepspeed/hostfile"},
        {"kind": "slurm", "nodes": 2},
        {"kind": "rendezvous", "nodes": 2, "endpoint": "lotlip-0:29500"},
    ],
    ids=lambda launch: launch["kind"],
)
def test_a_report_does_not_say_how_training_was_launched(launched_here, tmp_path, launch):
    assert launched_here and launched_here == files_of_a_launched_run(tmp_path, launch=launch, processes=2)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0002, "0.02"), (0.0, "0.0"), (0.001, "0.1"), (0.000514, "0.1"), (0.815, "81.5")]
)
def test_small_chances_are_not_rounded_to_zero(value: float, text: str) -> None:
    assert percent(value).text == f"{text}\u00a0%"
