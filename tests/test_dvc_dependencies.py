"""dvc.yaml: a stage depends on the code that decides what it writes, and on no other code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from lotlip.core.code import ROOT, stage_files

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def definition(stage: str) -> dict[str, Any]:
    return STAGES[stage].get("do", STAGES[stage])


def files_of(stage: str) -> list[str]:
    """The files that decide what a stage of dvc.yaml writes."""
    name = definition(stage)["cmd"].split()[3]
    return [file.relative_to(ROOT).as_posix() for file in stage_files(name)]


def dependencies(stage: str) -> list[str]:
    """Its code dependencies."""
    return [path for path in definition(stage)["deps"] if path.startswith(("flows", "lotlip"))]


def covers(path: str, file: str) -> bool:
    return file == path or file.startswith(f"{path}/")


@pytest.mark.parametrize("stage", STAGES)
def test_all_code_that_decides_a_stages_results_is_among_its_dependencies(stage: str) -> None:
    missing = [file for file in files_of(stage) if not any(covers(path, file) for path in dependencies(stage))]
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_has_code_that_decides_the_stages_results(stage: str) -> None:
    files = files_of(stage)
    assert not [path for path in dependencies(stage) if not any(covers(path, file) for file in files)]


def stages_that_depend_on(file: str) -> set[str]:
    assert Path(ROOT, file).is_file()
    return {
        definition(stage)["cmd"].split()[3] for stage in STAGES if any(covers(d, file) for d in dependencies(stage))
    }


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("lotlip/report/page.py", {"report"}),
        ("lotlip/importing/official.py", {"image-tower"}),  # `pretrain.start` may name the authors' checkpoint
        ("lotlip/ingest/config.py", {"ingest", "report"}),
        ("lotlip/image_tower/config.py", {"image-tower"}),
        ("lotlip/caption/config.py", {"caption"}),
        ("lotlip/shard/config.py", {"shard"}),
        ("lotlip/pretrain/config.py", {"pretrain", "report"}),  # the report says how ablations differ
        ("lotlip/evaluate/config.py", {"baselines", "evaluate", "report"}),
        ("lotlip/report/config.py", {"report"}),
    ],
)
def test_an_edit_makes_only_what_it_decides_stale(file: str, stages: set[str]) -> None:
    assert stages_that_depend_on(file) == stages


def test_a_parse_that_another_thread_disturbs_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 raises SystemError then, although nothing is wrong with the file."""
    parse, failures = ast.parse, iter([SystemError("AST constructor recursion depth mismatch")] * 3)

    def disturbed(source: str) -> ast.AST:
        if error := next(failures, None):
            raise error
        return parse(source)

    expected = stage_files("report")
    monkeypatch.setattr(ast, "parse", disturbed)
    assert stage_files("report") == expected
    assert next(failures, None) is None
