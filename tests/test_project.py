"""`lotlip run` prepares a folder outside a checkout for the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.reproduce import closing_message
from lotlip.config.params import load_params
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


@pytest.mark.parametrize(
    "text", ["stages:\n  hello: {cmd: echo hi}\n", "stages:\n  report: {cmd: echo hi}\n", "", "- 1"]
)
def test_another_pipeline_is_not_run(folder: Path, text: str) -> None:
    (folder / "dvc.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"dvc\.yaml is another pipeline's, .*; run in another folder"):
        set_up(folder, print)
    assert sorted(path.name for path in folder.iterdir()) == ["dvc.yaml", "params.yaml"]


def test_own_stages_beside_the_pipelines_are_kept(folder: Path) -> None:
    graph = folder / "dvc.yaml"
    graph.write_text(own := (ROOT / "dvc.yaml").read_text().replace("stages:", "stages:\n  hello: {cmd: echo hi}"))
    set_up(folder, print)
    assert graph.read_text() == own


def test_only_results_that_exist_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    announced = {"models": ["models"], "metrics": ["models", "scores"], "report": ["models", "scores"]}
    for folder, names in announced.items():
        Path(folder).mkdir()
        assert [line.split()[0] for line in closing_message(params, 60).splitlines()[2:-1]] == names
    Path("report/index.html").touch()
    assert f"report          {tmp_path / 'report' / 'index.html'}" in closing_message(params, 60)


def test_nothing_is_copied_without_the_pipelines_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        set_up(folder, print)
    assert raised.value.name == "dvc"
    assert not (folder / "lotlip").exists()
