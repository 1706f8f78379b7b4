"""docs/params.md matches the configuration types and describes every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lotlip.config.reference import PAGE, SectionKeys, reference, sections

ROOT = Path(__file__).parent.parent
SECTIONS = list(sections())


def test_the_page_is_current():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == reference(), "run `make docs` and commit docs/params.md"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.name or 'file'}-{section.kind}")
def test_every_key_has_a_description_and_a_type(section: SectionKeys):
    assert section.about
    assert [key.name for key in section.keys if not key.meaning or key.type == "any value"] == []


def test_nested_sections_and_all_kinds_of_a_section_are_listed():
    keys_of = {(section.name, section.kind): {key.name: key for key in section.keys} for section in SECTIONS}
    assert {kind for name, kind in keys_of if name == "ingest.source"} == {
        "scenes", "folder", "webdataset", "parquet", "csv", "jsonl", "json",
    }  # fmt: skip
    tower = keys_of["pretrain.text", ""]
    assert tower["pretrain.text.context_length"].default == "`128`"
    assert tower["pretrain.text.context_length"].limits == "≥ 8; ≤ 512"
    assert (
        keys_of["pretrain.text.position_interpolation", ""]["pretrain.text.position_interpolation.factor"].type
        == "integer"
    )
    assert keys_of["evaluate.benchmarks.NAME", "scenes"]["evaluate.benchmarks.NAME.size"].default == "required"
    assert ("caption.captioners.NAME", "endpoint") in keys_of and ("registry", "") in keys_of
