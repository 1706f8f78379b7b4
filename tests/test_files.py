"""Atomic writes, publishing, and hashes that depend on contents only."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lotlip.core import files
from lotlip.core.files import (
    PARTIAL,
    RECORD,
    SCRATCH,
    Damaged,
    ForeignFileError,
    atomic_write,
    check_files,
    check_free,
    check_model,
    check_replaceable,
    publish,
    read_json,
    recover,
    remove,
    remove_listed,
    sha256_files,
    sha256_json,
    sha256_tree,
    write_json,
    write_record,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_atomic_write_publishes_the_file_at_the_end(tmp_path):
    path = tmp_path / "deep/er/file"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_on_errors(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_a_folder(tmp_path):
    path = tmp_path / "folder"
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "old").touch()
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert (path / "old").is_file()
    assert [file.name for file in path.iterdir()] == ["new"]


def test_atomic_write_removes_an_incomplete_folder(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_folder", [True, False])
def test_atomic_write_removes_files_of_a_killed_process(tmp_path, as_folder):
    partial_path = tmp_path / f"out{PARTIAL}"
    if as_folder:
        partial_path.mkdir()
        (partial_path / "half").touch()
    else:
        partial_path.write_text("half")
    with atomic_write(tmp_path / "out") as partial:
        assert not partial.exists()
        partial.mkdir()
    assert list((tmp_path / "out").iterdir()) == []
    assert not partial_path.exists()


def test_remove_accepts_files_folders_links_and_missing_paths(tmp_path):
    scratch = tmp_path / SCRATCH
    kept = scratch / "kept"
    (kept / "inner").mkdir(parents=True)
    link = scratch / "link"
    link.symlink_to(kept)
    remove(link)
    remove(scratch / "nothing")
    assert (kept / "inner").is_dir()
    (kept / "file").touch()
    remove(kept / "file")
    remove(kept)
    assert list(scratch.iterdir()) == []
    remove(scratch)
    assert list(tmp_path.iterdir()) == []


def test_remove_accepts_files_written_by_the_same_process(tmp_path):
    write_json(tmp_path / "a.json", 1)
    remove(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine").replace(tmp_path / "a.json")
    with pytest.raises(ForeignFileError):
        remove(tmp_path / "a.json")
    remove(tmp_path / "a.json", ours=lambda path: path.read_text() == "mine")


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values)
def test_json_is_read_as_written(tmp_path, data):
    write_json(tmp_path / "data.json", data)
    assert read_json(tmp_path / "data.json") == data


@pytest.mark.slow
@given(st.dictionaries(st.text(), json_values, min_size=2))
def test_the_order_of_keys_changes_neither_hash_nor_bytes(data):
    backwards = dict(reversed(data.items()))
    assert sha256_json(backwards) == sha256_json(data)


def test_equal_json_gives_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": "ä"})
    write_json(tmp_path / "b", {"y": "ä", "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ä" in (tmp_path / "a").read_text(encoding="utf-8")


@pytest.mark.slow
@given(json_values, json_values)
def test_different_data_have_different_hashes(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


def test_a_file_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON.*run its stage again"):
        read_json(tmp_path / "bad.json")


def write_files(folder: Path, *contents: bytes) -> list[Path]:
    folder.mkdir()
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_the_hash_of_files_depends_on_contents_and_order(tmp_path):
    first = write_files(tmp_path / "here", b"ab", b"c")
    second = write_files(tmp_path / "there", b"ab", b"c")
    shifted = write_files(tmp_path / "shifted", b"a", b"bc")
    assert sha256_files(first) == sha256_files(second)
    assert sha256_files(reversed(first)) != sha256_files(first)
    assert sha256_files(shifted) != sha256_files(first)
    assert sha256_files(first[:1]) != sha256_files(first)


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
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


# --- foreign files are never removed --------------------------------------------------------------------------------


def publish_some(out: Path, place: str | None = None, **files: str) -> None:
    """Publishes a folder like a stage; `a__b` is file b in folder a."""
    new = out.parent / ".lotlip" / "work" / out.name
    for name, text in files.items():
        (new / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (new / name.replace("__", "/")).write_text(text)
    publish(new, out, Path(place or out.name))


def snapshot(folder: Path) -> dict[str, str | None]:
    """Name → the text of a file, the target of a link, or None for a folder."""
    entries: dict[str, str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            entries[name] = str(path.readlink())
        else:
            entries[name] = path.read_text() if path.is_file() else None
    return entries


NAMES = st.sampled_from(["a", "b", "deep/c", "deep/er/d", ".hidden", "index.json"])
# What a user may have in a folder.
FOREIGN = st.dictionaries(NAMES, st.sampled_from(["file", "folder", "link to file", "link to folder"]), max_size=4)
TARGETS = (
    *(".", "..", "/", "~", "", "user", "user/a", "user/deep", "published", "published/deep", "copy", "outside"),
    *("link", "link/kept", "link/deep", "scratch-link", "scratch-link/kept", ".lotlip/link", ".lotlip/link/kept"),
    *("published/..", "published/../user", ".lotlip/..", ".lotlip/../user", "../outside/kept", ".lotlip/link/deep/.."),
)


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    target=st.sampled_from(TARGETS),
    user=FOREIGN,
    mixed=FOREIGN,
    how=st.sampled_from(["remove", "own", "atomic file", "atomic folder", "publish", "recover", "replaceable"]),
    absolute=st.booleans(),
    inner=st.booleans(),
)
def test_foreign_files_are_never_removed(tmp_path_factory, target, user, mixed, how, absolute, inner):
    base = tmp_path_factory.mktemp("case")
    name = ".lotlip/project" if inner else "project"  # scratch is inside the project, not around it
    project, outside = base / name, base / "outside"
    for folder in (project, outside):
        folder.mkdir(parents=True)
    (outside / "kept").write_text("outside")
    (outside / "deep").mkdir()
    (outside / "deep" / "kept").write_text("deep")
    publish_some(project / "published", a="ours", deep__c="ours")
    ours = set(snapshot(project))
    add_foreign(project / "user", user, outside)
    add_foreign(
        project / "published", {name: kind for name, kind in mixed.items() if name not in ("a", "deep/c")}, outside
    )
    (project / "link").symlink_to(outside)
    (project / ".lotlip" / "link").symlink_to(outside)
    (project / "scratch-link").symlink_to(project / ".lotlip")
    (project / "scratch-link.lotlip-note").write_text("the user's")
    shutil.copytree(project / "published", project / "copy", symlinks=True)
    before = {place: text for place, text in snapshot(base).items() if place.removeprefix(f"{name}/") not in ours}
    # links in scratch may be removed, but not their targets
    before.pop(f"{name}/.lotlip/link")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("HOME", str(outside))
        path = Path(target).expanduser()
        path = project / path if absolute else path
        with contextlib.suppress(ForeignFileError, OSError, ValueError):
            call(how, path)
    after = snapshot(base)
    lost = {place for place, text in before.items() if after.get(place, "gone") != text}
    assert not lost


def add_foreign(folder: Path, what: dict[str, str], outside: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, kind in what.items():
        path = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_text("the user's") if not os.path.lexists(path) else None
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(outside / "kept" if kind.endswith("file") else outside)


def call(how: str, path: Path) -> None:
    if how == "remove":
        remove(path)
    elif how == "own":
        remove_listed(path)
    elif how == "recover":
        recover(path)
    elif how == "replaceable":
        check_replaceable(path)
    elif how == "publish":
        new = Path(".lotlip/new")
        new.mkdir(parents=True, exist_ok=True)
        (new / "x").write_text("new")
        publish(new, path)
    elif how == "atomic folder":
        with atomic_write(path) as partial:
            partial.mkdir()
    else:  # commands ask first
        check_free(path, lambda _: False)
        with atomic_write(path) as partial:
            partial.write_text("new")


def test_a_published_folder_can_be_replaced_and_removed(tmp_path):
    out = tmp_path / "out"
    publish_some(out, a="1", deep__c="2")
    publish_some(out, b="3")
    assert set(snapshot(out)) == {"b", RECORD}
    remove(out)
    assert not out.exists()


def test_a_published_folder_with_a_users_file_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    publish_some(out, a="1")
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(ForeignFileError, match=r"notes\.txt"):
        publish_some(out, a="2")
    with pytest.raises(ForeignFileError, match=r"notes\.txt"):
        remove(out)
    assert snapshot(out) == before
    assert remove_listed(out) == ["notes.txt"]
    assert snapshot(out) == {"notes.txt": "mine"}


def test_a_renamed_copy_of_a_published_folder_is_not_removed(tmp_path):
    publish_some(tmp_path / "out", a="1")
    shutil.copytree(tmp_path / "out", tmp_path / "mine")
    with pytest.raises(ForeignFileError):
        remove(tmp_path / "mine")
    with pytest.raises(ForeignFileError):
        remove_listed(tmp_path / "mine")


def test_published_bytes_depend_on_contents_only(tmp_path):
    for name in ("one", "two"):
        publish_some(tmp_path / name / "out", b="2", a="1")
    assert (tmp_path / "one/out" / RECORD).read_bytes() == (tmp_path / "two/out" / RECORD).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("other_disk", [False, True])
def test_publish_is_atomic_when_killed(tmp_path, monkeypatch, other_disk):
    """Publishes in a child process that is killed at its first, second, … file operation."""
    out = tmp_path / "out"
    for step in range(1, 40):
        publish_some(out, a="old", b="old")
        child = os.fork()
        if not child:
            publish_until_killed(step, out, other_disk)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        recover(out)
        entries = snapshot(out)
        assert entries.pop(RECORD)
        assert entries in ({"a": "old", "b": "old"}, {"a": "new"})
        check_files(out)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lotlip", "out"]
        remove(tmp_path / ".lotlip")
        if status == 0:
            assert entries == {"a": "new"}
            assert step > 3
            return
    pytest.fail("publishing never finished")


def publish_until_killed(step: int, out: Path, other_disk: bool) -> None:
    """Publishes in this process, which kills itself before the file operation number `step`."""
    changes = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copytree"):
            changes += 1
            if changes == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if (
                other_disk
                and event == "os.rename"
                and ".lotlip/work" in str(arguments[0])
                and str(out) == str(arguments[1])
            ):
                raise OSError(errno.EXDEV, "another disk")

    sys.addaudithook(hook)
    status = 1
    try:
        publish_some(out, a="new")
        status = 0
    finally:
        os._exit(status)


# --- output paths ---------------------------------------------------------------------------------------------------


def test_check_free_rejects_unsafe_outputs(tmp_path):
    def ours(path: Path) -> bool:
        return path.read_text() == "ours"

    for name, text in (("ours", "ours"), ("theirs", "theirs")):
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    check_free(tmp_path / "new" / "file.json", ours)
    assert not (tmp_path / "new").exists()
    check_free(tmp_path / "ours", ours)
    check_free(tmp_path / "theirs", ours, force=True)
    for name, force in (
        ("theirs", False),
        ("folder", True),
        ("link", True),
        (".", True),
        ("theirs/file", True),
        ("x" * 300, True),
        ("../" * 30 + "proc/1/x", True),
    ):
        with pytest.raises(ValueError, match="--out"):
            check_free(tmp_path / name, ours, force)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "ours", "theirs"]


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 2**20 + 1])
@pytest.mark.parametrize("remembered", [False, True])
def test_check_files_finds_damaged_and_missing_files(tmp_path, size, remembered):
    memory = tmp_path / "memory.json" if remembered else None
    out = tmp_path / "out"
    publish_some(out, deep__a="x" * size, b="1")
    check_files(out, hash_cache=memory)
    with (out / "deep/a").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"y")
    with pytest.raises(Damaged, match=r"out/deep/a is damaged.*dvc checkout"):
        check_files(out, hash_cache=memory)
    check_files(out, within="b", hash_cache=memory)
    (out / "deep/a").unlink()
    with pytest.raises(Damaged, match="out/deep/a is missing"):
        check_files(out, hash_cache=memory)


@pytest.mark.parametrize("inside", ["", "seed-0"])
def test_a_model_card_may_be_edited_or_removed(tmp_path, inside):
    out = tmp_path / "out"
    prefix = f"{inside}__" if inside else ""
    publish_some(out, **{f"{prefix}README.md": "a model", f"{prefix}weights": "1"})
    card, weights = out / inside / "README.md", out / inside / "weights"
    card.write_text("a model, and a note")
    check_model(out / inside)
    card.unlink()
    check_model(out / inside)
    weights.write_text("2")
    with pytest.raises(Damaged, match=r"weights is damaged: it is not what its stage wrote; restore it with `dvc"):
        check_model(out / inside)


def test_the_error_for_a_damaged_folder_names_the_command_that_wrote_it(tmp_path):
    (tmp_path / "weights").write_text("1")
    write_record(tmp_path, Path(tmp_path.name), "lotlip import")
    check_model(tmp_path)
    (tmp_path / "weights").write_text("2")
    with pytest.raises(Damaged, match=rf"not what `lotlip import` wrote; write {tmp_path} again with `.*--force"):
        check_model(tmp_path)
    (tmp_path / "weights").unlink()
    with pytest.raises(Damaged, match=rf"is missing; write {tmp_path} again with `lotlip import` and --force"):
        check_model(tmp_path)


def test_an_unchanged_large_file_is_hashed_once(tmp_path, monkeypatch):
    out, memory, hashed = tmp_path / "out", tmp_path / "memory.json", []
    publish_some(out, a="x" * 2**21)
    entry = files._entry
    monkeypatch.setattr(files, "_entry", lambda file: hashed.append(file) or entry(file))
    for _ in range(3):
        check_files(out, hash_cache=memory)
    assert hashed == [out / "a"]


def test_programs_that_check_a_folder_together_lose_no_hash(tmp_path):
    """Stages that run side by side read the same folder, whose hashes may all be unknown."""
    out, memory = tmp_path / "out", tmp_path / "memory.json"
    names = [f"part-{number}" for number in range(8)]
    publish_some(out, **{name: name * 9 for name in names})

    with ThreadPoolExecutor(len(names)) as pool:
        for _ in range(20):
            memory.unlink(missing_ok=True)
            list(pool.map(lambda name: check_files(out, within=name, hash_cache=memory), names))
            assert sorted(read_json(memory)) == names


def test_check_files_ignores_a_folder_without_a_record(tmp_path):
    check_files(tmp_path)


# --- who removes files ----------------------------------------------------------------------------------------------

REMOVERS = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "move"}
OS_CALLS = {"remove", "replace", "truncate"}
# Module or package → why it may call these.
ALLOWED = {
    "lotlip/core/files.py": "the module itself",
    "lotlip/core/temporary.py": "temporary folders get their names once they are locked, and others before they go",
    "benchmarks/drills": "damages and clears the checkouts that it made in a new folder of its own",
    "benchmarks/team": "clears a database and a clone that it made in a new folder of its own",
}


def is_allowed(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}/") for allowed in ALLOWED)


def removals(source: str) -> list[str]:
    """Calls in a module that remove or rename files."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, value = node.func.attr, node.func.value
            of_os = isinstance(value, ast.Name) and value.id in ("os", "shutil")
            # str.replace takes two arguments, Path.replace one; wds.rename takes keywords
            path_replace = name == "replace" and len(node.args) == 1 and not node.keywords
            wds_rename = name == "rename" and node.keywords and not node.args
            if (name in REMOVERS and not wds_rename) or (of_os and name in OS_CALLS) or path_replace:
                calls.append(f"{name} in line {node.lineno}")
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            calls += [f"import of {name.name}" for name in node.names if name.name in REMOVERS | OS_CALLS]
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lotlip", "flows", "benchmarks"])
def test_only_one_module_removes_and_renames_files(package):
    root = Path(__file__).parents[1]
    calls_by_file = {
        path.relative_to(root).as_posix(): removals(path.read_text(encoding="utf-8"))
        for path in sorted((root / package).rglob("*.py"))
    }
    assert {name: calls for name, calls in calls_by_file.items() if calls and not is_allowed(name)} == {}
