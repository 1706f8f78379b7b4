"""The source `folder`: records, failures and splits."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from lotlip.data.records import KEY_PATTERN, Failure, ImageRecord, Unit
from lotlip.ingest.config import FolderSourceConfig as Settings
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.sources import open_source
from lotlip.ingest.sources.folder import FolderSource
from tests.partitions import write_partition
from tests.plugins import AVIF, HEIC, JXL


def add_image(root: Path, name: str, caption: str | bytes | None = "a red dot", size: tuple[int, int] = (4, 3)) -> Path:
    """Writes an image below `root`, and its caption, if any."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    Image.new("RGB", size, "red").save(image, "png")
    path.write_bytes(image.getvalue())
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(data)
    return path


def open_folder(root: Path, **settings: float) -> FolderSource:
    return FolderSource(Settings(kind="folder", path=root, **settings), ImagesConfig())


def read_all(root: Path) -> dict[str, ImageRecord | Failure]:
    """Item → its record or failure."""
    source = open_folder(root)
    units = source.units(3)
    return {item: result for unit in units for item, result in zip(unit.items, source.read(unit), strict=True)}


def read_only(root: Path) -> ImageRecord | Failure:
    (result,) = read_all(root).values()
    return result


def read_failure(root: Path) -> Failure:
    result = read_only(root)
    assert isinstance(result, Failure)
    return result


def test_an_image_and_its_caption_become_a_record(tmp_path):
    path = add_image(tmp_path, "dogs/My dog.v2.PNG", "  a dog\n\n on\ta lawn \n", size=(7, 5))
    record = read_only(tmp_path)
    assert isinstance(record, ImageRecord)
    assert record == ImageRecord(
        key="dogs_My_dog_v2-7526bf664ed3",
        image=path.read_bytes(),
        extension="png",
        short_caption="a dog on a lawn",
        width=7,
        height=5,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    assert KEY_PATTERN.fullmatch(record.key)


def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path):
    add_image(tmp_path, "a.png", b"\xef\xbb\xbfa cat")
    assert read_only(tmp_path).short_caption == "a cat"


def test_hidden_and_other_files_are_ignored(tmp_path):
    add_image(tmp_path, "a.png")
    add_image(tmp_path, ".hidden.png")
    add_image(tmp_path, ".cache/b.png")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "README.txt").write_text("about the data set")
    add_image(tmp_path, "__MACOSX/b.png")
    add_image(tmp_path, "._a.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "sheet.pdf").write_text("Pillow writes these, but cannot read them")
    assert list(read_all(tmp_path)) == ["a.png"]


def test_a_caption_without_an_image_is_a_failure(tmp_path):
    add_image(tmp_path, "a.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/alone.txt").write_text("a caption")
    failed = read_all(tmp_path)["deep/alone.txt"]
    assert isinstance(failed, Failure)
    assert (failed.kind, failed.where) == ("missing", "deep/alone.txt")


def test_file_extensions_may_be_uppercase(tmp_path):
    add_image(tmp_path, "A.PNG", caption=None)
    (tmp_path / "A.TXT").write_text("a dog")
    assert read_only(tmp_path).short_caption == "a dog"


@pytest.mark.parametrize("ending", ["svg", "psd", "nef", "DNG", "ico", "tga"])
def test_images_of_other_formats_are_failures(tmp_path, ending):
    add_image(tmp_path, "a.png")
    add_image(tmp_path, f"b.{ending}").write_bytes(b"8BPS or another format")
    failed = read_all(tmp_path)[f"b.{ending}"]
    assert isinstance(failed, Failure)
    assert failed.kind == "unreadable"


@pytest.mark.parametrize("ending", ["heic", "HEIF", "jxl", "avif"])
def test_failures_name_a_missing_plug_in(tmp_path, ending, no_plugins):
    data = {"heic": HEIC, "HEIF": HEIC, "jxl": JXL, "avif": AVIF}[ending]
    add_image(tmp_path, f"a.{ending}").write_bytes(data)
    failed = read_failure(tmp_path)
    assert failed.kind == "unreadable"
    assert {"heic": "pillow-heif", "HEIF": "pillow-heif", "jxl": "pillow-jxl-plugin", "avif": "pillow-avif-plugin"}[
        ending
    ] in failed.reason


def test_images_are_read_with_an_installed_plug_in(tmp_path, heif_plugin):
    path = add_image(tmp_path, "a.heic")
    path.write_bytes(HEIC)
    record = read_only(tmp_path)
    assert isinstance(record, ImageRecord)
    assert (record.image, record.extension, record.width) == (HEIC, "heic", 5)


@pytest.mark.parametrize("keep", [0, 10, 50])
def test_a_broken_image_is_unreadable(tmp_path, keep):
    path = add_image(tmp_path, "a.png")
    path.write_bytes(path.read_bytes()[:keep])
    failed = read_failure(tmp_path)
    assert (failed.kind, failed.key, failed.where) == ("unreadable", "a", "a.png")


def test_a_text_with_the_extension_of_an_image_is_unreadable(tmp_path):
    add_image(tmp_path, "a.jpg").write_text("404 not found")
    assert read_failure(tmp_path).kind == "unreadable"


def test_a_broken_link_is_unreadable_and_its_reason_hides_the_path(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    failed = read_failure(tmp_path)
    assert failed.kind == "unreadable"
    assert str(tmp_path) not in failed.reason + failed.where


def test_a_missing_caption_is_a_failure(tmp_path):
    add_image(tmp_path, "deep/a.png", caption=None)
    failed = read_failure(tmp_path)
    assert (failed.kind, failed.where) == ("missing", "deep/a.txt")


def test_a_caption_of_whitespace_is_empty(tmp_path):
    add_image(tmp_path, "a.png", " \n\t\n")
    assert read_failure(tmp_path).kind == "empty"


def test_a_caption_in_another_encoding_fails(tmp_path):
    add_image(tmp_path, "a.png", "ein Käse".encode("latin-1"))
    failed = read_failure(tmp_path)
    assert failed.kind == "encoding"
    assert "at byte 5" in failed.reason


def test_a_folder_named_like_a_caption_is_a_failure(tmp_path):
    add_image(tmp_path, "a.png", caption=None)
    (tmp_path / "a.txt").mkdir()
    assert read_failure(tmp_path).kind == "unreadable"


def test_the_first_of_several_files_with_a_key_is_kept(tmp_path):
    names = ["a/b.png", "a_b.png", "a/b.jpg", "c.png"]
    for name in names:
        add_image(tmp_path, name)
    results = read_all(tmp_path)
    kinds = {item: result.kind if isinstance(result, Failure) else "" for item, result in results.items()}
    assert kinds == {"a/b.jpg": "", "a/b.png": "duplicate", "a_b.png": "duplicate", "c.png": ""}
    assert "a/b.jpg" in results["a_b.png"].reason


def test_duplicates_are_found_across_units(tmp_path):
    add_image(tmp_path, "a.jpg")
    add_image(tmp_path, "a.png")
    units = open_folder(tmp_path).units(1)
    assert [len(unit.items) for unit in units] == [1, 1]
    (second,) = open_folder(tmp_path).read(units[1])  # a new source, which has not listed its units
    assert isinstance(second, Failure)
    assert second.kind == "duplicate"


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        add_image(tmp_path, name)
    except OSError:
        pytest.skip("this file system refuses such names")
    (tmp_path / name).with_suffix(".txt").unlink()
    source = open_folder(tmp_path)
    (unit,) = source.units(10)
    report = write_partition(unit, source.read(unit), tmp_path / "out")
    assert report.failures[0].where == "caf\\xe9.txt"
    assert report.failures[0].key.startswith("caf_-")


def test_every_item_is_in_one_unit_of_one_split(tmp_path):
    for number in range(60):
        add_image(tmp_path, f"{number:02d}.png")
    units = open_folder(tmp_path, val_share=0.2, test_share=0.3).units(8)
    items = [item for unit in units for item in unit.items]
    assert sorted(items) == [f"{number:02d}.png" for number in range(60)]
    assert {unit.split for unit in units} == {"train", "val", "test"}
    for split in ("train", "val", "test"):
        split_units = [unit for unit in units if unit.split == split]
        assert [unit.index for unit in split_units] == list(range(len(split_units)))
        assert all(len(unit.items) == 8 for unit in split_units[:-1])
        assert [item for unit in split_units for item in unit.items] == sorted(
            item for unit in split_units for item in unit.items
        )


def split_of(source: FolderSource) -> dict[str, str]:
    return {item: unit.split for unit in source.units(5) for item in unit.items}


def test_splits_have_about_their_shares(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(1000):
        (tmp_path / "images" / f"{number}.png").touch()
    splits = list(split_of(open_folder(tmp_path, val_share=0.1, test_share=0.2)).values())
    assert 60 < splits.count("val") < 140
    assert 150 < splits.count("test") < 250


def test_the_split_of_a_file_depends_on_its_key_and_the_seed(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.png").touch()
    before = split_of(open_folder(tmp_path, val_share=0.3, test_share=0.3))
    for number in range(40, 60):
        (tmp_path / f"{number}.png").touch()
    after = split_of(open_folder(tmp_path, val_share=0.3, test_share=0.3))
    assert after.items() >= before.items()
    assert split_of(open_folder(tmp_path, val_share=0.3, test_share=0.3, split_seed=1)) != after


def test_everything_is_for_training_without_shares(tmp_path):
    add_image(tmp_path, "a.png")
    assert open_folder(tmp_path, val_share=0, test_share=0).units(1) == [Unit("train", 0, ("a.png",))]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; set ingest\.source\.path in params\.yaml"):
        open_folder(tmp_path / "nowhere")


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"has no image; set ingest\.source\.path in params\.yaml"):
        open_folder(tmp_path)


def test_open_source_opens_a_folder(tmp_path):
    add_image(tmp_path, "a.png")
    assert isinstance(open_source(Settings(kind="folder", path=tmp_path)), FolderSource)


@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_the_state_of_a_unit_depends_on_images_and_captions(tmp_path, ending):
    add_image(tmp_path, "a.png", caption=None)
    caption = tmp_path / f"a{ending}"
    states = []
    for text in ("a dog", "a large dog", None):
        caption.unlink() if text is None else caption.write_text(text)
        source = open_folder(tmp_path)
        states.append([source.state(unit) for unit in source.units(10)])
    assert len(set(map(tuple, states))) == 3


def test_formats_of_pillow_precede_those_of_plug_ins(tmp_path):
    add_image(tmp_path, "a.jpg")
    (tmp_path / "a.heic").write_bytes(HEIC)
    items = read_all(tmp_path)
    assert isinstance(items["a.jpg"], ImageRecord)
    assert items["a.heic"].kind == "duplicate"
