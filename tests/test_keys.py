"""Keys: different names have different keys in every script, and tables use the same rule."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lotlip.caption.captioners.table import TableCaptioner
from lotlip.caption.config import TableCaptionerConfig as TableSettings
from lotlip.data.keys import is_key, key_of, prefix_of
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.ingest.config import FolderSourceConfig as FolderSettings
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.sources.folder import FolderSource
from tests.test_folder_source import add_image


@pytest.mark.parametrize(
    "name", ["0.jpg", "./0.jpg", "train-000001", "000000012", "dogs/7.PNG", "a_b-c", "cc3m/00000/1.webp"]
)
def test_a_plain_name_keeps_its_key(name):
    stem = name.removeprefix("./").rsplit(".", 1)[0] if "." in name.removeprefix("./") else name
    assert key_of(name) == stem.replace("/", "_")


NAMES = [
    "собака 1.jpg", "собака 2.jpg", "кошка 1.jpg", "犬.jpg", "猫.jpg", "My dog.jpg", "My.dog.jpg", "My+dog.jpg",
    "My_dog.jpg", " a.jpg", "a .jpg", "a.jpg", "naïve.jpg", "naive.jpg", "ß.jpg", "v1.5", "v1_5", "v15",
    unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg"), "cafe.jpg", "caf\udce9.jpg",
]  # fmt: skip


def test_different_names_have_different_keys():
    keys = [key_of(name) for name in NAMES]
    assert all(map(is_key, keys))
    assert len(set(keys)) == len(NAMES)


def test_a_key_is_readable_and_maps_to_itself():
    assert key_of("My café.jpg").startswith("My_cafe-")
    for name in NAMES:
        assert key_of(key_of(name)) == key_of(name)


def test_a_folder_gives_the_same_key_in_paths_and_prefixes():
    name = "собаки v1/кот.jpg"
    assert key_of(name) == key_of("кот.jpg", prefix_of(Path("/data/собаки v1/t.csv"), Path("/data")))
    assert key_of("cc3m/кот.jpg").startswith("cc3m_")


@pytest.mark.parametrize("name", ["", "  ", "./"])
def test_an_empty_name_is_an_error(name):
    assert not is_key(key_of(name))


def captioner(path: Path, rows: list[tuple[str, str]], **settings) -> TableCaptioner:
    import pandas as pd

    pd.DataFrame(rows, columns=["key", "text"]).to_csv(path, index=False)
    return TableCaptioner("mine", TableSettings(kind="table", path=path, captioner=None, **settings), len)


def record(key: str) -> ImageRecord:
    return ImageRecord(key, b"", "png", "a", 1, 1, "")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_sixty_images_with_similar_names_get_their_own_captions(tmp_path, form):
    words = ("собака", "котики", "鳥", "魚", "été", "ète")
    names = [unicodedata.normalize(form, f"{word} {number}.png") for word in words for number in range(30)]
    for number, name in enumerate(names):
        add_image(tmp_path / "images", name, name, size=(10 + number % 20, 10 + number // 20))
    source = FolderSource(FolderSettings(kind="folder", path=tmp_path / "images"), ImagesConfig())
    records = [item for unit in source.units(50) for item in source.read(unit)]
    assert not [item for item in records if isinstance(item, Failure)]
    table = captioner(tmp_path / "t.csv", [(name, f"Long text of {name}.") for name in reversed(names)])
    for image_record, caption in zip(records, table.caption(records), strict=True):
        assert isinstance(caption, Caption)
        assert caption.text == f"Long text of {image_record.short_caption}."


def test_no_image_gets_the_caption_of_another(tmp_path):
    cats = captioner(tmp_path / "t.csv", [(f"котики {number}.png", "A cat.") for number in range(30)])
    dogs = [record(key_of(f"собака {number}.png")) for number in range(30)]
    assert all(isinstance(failure, Failure) and failure.kind == "missing" for failure in cats.caption(dogs))


@pytest.mark.parametrize("repeated", ["error", "first"])
@pytest.mark.parametrize("names", [("dogs/a.png", "dogs_a.png"), ("a.png", "a.jpg")])
def test_different_names_with_the_same_key_are_an_error(tmp_path, repeated, names):
    rows = [(names[0], "One."), (names[1], "Another.")]
    with pytest.raises(ValueError, match="|".join([rf"{names[0]}.*{names[1]}", rf"{names[1]}.*{names[0]}"])):
        captioner(tmp_path / "t.csv", rows, repeated=repeated)
