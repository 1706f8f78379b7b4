"""Files that are whole or not there, and hashes that depend on contents alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lotlip.files import PARTIAL, read_json, remove, sha256_files, sha256_json, sha256_tree, whole, write_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep/er/file"
    with whole(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), whole(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "folder"
    (path / "old").mkdir(parents=True)
    with whole(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert (path / "old").is_dir()
    assert [file.name for file in path.iterdir()] == ["new"]


def test_a_folder_half_written_is_removed(tmp_path):
    with pytest.raises(RuntimeError), whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_folder", [True, False])
def test_what_a_killed_process_left_does_not_get_in(tmp_path, as_folder):
    left = tmp_path / f"out{PARTIAL}"
    if as_folder:
        left.mkdir()
        (left / "half").touch()
    else:
        left.write_text("half")
    with whole(tmp_path / "out") as partial:
        assert not partial.exists()
        partial.mkdir()
    assert list((tmp_path / "out").iterdir()) == []
    assert not left.exists()


def test_remove_takes_files_folders_links_and_nothing(tmp_path):
    kept = tmp_path / "kept"
    (kept / "inner").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(kept)
    remove(link)
    remove(tmp_path / "nothing")
    assert (kept / "inner").is_dir()
    remove(kept)
    assert list(tmp_path.iterdir()) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values)
def test_json_comes_back(tmp_path, data):
    write_json(tmp_path / "data.json", data)
    assert read_json(tmp_path / "data.json") == data


@given(st.dictionaries(st.text(), json_values, min_size=2))
def test_the_order_of_keys_changes_neither_hash_nor_bytes(data):
    backwards = dict(reversed(data.items()))
    assert sha256_json(backwards) == sha256_json(data)


def test_equal_json_is_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": "ä"})
    write_json(tmp_path / "b", {"y": "ä", "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ä" in (tmp_path / "a").read_text(encoding="utf-8")


@given(json_values, json_values)
def test_other_data_has_another_hash(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON.*run its stage again"):
        read_json(tmp_path / "bad.json")


def written(folder: Path, *contents: bytes) -> list[Path]:
    folder.mkdir()
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_the_hash_of_files_is_of_their_contents_in_order(tmp_path):
    here = written(tmp_path / "here", b"ab", b"c")
    there = written(tmp_path / "there", b"ab", b"c")
    shifted = written(tmp_path / "shifted", b"a", b"bc")
    assert sha256_files(here) == sha256_files(there)
    assert sha256_files(reversed(here)) != sha256_files(here)
    assert sha256_files(shifted) != sha256_files(here)
    assert sha256_files(here[:1]) != sha256_files(here)


def test_a_folder_s_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_text("1")
    (tmp_path / "deep" / "b").write_text("2")
    before = sha256_tree(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()
    assert sha256_tree(tmp_path) == before
    (tmp_path / "deep" / "b").rename(tmp_path / "deep" / "c")
    renamed = sha256_tree(tmp_path)
    (tmp_path / "deep" / "c").write_text("3")
    assert len({before, renamed, sha256_tree(tmp_path)}) == 3
    assert sha256_tree(tmp_path / "a") == sha256_files([tmp_path / "a"])
