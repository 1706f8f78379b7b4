"""JSON files that are a list of objects: read in pieces, from any object on, with nested values as columns."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from lotlip.caption.captioners.table import TableCaptioner
from lotlip.caption.config import TableCaptionerConfig
from lotlip.data import rows as rows_module
from lotlip.data.records import Caption, Failure, ImageRecord
from lotlip.data.rows import RowRange, find_tables, open_table
from lotlip.ingest.config import JsonlSourceConfig, JsonSourceConfig
from lotlip.ingest.sources import open_source
from tests.test_table_source import add_image, image_bytes, kinds, read_all, write_jsonl

TEXTS = ["plain", 'a "quoted" \\ word', "é ü 漢字 🐶", "[{,]}", "", "x" * 700, "\n\t\u2028", "\\u00e9"]


def write(path: Path, content: bytes | object, **options: object) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content, **options).encode()  # type: ignore[arg-type]
    path.write_bytes(data)
    return path


def share_gpt(number: int, prompt: str = "<image>\nWhat is in the picture?") -> dict[str, object]:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"A dog, {number} cats. They run."}]
    return {"id": f"{number:012}", "image": f"coco/{number}.png", "conversations": turns}


@pytest.mark.parametrize("piece", [1, 7, 64, 2**16])
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 4, "ensure_ascii": False}])
def test_ranges_cover_all_objects_wherever_pieces_end(tmp_path, monkeypatch, piece, options):
    monkeypatch.setattr(rows_module, "_PIECE", piece)
    path = write(tmp_path / "t.json", [{"n": n, "text": text} for n, text in enumerate(TEXTS)], **options)
    table = open_table(path)
    whole = list(table.rows(["text", "n"]))
    assert [row.values for row in whole] == [(text, n) for n, text in enumerate(TEXTS)]
    assert [row.number for row in whole] == list(range(1, len(TEXTS) + 1))
    for size in (1, 3, 100):
        parts = list(table.ranges(size))
        assert [row for part in parts for row in table.rows(["text", "n"], part)] == whole
        assert all(path.read_bytes()[part.start : part.start + 1] == b"{" for part in parts)


def test_a_byte_order_mark_and_blanks_are_skipped(tmp_path):
    table = open_table(write(tmp_path / "t.JSON", b'\xef\xbb\xbf \r\n[ \n{"a": 1} , \t{"b": "\xc3\xa9"}\n]\n \n'))
    assert (table.columns, table.unit) == (["a", "b"], "object")
    assert [(row.number, row.values) for row in table.rows(["a", "b"])] == [(1, (1, None)), (2, (None, "é"))]
    assert list(table.ranges(1)) == [RowRange(9, 1, 1), RowRange(21, 2, 1)]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            b"",
            "neither a list of objects, .* nor two or more lines with an object in each; .* is no table; convert it$",
        ),
        (b'{"a": 1}', r"t\.json cannot be read as json: it has neither a list of objects, "),
        (b'{"a": 1}\n[2]\n', "neither a list of objects, "),
        (b'{"a":\n1}\n{"a":\n2}\n', "neither a list of objects, "),
        (
            b'{"a.jpg": "a dog", "b.jpg": "a cat"}',
            "an object of names and captions, or of lists .* convert it$",
        ),
        (b" [ ]\n", "its list is empty; write it again"),
        (b"[1, 2]", "object 1: it is not a JSON object"),
        (b'["\xff"]', "object 1: it is not UTF-8"),
        (b'[{"a": }]', r"object 1 is broken, .* \(Expecting value at byte 7\)"),
        (b"[" * 5000, "object 1 is broken, .*recursion"),
    ],
)
def test_a_file_without_a_first_object_is_an_error(tmp_path, content, fault):
    with pytest.raises(ValueError, match=fault):
        open_table(write(tmp_path / "t.json", content))


def test_a_json_file_may_have_an_object_per_line(tmp_path):
    """As many programs write it; everything is as in a .jsonl file of the same bytes."""
    content = b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xc3\xa9", "b": {"c": [2]}}\nbroken\n[3]\n{"a": "\xff"}\n{"b": null}'
    table, lines = (open_table(write(tmp_path / f"t.{ending}", content)) for ending in ("json", "jsonl"))
    assert (table.columns, table.unit) == (lines.columns, lines.unit) == (["a", "b.c", "b"], "line")
    rows = list(table.rows(["a", "b.c"]))
    assert rows == list(lines.rows(["a", "b.c"]))
    assert [row.values for row in rows if row.problem is None] == [(1, None), ("é", [2]), (None, None)]
    assert [(row.number, row.problem[1]) for row in rows if row.problem] == [(4, "row"), (5, "row"), (6, "encoding")]
    assert [row for part in table.ranges(2) for row in table.rows(["a", "b.c"], part)] == rows


GOOD = b",\n".join([b'{"a": "\xc3\xa9"}'] * 150)  # more than tell the columns
END = 1 + len(GOOD)


@pytest.mark.parametrize(
    ("ending", "fault"),
    [
        (b', {"a": x}]', rf"object 151 is broken, .* \(Expecting value at byte {END + 8:,}\)"),
        (b' {"a": 1}]', rf"object 150 is broken, .* \(Expecting ',' delimiter at byte {END + 1:,}\)"),
        (b', {"a": "cut', rf"object 151 is broken, .* \(Unterminated string starting at byte {END + 8:,}\)"),
        (b"", r"object 150 is broken"),
        (b", ]", r"object 151 is broken"),
        (b"] []", rf"after the list, which ends at byte {END + 1:,}, there is more than blanks"),
        (b', {"a": "' + b"x" * 2**20 + b'"}]', "object 151 is .* longer than 1,048,576 characters"),
        (b', {"a": "' + b"x" * 2**22 + b'"}]', "object 151 is .* longer than 1,048,576 characters"),
    ],
)
def test_a_file_that_is_broken_later_is_an_error_with_its_place(tmp_path, ending, fault):
    table = open_table(write(tmp_path / "t.json", b"[" + GOOD + ending))
    for read in (lambda: list(table.rows(["a"])), lambda: list(table.ranges(7))):
        with pytest.raises(ValueError, match=r"t\.json cannot be read as json: " + fault):
            read()


def test_a_long_object_is_read(tmp_path):
    values = ["x" * (2**20 - 100), "é" * 400_000, "short"]
    path = write(tmp_path / "t.json", [{"a": value} for value in values], ensure_ascii=False)
    table = open_table(path)
    assert [row.values[0] for row in table.rows(["a"])] == values
    assert [row.values[0] for part in table.ranges(1) for row in table.rows(["a"], part)] == values


@pytest.mark.slow
@pytest.mark.parametrize(("start", "between", "end"), [(b"[", b", ", b"]"), (b"", b"\n", b"\n")])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, start, between, end):
    monkeypatch.setattr(rows_module, "_PIECE", 2**12)
    content = start + between.join([b'{"a": 1, "text": "' + b"word " * 100 + b'"}'] * 2000) + end
    table = open_table(write(tmp_path / "t.json", content))
    tracemalloc.start()
    try:
        counts = sum(1 for _ in table.rows(["a"])), sum(part.count for part in table.ranges(50))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts == (2000, 2000) and peak < 200_000 < len(content) / 5


# --- nested values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_nested_values_are_columns(tmp_path, ending):
    objects: list[object] = [
        {
            "id": 7,
            "turns": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}],
            "meta": {"caption": ["It", " runs"], "a.b": "dot", "none": None},
            "x.y": "plain",
            "x": {"y": "nested"},
            "deep.key": {"lost": 1},
            "boxes": [[1, 2], [3, 4]],
            "numbers": [1.5, 2.5],
        },
        {"id": 8, "turns": [{"from": "human", "value": "Who?"}], "meta": "a text", "x": [1]},
        {"id": 9, "meta": None, "turns": {"1": {"value": "by key"}}},
    ]
    path = tmp_path / f"t.{ending}"
    table = open_table(write(path, objects) if ending == "json" else write_jsonl(path, objects))
    assert table.columns == [
        *("id", "turns.0.from", "turns.0.value", "turns.1.from", "turns.1.value"),
        *("meta.caption", "meta.a.b", "meta.none", "x.y", "boxes.0", "boxes.1", "numbers", "meta", "x"),
    ]
    columns = ["turns.1.value", "meta.caption", "meta.a.b", "x.y", "numbers"]
    assert [row.values for row in table.rows(columns)] == [
        ("A dog.", "It runs", "dot", "plain", [1.5, 2.5]),
        (None, None, None, None, None),
        ("by key", None, None, None, None),
    ]


def test_values_nested_very_deeply_are_no_columns(tmp_path):
    content = b'[{"a": "x", "b": ' + b'{"c": ' * 400 + b"1" + b"}" * 400 + b"}]"
    assert open_table(write(tmp_path / "t.json", content)).columns == ["a"]


# --- users of tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
def test_units_cover_all_objects_of_a_json_file(tmp_path, size):
    for number in (1, 2):
        add_image(tmp_path / "images", f"coco/{number}.png")
    objects = [json.dumps(share_gpt(number)).encode() for number in range(1, 4)]
    content = (
        b"[" + b",".join([*objects[:2], b"[1]", b'{"image": "\xff"}', b'{"image": "coco/9.png"}', objects[2]]) + b"]"
    )
    settings = {"images": tmp_path / "images", "caption": "conversations.1.value"}
    source = open_source(JsonSourceConfig(kind="json", path=write(tmp_path / "t.json", content), **settings))
    items = read_all(source, size)
    assert [kind for _, kind in kinds(items)] == ["", "", "row", "encoding", "missing", "missing"]
    assert items[0].short_caption == "A dog, 1 cats. They run." and items[0].key == "coco_1"
    assert items[2].where == f"{tmp_path}/t.json: object 3"


def test_a_changed_image_changes_the_state_of_its_unit_only(tmp_path):
    for number in range(4):
        add_image(tmp_path / "images", f"coco/{number}.png")
    path = write(tmp_path / "t.json", [share_gpt(number) for number in range(4)])
    settings = JsonSourceConfig(kind="json", path=path, images=tmp_path / "images", caption="conversations.1.value")
    units = open_source(settings).units(2)
    before = [open_source(settings).state(unit) for unit in units]
    (tmp_path / "images/coco/2.png").write_bytes(image_bytes(colour="blue") + b" ")
    after = [open_source(settings).state(unit) for unit in units]
    assert before[0] == after[0] and before[1] != after[1]


def test_compressed_tables_are_errors(tmp_path):
    table = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    for name in ("a.jsonl.gz", "b.json.gz", ".b.jsonl.gz", "b.txt.gz"):  # the first is there decompressed, too
        (tmp_path / name).touch()
    assert find_tables(tmp_path) == [table]
    (tmp_path / "b.JSONL.gz").touch()
    (tmp_path / "c.csv.part").touch()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/b\.JSONL\.gz and 1 more cannot be read.*; decompress or"):
        find_tables(tmp_path)
    with pytest.raises(ValueError, match=r"c\.csv\.part cannot be read"):
        find_tables(tmp_path, "csv")
    assert find_tables(tmp_path, "parquet") == []


def test_json_files_beside_other_tables_are_metadata(tmp_path):
    first = write(tmp_path / "a.json", [{"a": 1}])
    assert find_tables(tmp_path) == [first]
    lines = write_jsonl(tmp_path / "b.jsonl", [{"a": 1}])
    assert find_tables(tmp_path) == [lines]
    assert find_tables(tmp_path, "json") == [first] and find_tables(tmp_path, "jsonl") == [lines]
    longer = write_jsonl(tmp_path / "c.jsonlines", [{"image": "a", "caption": "b"}])
    assert find_tables(tmp_path, "jsonl") == [lines, longer]
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"has no table; set .* to a \.jsonl or \.jsonlines file"):
        open_source(JsonlSourceConfig(kind="jsonl", path=tmp_path / "images", images=tmp_path / "images"))


def test_long_captions_are_read_from_json(tmp_path):
    path = write(tmp_path / "t.json", [share_gpt(number) for number in range(3)])
    settings = TableCaptionerConfig(kind="table", path=path, key="image", captioner=None, text="conversations.1.value")
    captioner = TableCaptioner("mine", settings, len)
    (caption,) = captioner.caption([ImageRecord("coco_2", b"", "png", "a dog", 6, 4, "0" * 64)])
    assert isinstance(caption, Caption) and caption.sub_captions == ["A dog, 2 cats", "They run"]
    write(path, path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.json cannot be read as json: object 3 is broken"):
        TableCaptioner("mine", settings, len)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_half_an_emoji_makes_only_its_row_invalid(tmp_path, ending):
    """As json.dumps writes it if a model's caption was cut there."""
    texts = ["A dog.", "A \ud83d", "A \U0001f436."]
    rows = [{"image": f"{number}.png", "unused": "\ud83d", "long": text} for number, text in enumerate(texts)]
    path = tmp_path / f"t.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    read = list(open_table(path).rows(["long"]))
    assert [row.values for row in read] == [(texts[0],), (), (texts[2],)]
    assert read[1].problem == ("long is not UTF-8: lone surrogate", "encoding")
    settings = TableCaptionerConfig(kind="table", path=path, key="image", captioner=None, text="long")
    images = [ImageRecord(str(number), b"", "png", "a dog", 6, 4, "0" * 64) for number in range(3)]
    captions = TableCaptioner("mine", settings, len).caption(images)
    assert [isinstance(caption, Caption) for caption in captions] == [True, False, True]


def test_a_caption_with_nested_values_is_no_caption(tmp_path):
    rows = [{"image": "0.png", "long": "A dog."}, {"image": "1.png", "long": {"en": "A cat."}}]
    path = write(tmp_path / "t.json", rows)
    settings = TableCaptionerConfig(kind="table", path=path, key="image", captioner=None, text="long")
    images = [ImageRecord(str(number), b"", "png", "a dog", 6, 4, "0" * 64) for number in range(2)]
    one, other = TableCaptioner("mine", settings, len).caption(images)
    assert isinstance(one, Caption) and one.text == "A dog."
    assert isinstance(other, Failure) and other.reason.endswith(f"{path}: object 2: long has nested values")
