"""Results of stored seeds: the table, what makes its rows stale, and the report's verdicts. All numbers are made up."""

from __future__ import annotations

import hashlib
import json
import shutil

import pandas as pd
import pytest

from flows.reproduce import remove_outdated_report
from flows.runtime.scratch import StageFailed
from flows.store_results import store
from lotlip.config.params import Params
from lotlip.core.files import ForeignFileError, sha256_files, sha256_json, write_record
from lotlip.data.index import CaptionIndex, UnitIndex, write_index
from lotlip.evaluate.records import made_with
from lotlip.pretrain.config import PretrainConfig
from lotlip.report.findings import FINDINGS, INCONCLUSIVE, NOT_RUN, SUPPORTS, evaluate_findings
from lotlip.report.inputs import load_inputs
from lotlip.report.page import build_report
from lotlip.report.power import main, planning_table
from lotlip.report.stored import (
    COLUMNS,
    SETTINGS_VERSION,
    add_rows,
    cpu_model,
    data_hashes,
    load_stored,
    read_rows,
    rows_of_run,
    settings_hash,
)
from tests.test_report import Page, read_csv
from tests.test_report_findings import BASELINE, FINETUNED, corners, paper_params, with_noise, write_scores
from tests.tiny_pipeline import ROOT

FEW = {"short": BASELINE, "longs": corners(0), "base": {}, "short-half": BASELINE | {"steps": 20}}
TABLE = "results/made-up.csv"


def few(seeds=(0, 1, 2), ablations=FEW, **changes):
    return paper_params(seeds, ablations, **{"report": {"stored_results": TABLE, "contact_sheet": 0}, **changes})


def changed(params: Params, *path: str, value: object) -> Params:
    """The same params with another value of one key."""
    data = params.model_dump(mode="json", exclude_unset=True)
    section = data
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    return Params.model_validate(data)


def write_run(root, params, noise=None, long=None):
    """A run in place of an earlier one: scores, and what each ablation was trained with."""
    shutil.rmtree(root / "data", ignore_errors=True)
    write_scores(root, params, long=long)
    for captioner in params.caption.captioners:
        (root / params.paths.captions / captioner / "test" / "part-00000.json").write_text("{}")
    with_noise(root, params, noise or {})
    index = root / params.paths.shards / "index.json"
    for name in params.names:
        run = {
            "ablation": name,
            "config": params.ablation(name).model_dump(mode="json"),
            "data_hash": sha256_files([index]),
            "git_commit": "c0ffee",
            "fingerprints": {},
        }
        (root / params.paths.models / name).mkdir(parents=True, exist_ok=True)
        (root / params.paths.models / name / "run.json").write_text(json.dumps(run))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = few()
    write_run(tmp_path, params)
    return tmp_path, params


# --- the table ----------------------------------------------------------------------------------------------------


def test_a_run_is_stored_once_however_often_it_is_added(run):
    root, params = run
    table = root / TABLE
    assert list(store(params)) == [f"{TABLE}: 18 rows added, 0 replaced"]
    first = table.read_bytes()
    assert list(store(params)) == [f"{TABLE}: 0 rows added, 18 replaced"]
    assert table.read_bytes() == first
    lines = first.decode().splitlines()
    assert lines[0].split(",") == list(COLUMNS) and lines[1:] == sorted(lines[1:])
    row = read_rows(table)[0]
    assert (row.ablation, row.benchmark, row.seed) == ("base", "scenes", 0)
    assert row.scores["long.text_to_image.r1"] == 0.5 and len(row.scores) == 5
    assert (row.commit, row.machine) == ("c0ffee", cpu_model())


def test_other_seeds_settings_and_data_add_rows_and_replace_none(run):
    root, params = run
    list(store(params))
    more = few(seeds=(2, 3))
    write_run(root, more)
    assert list(store(more)) == [f"{TABLE}: 6 rows added, 6 replaced"]
    other = changed(more, "pretrain", "steps", value=60)
    write_run(root, other)
    # the steps of both halves are set, so their settings have not changed
    assert list(store(other)) == [f"{TABLE}: 8 rows added, 4 replaced"]
    assert len(read_rows(root / TABLE)) == 18 + 6 + 8


def test_rows_keep_their_order_and_a_score_that_is_missing_stays_missing(run):
    root, params = run
    rows, _ = rows_of_run(params, root)
    rows[3].scores.pop("classification.top1")
    assert add_rows(root / TABLE, reversed(rows)) == (18, 0)
    before = (root / TABLE).read_bytes()
    assert add_rows(root / TABLE, rows[::2]) == (0, 9)
    assert (root / TABLE).read_bytes() == before
    assert {row.key: row for row in read_rows(root / TABLE)} == {row.key: row for row in rows}


def test_scores_that_do_not_belong_to_the_configuration_are_not_stored(run):
    root, params = run
    (root / params.paths.models / "longs" / "run.json").unlink()
    base = root / params.paths.models / "base" / "run.json"
    base.write_text(base.read_text().replace('"data_hash": "', '"data_hash": "0'))
    half = root / params.paths.models / "stretched-half" / "run.json"
    half.write_text(half.read_text().replace('"fingerprints": {}', '"fingerprints": {"0": "x"}'))
    other = changed(params, "ablations", "short", "steps", value=41)
    *lines, last = list(store(other))
    assert lines == [
        "left out: short: params.yaml has changed since short was trained",
        "left out: longs: models/longs/run.json does not exist",
        "left out: base: its models were not trained on the data in data/shards",
        "left out: stretched: params.yaml has changed since short was trained",
        "left out: stretched-half: its scores are of other models than those in models/stretched-half",
    ]
    assert last == f"{TABLE}: 3 rows added, 0 replaced"
    assert {row.ablation for row in read_rows(root / TABLE)} == {"short-half"}


def test_scores_made_with_other_settings_are_not_stored_as_those_of_the_current_ones(run):
    root, params = run
    write_index(root / params.paths.ingest, [], UnitIndex)
    for captioner in params.caption.captioners:
        write_index(root / params.paths.captions / captioner, [], CaptionIndex)
    hashes = made_with(params.evaluate, params.paths, params.caption.describing, root)
    for name in ("longs", "base"):
        path = root / params.paths.metrics / f"{name}.json"
        data = json.loads(path.read_text())
        data["benchmarks"]["scenes"]["made_with"] = hashes["scenes"]
        path.write_text(json.dumps(data))
    assert list(store(params)) == [f"{TABLE}: 18 rows added, 0 replaced"]
    for other in (
        changed(params, "evaluate", "benchmarks", "scenes", "size", value=99),
        changed(params, "evaluate", "precision", value="bf16"),
    ):
        rows, left_out = rows_of_run(other, root)
        assert {row.ablation for row in rows} == {"short", "short-half", "stretched", "stretched-half"}
        assert left_out == [
            f"{name} on scenes: the benchmark, its data or evaluate.precision has changed since; rerun its evaluate "
            "stage"
            for name in ("longs", "base")
        ]


def test_the_report_leaves_out_scores_of_models_of_other_data_or_settings(run):
    root, params = run
    half = root / params.paths.models / "stretched-half" / "run.json"
    half.write_text(half.read_text().replace('"fingerprints": {}', '"fingerprints": {"0": "x"}'))
    base = root / params.paths.models / "base" / "run.json"
    base.write_text(base.read_text().replace('"data_hash": "', '"data_hash": "0'))
    inputs = load_inputs(changed(params, "ablations", "short", "steps", value=41), root)
    assert [ablation.name for ablation in inputs.scored] == ["longs", "short-half"]
    assert [line for line in inputs.missing if line.endswith("rerun its evaluate stage")] == [
        "metrics of short: params.yaml has changed since short was trained; rerun its evaluate stage",
        "metrics of base: its models were not trained on the data in data/shards; rerun its evaluate stage",
        "metrics of stretched: params.yaml has changed since short was trained; rerun its evaluate stage",
        "metrics of stretched-half: its scores are of other models than those in models/stretched-half; rerun its "
        "evaluate stage",
    ]
    tested = {one.finding.slug: one.verdict for one in evaluate_findings(inputs)}
    assert tested["long-texts-teach-long"] == NOT_RUN  # of short and longs


def test_nothing_to_store_is_an_error_that_says_so(run):
    root, params = run
    with pytest.raises(StageFailed, match="name a file, such as"):
        list(store(changed(params, "report", value={})))
    other = changed(params, "pretrain", "batch_size", value=16)
    with pytest.raises(StageFailed, match=r"no scores of the current params\.yaml"):
        list(store(other))
    assert not (root / TABLE).exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "a,b\n1,2\n", "its first line must be ablation,benchmark"),
        (lambda text: "", "its first line must be"),
        (lambda text: text + "base,scenes\n", "line 20: has 2 values, not 12"),
        (lambda text: text.replace(",0.5,", ",nan,", 1), "line 2: scores must be from 0 to 1"),
        (lambda text: text.replace(",0.5,", ",50,", 1), "line 2: scores must be from 0 to 1"),
        (lambda text: text.replace(",0.5,", ",a,", 1), "line 2: could not convert"),
        (lambda text: text + text.splitlines()[3] + "\n", "line 20: a row before it has the same ablation, benchmark"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_line(run, damage, message):
    root, params = run
    list(store(params))
    damaged = damage((root / TABLE).read_text())
    (root / TABLE).write_text(damaged)
    for use in (lambda: list(store(params)), lambda: load_inputs(params, root)):
        with pytest.raises(ValueError, match=message):
            use()
    assert (root / TABLE).read_text() == damaged


def test_a_link_is_not_replaced(run):
    root, params = run
    (root / "elsewhere.csv").write_text("mine")
    (root / "results").mkdir()
    (root / TABLE).symlink_to(root / "elsewhere.csv")
    with pytest.raises(ValueError, match="is a link"):
        list(store(params))
    assert (root / "elsewhere.csv").read_text() == "mine"


# --- what makes a row stale ---------------------------------------------------------------------------------------


def test_settings_that_decide_a_model_change_its_hash_and_others_do_not():
    params = few()
    names = ("short", "base", "short-half", "stretched-half")
    before = {name: settings_hash(params, name) for name in names}
    assert len(set(before.values())) == len(names)

    def differing(*path, value):
        after = changed(params, *path, value=value)
        return {name for name in names if settings_hash(after, name) != before[name]}

    assert differing("pretrain", "seeds", value=[7, 8]) == set()
    assert differing("paths", value={"models": "elsewhere"}) == set()
    assert differing("compute", value={"training": {"log_every": 3}}) == set()
    assert differing("pretrain", "text", "corner_mask", value=True) == set()  # its default
    assert differing("pretrain", "steps", value=41) == {"short", "base"}
    assert differing("ablations", "short-half", "steps", value=21) == {"short-half", "stretched-half"}
    assert differing("ablations", "base", value={"loss": {"short_loss_fraction": 0.5}}) == {"base"}


def test_the_hash_of_settings_has_a_version():
    """If this fails: increase SETTINGS_VERSION if the default of a key has changed; then write the new hash here."""
    assert (SETTINGS_VERSION, sha256_json(PretrainConfig().model_dump(mode="json"))[:16]) == (1, "0b6d7deb561f0ae2")


def test_the_data_decide_their_hash_and_not_their_files(run):
    root, params = run
    before = data_hashes(params, root)["scenes"]
    assert data_hashes(changed(params, "shard", value={"max_failure_share": 0.5}), root)["scenes"] == before
    assert data_hashes(changed(params, "image_tower", "min_accuracy", value=0.1), root)["scenes"] == before
    for path, value in (
        (("shard", "samples_per_shard"), 50),
        (("image_tower", "scenes"), 10),
        (("evaluate", "benchmarks", "scenes", "size"), 99),
        (("evaluate", "precision"), "bf16"),
    ):
        assert data_hashes(changed(params, *path, value=value), root)["scenes"] != before
    images = root / params.paths.ingest / "test" / "part-00000.parquet"
    captions = root / params.paths.captions / "ib" / "test" / "part-00000.parquet"
    for file, column, value, same in (
        (images, "width", 7, True),
        (images, "offset", 9, True),
        (images, "sha256", "abc", False),
        (images, "short_caption", "another", False),
        (captions, "captioner", "x", True),
        (captions, "text", "Another.", False),
    ):
        kept = file.read_bytes()
        pd.read_parquet(file).assign(**{column: value}).to_parquet(file)
        assert (data_hashes(params, root)["scenes"] == before) == same, column
        file.write_bytes(kept)


def test_a_generated_image_is_its_scene(run):
    root, params = run
    file = root / params.paths.ingest / "test" / "part-00000.parquet"
    table = pd.read_parquet(file).assign(scene='{"shape": "cube"}')
    table.to_parquet(file)
    before = data_hashes(params, root)
    table.assign(sha256="other bytes of the same scene").to_parquet(file)
    assert data_hashes(params, root) == before
    table.assign(scene='{"shape": "ball"}').to_parquet(file)
    assert data_hashes(params, root) != before


def test_stale_rows_are_left_out_and_said_to_be(run):
    root, params = run
    rows, _ = rows_of_run(params, root)
    text = []
    add_rows(root / TABLE, rows)
    for line in (root / TABLE).read_text().splitlines():
        values = line.split(",")
        if values[0] == "longs":
            values[2] = "0" * 16  # other settings
        if values[:2] == ["base", "scenes"] and values[4] == "1":
            values[3] = "0" * 16  # other data
        if values[0] == "short-half":
            values[0] = "gone"
        if values[0] == "stretched":
            values[1] = "elsewhere"
        text.append(",".join(values))
    (root / TABLE).write_text("\n".join(text) + "\n")
    missing: list[str] = []
    found = load_stored(params, root, missing)
    assert missing == []
    assert {(row.ablation, row.seed) for row in found.rows} == {
        *(("short", seed) for seed in range(3)),
        *(("stretched-half", seed) for seed in range(3)),
        ("base", 0),
        ("base", 2),
    }
    assert sorted(found.left_out) == [
        "1 rows (base), because the data have changed since",
        "3 rows (gone), because params.yaml has no such ablation",
        "3 rows (longs), because the ablation's settings have changed since",
        "3 rows (stretched), because params.yaml has no such benchmark",
    ]
    assert all(line in found.note for line in found.left_out) and "8 rows of 3 ablations and 3 seeds" in found.note


def test_without_a_table_or_without_data_the_report_says_why(run):
    root, params = run
    inputs = load_inputs(params, root)
    assert inputs.stored is None and inputs.with_stored is None
    assert f"stored results: {TABLE} does not exist; python -m flows.store_results writes it" in inputs.missing
    list(store(params))
    for marker in (root / params.paths.ingest).glob("*/*.json"):
        marker.unlink()
    stored = load_stored(params, root, [])
    assert stored.rows == [] and stored.left_out[0].startswith("18 rows (base, longs, short, short-half, stretched")
    assert "because this run has no data to compare them with" in stored.note
    assert load_stored(changed(params, "report", value={}), root, []) is None


def test_a_table_may_not_lie_where_a_stage_writes():
    with pytest.raises(ValueError, match=r"report.stored_results: report/results.csv overlaps with paths.report"):
        few(report={"stored_results": "report/results.csv"})


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report of three seeds with ten stored ones, of which those of `longs` are more alike."""
    root = tmp_path_factory.mktemp("stored")
    ten, three = few(range(10)), few()
    noise = [0.4, -0.3, 0.1, 0.5, -0.2, 0.0, 0.3, -0.4, 0.2, -0.1]
    write_run(root, ten, {"longs": noise}, long={"short": 49, "longs": 50})
    rows, left_out = rows_of_run(ten, root)
    assert left_out == []
    stale = [row for row in rows if row.ablation != "short-half"]
    add_rows(root / TABLE, stale)
    write_run(root, three, {"longs": [2, -2, 1]}, long={"short": 49})
    inputs = load_inputs(three, root)
    return root, inputs, build_report(inputs, root / "report").parent


def test_stored_seeds_have_their_own_verdicts(reports):
    _, inputs, report = reports
    tested = {(one.finding.slug, one.measure.slug): one for one in evaluate_findings(inputs)}
    stored = {(one.finding.slug, one.measure.slug): one for one in evaluate_findings(inputs.with_stored)}
    teach = ("long-texts-teach-long", "long")
    assert (tested[teach].verdict, len(tested[teach].by_seed)) == (INCONCLUSIVE, 3)
    assert (stored[teach].verdict, len(stored[teach].by_seed)) == (SUPPORTS, 10)
    assert stored[teach].difference.value == pytest.approx(1.05)
    assert stored[teach].detectable(0.05) < tested[teach].detectable(0.05)
    data = json.loads((report / "findings.json").read_text())
    assert data["stored_results"]["path"] == TABLE and data["stored_results"]["seeds"] == list(range(10))
    assert data["stored_results"]["sha256"] == hashlib.sha256((reports[0] / TABLE).read_bytes()).hexdigest()
    first = data["findings"][0]
    assert (first["finding"], first["verdict"], first["stored"]["verdict"]) == (teach[0], INCONCLUSIVE, SUPPORTS)
    assert first["stored"]["verdict_holm"] == SUPPORTS and len(first["stored"]["points_by_seed"]) == 10


def test_the_page_shows_both_sets_of_seeds_with_their_numbers(reports):
    _, _, report = reports
    page = (report / "index.html").read_text()
    parsed = Page(page)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    assert "This run (3 seeds)" in page and "Stored seeds (10 seeds)" in page  # the figure's legend
    for text in (page, (report / "report.md").read_text()):
        assert f"Stored seeds: {TABLE} has 50 rows of 5 ablations and 10 seeds" in text
        assert "the stored seeds support" in text and "What could be detected" in text
        assert text.count("With Holm") == 2
    (row, *_) = read_csv(report, "findings")
    assert (row["verdict"], row["stored_verdict"], row["stored_verdict_holm"]) == (INCONCLUSIVE, SUPPORTS, SUPPORTS)
    assert (row["seeds"], row["stored_seeds"]) == ("3", "10")
    (power, *_) = read_csv(report, "power")
    assert float(power["stored_detectable"]) < float(power["detectable"]) < float(power["detectable_corrected"])
    assert (report / "figures" / "findings.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_stored_seeds_the_page_has_one_set(run):
    root, _ = run
    params = few(report={"contact_sheet": 0})
    report = build_report(load_inputs(params, root), root / "report").parent
    page = (report / "index.html").read_text()
    assert "Stored seeds" not in page and "This run (3 seeds)" in page
    data = json.loads((report / "findings.json").read_text())
    assert data["stored_results"] is None and "stored" not in data["findings"][0]


@pytest.mark.slow
def test_a_report_of_other_stored_results_is_removed_so_that_it_is_written_again(run):
    root, params = run
    list(store(params))
    report = root / params.paths.report

    def publish():
        build_report(load_inputs(params, root), report)
        write_record(report, params.paths.report)

    remove_outdated_report(params)  # there is none
    publish()
    remove_outdated_report(params)
    assert report.is_dir()
    rows, _ = rows_of_run(params, root)
    rows[0].scores["classification.top1"] = 0.25
    add_rows(root / TABLE, rows)
    remove_outdated_report(params)
    assert not report.exists()
    report.mkdir()
    (report / "findings.json").write_text('{"stored_results": null}')
    with pytest.raises(ForeignFileError):
        remove_outdated_report(params)
    (report / "findings.json").write_text("{")
    remove_outdated_report(params)
    assert report.is_dir()


# --- planning -----------------------------------------------------------------------------------------------------


def test_the_documented_power_is_what_the_command_prints(capsys):
    tests = sum(len(finding.measures) for finding in FINDINGS)
    main(["--seeds", "10", "--tests", str(tests)])
    table = planning_table(10, tests)
    assert table in capsys.readouterr().out
    assert table in (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert f"--seeds 10 --tests {tests}" in (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_command_says_what_is_not_possible(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err


def test_a_finding_that_neither_run_nor_store_can_test_is_listed(reports):
    _, inputs, report = reports
    missing = {one.finding.slug for one in evaluate_findings(inputs) if one.verdict == NOT_RUN}
    assert "mask" in missing and "mask" not in {row["says"] for row in read_csv(report, "findings")}
    assert FINETUNED["stretched-half"]["init_from"] == "short-half"
