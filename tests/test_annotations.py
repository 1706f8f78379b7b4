"""Texts of annotation files: the formats of the paper's data sets, tables, and errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lotlip.data.annotations import Text, read_texts
from lotlip.data.partitions import write_captions
from lotlip.data.records import Caption

CAPTIONS = ["raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions"]
CAPTIONS += ["longSV_captions", "shortLLA_captions", "longLLA_captions"]


def write(path: Path, content: Any) -> Path:
    """Writes text unchanged, and anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def texts_of(path: Path, *fields: str, split: str | None = None) -> list[tuple[str, str]]:
    return [(name, text) for name, text in read_texts(path, fields, split)]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes records in the format of the file extension."""
    if path.suffix == ".json":
        return write(path, records)
    if path.suffix == ".jsonl":
        return write_lines(path, records)
    if path.suffix in (".csv", ".tsv"):
        pd.DataFrame(records).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        pd.DataFrame(records).to_parquet(path)
    return path


every_table = pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])


# --- the paper's data sets ----------------------------------------------------------------------------------------


def test_sharegpt4v(tmp_path):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog.\nIt runs."}]
    path = write(tmp_path / "share.json", [{"id": "7", "image": "sam/7.jpg", "conversations": turns}])
    assert list(read_texts(path)) == [Text("sam/7.jpg", "A dog.\nIt runs.")]


def dci(folder: Path) -> Path:
    for number in range(4):
        annotation = {
            "image": f"sa_{number}.jpg",
            "short_caption": f"dog {number}",
            "extra_caption": "It runs.",
            "x": {},
        }
        write(folder / "annotations" / f"sa_{number}.json", annotation)
    write(folder / "splits.json", {"train": ["sa_2.json", "sa_0.json"], "test": ["sa_1.json"], "all": ["sa_0.json"]})
    write(folder / "photos" / "list.txt", "no text")
    return folder


def test_dci_reads_the_annotations_of_its_splits_once(tmp_path):
    folder = dci(tmp_path / "densely_captioned_images")
    expected = [(f"sa_{number}.jpg", f"dog {number}\nIt runs.") for number in (2, 0, 1)]
    assert texts_of(folder) == texts_of(tmp_path) == texts_of(folder / "splits.json") == expected
    assert texts_of(folder, split="test") == expected[2:]
    assert texts_of(folder, "short_caption", split="test") == [("sa_1.jpg", "dog 1")]


def test_dci_without_splits_reads_all_annotations(tmp_path):
    folder = dci(tmp_path)
    (folder / "splits.json").unlink()
    assert [name for name, _ in texts_of(folder)] == [f"sa_{number}.jpg" for number in range(4)]
    assert texts_of(folder / "annotations") == texts_of(folder)
    assert texts_of(folder / "annotations" / "sa_3.json") == [("sa_3.jpg", "dog 3\nIt runs.")]


def test_dci_joins_texts_that_are_not_null(tmp_path):
    records = [{"short_caption": "a dog", "extra_caption": None}, {"short_caption": None, "extra_caption": ""}]
    assert [text for _, text in texts_of(write(tmp_path / "a.json", records))] == ["a dog\n", ""]


def test_iiw_reads_a_file_or_a_folder(tmp_path):
    docci = write_lines(tmp_path / "DOCCI_Test" / "data.jsonl", [{"image": "test_1", "IIW": "A dog."}])
    dci_test = write_lines(
        tmp_path / "DCI_Test" / "data.jsonl", [{"image/key": "sa_1.jpg", "IIW": "A cat.", "url": "x"}]
    )
    write(tmp_path / "README.md", "not an annotation")
    assert texts_of(docci) == [("test_1", "A dog.")]
    assert texts_of(dci_test) == [("sa_1.jpg", "A cat.")]
    assert texts_of(tmp_path) == [*texts_of(dci_test), *texts_of(docci)]


def test_urban_1k(tmp_path):
    for stem, text in (("1", "A street.\n"), ("10", "A house.\nIt is old.")):
        write(tmp_path / "caption" / f"{stem}.txt", text)
        write(tmp_path / "image" / f"{stem}.jpg", "")
    expected = [("1", "A street.\n"), ("10", "A house.\nIt is old.")]
    assert texts_of(tmp_path) == texts_of(tmp_path / "caption") == expected
    assert texts_of(tmp_path / "caption" / "10.txt") == expected[1:]


def karpathy(path: Path) -> Path:
    def image(number: int, split: str) -> dict[str, Any]:
        sentences = [{"raw": f"dog {number} {index}", "tokens": []} for index in range(2)]
        return {"filename": f"{number}.jpg", "filepath": "val2014", "split": split, "sentences": sentences}

    return write(path, {"dataset": "coco", "images": [image(1, "train"), image(2, "test"), image(3, "restval")]})


def test_karpathy_splits(tmp_path):
    path = karpathy(tmp_path / "dataset_coco.json")
    texts = [(f"{number}.jpg#{index}", f"dog {number} {index}") for number in (1, 2, 3) for index in range(2)]
    assert texts_of(path) == texts
    assert texts_of(path, split="test") == texts[2:4]
    assert texts_of(path, "sentences.1.raw", split="restval") == [("3.jpg", "dog 3 1")]
    with pytest.raises(ValueError, match=r"no split 'val' \(it has restval, test, train\)"):
        texts_of(path, split="val")


@every_table
def test_long_captions_of_dreamlip(tmp_path, ending):
    row = {"Image Path": "0/1.jpg", **{name: f"{name}, long." for name in CAPTIONS}}
    path = write_records(tmp_path / f"cc3m.{ending}", [row])
    assert texts_of(path) == [(f"0/1.jpg#{name}", f"{name}, long.") for name in CAPTIONS]
    assert texts_of(path, "longSV_captions") == [("0/1.jpg", "longSV_captions, long.")]
    write_records(path, [{name: row[name] for name in ("Image Path", "raw_caption")}])
    assert texts_of(path) == [("0/1.jpg", "raw_caption, long.")]


def test_the_projects_own_captions(tmp_path):
    for split, name in (("train", "a"), ("test", "b")):
        caption = Caption(name, "llava", f"Dog {name}.", [f"Dog {name}"], 3, "stop", "r", "")
        write_captions(f"{split}/part-00000", [caption], 1, tmp_path / "captions" / "llava")
    write(tmp_path / "captions" / "llava" / "index.json", {"units": []})
    assert (
        texts_of(tmp_path / "captions")
        == texts_of(tmp_path / "captions" / "llava")
        == [("b", "Dog b."), ("a", "Dog a.")]
    )
    assert texts_of(tmp_path, "text", split="train") == [("a", "Dog a.")]
    assert texts_of(tmp_path / "captions" / "llava" / "test" / "part-00000.parquet") == [("b", "Dog b.")]
    with pytest.raises(ValueError, match=r"captions has no split 'val' \(it has test, train\)"):
        texts_of(tmp_path / "captions", split="val")


# --- any table ----------------------------------------------------------------------------------------------------


@every_table
def test_several_fields_are_separate_texts(tmp_path, ending):
    path = write_records(tmp_path / f"any.{ending}", [{"title": 'A, "b"\nc', "alt": "x"}, {"title": "d", "alt": " "}])
    place = path.as_posix()
    assert texts_of(path, "title") == [(f"{place}:1", 'A, "b"\nc'), (f"{place}:2", "d")]
    both = [(":1#alt", "x"), (":1#title", 'A, "b"\nc'), (":2#alt", ""), (":2#title", "d")]
    assert texts_of(path, "alt", "title") == [(place + name, text) for name, text in both]


@every_table
def test_a_column_of_splits_selects_records(tmp_path, ending):
    records = [{"text": "a", "split": "train"}, {"text": "b", "split": "test"}]
    path = write_records(tmp_path / f"any.{ending}", records)
    assert [text for _, text in texts_of(path)] == ["a", "b"]
    assert [text for _, text in texts_of(path, split="test")] == ["b"]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_nested_fields(tmp_path, ending):
    record = {"a": {"b": [{"c": "one"}, {"c": "two"}], "d": "three"}, "e.f": "four", "g": ["five", "six"], "h": ""}
    path = write_records(tmp_path / f"any.{ending}", [record])

    def texts(field: str) -> list[tuple[str, str]]:
        return [(name.removeprefix(f"{path.as_posix()}:1"), text) for name, text in texts_of(path, field)]

    assert texts("a.d") == [("", "three")]
    assert texts("a.b.1.c") == [("", "two")]
    assert texts("a.b.c") == [("#0", "one"), ("#1", "two")]
    assert texts("e.f") == [("", "four")]
    assert texts("g") == [("#0", "five"), ("#1", "six")]
    assert texts("g.1") == [("", "six")]
    for missing in ("a.x", "a.b.2.c", "a.b.c.d", "h.x"):
        with pytest.raises(ValueError, match=rf"any\.{ending}, record 1 has no field '{missing}' \(it has .*[ah]\)"):
            texts(missing)
    with pytest.raises(ValueError, match=rf"any\.{ending}.* has no field 'x' \(it has a, e\.f, g, h\)"):
        texts("x")


def test_numbers_may_be_names(tmp_path):
    path = write(tmp_path / "a.json", [{"id": 7, "text": "a"}, {"id": 0, "text": "b"}, {"id": None, "text": "c"}])
    assert texts_of(path) == [("7", "a"), ("0", "b"), (f"{path.as_posix()}:3", "c")]
    assert texts_of(write_records(tmp_path / "a.parquet", [{"key": 7, "text": "a"}])) == [("7", "a")]


def test_a_list_inside_an_object(tmp_path):
    path = write(tmp_path / "captions.json", {"images": [1], "annotations": [{"caption": "a"}, {"caption": "b"}]})
    with pytest.raises(ValueError, match=r"name one with --field \(there are: images, annotations\)"):
        texts_of(path)
    assert [text for _, text in texts_of(path, "annotations.caption")] == ["a", "b"]


@every_table
def test_null_and_blank_texts_are_empty(tmp_path, ending):
    path = write_records(
        tmp_path / f"any.{ending}", [{"key": "a", "text": None}, {"key": "b", "text": " \n"}, {"key": "c", "text": "."}]
    )
    assert texts_of(path) == [("a", ""), ("b", ""), ("c", ".")]


def test_null_and_empty_lists_are_empty(tmp_path):
    records = [
        {"conversations": None},
        {"conversations": [{}, {"value": None}]},
        {"conversations": [{}, {"value": []}]},
    ]
    assert [text for _, text in texts_of(write(tmp_path / "a.json", records))] == ["", "", ""]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_byte_order_mark_is_skipped(tmp_path, name):
    content = {".json": '[{"text": "dög"}]', ".jsonl": '{"text": "dög"}', ".csv": "text\ndög\n", ".txt": "dög"}
    path = tmp_path / name
    path.write_text(content[path.suffix], encoding="utf-8-sig")
    assert [text for _, text in texts_of(path)] == ["dög"]


def test_file_extensions_may_be_uppercase(tmp_path):
    assert texts_of(write(tmp_path / "A.TXT", "dog")) == [("A", "dog")]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_file_may_have_other_separators(tmp_path, separator):
    rows = [["key", "text"], ["k", 'A dog, a "cat".'], ["l", f"one{separator} two"]]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    assert texts_of(tmp_path / "a.csv") == [(key, text) for key, text in rows[1:]]


def test_a_json_file_may_have_an_object_per_line(tmp_path):
    records = [{"text": f"dog {number} " + "x" * 100} for number in range(5000)]
    path = write_lines(tmp_path / "a.json", records)
    with path.open("a") as file:
        file.write('"broken')
    texts = read_texts(path)
    assert next(texts).text == records[0]["text"]
    with pytest.raises(ValueError, match=r"a\.json, line 5001: broken JSON"):
        list(texts)


def test_very_long_texts(tmp_path):
    long = "a dog, a cat. " * 30_000
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [long], ["b"]])
    assert [text for _, text in texts_of(path)] == [long, "b"]


def test_blank_lines_are_skipped(tmp_path):
    assert texts_of(write(tmp_path / "a.jsonl", '\n{"text": "a", "key": "k"}\n\n')) == [("k", "a")]
    assert texts_of(write(tmp_path / "a.csv", "\nkey,text\n\nk,a\n\n")) == [("k", "a")]


def test_a_lone_surrogate_is_replaced(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a dog \\ud83d"}, {"text": "\\ud83d\\ude00"}]')
    assert [text for _, text in texts_of(path)] == ["a dog \ufffd", "\U0001f600"]


def test_images_in_a_parquet_file_are_not_read(tmp_path):
    records = [{"image": {"bytes": b"\xff" * 10, "path": "1.jpg"}, "filename": b"\xff", "text": "a", "key": None}]
    assert texts_of(write_records(tmp_path / "a.parquet", records)) == [
        (f"{(tmp_path / 'a.parquet').as_posix()}:1", "a")
    ]


def test_parquet_records_are_counted_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("lotlip.data.annotations._BATCH", 2)
    path = write_records(tmp_path / "a.parquet", [{"text": str(number)} for number in range(5)])
    assert [name.rpartition(":")[2] for name, _ in texts_of(path)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_tables_are_streamed(tmp_path, name):
    """Later records are not parsed yet when the first one is returned."""
    records = [{"text": f"dog {number} " + "x" * 100} for number in range(5000)]
    path = write_records(tmp_path / name, records)
    if name != "a.parquet":
        with path.open("a") as file:
            file.write('"broken')
    texts = read_texts(path)
    assert next(texts).text == records[0]["text"]
    if name != "a.parquet":
        with pytest.raises(ValueError, match=r"a\.\w+, line 500[12]: (broken JSON|it cannot be read as CSV)"):
            list(texts)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_files_without_records_have_no_texts(tmp_path, name):
    assert texts_of(write(tmp_path / name, "[]" if name == "a.json" else "")) == []
    with pytest.raises(ValueError, match=r"no split 'test' \(it has none\)"):
        texts_of(tmp_path / name, split="test")


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_texts_are_read_as_written(tmp_path, texts):
    expected = [text if text.strip() else "" for text in texts]
    for ending in ("json", "jsonl", "parquet", "csv"):
        path = tmp_path / f"any.{ending}"
        if ending == "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
        else:
            write_records(path, [{"text": text} for text in texts])
        assert [text for _, text in texts_of(path)] == expected


# --- errors -------------------------------------------------------------------------------------------------------


@every_table
def test_a_table_of_an_unknown_format_is_an_error_listing_its_fields(tmp_path, ending):
    path = write_records(tmp_path / f"any.{ending}", [{"title": "a", "alt": "b"}])
    with pytest.raises(
        ValueError,
        match=rf"any\.{ending} has no known text field; name one with --field \(there are: title, alt\)",
    ):
        texts_of(path)


def test_the_list_of_fields_is_limited(tmp_path):
    path = write(tmp_path / "a.json", {f"key-{number}": "text" for number in range(1000)})
    with pytest.raises(ValueError, match=r"key-18, key-19, … 980 more\)"):
        texts_of(path)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_record_without_the_field_is_an_error(tmp_path, ending):
    path = write_records(tmp_path / f"a.{ending}", [{"IIW": "a"}, {"IIW": "b"}, {"image": "c"}])
    with pytest.raises(ValueError, match=rf"a\.{ending}, record 3 has no field 'IIW' \(it has image\)"):
        texts_of(path)
    with pytest.raises(ValueError, match=rf"a\.{ending}, record 1 has no field 'x' \(it has IIW\)"):
        texts_of(path, "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"text": "a"},\n{"text": }]', r"a\.json, line 3: broken JSON \(Expecting value at column 10\)"),
        ("a.json", "", r"a\.json, line 1: broken JSON"),
        ("a.json", '"text"', r"a\.json is neither a list of objects nor an object"),
        ("a.json", '["a dog"]', r"a\.json, record 1 is not an object with fields"),
        ("a.json", '[{"text": 7}]', r"a\.json, record 1: field 'text' is of type int, not text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: broken JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl, record 2 is not an object"),
        ("a.csv", "key,text\nk,a\nl,b, c\n", r"a\.csv, line 3: it has 3 fields, but the header has 2; put quotes"),
        ("a.csv", "", r"a\.csv cannot be read as CSV: the file is empty: it has no header line"),
        ("a.csv", "title\n", r"a\.csv has no known text field.*there are: title"),
        ("a.csv", "key,text\nk,a\nl\n", r"a\.csv, line 3: it has 1 fields"),
        ("a.csv", 'text\na\n"b\nc\n', r"a\.csv, line 3: it cannot be read as CSV: a quote is not closed"),
        ("a.csv", 'key,text\nk1,"a\nl2,b\nm3,c"\n', r"a\.csv, line 2: it cannot be read as CSV: a stray quote joins"),
        ("a.tsv", "key\ttext\nk\ta\tb\n", r"a\.tsv, line 2: it has 3 fields, but the header has 2"),
        ("a.parquet", "no", r"a\.parquet cannot be read as Parquet"),
        ("a.md", "a dog", r"none of the endings \.csv, \.tsv, \.jsonl, \.jsonlines, \.json, \.parquet, \.txt"),
        ("splits.json", '{"train": 3}', r"splits\.json is not DCI's"),
        ("splits.json", '{"train": ["sa_1.json"]}', r"splits\.json names sa_1\.json, but .*/sa_1\.json does not exist"),
    ],
)  # fmt: skip
def test_a_broken_file_is_an_error_with_its_position(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        texts_of(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_other_encodings_are_errors(tmp_path, name):
    (tmp_path / name).write_bytes('text\n"dög"'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}(, line 2: text)? is not UTF-8"):
        texts_of(tmp_path / name)


def test_missing_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json does not exist"):
        texts_of(tmp_path / "a.json")
    with pytest.raises(ValueError, match="/dev/null is a device, pipe or socket, not a regular file"):
        texts_of(Path("/dev/null"))
    with pytest.raises(ValueError, match=r"has no annotations; name a file, or a folder"):
        texts_of(tmp_path)


def test_a_folder_of_several_formats_is_an_error(tmp_path):
    write(tmp_path / "a.json", "[]")
    write(tmp_path / "b" / "a.txt", "a dog")
    with pytest.raises(ValueError, match=r"has files of \.json and \.txt; name a file"):
        texts_of(tmp_path)
    (tmp_path / "b").rename(tmp_path / ".hidden")
    assert texts_of(tmp_path) == []
    (tmp_path / "b.json.gz").touch()
    with pytest.raises(ValueError, match=r"b\.json\.gz cannot be read"):
        texts_of(tmp_path)


def test_a_text_file_with_fields_or_splits_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "a dog")
    for call in (lambda: texts_of(path, "text"), lambda: texts_of(path, split="test")):
        with pytest.raises(ValueError, match=r"a\.txt is a single text, without fields or splits"):
            call()


def test_a_split_of_a_table_without_splits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json, record 1 has no field 'split': remove --split"):
        texts_of(write(tmp_path / "a.json", [{"text": "a"}]), split="test")


def test_parquet_names_may_be_categories_or_floats(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    category = pa.dictionary(pa.int32(), pa.string())
    texts = pa.array(["a dog"]).cast(category)
    for column, expected in ((pa.array(["x.jpg"]).cast(category), "x.jpg"), (pa.array([7.0]), "7")):
        pq.write_table(pa.table({"key": column, "text": texts}), tmp_path / "A.PARQUET")
        assert list(read_texts(tmp_path / "A.PARQUET")) == [(expected, "a dog")]


def test_files_of_macos_are_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a dog"}')
    (tmp_path / "._a.jsonl").write_bytes(b"\0")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/b.csv").write_bytes(b"\0")
    assert [text for _, text in read_texts(tmp_path)] == ["a dog"]
