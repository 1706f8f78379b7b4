"""Folders that DVC cannot hash are errors naming the entry and the key of params.yaml."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from lotlip.config.params import load_params
from lotlip.data.paths import check_inputs, file_state
from tests.test_folder_source import add_image

ROOT = Path(__file__).parents[1]
LATIN = os.fsdecode(b"caf\xe9.png")


def broken_link(folder: Path) -> None:
    (folder / "b.png").symlink_to("nowhere.png")


def circular_link(folder: Path) -> None:
    (folder / "c.png").symlink_to("c.png")


def circle_of_two_links(folder: Path) -> None:
    (folder / "c.png").symlink_to("d.png")
    (folder / "d.png").symlink_to("c.png")


def hidden_broken_link(folder: Path) -> None:
    (folder / ".b").symlink_to("nowhere")


def not_utf8(folder: Path) -> None:
    try:
        (folder / LATIN).touch()
    except OSError:
        pytest.skip("this file system refuses such names")


def folder_not_utf8(folder: Path) -> None:
    try:
        (folder / os.fsdecode(b"f\xfc")).mkdir()
    except OSError:
        pytest.skip("this file system refuses such names")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


DEFECTS = [
    (broken_link, "b.png"), (circular_link, "c.png"), (circle_of_two_links, "d.png"),
    (hidden_broken_link, ".b"), (not_utf8, "caf\\xe9.png"),
    (folder_not_utf8, "f\\xfc"), (pipe, "pipe.png"),
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with valid folders of images, evaluation images, a benchmark and a captioner."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "profiles" / "own-images.yaml", "params.yaml")
    for name in ("my-images", "evaluated", "bench", "bench-images", "tables"):
        add_image(tmp_path / name, "deep/a.png")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["ingest"]["evaluation_images"] = ["evaluated"]
    params["evaluate"]["benchmarks"]["urban-1k"] = {"folder": "bench", "images": "bench-images"}
    params["caption"]["captioners"] = {"mine": {"kind": "table", "path": "tables"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such entries")
@pytest.mark.parametrize(("plant", "name"), DEFECTS, ids=[plant.__name__ for plant, _ in DEFECTS])
@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("my-images", "ingest.source.path"),
        ("evaluated", "ingest.evaluation_images"),
        ("bench", "evaluate.benchmarks.urban-1k.folder"),
        ("bench-images", "evaluate.benchmarks.urban-1k.images"),
        ("tables", "caption.captioners.mine.path"),
    ],
)
def test_an_entry_that_dvc_cannot_hash_is_an_error_naming_its_key(project, plant, name, folder, key):
    plant(project / folder / "deep")
    params = load_params()
    with pytest.raises(ValueError) as raised:
        check_inputs(params.inputs())
    message = str(raised.value)
    assert f"{folder}/deep/{name}" in message
    assert key in message
    message.encode()
    if key.startswith("ingest"):
        with pytest.raises(ValueError, match=key):
            check_inputs(params.ingest.inputs())


def test_valid_folders_and_links_pass(project):
    (project / "my-images/link.png").symlink_to("deep/a.png")
    (project / "my-images/loop").symlink_to(".")
    (project / "my-images/café 犬.png").touch()
    check_inputs(load_params().inputs())


def test_a_path_that_is_a_broken_link_is_an_error(project):
    shutil.rmtree("my-images")
    Path("my-images").symlink_to("gone")
    with pytest.raises(ValueError, match=r"my-images.*ingest\.source\.path|ingest\.source\.path.*my-images"):
        check_inputs(load_params().inputs())


def test_images_of_a_table_are_checked(project):
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("t.csv").write_text("image,caption\n")
    params["ingest"]["source"] = {"kind": "csv", "path": "t.csv", "images": "my-images"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    broken_link(project / "my-images")
    with pytest.raises(ValueError, match=r"ingest\.source\.images"):
        check_inputs(load_params().ingest.inputs())


def test_reproduce_checks_paths_first(project, monkeypatch):
    from flows import reproduce

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    for name in ("fork_server", "prefect_server", "run_dvc"):
        monkeypatch.setattr(reproduce, name, started)
    broken_link(project / "my-images")
    with pytest.raises(ValueError, match=r"my-images/b\.png"):
        reproduce.reproduce(load_params(), [[]])


def test_reproduce_makes_the_folder_of_captions(project, monkeypatch):
    """Stage `shard` depends on it in dvc.yaml, but without captioners no stage writes it."""
    from flows import reproduce

    def runs(_: object) -> bool:
        assert list(Path("elsewhere/captions").iterdir())  # DVC warns of an empty folder
        return True

    monkeypatch.setattr(reproduce, "is_up_to_date", runs)
    params = load_params()
    paths = params.paths.model_copy(update={"captions": Path("elsewhere/captions")})
    caption = params.caption.model_copy(update={"captioners": {}})
    reproduce.reproduce(params.model_copy(update={"paths": paths, "caption": caption}), [[]])


def test_the_state_of_a_file_depends_on_permissions_and_contents(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    first = file_state(path)
    assert file_state(path) == first
    status = path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_state(path) != first
    path.unlink()
    assert isinstance(file_state(path), str)
