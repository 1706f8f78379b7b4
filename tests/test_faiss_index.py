"""FAISS indexes: agreement with exact search, added items, and changed features."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lotlip import cli
from lotlip.core.files import ForeignFileError
from lotlip.retrieval import faiss_index
from lotlip.retrieval.embedding import matches
from lotlip.retrieval.faiss_index import add, build, faiss_file, open_searchable
from lotlip.retrieval.index import IndexRows, index_writer, nearest

WIDTH = 16
ENDINGS = (".parquet", ".npy")


@pytest.fixture
def approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes searches approximate even in few items."""
    monkeypatch.setattr(faiss_index, "EXACT_BELOW", 1)


def write(path: Path, rows: int, seed: int = 0, **about: object) -> np.ndarray:
    """Writes and returns normalised features around 40 directions."""
    rng = np.random.default_rng(seed)
    features = np.random.default_rng(9).normal(size=(40, WIDTH))[rng.integers(40, size=rows)]
    features = (features + 0.3 * rng.normal(size=(rows, WIDTH))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    described = {"model": "m", "weights_sha256": "abc", "kind": "images", "width": WIDTH, "source": f"source-{seed}"}
    with index_writer(path, {**described, **about}) as writer:
        for start in range(0, rows, 500):
            block = features[start : start + 500]
            writer(IndexRows([f"{seed}-{start + row}.png" for row in range(len(block))], None, block))
    return features


def names(path: Path, query: np.ndarray, top: int = 10) -> list[str]:
    return [match.name for match in matches(open_searchable(path), query, top)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "kind", "rows", "ending"),
    [(None, "hnsw", 900, ".npy"), ("flat", "flat", 900, ".parquet"), (None, "ivf-pq", 10_000, ".npy")],
)
def test_approximate_search_agrees_with_exact_search(tmp_path, approximate, given, kind, rows, ending):
    path = tmp_path / f"images{ending}"
    features = write(path, rows)
    built = build(path, given)
    assert (built.path, built.kind, built.rows, built.queries) == (faiss_file(path), kind, rows, 200)
    assert built.recall >= (1 if kind == "flat" else 0.95)
    index = open_searchable(path)
    assert index.approximate is not None
    for top in (10, 300):
        recalls = []
        for number in range(0, rows, rows // 30):
            query = features[number] + np.float32(0.01)
            hits, expected = index.approximate(query, top), nearest([features], query, top)
            scores = [score for score, _ in hits]
            assert len(hits) == top and scores == sorted(scores, reverse=True)
            np.testing.assert_allclose([features[row] @ query for _, row in hits], scores, atol=1e-3)
            recalls.append(len({row for _, row in hits} & {row for _, row in expected}) / top)
        assert np.mean(recalls) >= 0.95
    assert str(faiss_file(path)) in Path("/proc/self/maps").read_text()  # it is memory-mapped
    assert len(matches(index, features[0], rows + 5)) == rows


def test_recall_is_measured_with_all_given_queries(tmp_path, approximate, monkeypatch):
    path, queries = tmp_path / "images.npy", tmp_path / "texts.npy"
    write(path, 300)
    write(queries, 20, seed=1, kind="texts")
    built = build(path, "flat", queries)
    assert (built.recall, built.queries) == (1, 20)
    write(queries, 20, seed=1, weights_sha256="other")
    with pytest.raises(ValueError, match=r"texts\.npy was made by another model"):
        build(path, "flat", queries)


@pytest.mark.parametrize("ending", ENDINGS)
def test_items_are_added_without_a_rebuild(tmp_path, approximate, monkeypatch, ending):
    path, more, last = (tmp_path / f"{name}{ending}" for name in ("images", "more", "last"))
    write(path, 700)
    features = write(more, 60, seed=1)
    write(last, 5, seed=2)
    build(path)
    monkeypatch.setattr(faiss_index, "_new", None)
    assert add(path, [more]).rows == 760
    assert add(path, [last]).rows == 765
    for exact in (False, True):
        index = open_searchable(path, exact)
        assert (index.approximate is None) == exact
        first = matches(index, features[40], 1)[0]
        assert (first.name, first.source) == ("1-40.png", "source-1")
        assert first.score == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=rf"more\{ending} is already in .*images\{ending}\.faiss"):
        add(path, [more])


def test_incompatible_items_cannot_be_added(tmp_path):
    path, other = tmp_path / "images.npy", tmp_path / "other.npy"
    write(path, 50)
    write(other, 5, weights_sha256="other")
    with pytest.raises(ValueError, match=r"has no index to add to; build it with `lotlip index .*images\.npy`"):
        add(path, [other])
    build(path)
    with pytest.raises(ValueError, match="its weights_sha256 is other, not that of"):
        add(path, [other])
    write(other, 5, seed=3, kind="texts")
    with pytest.raises(ValueError, match="its kind is texts"):
        add(path, [other])


@pytest.mark.parametrize("ending", ENDINGS)
def test_items_are_added_only_once(tmp_path, ending):
    path, again, other = (tmp_path / f"{name}{ending}" for name in ("images", "again", "other"))
    write(path, 50)
    build(path)
    index = faiss_file(path).read_bytes()
    write(again, 60)  # the same folder, with ten more images
    with pytest.raises(ValueError, match=r"again.* has 50 items that are already in .*, such as 0-0\.png; embed only"):
        add(path, [again])
    write(other, 5, seed=1)
    with pytest.raises(ValueError, match="is already in"):
        add(path, [other, other])
    assert faiss_file(path).read_bytes() == index
    write(again, 50, source="a copy elsewhere")
    assert add(path, [other, again]).rows == 105


def test_few_items_and_added_ones_are_searched_exactly(tmp_path):
    path, more = tmp_path / "images.npy", tmp_path / "more.parquet"
    write(path, 50)
    features = write(more, 5, seed=1)
    build(path)
    add(path, [more])
    assert open_searchable(path).approximate is None
    assert names(path, features[3], 1) == ["1-3.png"]
    assert len(names(path, features[3], 99)) == 55


def test_a_copied_folder_can_be_searched(tmp_path, approximate):
    features = write(tmp_path / "a" / "images.npy", 50)
    write(tmp_path / "a" / "more.npy", 5, seed=1)
    build(tmp_path / "a" / "images.npy")
    add(tmp_path / "a" / "images.npy", [tmp_path / "a" / "more.npy"])
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "a")
    assert names(tmp_path / "b" / "images.npy", features[7], 1) == ["0-7.png"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_index_of_changed_features_is_an_error(tmp_path, approximate, ending):
    path, more = tmp_path / f"images{ending}", tmp_path / f"more{ending}"
    write(path, 50)
    write(more, 5, seed=1)
    build(path)
    add(path, [more])
    write(more, 5, seed=2)  # with the same file size
    message = (
        rf"was built from another .*more\{ending}, which has changed since; build it again with .*images\{ending}`"
    )
    with pytest.raises(ValueError, match=message):
        open_searchable(path)
    with pytest.raises(ValueError, match=message):
        add(path, [more])
    more.unlink()
    with pytest.raises(ValueError, match=rf"more\{ending}, which .* covers, does not exist; restore it, or build it"):
        open_searchable(path)
    assert build(path).rows == open_searchable(path).size == 50


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-40], "is damaged or is not an index"),
        (lambda data: b"", "is damaged or is not an index"),
        (lambda data: data[100:], "its record does not fit it"),
        (lambda data: b"wrong" + data[5:], "FAISS cannot read it"),
    ],
)
def test_a_damaged_index_is_an_error(tmp_path, approximate, spoil, message):
    path = tmp_path / "images.npy"
    write(path, 50)
    build(path)
    faiss_file(path).write_bytes(spoil(faiss_file(path).read_bytes()))
    with pytest.raises(ValueError, match=rf"images\.npy\.faiss .*{message}.*build it again with `lotlip index"):
        open_searchable(path)


def test_another_file_is_not_replaced(tmp_path):
    path = tmp_path / "images.npy"
    write(path, 50)
    faiss_file(path).write_text("mine")
    with pytest.raises(ForeignFileError):
        build(path)
    assert faiss_file(path).read_text() == "mine"
    assert build(path, force=True).rows == 50
    assert build(path, "flat").kind == "flat"


def test_an_invalid_kind_is_an_error(tmp_path):
    write(tmp_path / "images.npy", 50)
    with pytest.raises(ValueError, match="unknown kind 'lsh'; choose hnsw, ivf-pq, flat"):
        build(tmp_path / "images.npy", "lsh")
    with pytest.raises(ValueError, match=r"has 50 items; ivf-pq needs 10,000: use --kind hnsw or flat"):
        build(tmp_path / "images.npy", "ivf-pq")


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["lotlip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code


def test_the_command_builds_and_adds(tmp_path, monkeypatch, capsys):
    path, more = tmp_path / "images.npy", tmp_path / "more.npy"
    write(path, 50)
    write(more, 5, seed=1)
    assert program(monkeypatch, "index", path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}.faiss: hnsw, 50 items; recall@10 ")
    assert err.splitlines()[-1] == "search is exact below 100,000 items, so it does not use this index"
    assert program(monkeypatch, "index", path, "--add", more) == 0
    assert capsys.readouterr().out.startswith(f"{path}.faiss: hnsw, 55 items; recall@10 ")
    message = "error: --kind is the kind of a new index; remove it, or remove --add"
    assert program(monkeypatch, "index", path, "--add", more, "--kind", "flat") == message


def test_without_faiss_the_message_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "images.npy", 50)
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = "error: `lotlip index` needs the package faiss: pip install 'lotlip[index]'"
    assert program(monkeypatch, "index", tmp_path / "images.npy") == message
