"""Captions from a table, looked up by key."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from lotlip.caption.captioners import open_captioner
from lotlip.caption.captioners.table import TableCaptioner, _TextIndex
from lotlip.caption.config import TableCaptionerConfig as Settings
from lotlip.core.console import explain
from lotlip.data.keys import key_of
from lotlip.data.records import Caption, Failure, ImageRecord

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
def test_captions_come_in_the_order_of_the_images(tmp_path, ending):
    path = table(tmp_path / f"captions.{ending}")
    revision = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    llava = captioner(path)
    assert (llava.revision, llava.prompt) == (revision, "")
    captions = list(llava.caption(map(record, ["k1", "k9", "k0", "k2", "k3"])))
    assert captions[0] == Caption("k1", "llava", "null", ["null"], 1, "stop", revision, "")
    assert captions[2] == Caption("k0", "llava", "A dog. It runs.", ["A dog", "It runs"], 4, "stop", revision, "")
    failures = [item for item in captions if isinstance(item, Failure)]
    assert [(item.key, item.kind, item.where) for item in failures] == [
        ("k9", "missing", str(path)),
        ("k2", "empty", str(path)),
        ("k3", "empty", str(path)),
    ]


def test_each_captioner_has_its_own_rows(tmp_path):
    (caption,) = captioner(table(tmp_path / "captions.csv"), "sharegpt4v").caption([record("k0")])
    assert (caption.text, caption.captioner) == ("A large dog", "sharegpt4v")


def test_keys_may_be_numbers_in_the_table(tmp_path):
    (caption,) = captioner(table(tmp_path / "captions.parquet", [(7, "llava", "A dog")])).caption([record("7")])
    assert caption.text == "A dog"


def test_two_rows_for_a_key_are_an_error(tmp_path):
    rows = [(f"k{number // 2}", "llava", "A dog") for number in range(14)]
    with pytest.raises(ValueError, match=r"more than one row of llava for 7 keys \(k0, k1, k2, k3, k4, …\)"):
        captioner(table(tmp_path / "captions.csv", rows))


def test_an_unknown_captioner_is_an_error_listing_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no rows of the captioner 'gpt' \(it has: llava, sharegpt4v\).*params\.yaml"):
        captioner(table(tmp_path / "captions.csv"), "gpt")


def test_a_table_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"it has: none"):
        captioner(table(tmp_path / "captions.csv", []))


def test_missing_columns_are_an_error(tmp_path):
    path = tmp_path / "captions.csv"
    pd.DataFrame({"key": ["k0"], "caption": ["A dog"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"no column captioner, text \(it has key, caption\)"):
        captioner(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"captions\.csv does not exist; set `path`"):
        captioner(tmp_path / "captions.csv")


def test_an_unknown_file_extension_is_an_error(tmp_path):
    (tmp_path / "captions.xml").write_text("[]")
    with pytest.raises(ValueError, match=r"must end in \.csv, \.tsv, \.jsonl, \.jsonlines, \.json, \.parquet; convert"):
        captioner(tmp_path / "captions.xml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.parquet", b"not parquet"),
        ("captions.csv", b""),
        ("captions.json", b'[{"key": "k", "captioner": "llava", "text": "a"}, {'),
    ],
)
def test_a_broken_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        captioner(tmp_path / name)


def test_columns_and_captioner_can_be_named(tmp_path):
    path = tmp_path / "t.csv"
    urls = ["https://example.org/a.jpg", "https://example.org/b.jpg"]
    rows = {
        "url": urls,
        "s": ["Short", ""],
        "l": ["Long. Text", "B"],
    }
    pd.DataFrame(rows).to_csv(path, index=False)
    settings = Settings(kind="table", path=path, key="url", captioner=None, text=["s", "l"])
    both_columns = TableCaptioner("mine", settings, words)
    captions = list(both_columns.caption(record(key_of(url)) for url in rows["url"]))
    assert [caption.sub_captions for caption in captions] == [["Short", "Long", "Text"], ["B"]]
    assert captions[0].text == "Short\nLong. Text"
    one_column = TableCaptioner("mine", settings.model_copy(update={"text": "l"}), words)
    assert both_columns.about != one_column.about and both_columns.revision == one_column.revision


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_of_a_folder_are_joined_and_prefix_their_keys(tmp_path, ending):
    for place, text in (("cc3m", "three"), ("cc12m", "twelve"), (".", "none")):
        (tmp_path / place).mkdir(exist_ok=True)
        table(tmp_path / place / f"t.{ending}", [("k0", "llava", text)])
    llava = captioner(tmp_path)
    texts = [caption.text for caption in llava.caption(map(record, ["cc12m_k0", "cc3m_k0", "k0"]))]
    assert texts == ["twelve", "three", "none"]
    table(tmp_path / f"cc3m/t.{ending}", [("k0", "llava", "changed")])
    assert captioner(tmp_path).revision != llava.revision


def test_the_first_of_repeated_rows_can_be_used(tmp_path):
    rows = [("k0", "llava", "First"), ("k0", "llava", "Second"), ("k1", "llava", "Third")]
    settings = Settings(kind="table", path=table(tmp_path / "t.csv", rows), repeated="first")
    captions = TableCaptioner("llava", settings, words).caption(map(record, ["k0", "k1"]))
    assert [caption.text for caption in captions] == ["First", "Third"]


def test_images_of_rows_that_cannot_be_read_are_failures_naming_the_first_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'key,captioner,text\nk0,llava,a\nk1,llava\nk2,llava,\xe9\nk3,llava,"b\nk4,llava,c\n')
    captions = list(captioner(path).caption(map(record, ["k0", "k1", "k2", "k3", "k4"])))
    assert [getattr(item, "kind", "") for item in captions] == ["", "missing", "missing", "missing", ""]
    fault = f"; rows that cannot be read: 3, first {path}: line 3: it has 2 fields, but the header has 3"
    assert isinstance(captions[1], Failure) and captions[1].reason.endswith(fault)
    path.write_text("key,captioner,text\nk1,llava\n")
    with pytest.raises(ValueError, match=r"no rows of the captioner 'llava' .*: 1, first .*t\.csv: line 2: it has 2"):
        captioner(path)


def test_a_captioner_is_thread_safe(tmp_path):
    keys = [f"k{number}" for number in range(500)]
    llava = captioner(table(tmp_path / "t.parquet", [(key, "llava", f"text of {key}") for key in keys]))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda key: next(llava.caption([record(key)])).text, keys * 4))
    assert texts == [f"text of {key}" for key in keys] * 4


@pytest.mark.integration
def test_memory_does_not_grow_with_the_table(tmp_path):
    """The table has 150 MB, of which pandas would hold two copies; SQLite uses at most 64 MB."""
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("key,captioner,text\n")
        file.writelines(f"k{number},llava,{'word ' * 400}\n" for number in range(75_000))
    code = (
        "import resource, sys; from pathlib import Path; from lotlip.caption.captioners.table import TableCaptioner; "
        "from lotlip.caption.config import TableCaptionerConfig as Settings; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak(); "
        "TableCaptioner('llava', Settings(kind='table', path=Path(sys.argv[1])), len); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True, text=True)
    assert int(done.stdout) < 110


def test_open_captioner_counts_word_pieces(tmp_path):
    path = table(tmp_path / "captions.csv", [("k0", "llava", "A dog. It runs.")])
    llava = open_captioner("llava", Settings(kind="table", path=path), "bert-base-uncased")
    (caption,) = llava.caption([record("k0")])
    assert caption.tokens == 6  # full stops are word pieces, too


def test_a_full_temporary_folder_is_an_error_with_a_remedy():
    texts = _TextIndex()
    texts._base.execute("PRAGMA max_page_count = 20")  # SQLite raises the error of a full disk
    with pytest.raises(OSError, match="No space left") as full:
        texts.add((f"key-{number}", None, "A dog runs. " * 50) for number in range(1000))
    assert full.value.filename == tempfile.gettempdir()
    assert "set TMPDIR" in explain(full.value)
