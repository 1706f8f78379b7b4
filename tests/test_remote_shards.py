"""Shards on another store: the same batches as from a folder, through a cache that stays within its size."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from flows.runtime.scratch import StageFailed
from flows.upload_shards import upload_shards
from lotlip.config.params import load_params
from lotlip.core.compute import RemoteShards
from lotlip.core.files import read_json, write_json
from lotlip.data.index import ShardIndex, read_index
from lotlip.data.remote_shards import ShardCache, check_same, open_index, upload
from lotlip.data.token_ids import write_token_ids
from lotlip.data.tokenizer import TextTokenizer
from lotlip.pretrain.config import LongTextsConfig, PretrainConfig
from lotlip.pretrain.loader import BatchSlice, Loader
from tests.training import losses, same, tiny_job, train, weights

TOKENIZER = TextTokenizer("bert-base-uncased", 48, 1)


@pytest.fixture
def shards(tiny_world, tmp_path) -> Path:
    """A copy of the tiny world's shards, with the token ids of its texts."""
    folder = shutil.copytree(tiny_world.shards, tmp_path / "shards")
    for tar in folder.glob("*.tar"):
        write_token_ids(tar, "bert-base-uncased")
    return folder


@pytest.fixture
def there(shards, tmp_path) -> str:
    """The URL of a copy of the shards."""
    upload(shards, f"file://{tmp_path}/store/shards")
    return f"file://{tmp_path}/store/shards"


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """The names of the files that this process downloads, from now on."""
    names: list[str] = []
    get_file = LocalFileSystem.get_file

    def counted(self, rpath, lpath, **more):
        names.append(Path(rpath).name)
        return get_file(self, rpath, lpath, **more)

    monkeypatch.setattr(LocalFileSystem, "get_file", counted)
    return names


def remote(url: str, tmp_path: Path, max_bytes: int = 10**9) -> RemoteShards:
    return RemoteShards(url=url, cache=tmp_path / "local", max_bytes=max_bytes)


def batches(shards: Path, source: RemoteShards | None, workers: int = 0) -> list:
    config = PretrainConfig(long_texts=LongTextsConfig(sub_captions=2))
    loader = Loader(shards, config, TOKENIZER, 5, BatchSlice(8), workers=workers, remote=source)
    return [batch for step in loader.steps(0, 2 * loader.steps_per_epoch) for batch in step]


def cache_of(url: str, tmp_path: Path, max_bytes: int = 10**9, held: int = 1) -> ShardCache:
    settings = remote(url, tmp_path, max_bytes)
    return ShardCache(settings, open_index(Path("none"), settings).shards, held)


def stored(tmp_path: Path) -> list[str]:
    """The tars in the cache."""
    return sorted(path.name for path in (tmp_path / "local").rglob("*.tar"))


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(shards, there, tmp_path, workers):
    expected = batches(shards, None)
    found = batches(tmp_path / "no such folder", remote(there, tmp_path), workers)
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys and torch.equal(one.images, other.images)
        assert torch.equal(one.short_ids, other.short_ids) and torch.equal(one.long_ids, other.long_ids)
    assert len(list((tmp_path / "local").rglob("*.token-ids.arrow"))) == len(list(shards.glob("*.token-ids.arrow")))


@pytest.mark.slow
def test_shards_are_read_from_s3(shards, tmp_path, s3):
    from s3fs import S3FileSystem

    S3FileSystem().mkdir("remote-shards")
    upload(shards, "s3://remote-shards/demo")
    found = batches(tmp_path / "none", remote("s3://remote-shards/demo", tmp_path), workers=1)
    assert [batch.keys for batch in found] == [batch.keys for batch in batches(shards, None)]
    with pytest.raises(ValueError, match=r"s3://remote-shards/other (lacks|cannot be used)"):
        batches(tmp_path / "none", remote("s3://remote-shards/other", tmp_path))


def test_a_shard_is_downloaded_once_by_all_processes(shards, there, tmp_path, downloads):
    name = read_index(shards, ShardIndex).shards[0].name
    caches = [cache_of(there, tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=cache.open, args=(cache.folder / f"{name}.tar",)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads.count(f"{name}.tar") == 1


def test_shards_are_downloaded_ahead(shards, there, tmp_path, downloads):
    names = [entry.name for entry in read_index(shards, ShardIndex).shards]
    cache = cache_of(there, tmp_path)
    cache.prefetch(names)
    for name in names:  # `open` waits for a download that has begun
        cache.open(cache.folder / f"{name}.tar")
    assert sorted(name for name in downloads if name.endswith(".tar")) == sorted(f"{name}.tar" for name in names)


def test_the_cache_keeps_its_size_and_the_latest_shards(shards, there, tmp_path, downloads):
    entries = read_index(shards, ShardIndex).shards
    assert len(entries) >= 3
    size = sum(sorted(entry.bytes for entry in entries)[-2:])  # of any two
    cache = cache_of(there, tmp_path, size)
    first, second, third = [cache.folder / f"{entry.name}.tar" for entry in entries[:3]]
    opened = cache.open(first)
    keys = opened.keys.to_pylist()
    for number, tar in enumerate([second, first, third]):  # so `second` was used the longest ago
        os.utime(first, (number, number)) if tar is second else None
        cache.open(tar)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= size
    assert stored(tmp_path) == sorted([first.name, third.name])
    assert not [path for path in cache.folder.glob(f"{second.name.removesuffix('.tar')}.*") if path.suffix != ".lock"]
    cache.open(second)
    assert downloads.count(second.name) == 2 and second.name in stored(tmp_path)
    assert opened.read(0, ("json",))["__key__"] == keys[0]  # an open shard stays readable


def test_downloads_that_run_count_as_used(shards, there, tmp_path, monkeypatch):
    entries = read_index(shards, ShardIndex).shards[:3]
    size = sum(sorted(entry.bytes for entry in entries)[-2:])  # of any two
    cache = cache_of(there, tmp_path, size)
    first, second, third = [cache.folder / f"{entry.name}.tar" for entry in entries]
    (cache.folder / "killed.reserved").parent.mkdir(parents=True)
    with (cache.folder / "killed.reserved").open("wb") as file:  # of a process that was killed
        file.truncate(size)
    os.utime(cache.folder / "killed.reserved", (0, 0))
    cache.open(first)
    assert not (cache.folder / "killed.reserved").exists()
    get_file = LocalFileSystem.get_file

    def meanwhile(self, rpath, lpath, **more):
        get_file(self, rpath, lpath, **more)
        if Path(rpath).name == second.name:
            cache.open(third)  # as another process would

    monkeypatch.setattr(LocalFileSystem, "get_file", meanwhile)
    cache.open(second)
    assert stored(tmp_path) == sorted([second.name, third.name])
    assert not list(cache.folder.glob("*.reserved"))


def test_a_cache_that_cannot_hold_the_open_shards_is_an_error(there, tmp_path):
    with pytest.raises(ValueError, match=r"max_bytes 1,000 is less than the [\d,]+ bytes of the \d+ shards"):
        batches(tmp_path, remote(there, tmp_path, 1000))


@pytest.mark.integration
def test_training_needs_no_folder_with_shards(group, tiny_world, tmp_path):
    upload(tiny_world.shards, f"file://{tmp_path}/store")
    source = {"remote_shards": {"url": f"file://{tmp_path}/store", "cache": str(tmp_path / "local")}, "steps": 4}
    plain = train(tiny_job(tiny_world, tmp_path / "plain", {"steps": 4}))
    cached = train(tiny_job(tiny_world, tmp_path / "cached", source, shards=tmp_path / "none"))
    assert losses(cached) == losses(plain) and same(weights(cached), weights(plain))


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_shard_is_an_error_that_names_it(shards, there, tmp_path, damage):
    entry = read_index(shards, ShardIndex).shards[0]
    file = tmp_path / "store" / "shards" / f"{entry.name}.tar"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data[:-1] + b"x")
    cache = cache_of(there, tmp_path)
    with pytest.raises(ValueError, match=rf"{entry.name}.tar.*upload the shards again"):
        cache.open(cache.folder / file.name)
    assert stored(tmp_path) == [] and not list((tmp_path / "local").rglob("*.lotlip-partial"))
    file.write_bytes(data)
    assert len(cache.open(cache.folder / file.name)) == entry.samples


def test_a_damaged_index_or_store_is_an_error(shards, there, tmp_path):
    check_same(there, shards)
    index = read_json(shards / "index.json")
    write_json(shards / "index.json", {**index, "vocabulary": index["vocabulary"][1:]})
    with pytest.raises(ValueError, match=r"store/shards has other shards than .*upload the shards again"):
        check_same(there, shards)
    (tmp_path / "store" / "shards" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"store/shards/index.json is damaged"):
        check_same(there, shards)
    with pytest.raises(ValueError, match=r"store/none lacks index.json"):
        check_same(f"file://{tmp_path}/store/none", shards)
    with pytest.raises(ValueError, match=r"nosuch://bucket cannot be"):
        check_same("nosuch://bucket", shards)


# --- uploading ----------------------------------------------------------------------------------------------------


def test_only_what_is_missing_or_changed_is_uploaded(shards, there, tmp_path):
    store = tmp_path / "store" / "shards"
    files = sorted(path.name for path in store.iterdir())
    assert files == sorted(path.name for path in shards.iterdir() if path.suffix in (".tar", ".arrow", ".json"))
    assert upload(shards, there) == 1  # index.json
    index = read_index(shards, ShardIndex)
    (store / f"{index.shards[0].name}.tar").unlink()
    steps: list[tuple[int, int, str]] = []
    assert upload(shards, there, lambda *step: steps.append(step)) == 2
    assert [done for done, _, _ in steps] == list(range(1, len(files) + 1)) and steps[-1][2] == "index.json"
    entry = index.shards[1].model_copy(update={"sha256": "other"})
    write_json(
        store / "index.json",
        {**read_json(store / "index.json"), "splits": {"train": {"samples": 1, "shards": [entry.model_dump()]}}},
    )
    assert upload(shards, there) > len(files) - 3  # the index there lists no shard of these
    check_same(there, shards)


def test_an_interrupted_upload_has_no_index(shards, tmp_path, monkeypatch):
    put_file = LocalFileSystem.put_file

    def failing(self, lpath, rpath, **more):
        if lpath.endswith("1.tar"):
            raise OSError("the store is full")
        return put_file(self, lpath, rpath, **more)

    monkeypatch.setattr(LocalFileSystem, "put_file", failing)
    url = f"file://{tmp_path}/new"
    with pytest.raises(ValueError, match=r"new cannot be used: .*the store is full"):
        upload(shards, url)
    with pytest.raises(ValueError, match=r"lacks index\.json"):
        check_same(url, shards)
    monkeypatch.undo()
    upload(shards, url)
    check_same(url, shards)


def test_the_command_uploads_to_the_configured_address(shards, tmp_path):
    params = load_params()
    params = params.model_copy(update={"paths": params.paths.model_copy(update={"shards": shards})})
    with pytest.raises(StageFailed, match=r"compute\.training\.remote_shards\.url"):
        upload_shards(params, None)
    lines: list[str] = []
    upload_shards(params, f"file://{tmp_path}/new", lines.append)
    assert lines[-1].startswith(f"file://{tmp_path}/new: copied ") and "files of" in lines[-1]
    check_same(f"file://{tmp_path}/new", shards)
