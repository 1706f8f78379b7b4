"""Kinds that other packages add to sections of params.yaml by entry points."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from lotlip.caption.captioners import open_captioner
from lotlip.config.params import ConfigError, Params, load_params
from lotlip.core.paths import Paths
from lotlip.core.variants import Variants
from lotlip.data.records import Caption, ImageRecord
from lotlip.evaluate.benchmarks import open_benchmark
from lotlip.ingest.sources import open_source

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = """
[lotlip.sources]
dots = dots_for_lotlip:DotSource
broken = dots_for_lotlip.nothing:Source
bare = dots_for_lotlip:Bare
pathless = dots_for_lotlip:Pathless
[lotlip.captioners]
parrot = dots_for_lotlip:Parrot
[lotlip.benchmarks]
dots = dots_for_lotlip:benchmark
[lotlip.image_towers]
blind = dots_for_lotlip:BlindTower
"""
PACKAGE = """
import io
from pathlib import Path
from typing import Literal

from PIL import Image

from lotlip.core.section import Count, Section
from lotlip.data.records import Caption, Unit
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.ingest.record_validation import RecordValidator


class DotSource:
    class Config(Section):
        kind: Literal["dots"]
        path: Path
        dots: Count = 3

    def __init__(self, settings, images):
        self.settings, self.validator = settings, RecordValidator(images)

    def units(self, partition_size):
        return [Unit("train", 0, tuple(str(number) for number in range(self.settings.dots)))]

    def read(self, unit):
        for item in unit.items:
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (int(item), 0, 0)).save(file, "PNG")
            yield self.validator(item, item, file.getvalue(), f"dot {item}", "png")

    def state(self, unit):
        return None

    def split(self, key):
        return "train"


class Parrot:
    class Config(Section):
        kind: Literal["parrot"]
        path: Path
        times: Count = 2

    prompt = ""
    revision = "parrot-1"

    def __init__(self, name, settings, count_tokens, compute):
        self.name, self.settings, self.count = name, settings, count_tokens
        self.about = {"revision": self.revision, "times": settings.times}

    def caption(self, records):
        for record in records:
            text = " ".join([f"{record.short_caption}."] * self.settings.times)
            yield Caption(record.key, self.name, text, [text], self.count(text), "stop", self.revision, self.prompt)


class BenchmarkSection(Section):
    kind: Literal["dots"]


def benchmark(name, settings, paths, captioners):
    return Benchmark(name, ["a"], lambda number: b"", {})


benchmark.Config = BenchmarkSection


class BlindTower:
    class Config(Section):
        kind: Literal["blind"]


class Bare:
    pass


class Pathless:
    class Config(Section):
        kind: Literal["pathless"]
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sys.path with a distribution that adds kinds."""
    folder = tmp_path / "site-packages"
    about = folder / "dots_for_lotlip-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dots-for-lotlip\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "dots_for_lotlip.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "dots_for_lotlip", raising=False)
    return folder


def params(tmp_path: Path, **changes: Any) -> Params:
    """The demo's parameters with the added kinds, and with changes to the source."""
    data = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    data["ingest"]["source"] = {"kind": "dots", "path": "dots", "dots": 2, **changes}
    data["caption"]["captioners"]["llava"] = {"kind": "parrot", "path": "parrot"}
    data["evaluate"]["benchmarks"]["mine"] = {"kind": "dots"}
    data["image_tower"] = {"kind": "blind"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    return load_params(tmp_path / "params.yaml")


def problem(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        params(tmp_path, **changes)
    (line,) = caught.value.problems
    return line


@pytest.mark.slow
def test_sources_and_captioners_of_another_package_are_used(installed: Path, tmp_path: Path) -> None:
    loaded = params(tmp_path)
    source = open_source(loaded.ingest.source, loaded.ingest.images)
    (unit,) = source.units(10)
    records = [record for record in source.read(unit) if isinstance(record, ImageRecord)]
    assert [record.short_caption for record in records] == ["dot 0", "dot 1"]
    captioner = open_captioner("llava", loaded.caption.captioners["llava"], "bert-base-uncased")
    captions = [caption for caption in captioner.caption(records) if isinstance(caption, Caption)]
    assert [(caption.text, caption.captioner) for caption in captions] == [
        ("dot 0. dot 0.", "llava"),
        ("dot 1. dot 1.", "llava"),
    ]


@pytest.mark.slow
def test_a_function_may_be_a_benchmark(installed: Path, tmp_path: Path) -> None:
    settings = params(tmp_path).evaluate.benchmarks["mine"]
    assert open_benchmark("mine", settings, Paths(), []).images == ["a"]


@pytest.mark.slow
def test_settings_of_added_kinds_are_read_as_written(installed: Path, tmp_path: Path) -> None:
    loaded = params(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dumped = loaded.model_dump(mode="json", exclude_unset=True)
        assert Params.model_validate_json(loaded.model_dump_json()) == loaded
    assert dumped["ingest"]["source"] == {"kind": "dots", "path": "dots", "dots": 2}
    assert dumped["caption"]["captioners"]["llava"] == {"kind": "parrot", "path": "parrot"}
    assert loaded.model_dump(mode="json")["caption"]["captioners"]["llava"]["times"] == 2


@pytest.mark.slow
def test_an_unknown_kind_lists_the_added_ones(installed: Path, tmp_path: Path) -> None:
    assert problem(tmp_path, kind="dotes") == (
        "ingest.source.kind: unknown kind 'dotes'; did you mean 'dots'? "
        "(there are: scenes, folder, webdataset, parquet, csv, jsonl, json, bare, broken, dots, pathless)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"size": 3}, "ingest.source.size: unknown key (known here: dots, kind, path)"),
        ({"dots": 0}, "ingest.source.dots: Input should be greater than or equal to 1, not 0"),
    ],
)
def test_an_invalid_value_of_an_added_kind_is_an_error(
    installed: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    assert problem(tmp_path, **changes) == line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("broken", "dots-for-lotlip cannot be imported (ModuleNotFoundError"),
        ("bare", "needs an attribute Config"),
        ("pathless", "Config lacks the field path"),
    ],
)
def test_an_unusable_entry_point_is_an_error(installed: Path, tmp_path: Path, kind: str, reason: str) -> None:
    line = problem(tmp_path, kind=kind)
    assert line.startswith(f"ingest.source.kind: entry point {kind} of lotlip.sources") and reason in line


def test_two_packages_with_the_same_kind_are_an_error(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "others" / "other-2.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (about / "entry_points.txt").write_text("[lotlip.sources]\ndots = other:Dots\n")
    monkeypatch.syspath_prepend(tmp_path / "others")
    with pytest.raises(ValueError, match=r"several packages add dots .*\(dots-for-lotlip, other\)"):
        Variants("lotlip.sources").section("dots")


@pytest.mark.integration
def test_loading_parameters_imports_neither_torch_nor_the_code_of_a_kind() -> None:
    code = """
        import sys
        from lotlip.config.params import load_params
        load_params("params.yaml")
        heavy = {"torch", "timm", "transformers", "pandas", "lotlip.demo", "lotlip.ingest.sources"}
        sys.exit(" ".join(sorted(heavy & set(sys.modules))) or None)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
