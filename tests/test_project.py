"""`lotlip run` prepares a folder outside a checkout for the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from lotlip.init import project
from lotlip.init.project import set_up
from tests.tiny_pipeline import ROOT

CODE = ("dvc.yaml", "flows/reproduce.py", "lotlip/cli.py", "lotlip/data/bert-base-uncased/tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("ablations: {}\n")
    return tmp_path


def test_the_pipeline_is_copied_once(folder: Path) -> None:
    lines: list[str] = []
    set_up(folder, lines.append)
    assert lines == ["copied from the installed package: lotlip, flows, dvc.yaml, .dvcignore, .dvc/config"]
    for name in (*CODE, ".dvc/config"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert not list(folder.rglob("__pycache__"))
    (folder / "flows" / "reproduce.py").write_text("# mine\n")
    set_up(folder, lines.append)
    assert (folder / "flows" / "reproduce.py").read_text() == "# mine\n"
    assert len(lines) == 2 and lines[1].startswith("note: flows here and in the installed package differ")


def test_a_checkout_is_not_changed() -> None:
    lines: list[str] = []
    set_up(ROOT, lines.append)
    assert not lines


def test_other_folders_are_not_changed(folder: Path) -> None:
    (folder / "flows").mkdir()
    with pytest.raises(ValueError, match=r"flows is not the pipeline's code"):
        set_up(folder, print)
    assert sorted(path.name for path in folder.iterdir()) == ["flows", "params.yaml"]
    with pytest.raises(ValueError, match=r"has no params\.yaml; write one with `lotlip init`"):
        set_up(folder / "flows", print)


def test_nothing_is_copied_without_the_pipelines_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        set_up(folder, print)
    assert raised.value.name == "dvc"
    assert not (folder / "lotlip").exists()
