"""JSON between stages is read as written, and an invalid file is a clear error."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lotlip.core.record import Record, read_record
from lotlip.data.index import CaptionIndex, read_index
from lotlip.data.records import Failure, ItemWarning, UnitReport
from lotlip.data.stage_record import StageRecord
from lotlip.evaluate.records import AblationScores, BenchmarkScores
from lotlip.pretrain.records import HISTORY, Run, read_history


class Example(Record):
    folder: Path
    counts: dict[int, int]
    share: float


EXAMPLE = Example(folder=Path("a/b"), counts={128: 2, 64: 1}, share=0.5)
RUN = {"ablation": "lit", "config": {"steps": 2}, "data_hash": "d", "git_commit": "c", "fingerprints": {"0": "f"}}


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path / "example.json")
    assert Example.load(tmp_path / "example.json") == EXAMPLE
    text = '{\n "counts": {\n  "64": 1,\n  "128": 2\n },\n "folder": "a/b",\n "share": 0.5\n}\n'
    assert (tmp_path / "example.json").read_text() == text


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"example\.json cannot be written as JSON"):
        EXAMPLE.model_copy(update={"share": math.nan}).write(tmp_path / "example.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"folder": "a", "counts": {}}', "share: Field required"),
        ('{"folder": "a", "counts": {"x": 1}, "share": 1}', r"counts\.x\.\[key\]: Input should be a valid integer"),
        ('{"folder": "a", "counts": {}, "share": 1, "more": 2}', "more: Extra inputs are not permitted"),
        ("[]", "the file: Input should be a valid dictionary or instance of Example"),
        ('{"a": 1, "b": 2}', "folder: Field required; counts: Field required; share: Field required; and 2 more"),
    ],
)
def test_an_invalid_file_is_an_error_with_problem_and_remedy(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "example.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"^{file} is not what its stage writes \({problem}.*run its stage again"):
        Example.load(file)


def test_a_list_of_records_is_validated(tmp_path: Path) -> None:
    (tmp_path / "seed-0").mkdir()
    file = tmp_path / "seed-0" / HISTORY
    file.write_text('[{"step": 1, "loss": 2.5}]')
    assert repr(read_history(tmp_path, 0)) == "[{'step': 1, 'loss': 2.5}]"  # the step stays an integer
    file.write_text('[{"step": 1, "loss": "low"}]')
    with pytest.raises(ValueError, match=r"history\.json is not what its stage writes \(0\.loss"):
        read_history(tmp_path, 0)


STAGE = {
    "stage": "ingest",
    "name": None,
    "seconds": 2.5,
    "work_seconds": 2.0,
    "samples": 10,
    "samples_per_second": 5.0,
    "orchestration_seconds": {"gate": 0.5},
    "counts": {"read": 10, "written": 9, "failed": 1},
    "failure_kinds": {"empty": 1},
    "gate": [{"what": "all is well", "observed": "it is", "success": True, "key": ""}],
    "notes": {"epochs": 0.5, "quality": {"words": 3}},
}
SCORES = {
    "ablation": "lit",
    "config": {"steps": 2},
    "fingerprints": {"0": "f"},
    "parameters": {"text_tower": 5},
    "text_tower_flops": {"64": 1, "128": 2},
    "benchmarks": {
        "scenes": {
            "protocol": {"images": 10, "share": 0.5, "command": "evaluate"},
            "chance": {"short.text_to_image.r1": 0.1},
            "ceiling": {},
            "seeds": {"0": {"short.text_to_image.r1": 0.5, "short.text_to_image.median_rank": 1.0}},
            "intervals": {"0": {"short.text_to_image.r1": [0.25, 0.75]}},
            "attention": {"0": {"values": {"on_named_object": 0.5}, "intervals": {}, "left_out": {}}},
            "weights_sha256": {"0": "w"},
            "examples": {"short": {"best": [{"rank": 1}], "worst": []}},
        }
    },
}


@pytest.mark.parametrize(("kind", "data"), [(Run, RUN), (StageRecord, STAGE), (AblationScores, SCORES)])
def test_files_of_earlier_versions_are_rewritten_unchanged(tmp_path: Path, kind: type[Record], data: object) -> None:
    file, rewritten = tmp_path / "earlier.json", tmp_path / "again.json"
    file.write_text(json.dumps(data))
    kind.load(file).write(rewritten)
    assert json.loads(rewritten.read_text()) == data


def test_scores_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"seeds": {"3": {"a": 0.5}}, "protocol": {}, "chance": {}}')
    read = read_record(tmp_path / "scores.json", BenchmarkScores)
    assert (read.seeds, read.ceiling, read.limited) == ({3: {"a": 0.5}}, {}, False)


def test_an_index_of_earlier_versions_is_read(tmp_path: Path) -> None:
    """They called warnings remarks and did not record the sentence ends."""
    totals = {"read": 3, "written": 2, "failed": 1, "failure_kinds": {"empty": 1}, "hash": "h"}
    failure = {"key": "k", "where": "a.png", "reason": "no words", "kind": "empty"}
    warning = {**failure, "kind": "renamed"}
    unit = {"name": "train/part-00000", "written": 2, "bytes": 9, "sha256": "s"}
    index = {
        **totals,
        "failures": [failure],
        "remarks": [warning],
        "remark_kinds": {"renamed": 1},
        "units": [unit],
        "revision": "r",
        "prompt": "p",
    }
    (tmp_path / "index.json").write_text(json.dumps({**index, "quality": {}}))
    read = read_index(tmp_path, CaptionIndex)
    assert (read.failures, read.warnings) == ([Failure(**failure)], [ItemWarning(**warning)])
    assert (read.sentence_ends, [unit.name for unit in read.whole]) == ("released", ["train/part-00000"])


def test_a_report_with_lost_items_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    report = {"name": "part", "read": 2, "written": 1, "sha256": "", "bytes": 0, "failures": [], "warnings": []}
    file.write_text(json.dumps(report))
    with pytest.raises(
        ValueError, match=r"part\.json is not what its stage writes \(.*some were lost without a reason"
    ):
        read_record(file, UnitReport)
    file.write_text(json.dumps({**report, "read": 1, "more": 1}))
    with pytest.raises(ValueError, match=r"part\.json is not what its stage writes \(more: Unexpected"):
        read_record(file, UnitReport)
