"""Units that are sent to workers without the project's files: what is sent, and what may come back."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from flows.runtime import sent_unit
from flows.runtime.sent_unit import SentUnit, accept, pack, unpack
from flows.runtime.unit_work import answer
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.work import UnitFiles
from lotlip.ingest.config import ImagesConfig, SourceConfig
from lotlip.ingest.partition import Ingesting
from tests.test_folder_source import add_image
from tests.test_webdataset_source import samples, write_tar


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_files_are_sent_whole_or_in_parts_and_folders_with_links(project: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b").write_bytes(b"linked")
    Path("model").mkdir()
    Path("model/a").write_bytes(b"")
    Path("model/more").symlink_to(tmp_path / "outside")
    Path("data.tar").write_bytes(b"0123456789")
    Path("empty").mkdir()
    absent = [Path("absent"), Path("x" * 300), Path("nul\0"), tmp_path / "outside" / "b", Path("../outside/b")]
    reads = {Path("model"): None, Path("data.tar"): [(2, 3), (7, 1)], Path("empty"): None, **dict.fromkeys(absent)}
    unpack(pack(reads), tmp_path / "worker")
    found = {path.relative_to(tmp_path / "worker").as_posix(): path for path in (tmp_path / "worker").rglob("*")}
    assert set(found) == {"model", "model/a", "model/more", "model/more/b", "data.tar", "empty"}
    assert found["model/more/b"].read_bytes() == b"linked" and found["model/a"].read_bytes() == b""
    assert found["data.tar"].read_bytes() == bytes(2) + b"234" + bytes(2) + b"7"


@pytest.mark.parametrize("name", ["../x.tar", "/tmp/x.tar", "out/../../x.tar", "params.yaml", "out/other.tar"])
def test_a_file_that_the_unit_does_not_write_is_rejected(project: Path, name: str) -> None:
    files = UnitFiles({}, [Path("out/x.tar"), Path("out/x.json")])
    with pytest.raises(NonRetryableError, match="which its unit does not write"):
        accept({"out/x.json": [(0, b"{}")], name: [(0, b"bad")]}, files)
    assert not list(project.parent.rglob("x.*"))


def test_files_of_an_earlier_version_of_the_unit_are_removed(project: Path) -> None:
    old, kept, new = (Path(".lotlip/out") / name for name in ("old", "kept", "new"))
    old.parent.mkdir(parents=True)
    for path in (old, kept):
        path.write_text("before")
    accept({new.as_posix(): [(0, b"now")]}, UnitFiles({kept: None}, [old, kept, new]))
    assert {path.name: path.read_text() for path in old.parent.iterdir()} == {"kept": "before", "new": "now"}


class Copying:
    """Copies a file to another one."""

    def __init__(self, unit: str, source: Path, target: Path = Path("out")) -> None:
        self.unit, self.source, self.target = unit, source, target

    def files(self) -> UnitFiles:
        return UnitFiles({self.source: None}, [self.target], [Path("model")])

    def write(self, unit: str) -> list[UnitReport]:
        assert Path("model/weights").read_text() == "weights"
        self.target.write_bytes(self.source.read_bytes())
        return [UnitReport(unit, 1, 1, "", 0)]

    def sent(self) -> SentUnit:
        return SentUnit.of(self, self.unit, self.files(), "run")


COMMON = {"model": None, "model/weights": [(0, b"weights")]}


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the hash of a stage's code: the work here is no stage's."""
    monkeypatch.setattr(sent_unit, "code_hash", lambda _: "same")


def on_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, sent: SentUnit) -> Any:
    """What a worker in a folder answers."""
    folder.mkdir(exist_ok=True)
    request = pickle.dumps(sent)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return answer(request, COMMON)


def test_a_unit_runs_in_a_folder_of_its_own_and_its_files_come_back(project, tmp_path, monkeypatch, code) -> None:
    Path("in").write_text("text")
    reports, written = on_worker(monkeypatch, tmp_path / "worker", Copying("a", Path("in")).sent())
    assert [report.name for report in reports] == ["a"]
    assert written == {"out": [(0, b"text")]}
    assert not list((tmp_path / "worker").iterdir()) and not Path("out").exists()


def test_a_file_outside_the_project_must_be_on_the_worker(project, tmp_path, monkeypatch, code) -> None:
    mounted = tmp_path / "mounted"
    mounted.write_text("text")
    sent = Copying("a", mounted).sent()
    assert sent.files == {}
    _, written = on_worker(monkeypatch, tmp_path / "worker", sent)
    assert written == {"out": [(0, b"text")]}
    mounted.unlink()
    error = on_worker(monkeypatch, tmp_path / "worker", sent)
    assert isinstance(error, NonRetryableError) and f"has no {mounted}, which is not sent" in str(error)


def test_a_unit_that_writes_outside_the_project_is_not_sent(project, tmp_path, code) -> None:
    with pytest.raises(NonRetryableError, match=r"is not a path relative .*, and compute\.shared_folder is false"):
        Copying("a", Path("in"), tmp_path / "store" / "out").sent()


def test_a_worker_with_other_code_is_an_error(project, tmp_path, monkeypatch, code) -> None:
    sent = replace(Copying("a", Path("in")).sent(), code="other")
    error = on_worker(monkeypatch, tmp_path / "worker", sent)
    assert isinstance(error, NonRetryableError) and "install the same on all nodes" in str(error)


# --- sources ------------------------------------------------------------------------------------------------------


def folder_source() -> dict[str, Any]:
    for name in ("a.png", "b/c.png", "d.png", "a.PNG"):
        add_image(Path("images"), name, f"a {name[0]}")
    add_image(Path("images"), "no-caption.png", None)
    Path("images/alone.txt").write_text("no image")
    return {"kind": "folder", "path": "images"}


def csv_source() -> dict[str, Any]:
    images = [add_image(Path("images"), name) for name in ("a.png", "b/c.png")]
    names = ["a.png", str(images[1].resolve()), "missing.png", "../outside.png", ""]
    Path("../outside.png").write_bytes(images[0].read_bytes())
    Path("table.csv").write_text("".join(f"{row}\n" for row in ["image,caption", *(f"{name},text" for name in names)]))
    return {"kind": "csv", "path": "table.csv", "images": "images"}


def parquet_source() -> dict[str, Any]:
    image = add_image(Path("images"), "a.png").read_bytes()
    Path("tables").mkdir()
    for number in range(2):
        pq.write_table(pa.table({"image": [image] * 3, "caption": ["x", "y", ""]}), f"tables/{number}.parquet")
    return {"kind": "parquet", "path": "tables"}


def webdataset_source() -> dict[str, Any]:
    for number in range(2):
        write_tar(Path(f"tars/{number}.tar"), samples(3))
    Path("list.txt").write_text("cc = tars/*.tar\ntars/missing.tar\n")
    return {"kind": "webdataset", "path": "list.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("make", [folder_source, csv_source, parquet_source, webdataset_source])
def test_a_worker_reads_of_each_source_what_this_machine_reads(
    make: Callable[[], dict[str, Any]], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Ingesting(TypeAdapter(SourceConfig).validate_python(make()), ImagesConfig(), Path("out"))
    units = work.open().units(2)
    assert len(units) >= 2
    for number, unit in enumerate(units):
        expected = [*work.open().read(unit)]
        sent = pickle.dumps(replace(work, opened=work.open()))
        with monkeypatch.context() as patch:
            (tmp_path / str(number)).mkdir()
            unpack(pack(work.files(unit).reads), tmp_path / str(number))
            patch.chdir(tmp_path / str(number))
            assert [*pickle.loads(sent).open().read(unit)] == expected


def test_a_source_that_does_not_tell_its_files_is_an_error(project: Path, monkeypatch) -> None:
    work = Ingesting(TypeAdapter(SourceConfig).validate_python(folder_source()), ImagesConfig(), Path("out"))
    unit = work.open().units(2)[0]
    work = replace(work, opened=object())
    with pytest.raises(NonRetryableError, match="cannot tell which files a unit reads"):
        work.files(unit)
