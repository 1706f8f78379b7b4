"""The page of `lotlip look`, which is also part of the report."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lotlip.config.params import Params, load_params
from lotlip.data.index import CaptionIndex, UnitIndex, write_index
from lotlip.data.partitions import write_captions
from lotlip.data.records import Failure, ImageRecord, MeasuredCaption, Unit
from lotlip.init.look import look, write_page
from lotlip.report.inputs import load_inputs
from lotlip.report.look import Look, look_of, read_items
from lotlip.report.page import build_report
from lotlip.report.similar import similar_images, similar_texts
from tests.partitions import write_partition
from tests.test_init import data as data
from tests.test_init import run
from tests.test_report import Page, make_params, write_project

ATTACK = "<script>alert(1)</script>"


def image_bytes(seed: int, size: int = 64) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def caption(key: str, captioner: str, text: str, **measures: Any) -> MeasuredCaption:
    defaults = {"words": 9, "repetition": 0.0, "truncated": False, "control": 0, "mojibake": 0, "refusal": ""}
    defaults |= {"reasoning": "", "agreement": 1.0, "own_agreement": None, "next_agreement": None} | measures
    parts = [part.strip() for part in text.split(".") if part.strip()]
    return MeasuredCaption(key, captioner, text, parts, 9, "stop", "r", "p", **defaults)


def write_data(root: Path, params: Params) -> None:
    """Four images, the last of which is a small copy of the first; captions of `llava`."""
    records = [
        ImageRecord(f"p{n}", image_bytes(n % 3, 64 - 8 * n), "png", f"A picture of thing number {n}", 64, 64, "")
        for n in range(4)
    ]
    ingest = root / params.paths.ingest
    broken = Failure("p4", "p4.png", "the file ends early", "unreadable")
    unit = Unit("train", 0, tuple(f"p{n}" for n in range(5)))
    write_index(ingest, [write_partition(unit, [*records, broken], ingest)], UnitIndex)
    llava = [
        caption("p0", "llava", "One dog. It barks."),
        caption("p1", "llava", f"A cat. {ATTACK}. \x00", agreement=0.2, repetition=0.5, truncated=True),
        Failure("p2", "llava", f"the server said {ATTACK}", "rejected"),
        caption("p3", "llava", "It barks. One dog."),
    ]
    folder = root / params.paths.captions / "llava"
    write_index(folder, [write_captions(unit.name, llava, 4, folder)], CaptionIndex)


@pytest.fixture(scope="module")
def params() -> Params:
    table = {"kind": "table", "path": "t.csv"}
    text = {"config": {"hidden_size": 64}, "context_length": 16}
    return make_params(caption={"captioners": {"llava": table, "later": table}}, pretrain={"text": text})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_data(root, params)
    return root


@pytest.fixture(scope="module")
def look_result(project: Path, params: Params) -> Look:
    return look_of(params, project)


def test_similar_images_and_texts_are_grouped() -> None:
    hashes = np.array([0b0, 0b1111_0000_0000, 0b1, 0b11, 2**63 + 2**40 - 1], dtype=np.uint64)
    assert similar_images(hashes, 1) == [[0, 2, 3]]  # the first and the last one differ in two bits
    assert similar_images(hashes[:0], 1) == []
    texts = ["A red dog barks.", "barks, a RED dog", "", "", "a red dog barks loudly", "a cat"]
    assert similar_texts(texts, 1.0) == [[0, 1]]
    assert similar_texts(texts, 0.8) == [[0, 1, 4]]


def test_the_worst_captions_come_first(look_result: Look) -> None:
    assert [one.key for one in look_result.worst][:2] == ["p1", "p2"]
    (text,) = look_result.worst[0].texts
    assert {"agreement 20%", "repetition 50%", "no end"} <= set(text.measures)
    assert look_result.worst[1].texts[0].missing.startswith("rejected: the server said")
    assert look_result.notes == ["No captions of later yet."]


def test_lengths_and_near_duplicates_are_counted(look_result: Look) -> None:
    texts, unused = look_result.tables
    assert [[cell.text for cell in row[:3]] for row in texts.rows] == [["short", "4", "0"], ["llava", "3", "1"]]
    assert unused.rows[0][2].text == "the file ends early"
    (copies,) = look_result.images
    assert [one.key for one, _ in copies.members] == ["p0", "p3"]
    assert ("llava", 2) in [(group.kind, group.count) for group in look_result.texts]
    assert [row[-3].value for row in texts.rows] == [0.0, pytest.approx(1 / 3)]  # fraction longer than the context


def test_sampled_images_are_spread_over_the_data(project: Path, params: Params) -> None:
    assert [item.key for item in read_items(params, project, 2).items] == ["p0", "p3"]


def test_the_page_opens_from_disk_and_escapes_texts(look_result: Look, tmp_path: Path) -> None:
    folder = tmp_path / "look"
    text = write_page(look_result, folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags and ATTACK not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "\x00" not in text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.loads and all((folder / name).is_file() for name in page.loads)
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    write_page(look_result, folder)  # replaces its own page
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"contains mine\.txt"):
        write_page(look_result, folder)


@pytest.mark.slow
def test_data_that_was_not_ingested_is_read_from_its_source(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data / "captions.csv", data / "params.yaml")
    monkeypatch.chdir(data)
    text = look(load_params(data / "params.yaml"), data / "look", shown=3).read_text(encoding="utf-8")
    assert "30 of 30 images" in text and "<h4>detailed</h4>" in text
    assert text.count('class="seen"') == 6


@pytest.mark.slow
def test_the_report_links_to_the_page(tmp_path: Path) -> None:
    params = make_params(ablations={"lotlip": {}}, tables={}, findings={})
    write_project(tmp_path, params)
    write_data(tmp_path, params)
    page = build_report(load_inputs(params, tmp_path), tmp_path / "report")
    assert 'href="look/index.html"' in page.read_text(encoding="utf-8")
    assert "](look/index.html)" in (page.parent / "report.md").read_text(encoding="utf-8")
    assert ATTACK not in (page.parent / "look" / "index.html").read_text(encoding="utf-8")
