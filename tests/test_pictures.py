"""Images are read by their names only."""

from __future__ import annotations

from pathlib import Path

import pytest

from lotlip.data.pictures import open_pictures
from tests.partitions import ingested

IMAGES = {f"key-{number}": f"image {number}".encode() for number in range(7)}


def test_images_of_a_folder_are_read_by_name(tmp_path):
    for name in ("b.png", "more/a.JPG", ".hidden/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    pictures = open_pictures(tmp_path)
    assert pictures.names == ["b.png", "more/a.JPG"]
    assert [pictures.read(name) for name in pictures.names] == [b"b.png", b"more/a.JPG"]


@pytest.mark.parametrize(
    ("split", "expected"), [(None, [4, 5, 6, 0, 1, 2, 3]), ("train", [0, 1, 2, 3]), ("test", [4, 5, 6])]
)
def test_ingested_images_are_read_by_key(tmp_path, split, expected):
    pictures = open_pictures(ingested(tmp_path, IMAGES), split)
    assert pictures.names == [f"key-{number}" for number in expected]
    assert {name: pictures.read(name) for name in pictures.names} == {name: IMAGES[name] for name in pictures.names}


def test_only_finished_partitions_are_read(tmp_path):
    ingested(tmp_path, IMAGES)
    (tmp_path / "train" / "part-00001.json").unlink()
    assert open_pictures(tmp_path, "train").names == ["key-0", "key-1"]


@pytest.mark.parametrize("name", ["../secret.png", "more/../../secret.png", "/etc/passwd", "b.txt", "B.png", ""])
def test_names_outside_the_folder_are_errors(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    for file in ("a.png", "b.txt"):
        (inside / file).write_bytes(b"")
    with pytest.raises(ValueError, match="has no picture"):
        open_pictures(inside).read(name)


def test_a_deleted_image_is_a_clear_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    pictures = open_pictures(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"^cannot be read: No such file or directory$"):
        pictures.read("a.png")


def test_a_source_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder of images"):
        open_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no image \(\.jpg, "):
        open_pictures(tmp_path)
    ingest: Path = ingested(tmp_path / "ingest", IMAGES)
    with pytest.raises(ValueError, match=r"ingest has no split 'val' \(it has test, train\)"):
        open_pictures(ingest, "val")
    with pytest.raises(ValueError, match="only that has splits; remove --split"):
        open_pictures(tmp_path, "test")
