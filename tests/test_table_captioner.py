"""Captions from a table: looked up by key, refused where the table is not clear."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from lotlip.captioning import open_captioner
from lotlip.captioning.table import TableCaptioner
from lotlip.config import TableCaptioner as Settings
from lotlip.records import Caption, Failure, ImageRecord

ROWS = [
    ("k0", "llava", "A dog. It runs.\n"),
    ("k1", "llava", "null"),
    ("k2", "llava", " . "),
    ("k3", "llava", None),
    ("k0", "sharegpt4v", "A large dog"),
]


def table(path: Path, rows: list[tuple] = ROWS) -> Path:
    frame = pd.DataFrame(rows, columns=["key", "captioner", "text"])
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


def words(text: str) -> int:
    return len(text.split())


def captioner(path: Path, name: str = "llava") -> TableCaptioner:
    return TableCaptioner(name, Settings(kind="table", path=path), words)


def record(key: str) -> ImageRecord:
    return ImageRecord(key, b"", "png", "a dog", 1, 1, "")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_captions_are_looked_up_in_the_order_of_the_images(tmp_path, ending):
    path = table(tmp_path / f"captions.{ending}")
    revision = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    llava = captioner(path)
    assert (llava.revision, llava.prompt) == (revision, "")
    found = list(llava.caption(map(record, ["k1", "k9", "k0", "k2", "k3"])))
    assert found[0] == Caption("k1", "llava", "null", ["null"], 1, "stop", revision, "")
    assert found[2] == Caption("k0", "llava", "A dog. It runs.", ["A dog", "It runs"], 4, "stop", revision, "")
    failures = [item for item in found if isinstance(item, Failure)]
    assert [(item.key, item.kind, item.where) for item in failures] == [
        ("k9", "missing", str(path)),
        ("k2", "empty", str(path)),
        ("k3", "empty", str(path)),
    ]


def test_each_captioner_has_its_own_rows(tmp_path):
    (found,) = captioner(table(tmp_path / "captions.csv"), "sharegpt4v").caption([record("k0")])
    assert (found.text, found.captioner) == ("A large dog", "sharegpt4v")


def test_keys_may_be_numbers_in_the_table(tmp_path):
    (found,) = captioner(table(tmp_path / "captions.parquet", [(7, "llava", "A dog")])).caption([record("7")])
    assert found.text == "A dog"


def test_two_rows_for_a_key_are_refused(tmp_path):
    rows = [(f"k{number // 2}", "llava", "A dog") for number in range(14)]
    with pytest.raises(ValueError, match=r"more than one row of llava for 7 keys \(k0, k1, k2, k3, k4, …\)"):
        captioner(table(tmp_path / "captions.csv", rows))


def test_an_unknown_captioner_is_told_who_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"no rows of the captioner 'gpt' \(it has: llava, sharegpt4v\).*params\.yaml"):
        captioner(table(tmp_path / "captions.csv"), "gpt")


def test_a_table_without_rows_has_no_captioner(tmp_path):
    with pytest.raises(ValueError, match=r"it has: none"):
        captioner(table(tmp_path / "captions.csv", []))


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "captions.csv"
    pd.DataFrame({"key": ["k0"], "caption": ["A dog"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"no column captioner, text \(it has key, caption\)"):
        captioner(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"captions\.csv is not there; set `path`"):
        captioner(tmp_path / "captions.csv")


def test_another_ending_is_refused(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"ends in \.parquet or \.csv"):
        captioner(tmp_path / "captions.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.parquet", b"not parquet"),
        ("captions.csv", b""),
        ("captions.csv", b"key,captioner,text\nk,llava,\xe9\n"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        captioner(tmp_path / name)


def test_open_captioner_counts_word_pieces(tmp_path):
    path = table(tmp_path / "captions.csv", [("k0", "llava", "A dog. It runs.")])
    llava = open_captioner("llava", Settings(kind="table", path=path), "bert-base-uncased")
    (found,) = llava.caption([record("k0")])
    assert found.tokens == 6  # full stops are word pieces, too
