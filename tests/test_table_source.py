"""Parquet, CSV and JSONL files with a row per image, and published tables of long captions."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lotlip.caption.captioners.table import TableCaptioner
from lotlip.caption.config import TableCaptionerConfig as TableSettings
from lotlip.data.keys import key_of
from lotlip.data.partitions import read_records, write_partitions
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.rows import RowRange, open_table
from lotlip.ingest.config import CsvSourceConfig, ImagesConfig, JsonlSourceConfig, ParquetSourceConfig
from lotlip.ingest.sources import open_source
from lotlip.ingest.sources.table import TableSource


def image_bytes(form: str = "PNG", colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, form)
    return file.getvalue()


def add_image(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes())
    return path


def write_csv(path: Path, rows: list[list[str]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def write_parquet(path: Path, columns: dict[str, list], row_group_size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def csv_source(path: Path, images: Path, **settings: object) -> TableSource:
    source = open_source(CsvSourceConfig(kind="csv", path=path, images=images, **settings))
    assert isinstance(source, TableSource)
    return source


def parquet_source(path: Path, limits: ImagesConfig | None = None, **settings: object) -> TableSource:
    source = open_source(ParquetSourceConfig(kind="parquet", path=path, **settings), limits)
    assert isinstance(source, TableSource)
    return source


def read_all(source: TableSource, size: int = 2) -> list[ImageRecord | Failure]:
    return [item for unit in source.units(size) for item in source.read(unit)]


def kinds(items: list[ImageRecord | Failure]) -> list[tuple[str, str]]:
    """Key and failure kind of each item; the kind of a record is empty."""
    return [(item.key, item.kind if isinstance(item, Failure) else "") for item in items]


# --- CSV ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_csv_file_become_records(tmp_path):
    for name in ("0000000/0000008.jpg", "dogs/My dog.v2.PNG"):
        add_image(tmp_path / "images", name)
    rows = [["image", "caption"], ["0000000/0000008.jpg", "a\n red  dot"], ["dogs/My dog.v2.PNG", 'a "dog", red']]
    table = write_csv(tmp_path / "t.csv", rows)
    first, second = read_all(csv_source(table, tmp_path / "images"))
    assert isinstance(first, ImageRecord) and isinstance(second, ImageRecord)
    assert (first.key, first.short_caption, first.extension) == ("0000000_0000008", "a red dot", "png")
    assert [warning.kind for warning in first.warnings] == ["renamed"]
    assert first.warnings[0].where == f"{table}: line 2"
    assert (second.key, second.short_caption, second.warnings) == ("dogs_My_dog_v2-7526bf664ed3", 'a "dog", red', ())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_units_cover_all_rows_whatever_their_fields_hold(tmp_path, size, end):
    texts = [
        "plain",
        'a "quoted" word',
        "two\nlines",
        "win\r\ndows",
        "é ü 漢字",
        "a, b",
        "",
        "x" * 5000,
        "\n\n\n",
    ]
    rows = [["key", "text"], *[[f"k{number}", text] for number, text in enumerate(texts)]]
    table = open_table(write_csv(tmp_path / "t.csv", rows, lineterminator=end))
    rows_read = [row.values for row in table.rows(["text", "key"])]
    assert rows_read == [(text, key) for key, text in rows[1:]]
    parts = list(table.ranges(size))
    assert [part.count for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert [row.values for part in parts for row in table.rows(["text", "key"], part)] == rows_read
    numbers = [row.number for part in parts for row in table.rows(["key"], part)]
    assert numbers == [row.number for row in table.rows(["key"])]
    lines = (tmp_path / "t.csv").read_bytes().split(b"\n")
    assert all(lines[number - 1].startswith(b"k") for number in numbers)


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbf"a,b",c\n\n1,2\n\n\n3,4\n')
    table = open_table(tmp_path / "t.csv")
    assert table.columns == ["a,b", "c"]
    assert [(row.number, row.values) for row in table.rows(["c"])] == [(3, ("2",)), (6, ("4",))]
    assert list(table.ranges(1)) == [RowRange(12, 3, 1), RowRange(18, 6, 1)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_fields_may_have_other_separators(tmp_path, separator):
    add_image(tmp_path / "images", "a.png")
    rows = [["image", "caption, short; or long"], ["a.png", "a dog, a cat;\ta bird"], ["b.png", "no image"]]
    source = csv_source(
        write_csv(tmp_path / "t.csv", rows, delimiter=separator),
        tmp_path / "images",
        image="image",
        caption="caption, short; or long",
    )
    items = read_all(source)
    assert kinds(items) == [("a", ""), ("b", "missing")]
    assert items[0].short_caption == "a dog, a cat; a bird"


def test_fields_of_a_tsv_file_are_separated_by_tabs(tmp_path):
    add_image(tmp_path / "images", "a.png")
    content = "image\tcaption, or text, or alt\na.png\ta dog, a cat, a bird\n"  # commas fit the header better
    (tmp_path / "t.TSV").write_text(content)
    source = csv_source(tmp_path / "t.TSV", tmp_path / "images", caption="caption, or text, or alt")
    (item,) = read_all(source)
    assert isinstance(item, ImageRecord) and item.short_caption == "a dog, a cat, a bird"
    assert open_table(tmp_path / "t.TSV").columns == ["image", "caption, or text, or alt"]
    (tmp_path / "t.TSV").write_text("image\na.png\n")
    assert open_table(tmp_path / "t.TSV").columns == ["image"]


def test_a_bad_row_does_not_affect_others(tmp_path):
    csv.field_size_limit(2**31 - 1)  # other readers of CSV in this process may have set it
    for number in range(9):
        add_image(tmp_path / "images", f"{number}.png")
    lines = [b"image,caption", b"0.png,a", b"1.png,a,b", b"2.png", b"3.png,K\xe4se", b"4.png,a", b'5.png,"never closed']
    filler = [b"x" * 1000] * 140  # more than a field may hold
    (tmp_path / "t.csv").write_bytes(b"\n".join([*lines, *filler, b"6.png,a", b"7.png,a"]) + b"\n")
    for size in (1, 2, 100):
        items = read_all(csv_source(tmp_path / "t.csv", tmp_path / "images"), size)
        by_kind = [kind for _, kind in kinds(items)]
        assert by_kind[:6] == ["", "row", "row", "encoding", "", "row"]
        assert set(by_kind[6:-2]) <= {"row"}
        assert kinds(items)[-2:] == [("6", ""), ("7", "")]
        assert (
            items[1].where == f"{tmp_path}/t.csv: line 3" and "it has 3 fields, but the header has 2" in items[1].reason
        )
        assert items[3].where == f"{tmp_path}/t.csv: line 5" and items[3].key == "t-000000005"
        assert items[5].where == f"{tmp_path}/t.csv: line 7"


STRAY = "it cannot be read as CSV: a stray quote joins it with the next {}; remove or double the quote"
FILLER = [f"{number}.png,a dog that runs in a park" for number in range(9, 9000)]  # more than a field may hold


@pytest.mark.parametrize(
    ("lines", "bad", "problem"),
    [
        (['a.png,"A dog', "b.png,a"], "a", "a quote is not closed up to the end of the file"),
        (['a.png,"A dog', "b.png,a", 'c.png,5" tall', "d.png,a"], "a", STRAY.format("2 lines")),
        (['a.png,"A dog', 'b.png,a dog 5" tall', "c.png,a"], "a", STRAY.format("line")),
        (['a.png,"A dog', 'b.png,"a dog, red"', "c.png,a"], "a", STRAY.format("line")),
        (['a.png,"A dog', "b.png,a", 'c.png,5"', "d.png,a"], "a", STRAY.format("2 lines")),
        (
            ['a.png,"A dog', "b.png,a", 'c.png,5",no', "d.png,a"],
            "ac",
            "with the lines that a quote joins to it, it has 3 fields",
        ),
        (['a.png,"A dog', *FILLER], "a", STRAY.format("3,776 lines")),
        (['a.png,"A" dog,"A cat', "b.png,a"], "a", "a quote is not closed at its end"),
        (["a.png," + "x" * 2**17 + "x", "b.png,a"], "a", "field larger than field limit"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 10000])
def test_a_stray_quote_costs_one_row(tmp_path, lines, bad, problem, size):
    content = ["0.png,fine", *lines, "z.png,last"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *content]))
    table = open_table(tmp_path / "t.csv")
    rows = list(table.rows(["image", "caption"]))
    assert [row.number for row in rows] == list(range(2, len(content) + 2))  # every line is a row
    problems = [(line[0], row.problem) for line, row in zip(content, rows, strict=True) if row.problem]
    assert "".join(name for name, _ in problems) == bad
    assert problem in problems[0][1][0] and problems[0][1][1] == "row"
    good = [line.replace('"a dog, red"', "a dog, red") for line in content if line[0] not in bad]
    assert [",".join(row.values) for row in rows if not row.problem] == good
    parts = table.ranges(size)
    assert [row for part in parts for row in table.rows(["image", "caption"], part)] == rows


def test_texts_of_several_lines_are_not_taken_for_stray_quotes(tmp_path):
    texts = ["a dog\nruns, fast", "a\n\nb,c", "a, b\nc,d", '5" tall\n', '\n"', "A crowd\n1,000 balloons\nb.jpg,x"]
    rows = [["image", "caption"], *[[f"{number}.png", text] for number, text in enumerate(texts)]]
    path = write_csv(tmp_path / "t.csv", rows)
    assert [row.values[0] for row in open_table(path).rows(["caption"])] == texts
    path = write_csv(tmp_path / "t.tsv", rows, delimiter="\t")
    assert [row.values[0] for row in open_table(path).rows(["caption"])] == texts
    path = write_csv(tmp_path / "u.csv", [["caption"], *[[text] for text in texts]])
    assert [row.values[0] for row in open_table(path).rows(["caption"])] == texts


@pytest.mark.parametrize("size", [1, 3, 100])
def test_quotes_in_a_tsv_file_are_ordinary_characters(tmp_path, size):
    """Many programs that write such files do not quote."""
    texts = [
        '"hello says a sign',
        "a",
        'says hello"',
        '"hello" says a sign',
        'a 5" pipe',
        '"',
        'a "b"',
        '"" a',
        '"open',
    ]
    path = tmp_path / "t.tsv"
    path.write_text("image\tcaption\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(texts)))
    table = open_table(path)
    rows = [row for part in table.ranges(size) for row in table.rows(["caption"], part)]
    assert [row.values for row in rows] == [(text,) for text in texts]
    assert [row.number for row in rows] == list(range(2, len(texts) + 2))


def test_images_outside_their_folder_are_unsafe(tmp_path):
    add_image(tmp_path, "secret.png")
    add_image(tmp_path / "images", "fine.png")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images/inner.png").symlink_to(tmp_path / "images/fine.png")
    (tmp_path / "images/way").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "images/pipe.png")
    paths = [f"{tmp_path}/secret.png", "../secret.png", "a/../../secret.png", "link.png", "way/secret.png", "C:\\x.png"]
    missing = ["inner.png", "gone.png", "pipe.png", "nul\0.png", "x" * 300 + ".png", ""]
    rows = [["image", "caption"], *[[path, "a"] for path in [*paths, *missing]]]
    items = read_all(csv_source(write_csv(tmp_path / "t.csv", rows), tmp_path / "images"))
    expected = ["", "missing", "unreadable", "missing", "unreadable", "missing"]
    assert [kind for _, kind in kinds(items)] == ["unsafe"] * 6 + expected
    assert items[4].reason.endswith(f"images: it leads out through the link {tmp_path}/images/way → {tmp_path}")
    assert items[1].reason.endswith("images")


def test_a_folder_may_hold_tables_and_images(tmp_path):
    """DVC then watches a single path. A table among the images does not belong to the source."""
    for name in ("a.png", "b.png"):
        add_image(tmp_path / "data/images", name)
    write_csv(tmp_path / "data/cc3m/t.csv", [["image", "caption"], ["a.png", "a"]])
    write_csv(tmp_path / "data/cc12m/t.csv", [["image", "caption"], ["a.png", "a"], ["b.png", "b"], ["b.png", "c"]])
    write_csv(tmp_path / "data/images/other.csv", [["no", "columns"]])
    source = csv_source(tmp_path / "data", tmp_path / "data/images")
    expected = [("cc12m_a", ""), ("cc12m_b", ""), ("cc12m_b", "duplicate"), ("cc3m_a", "")]
    assert kinds(read_all(source, 10)) == expected
    assert [unit.name for unit in source.units(2)] == ["part-00000", "part-00001", "part-00002"]


def test_missing_files_and_columns_are_errors(tmp_path):
    table = write_csv(tmp_path / "t.csv", [["Image Path", "raw_caption"], ["a.png", "a"]])
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"no column image, caption \(it has Image Path, raw_caption\); set image"):
        csv_source(table, tmp_path / "images")
    with pytest.raises(ValueError, match=r"nowhere does not exist; set ingest\.source\.images"):
        csv_source(table, tmp_path / "nowhere", image="Image Path", caption="raw_caption")
    with pytest.raises(ValueError, match=r"gone\.csv does not exist; set ingest\.source\.path"):
        csv_source(tmp_path / "gone.csv", tmp_path)
    with pytest.raises(ValueError, match=r"images has no table; set ingest\.source\.path"):
        csv_source(tmp_path / "images", tmp_path)
    twice = write_csv(tmp_path / "u.csv", [["image", "image", "caption"]])
    with pytest.raises(ValueError, match="more than one column image"):
        csv_source(twice, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n", "bild;größe\n".encode("utf-16")])
def test_a_file_without_a_header_is_an_error(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.csv cannot be read as csv"):
        csv_source(tmp_path / "t.csv", tmp_path)


# --- Parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_images_inside_a_parquet_file_become_records(tmp_path, size):
    images = [image_bytes("PNG"), image_bytes("WEBP"), None, b"cut", image_bytes("JPEG")] * 3
    captions = ["a", "b", "c", "d", None] * 3
    table = write_parquet(tmp_path / "t.parquet", {"image": images, "caption": captions}, row_group_size=4)
    items = read_all(parquet_source(table), size)
    expected = ["", "", "missing", "unreadable", "missing"] * 3
    assert kinds(items) == [(f"t-{number:09d}", kind) for number, kind in enumerate(expected, 1)]
    assert (items[1].extension, items[1].short_caption) == ("webp", "b")
    assert items[3].where == f"{table}: row 4"


def test_images_of_the_datasets_library_are_read(tmp_path):
    add_image(tmp_path / "images", "c.png")
    images = [
        {"bytes": image_bytes(), "path": "deep/a.png"},
        {"bytes": image_bytes(), "path": None},
        {"bytes": None, "path": "c.png"},
        {"bytes": None, "path": None},
        None,
    ]
    table = write_parquet(tmp_path / "t.parquet", {"image": images, "caption": list("abcde")})
    rest = [("t-000000004", "missing"), ("t-000000005", "missing")]
    assert kinds(read_all(parquet_source(table))) == [("deep_a", ""), ("t-000000002", ""), ("c", "missing"), *rest]
    items = kinds(read_all(parquet_source(table, images=tmp_path / "images")))
    assert items == [("deep_a", ""), ("t-000000002", ""), ("c", ""), *rest]


def test_keys_may_come_from_a_column(tmp_path):
    url = "https://example.org/a.jpg"
    columns = {"jpg": [image_bytes()] * 4, "txt": ["a"] * 4, "url": [url, url, None, "7"]}
    table = write_parquet(tmp_path / "data/cc3m/t.parquet", columns)
    items = read_all(parquet_source(table.parent.parent, image="jpg", caption="txt", key="url"), 10)
    key = key_of(url, "cc3m")
    assert kinds(items) == [(key, ""), (key, "duplicate"), ("cc3m_t-000000003", "missing"), ("cc3m_7", "")]
    numbers = write_parquet(tmp_path / "n.parquet", {"image": [image_bytes()], "caption": ["a"], "id": [7]})
    assert kinds(read_all(parquet_source(numbers, key="id"))) == [("7", "")]


def test_a_text_that_is_not_utf8_fails_its_row_only(tmp_path):
    captions = pa.array([b"a", b"K\xe4se", b"c"], pa.binary()).view(pa.string())
    table = write_parquet(tmp_path / "t.parquet", {"image": [image_bytes()] * 3, "caption": captions})
    assert [kind for _, kind in kinds(read_all(parquet_source(table), 10))] == ["", "encoding", ""]


def test_limits_of_images_apply_to_rows(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", {"image": [image_bytes()], "caption": ["a"]})
    assert [kind for _, kind in kinds(read_all(parquet_source(table, ImagesConfig(max_bytes=9))))] == ["too-large"]


def test_a_column_without_images_is_an_error(tmp_path):
    paths = write_parquet(tmp_path / "p.parquet", {"image": ["a.png"], "caption": ["a"]})
    with pytest.raises(ValueError, match=r"column image holds paths; set ingest\.source\.images"):
        parquet_source(paths)
    numbers = write_parquet(tmp_path / "n.parquet", {"image": [1.5], "caption": ["a"]})
    with pytest.raises(ValueError, match="column image holds double, neither encoded images nor paths"):
        parquet_source(numbers)
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as parquet"):
        parquet_source(tmp_path / "b.parquet")


# --- DreamLIP's tables --------------------------------------------------------------------------------------------

DREAMLIP = [
    "Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions",
    "shortLLA_captions", "longLLA_captions",
]  # fmt: skip


def test_images_and_three_captioners_come_from_one_dreamlip_table(tmp_path):
    rows = [DREAMLIP]
    for number in range(5):
        path = f"0000000/{number:07d}.jpg"
        add_image(tmp_path / "cc3m/images", path)
        texts = [f'{column} of {number}, "quoted".\nSecond line' for column in DREAMLIP[2:]]
        rows.append([path, f"raw of {number}", *texts])
    rows[4][5] = ""  # one ShareGPT4V caption is missing
    table = write_csv(tmp_path / "cc3m/cc3m_3long_3short_1raw_captions.csv", rows)
    settings = CsvSourceConfig(
        kind="csv", path=tmp_path / "cc3m", images=tmp_path / "cc3m/images", image="Image Path", caption="raw_caption"
    )
    source = open_source(settings)
    out = tmp_path / "out"
    for unit in source.units(2):
        write_partitions(unit, source.read(unit), out, source.split)
    parts = sorted(path.relative_to(out).as_posix()[:-5] for path in out.glob("*/part-*.json"))
    records = [record for part in parts for record in read_records(out, part)]
    assert sorted(record.key for record in records) == [f"0000000_{number:07d}" for number in range(5)]
    for short in ("IB", "SV", "LLA"):
        about = TableSettings(
            kind="table",
            path=table,
            key="Image Path",
            captioner=None,
            text=[f"short{short}_captions", f"long{short}_captions"],
        )
        author = TableCaptioner(short.lower(), about, len)
        for record, caption in zip(records, author.caption(records), strict=True):
            assert isinstance(caption, Caption)
            number = int(record.key[-7:])
            assert record.short_caption == f"raw of {number}"
            words = [f'short{short}_captions of {number}, "quoted"', "Second line"]
            if (short, number) != ("SV", 3):
                words += [f'long{short}_captions of {number}, "quoted"', "Second line"]
            assert (caption.captioner, caption.sub_captions) == (short.lower(), words)


TEXT_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "category": pa.dictionary(pa.int32(), pa.string()),
    "large category": pa.dictionary(pa.int8(), pa.large_string()),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_columns_may_have_any_arrow_type(tmp_path, kind):
    add_image(tmp_path / "images", "a.png")
    column = pa.array(["a.png"]).cast(TEXT_TYPES[kind])
    path = write_parquet(tmp_path / "a.parquet", {"image": column, "caption": column, "key": column})
    (record,) = read_all(parquet_source(path, images=tmp_path / "images", key="key"))
    assert isinstance(record, ImageRecord)
    assert (record.key, record.short_caption) == ("a", "a.png")
    captioner = TableCaptioner(
        "llava", TableSettings(kind="table", path=path, captioner=None, text="caption"), lambda text: 1
    )
    assert isinstance(next(captioner.caption([record])), Caption)


def test_integers_stored_as_floats_are_the_same_keys(tmp_path):
    columns = {"image": [image_bytes()] * 4, "caption": ["a"] * 4, "id": [1.0, 2.0, None, 2.5]}
    items = read_all(parquet_source(write_parquet(tmp_path / "a.parquet", columns), key="id"))
    assert [(item.key, getattr(item, "kind", "")) for item in items] == [
        ("1", ""),
        ("2", ""),
        ("a-000000003", "missing"),
        (key_of("2.5"), ""),
    ]
    path = write_parquet(tmp_path / "c.parquet", {"key": [1.0, 2.0, None], "text": ["a dog", "a cat", "nobody's"]})
    captioner = TableCaptioner("llava", TableSettings(kind="table", path=path, captioner=None), lambda text: 1)
    assert [item.text for item in captioner.caption(items[:2])] == ["a dog", "a cat"]


def test_file_extensions_of_tables_may_be_uppercase(tmp_path):
    add_image(tmp_path / "images", "A.PNG")
    columns = {"image": ["A.PNG"], "caption": ["a"]}
    write_parquet(tmp_path / "one/DATA.PARQUET", columns)
    write_parquet(tmp_path / "one/._DATA.PARQUET", columns)
    write_parquet(tmp_path / "one/__MACOSX/DATA.PARQUET", columns)
    write_csv(tmp_path / "two/DATA.CSV", [["image", "caption"], ["A.PNG", "a"]])
    for items in (
        read_all(parquet_source(tmp_path / "one", images=tmp_path / "images")),
        read_all(csv_source(tmp_path / "two", tmp_path / "images")),
    ):
        assert [(item.key, getattr(item, "kind", "")) for item in items] == [("A", "")]
    path = write_parquet(tmp_path / "CAPTIONS.PARQUET", {"key": ["A.PNG"], "text": ["a dog"]})
    captioner = TableCaptioner("llava", TableSettings(kind="table", path=path, captioner=None), lambda text: 1)
    assert next(captioner.caption(items)).text == "a dog"


def test_absolute_paths_must_be_inside_the_image_folder(tmp_path):
    add_image(tmp_path / "images", "deep/a.png")
    add_image(tmp_path, "outside.png")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "outside.png")
    names = [
        f"{tmp_path}/{name}"
        for name in ("images/deep/a.png", "outside.png", "images/../outside.png", "images/link.png")
    ]
    path = write_csv(tmp_path / "a.csv", [["image", "caption"], *([name, "a"] for name in names)])
    items = read_all(csv_source(path, tmp_path / "images"))
    assert [getattr(item, "kind", "") for item in items] == ["", "unsafe", "unsafe", "unsafe"]
    assert items[0].key == "deep_a"
    assert "ingest.source.images" in items[1].reason


# --- JSONL --------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, lines: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


@pytest.mark.parametrize("size", [1, 2, 5])
def test_units_cover_all_lines_of_a_jsonl_file(tmp_path, size):
    for name in ("a.png", "b.png", "7"):
        add_image(tmp_path / "images", name)
    lines: list[object] = [
        {"image": "a.png", "caption": "a dog", "long": ["It is brown.", "It runs. "]},
        b"",
        b"{broken",
        [1, 2],
        {"caption": "no image"},
        {"image": 7, "caption": "a number"},
        b'{"image": "b.png", "caption": "\xff"}',
        {"image": "b.png", "caption": 'é "quoted"\nline', "more": {"ignored": 1}},
    ]
    table = write_jsonl(tmp_path / "t.jsonl", lines)
    source = open_source(JsonlSourceConfig(kind="jsonl", path=table, images=tmp_path / "images"))
    items = read_all(source, size)
    assert kinds(items) == [
        ("a", ""),
        ("t-000000003", "row"),
        ("t-000000004", "row"),
        ("t-000000005", "missing"),
        ("7", ""),
        ("t-000000007", "encoding"),
        ("b", ""),
    ]
    assert items[-1].short_caption == 'é "quoted" line'
    assert next(row.values for row in open_table(table).rows(["long"])) == ("It is brown. It runs.",)


@pytest.mark.parametrize(
    ("content", "fault"), [(b"", "is empty"), (b"[1]\n", "not a JSON object"), (b"{\n", "not JSON")]
)
def test_a_jsonl_file_without_a_first_object_is_an_error(tmp_path, content, fault):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        open_table(tmp_path / "t.jsonl")


def test_keys_of_later_objects_are_columns(tmp_path):
    table = open_table(write_jsonl(tmp_path / "t.jsonl", [{"a": 1}, b"{broken", {"b": "x", "a": 2}]))
    assert table.columns == ["a", "b"]
    assert [row.values for row in table.rows(["a", "b"])] == [(1, None), (), (2, "x")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_texts_are_joined(tmp_path, kind):
    cells = [["A dog.", " It runs."], [], None, ["It", None], [1.0, 2.0]]
    if kind == "jsonl":
        table = write_jsonl(tmp_path / "t.jsonl", [{"a": cell} for cell in cells])
        (*texts, numbers) = [row.values[0] for row in open_table(table).rows(["a"])]
    else:
        table = write_parquet(tmp_path / "t.parquet", {"a": cells[:4], "numbers": [None, None, None, cells[4]]})
        texts = [row.values[0] for row in open_table(table).rows(["a"])]
        (*_, numbers) = [row.values[0] for row in open_table(table).rows(["numbers"])]
    assert texts == ["A dog. It runs.", "", None, "It"] and numbers == [1.0, 2.0]


def test_long_captions_are_read_from_jsonl(tmp_path):
    table = write_jsonl(tmp_path / "t.jsonl", [{"file": "dogs/1.png", "text": "A dog. It runs."}])
    settings = TableSettings(kind="table", path=table, key="file", captioner=None)
    captioner = TableCaptioner("mine", settings, lambda text: len(text.split()))
    (caption,) = captioner.caption([ImageRecord("dogs_1", image_bytes(), "png", "a dog", 6, 4, "0" * 64)])
    assert isinstance(caption, Caption) and caption.sub_captions == ["A dog", "It runs"]
