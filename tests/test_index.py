"""Index files of features, and exact nearest neighbours in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotlip.retrieval import index
from lotlip.retrieval.index import IndexRows, index_writer, nearest, open_index

ABOUT = {"model": "models/lotlip", "weights_sha256": "abc", "kind": "texts", "width": 3, "source": "texts.txt"}
ENDINGS = (".parquet", ".npy")


def features(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)


def write(path: Path, rows: int, kind: str = "texts", block: int = 4) -> np.ndarray:
    rows_written = features(rows)
    with index_writer(path, {**ABOUT, "kind": kind}) as add:
        for start in range(0, rows, block):
            numbers = range(start, min(start + block, rows))
            texts = [f"text “{number}”\n\u2028" for number in numbers] if kind == "texts" else None
            add(IndexRows([f"name {number}" for number in numbers], texts, rows_written[start : start + block]))
    return rows_written


def plain_sort(blocks: list[np.ndarray], query: np.ndarray, top: int) -> list[tuple[float, int]]:
    """The best rows by a plain sort."""
    scores = [float(np.float32(sum(float(a) * float(b) for a, b in zip(row, query, strict=True)))) for row in blocks]
    return sorted(((score, number) for number, score in enumerate(scores)), key=lambda item: (-item[0], item[1]))[:top]


@pytest.mark.slow
@given(
    rows=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), max_size=30),
    query=st.tuples(*[st.integers(-2, 2)] * 3),
    top=st.integers(1, 35),
    block=st.integers(1, 12),
)
def test_nearest_agrees_with_a_plain_sort(rows, query, top, block):
    """With small integers many rows tie, and the earlier row comes first."""
    matrix = np.array(rows, dtype=np.float32).reshape(-1, 3)
    blocks = [matrix[start : start + block] for start in range(0, len(matrix), block)]
    vector = np.array(query, dtype=np.float32)
    assert nearest(iter(blocks), vector, top) == plain_sort(list(matrix), vector, top)


def test_equal_rows_have_equal_scores_in_all_blocks():
    one = np.random.default_rng(1).normal(size=(1, 769)).astype(np.float32)
    query = np.random.default_rng(2).normal(size=769).astype(np.float32)
    results = nearest([np.repeat(one, count, axis=0) for count in (1, 2, 5, 16, 7)], query, 31)
    assert [row for _, row in results] == list(range(31))
    assert len({score for score, _ in results}) == 1


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_index_is_read_as_written(tmp_path, monkeypatch, ending, kind):
    monkeypatch.setattr(index, "_GROUP", 5)  # more than one block
    monkeypatch.setattr(index, "_BLOCK", 5)
    path = tmp_path / f"index{ending}"
    expected = write(path, 18, kind)
    opened = open_index(path)
    assert opened.about == {**ABOUT, "kind": kind}
    blocks = list(opened.blocks())
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks), expected)
    assert np.concatenate(blocks).dtype == np.float32
    texts = {number: f"text “{number}”\n\u2028" if kind == "texts" else None for number in (17, 0, 8)}
    assert opened.rows([17, 0, 8]) == {number: (f"name {number}", text) for number, text in texts.items()}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        {path.name, "index.names.jsonl"} if ending == ".npy" else {path.name}
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_open_index_stays_what_it_was_when_its_files_are_replaced(tmp_path, ending):
    """A server has opened it."""
    path = tmp_path / f"index{ending}"
    expected = write(path, 9)
    opened = open_index(path)
    with index_writer(path, ABOUT) as add:
        add(IndexRows(["a longer name", "another"], ["x", "y"], features(2)))
    assert opened.rows([0, 8]) == {number: (f"name {number}", f"text “{number}”\n\u2028") for number in (0, 8)}
    assert np.array_equal(np.concatenate(list(opened.blocks())), expected)


def test_parquet_is_written_in_groups(tmp_path, monkeypatch):
    """Groups limit the memory. A fixed-size list cannot hold a row that is too short."""
    monkeypatch.setattr(index, "_GROUP", 8)
    expected = write(tmp_path / "index.parquet", 21)
    file = pq.ParquetFile(tmp_path / "index.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [8, 8, 5]
    table = file.read()
    assert table.schema.names == ["name", "text", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert table.schema.field("embedding").type.list_size == 3
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), expected)
    assert json.loads(table.schema.metadata[b"lotlip"]) == ABOUT


def test_an_index_without_a_source_is_read(tmp_path):
    with index_writer(tmp_path / "index.npy", {name: ABOUT[name] for name in ABOUT if name != "source"}) as add:
        add(IndexRows(["a"], ["b"], features(1)))
    assert "source" not in open_index(tmp_path / "index.npy").about


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 100_003])
def test_numpy_reads_the_features(tmp_path, rows):
    expected = write(tmp_path / "index.npy", rows, block=50_000)
    loaded = np.load(tmp_path / "index.npy")
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, expected)
    lines = (tmp_path / "index.names.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"lotlip": ABOUT}
    assert json.loads(lines[rows]) == {"name": f"name {rows - 1}", "text": f"text “{rows - 1}”\n\u2028"}
    assert lines[rows + 1 :] == [""]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_index_is_written_atomically(tmp_path, ending):
    path = tmp_path / f"index{ending}"
    for existing in ([], ["an earlier index"]):
        if existing:
            write(path, 2)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(RuntimeError, match="interrupted"), index_writer(path, ABOUT) as add:
            add(IndexRows(["a"], ["b"], features(1)))
            raise RuntimeError("interrupted")
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_feature_is_an_error_naming_index_and_row(tmp_path, ending, value):
    path = tmp_path / f"index{ending}"
    values = features(9)
    values[5, 1] = value
    with index_writer(path, {**ABOUT, "kind": "images"}) as add:
        add(IndexRows([str(number) for number in range(9)], None, values))
    with pytest.raises(ValueError, match=rf"{path}.*row 5"):
        nearest(open_index(path).blocks(), values[0], 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_truncated_or_damaged_index_is_an_error(tmp_path, ending):
    path = tmp_path / f"index{ending}"
    write(path, 2000)
    data = path.read_bytes()
    for spoilt in (data[: len(data) // 2], b"", b"\xff" * 100, data[:100] + b"\xff" * 4000 + data[4100:]):
        path.write_bytes(spoilt)
        try:
            index = open_index(path)
            for block in index.blocks():
                assert np.isfinite(block).all()
            index.rows([0, 1999])
        except ValueError as error:
            assert str(path) in str(error)


def test_an_unknown_file_extension_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"index\.csv has an unknown suffix; use \.parquet or \.npy"):
        index_writer(tmp_path / "index.csv", ABOUT)
    with pytest.raises(ValueError, match=r"unknown suffix"):
        open_index(tmp_path / "index.csv")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_index_is_an_error(tmp_path, ending):
    with pytest.raises(ValueError, match="does not exist; write it with `lotlip embed`"):
        open_index(tmp_path / f"index{ending}")


def table(path: Path, metadata: dict[str, str]) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"name": ["a"]}).replace_schema_metadata(metadata), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def drop_name(path: Path) -> None:
    names = path.with_suffix(".names.jsonl")
    names.write_text("".join(names.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("index.parquet", truncate, r"index\.parquet is damaged: it cannot be read as Parquet"),
        ("index.parquet", lambda path: table(path, {}), "is not an index: it names no model"),
        ("index.parquet", lambda path: table(path, {"lotlip": '{"model": "a"}'}), "is not an index: it names no model"),
        ("index.npy", truncate, r"index\.npy is damaged: it cannot be read as a NumPy array"),
        ("index.npy", lambda path: path.write_bytes(b""), r"index\.npy is damaged: it cannot be read as a NumPy array"),
        ("index.npy", lambda path: path.with_suffix(".names.jsonl").unlink(), r"names\.jsonl.* does not exist"),
        ("index.npy", drop_name, r"has shape \(9, 3\), but .* names 8 rows"),
        ("index.npy", lambda path: np.save(path, np.zeros((9, 4))), r"has shape \(9, 4\), but"),
        (
            "index.npy",
            lambda path: path.with_suffix(".names.jsonl").write_text("[]\n"),
            r"names\.jsonl is not an index: it names no model",
        ),
        (
            "index.npy",
            lambda path: path.with_suffix(".names.jsonl").write_text("name\n"),
            r"names\.jsonl is not an index: it names no model",
        ),
    ],
)
def test_a_broken_index_is_an_error(tmp_path: Path, name: str, spoil: Any, message: str):
    write(tmp_path / name, 9)
    spoil(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path / name)
