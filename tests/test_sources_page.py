"""docs/sources.md: its examples are valid, and it documents every setting and every kind of failure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lotlip.caption.config import TableCaptionerConfig
from lotlip.config.params import load_params
from lotlip.core.section import merge
from lotlip.ingest.config import (
    CsvSourceConfig,
    FolderSourceConfig,
    ImagesConfig,
    JsonlSourceConfig,
    JsonSourceConfig,
    ParquetSourceConfig,
    WebDatasetSourceConfig,
)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join([*block, *next(iter(block.values()))]))
def test_examples_are_valid_in_params_yaml(block, tmp_path):
    demo = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if "source" in block.get("ingest", {}):
        del demo["ingest"]["source"]
    if "captioners" in block.get("caption", {}):
        del demo["caption"]["captioners"]
        demo |= {"ablations": {"lotlip": {}}, "finetune": {}, "reproduce": {}, "tables": {}, "findings": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merge(demo, block)), encoding="utf-8")
    load_params(tmp_path / "params.yaml")


def test_every_kind_of_source_has_an_example():
    shown = {block["ingest"]["source"]["kind"] for block in BLOCKS if "source" in block.get("ingest", {})}
    assert shown == {"folder", "webdataset", "parquet", "csv", "jsonl", "json"}


@pytest.mark.parametrize(
    "section",
    [
        FolderSourceConfig,
        WebDatasetSourceConfig,
        ParquetSourceConfig,
        CsvSourceConfig,
        JsonlSourceConfig,
        JsonSourceConfig,
        ImagesConfig,
        TableCaptionerConfig,
    ],
)
def test_every_setting_is_documented(section):
    missing = [name for name in section.model_fields if not re.search(rf"`{name}`|\b{name}: ", PAGE)]
    assert missing == []


def test_exactly_the_kinds_of_failures_and_warnings_are_documented():
    files = [*sorted((ROOT / "lotlip/ingest").rglob("*.py")), ROOT / "lotlip/data/duplicates.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    in_code = set(
        re.findall(r'(?:Failure\(|ItemWarning\(|problem=\(|yield name,)[^\n]*"([a-z]+(?:-[a-z]+)?)"\)*,?\n', code)
    )
    described = set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, flags=re.MULTILINE))
    assert described - {"unit"} == {kind for kind in described if f'"{kind}"' in code} - {"unit"}
    assert in_code <= described
    assert len(in_code) > 8
