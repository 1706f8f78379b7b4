"""dvc.yaml: a stage depends on exactly the code that decides its results."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.runtime.edits import check_watched_parameters
from lotlip.caption.config import CaptionConfig
from lotlip.config.params import load_params
from lotlip.core import code
from lotlip.core.code import ROOT, stage_files
from lotlip.core.section import ConfigError
from lotlip.evaluate.config import EvaluateConfig

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def definition(stage: str) -> dict[str, Any]:
    return STAGES[stage].get("do", STAGES[stage])


def files_of(stage: str) -> list[str]:
    """The files that decide the results of a stage of dvc.yaml."""
    name = definition(stage)["cmd"].split()[3]
    return [file.relative_to(ROOT).as_posix() for file in stage_files(name)]


def dependencies(stage: str) -> list[str]:
    """The code dependencies of a stage."""
    return [path for path in definition(stage)["deps"] if path.startswith(("flows", "lotlip"))]


def covers(path: str, file: str) -> bool:
    return file == path or file.startswith(f"{path}/")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_cover_the_code_that_decides_results(stage: str) -> None:
    missing = [file for file in files_of(stage) if not any(covers(path, file) for path in dependencies(stage))]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_contains_code_that_decides_results(stage: str) -> None:
    files = files_of(stage)
    assert not [path for path in dependencies(stage) if not any(covers(path, file) for file in files)]


def test_dvc_watches_every_setting_that_decides_captions() -> None:
    deciding = {f"caption.{name}" for name in set(CaptionConfig.model_fields) - {"captioners"}}
    assert set(definition("caption")["params"]) == deciding | {"caption.captioners.${key}"}


def test_dvc_watches_every_setting_that_decides_scores() -> None:
    deciding = {f"evaluate.{name}" for name in EvaluateConfig.model_fields}
    for stages in (("evaluate", "baselines"), ("evaluate-finetune", "baselines")):
        assert {name for stage in stages for name in definition(stage)["params"]} == deciding | {"caption.captioners"}
    assert "evaluate.precision" in set(definition("evaluate")["params"]) & set(definition("baselines")["params"])


@pytest.mark.parametrize(
    "path",
    [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml")), *ROOT.glob("examples/*/params.yaml")],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_params_files_have_every_parameter_that_dvc_watches(path: Path) -> None:
    """DVC does not know the defaults."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    watched = {name for stage in STAGES for name in definition(stage)["params"] if "${" not in name}
    missing = []
    for name in watched:
        found = values
        for part in name.split("."):
            found = found.get(part, missing) if isinstance(found, dict) else missing
        if found is missing:
            missing.append(name)
    assert not missing


def test_a_missing_parameter_is_an_error_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC itself would fail at the first stage that watches it, which may be after hours of training."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    del values["evaluate"]["precision"], values["findings"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        check_watched_parameters(load_params())
    assert "add them with these defaults" in str(error.value)
    assert sorted(line.split(": ", 1)[0] for line in error.value.problems) == ["evaluate.precision", "findings"]
    assert 'evaluate.precision: "fp32"' in error.value.problems
    for text in ("stages: {own: {cmd: x, params: [train.lr]}, other: {cmd: y}}", "stages: {empty: }", "stages:"):
        (tmp_path / "dvc.yaml").write_text(text)
        check_watched_parameters(load_params())  # DVC names what params.yaml cannot have, and what is no stage
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    values["evaluate"]["precision"], values["findings"] = "fp32", {}
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    check_watched_parameters(load_params())


def stages_that_depend_on(file: str) -> set[str]:
    assert Path(ROOT, file).is_file()
    return {
        definition(stage)["cmd"].split()[3] for stage in STAGES if any(covers(d, file) for d in dependencies(stage))
    }


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("lotlip/report/page.py", {"report"}),
        ("lotlip/importing/official.py", {"image-tower"}),  # `pretrain.start` may be a released checkpoint
        ("lotlip/ingest/config.py", {"ingest", "report"}),
        ("lotlip/image_tower/config.py", {"image-tower"}),
        ("lotlip/caption/config.py", {"caption"}),
        ("lotlip/shard/config.py", {"shard"}),
        ("lotlip/pretrain/config.py", {"pretrain", "report"}),  # the report shows how ablations differ
        ("lotlip/evaluate/config.py", {"baselines", "evaluate", "report"}),
        ("lotlip/report/config.py", {"report"}),
    ],
)
def test_an_edit_makes_only_dependent_stages_stale(file: str, stages: set[str]) -> None:
    assert stages_that_depend_on(file) == stages


@pytest.mark.slow
def test_files_that_processes_and_editors_leave_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such files come and go: Python writes compiled code under a temporary name, Emacs locks a file with a link."""
    for package in ("flows", "lotlip"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ingest = files_of("ingest")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    expected = stage_files("ingest")
    assert [file.relative_to(tmp_path).as_posix() for file in expected] == ingest
    package = tmp_path / "lotlip" / "ingest"
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "config.cpython-311.pyc").touch()
    (package / "__pycache__" / "config.cpython-311.pyc.139624169453840").touch()
    (package / ".#config.py").symlink_to("user@host.1234")
    (package / ".config.py.swp").touch()
    assert stage_files("ingest") == expected
    (package / "words.txt").touch()
    assert stage_files("ingest") == sorted([*expected, package / "words.txt"])


@pytest.mark.slow
def test_a_parse_disturbed_by_another_thread_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 then raises SystemError, although the file is valid."""
    parse, failures = ast.parse, iter([SystemError("AST constructor recursion depth mismatch")] * 3)

    def disturbed(source: str) -> ast.AST:
        if error := next(failures, None):
            raise error
        return parse(source)

    expected = stage_files("report")
    code._modules.cache_clear()
    monkeypatch.setattr(ast, "parse", disturbed)
    assert stage_files("report") == expected
    assert next(failures, None) is None
