"""Batches out of shards: each sample once, independent of processes and workers, with reproducible texts."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lotlip.core.files import read_json, write_json
from lotlip.data.images import Transform, decode_rgb, training_transform
from lotlip.data.tars import index_path, write_index
from lotlip.data.tokenizer import TextTokenizer
from lotlip.pretrain.config import AugmentationConfig, LongTextsConfig, PretrainConfig
from lotlip.pretrain.loader import Batch, BatchSlice, Loader, WorkerLost
from tests.conftest import TinySample, TinyWorld, write_shards, write_tar

TOKENIZER = TextTokenizer("bert-base-uncased", 48, 1)
CLS, SEP, CORNER = 101, 102, 30522
ONE = LongTextsConfig(sub_captions=1)


def loader(
    shards: Path,
    rows: BatchSlice | None = None,
    long_texts: LongTextsConfig = ONE,
    seed: int = 0,
    transform: Transform | None = None,
    workers: int = 0,
    prefetch: int = 4,
    **settings: Any,
) -> Loader:
    """A loader, by default without workers. `settings` belong to the section `loader`."""
    config = PretrainConfig(long_texts=long_texts, loader=settings)
    return Loader(shards, config, TOKENIZER, seed, rows or BatchSlice(8), transform, workers=workers, prefetch=prefetch)


def epoch(shards: Path, *args: Any, epoch: int = 0, **more: Any) -> list[Batch]:
    opened = loader(shards, *args, **more)
    first = epoch * opened.steps_per_epoch
    return [batch for step in opened.steps(first, first + opened.steps_per_epoch) for batch in step]


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def texts(ids: torch.Tensor, lengths: torch.Tensor) -> list[tuple[int, ...]]:
    """Token ids without padding."""
    return [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]


def rows_of(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Key, image, short text and long texts of each sample, in order."""
    rows: list[tuple[Any, ...]] = []
    for batch in batches:
        short = texts(batch.short_ids, batch.short_lengths)
        assert batch.long_ids is not None and batch.long_lengths is not None
        long = texts(batch.long_ids, batch.long_lengths)
        per_image = len(long) // len(short)
        rows += [
            (key, tuple(image.tolist()), text, tuple(long[i * per_image : (i + 1) * per_image]))
            for i, (key, image, text) in enumerate(zip(batch.keys, batch.images, short, strict=True))
        ]
    return rows


def encoded(*sub_captions: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode([list(sub_captions)])[0])


@pytest.fixture
def small_windows(monkeypatch) -> None:
    """Two shards per window, so that a small data set has several windows."""
    monkeypatch.setattr("lotlip.pretrain.order.WINDOW", 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
@pytest.mark.parametrize(("shards", "workers"), [(1, 0), (1, 3), (3, 0), (5, 0), (5, 2)])
def test_an_epoch_has_every_sample_once(tmp_path, tiny_samples, small_windows, shards, workers):
    folder = write_shards(tmp_path, tiny_samples, shards)
    for number in (0, 1):
        batches = epoch(folder, epoch=number, workers=workers)
        assert [len(batch.keys) for batch in batches] == [8] * 6
        assert Counter(keys(batches)) == Counter(sample.key for sample in tiny_samples)


def test_an_incomplete_batch_is_dropped(tiny_world):
    batches = epoch(tiny_world.shards, BatchSlice(10))
    assert [len(batch.keys) for batch in batches] == [10] * 4
    assert len(set(keys(batches))) == 40


def test_epochs_and_seeds_differ_and_are_reproducible(tiny_world):
    shards = tiny_world.shards
    first = rows_of(epoch(shards))
    assert rows_of(epoch(shards)) == first
    assert keys(epoch(shards, epoch=1)) != keys(epoch(shards))
    assert keys(epoch(shards, seed=1)) != keys(epoch(shards))
    second = {row[0]: row[3] for row in rows_of(epoch(shards, epoch=1))}
    assert any(second[row[0]] != row[3] for row in first)  # long texts differ, too


def test_samples_are_mixed_over_shards(tmp_path, tiny_samples):
    folder = write_shards(tmp_path, tiny_samples, 4)
    origin = {sample.key: number % 4 for number, sample in enumerate(tiny_samples)}
    assert all(len({origin[key] for key in batch.keys}) > 1 for batch in epoch(folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (1, 3), (2, 0), (4, 2)])
def test_batches_do_not_depend_on_processes_and_workers(tiny_world, small_windows, processes, workers):
    expected = rows_of(epoch(tiny_world.shards))
    shares = [epoch(tiny_world.shards, BatchSlice(8, rank, processes), workers=workers) for rank in range(processes)]
    joined = [share[number] for number in range(6) for share in shares]
    assert rows_of(joined) == expected


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("long_texts", [LongTextsConfig(sub_captions=3, per_image=2), LongTextsConfig(sub_captions=0)])
def test_micro_batches_hold_the_same_samples_sorted_by_length(tiny_world, processes, long_texts):
    for rank in range(processes):
        unsplit = loader(tiny_world.shards, BatchSlice(24, rank, processes), long_texts)
        split = loader(tiny_world.shards, BatchSlice(24, rank, processes, micro_batches=3), long_texts)
        for (batch,), parts in zip(unsplit.steps(0, 2), split.steps(0, 2), strict=True):
            assert [len(part.keys) for part in parts] == [8 // processes] * 3
            assert sorted(samples_of(parts)) == sorted(samples_of([batch]))
            longest = [lengths_of(part) for part in parts]
            assert [length for part in longest for length in part] == sorted(lengths_of(batch))
            for part, lengths in zip(parts, longest, strict=True):
                ids = part.short_ids if part.long_ids is None else part.long_ids
                assert ids.shape[1] == max(lengths)


def samples_of(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Like `rows_of`, with or without long texts."""
    if any(batch.long_ids is None for batch in batches):
        batches = [replace(batch, long_ids=batch.short_ids, long_lengths=batch.short_lengths) for batch in batches]
    return rows_of(batches)


def lengths_of(batch: Batch) -> list[int]:
    lengths = batch.short_lengths if batch.long_lengths is None else batch.long_lengths
    return [int(row.max()) for row in lengths.view(len(batch.keys), -1)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"epochs": "resampled", "weights": {"red": 5.0}}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_at_any_step(tiny_world, small_windows, settings, workers):
    expected = list(loader(tiny_world.shards, **settings).steps(0, 14))  # two epochs and part of the third
    for first in (1, 5, 6, 11):
        rest = list(loader(tiny_world.shards, workers=workers, **settings).steps(first, 14))
        assert [rows_of(step) for step in rest] == [rows_of(step) for step in expected[first:]]
    assert list(loader(tiny_world.shards, workers=workers).steps(3, 3)) == []


def test_fewer_samples_than_a_batch_are_an_error(tiny_world):
    with pytest.raises(ValueError, match=r"has 48 training samples, fewer than a batch of 49; set pretrain.batch_size"):
        loader(tiny_world.shards, BatchSlice(49))


def test_stored_features_and_pixels_belong_to_their_sample(tiny_world: TinyWorld):
    for batch in epoch(tiny_world.shards):
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert np.array_equal(image.numpy(), tiny_world.samples[key].feature)

    def corner(data: bytes, _: random.Random | None = None) -> np.ndarray:
        return np.array(decode_rgb(data).getpixel((0, 0)), dtype=np.float32)

    for shards in (tiny_world.shards, tiny_world.pixel_shards):
        for batch in epoch(shards, transform=corner):
            for key, image in zip(batch.keys, batch.images, strict=True):
                assert np.array_equal(image.numpy(), corner(tiny_world.samples[key].image))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_without_a_stored_feature_is_an_error(tiny_world, workers):
    with pytest.raises(ValueError, match=r"^sample \S+ in \S+train-00000\d.tar has no stored feature; set shard"):
        epoch(tiny_world.pixel_shards, workers=workers)


def test_short_texts_are_full_captions_and_long_texts_are_windows_of_sub_captions(tiny_world: TinyWorld):
    for key, _, short, long in rows_of(epoch(tiny_world.shards, long_texts=LongTextsConfig(sub_captions=2))):
        info = tiny_world.samples[key].info
        assert short == encoded(info["raw"])
        windows = {encoded(*parts[i : i + 2]) for parts in info["captions"].values() for i in range(len(parts) - 1)}
        assert len(long) == 1 and long[0] in windows


def test_long_texts_come_from_the_named_captioners_only(tiny_world: TinyWorld):
    rows = {}
    for names in (["llava"], ["gpt"], ["llava", "gpt"], []):
        rows[tuple(names)] = rows_of(
            epoch(tiny_world.shards, long_texts=LongTextsConfig(sub_captions=1, captioners=names))
        )
    for names in (("llava",), ("gpt",)):
        for key, _, _, long in rows[names]:
            assert long[0] in {encoded(part) for part in tiny_world.samples[key].info["captions"][names[0]]}
    assert rows[()] == rows["llava", "gpt"]
    assert rows[()] not in (rows[("llava",)], rows[("gpt",)])


def with_captions(key: str, sample: TinySample, short: str, captions: dict[str, list[str]]) -> TinySample:
    return TinySample(key, sample.image, sample.feature, {"raw": short, "captions": captions})


def test_the_short_caption_replaces_a_missing_long_caption(tmp_path, tiny_samples):
    samples = [
        with_captions("none", tiny_samples[0], "a dog. it runs", {}),
        with_captions("empty", tiny_samples[1], "a cat. it sits", {"llava": []}),
        with_captions("other", tiny_samples[2], "a car. it is red", {"gpt": ["not asked for"]}),
        with_captions("all", tiny_samples[3], "a boat", {"llava": ["a long boat"]}),
    ]
    shards = write_shards(tmp_path, samples, 1)
    long_texts = LongTextsConfig(sub_captions=3, captioners=["llava"])
    long_of = {row[0]: row[3] for row in rows_of(epoch(shards, BatchSlice(4), long_texts))}
    assert long_of == {
        "none": (encoded("a dog", "it runs"),),
        "empty": (encoded("a cat", "it sits"),),
        "other": (encoded("a car", "it is red"),),
        "all": (encoded("a long boat"),),
    }


def test_sentences_of_the_short_caption_can_be_long_texts(tmp_path, tiny_samples):
    """This holds for images with long captions, too."""
    sample = with_captions("a", tiny_samples[0], "a dog. it runs. it is red", {"llava": ["a long dog"]})
    shards = write_shards(tmp_path, [sample], 1)

    def texts(captioners: list[str]) -> set[tuple[str, ...]]:
        long_texts = LongTextsConfig(sub_captions=2, captioners=captioners, per_image=24)
        return set(rows_of(epoch(shards, BatchSlice(1), long_texts))[0][3])

    sentences = {encoded("a dog", "it runs"), encoded("it runs", "it is red")}
    assert texts(["raw"]) == sentences
    assert texts(["raw", "llava"]) == {*sentences, encoded("a long dog")}


def test_zero_sub_captions_give_no_long_texts(tiny_world):
    batches = epoch(tiny_world.shards, long_texts=LongTextsConfig(sub_captions=0))
    assert all(batch.long_ids is None and batch.long_lengths is None for batch in batches)
    assert batches[0].texts["long_ids"] is None


def test_long_texts_of_an_image_are_adjacent(tmp_path, tiny_samples):
    samples = [
        with_captions(f"s{number}", tiny_samples[number], "raw", {"llava": [word] * 3})
        for number, word in enumerate(["red", "green", "blue", "white"])
    ]
    (batch,) = epoch(write_shards(tmp_path, samples, 1), BatchSlice(4), LongTextsConfig(sub_captions=1, per_image=3))
    assert batch.long_ids is not None and batch.long_ids.shape[0] == 12
    for key, *_, long in rows_of([batch]):
        word = ["red", "green", "blue", "white"][int(key[1])]
        assert long == (encoded(word),) * 3


def test_several_long_texts_are_drawn_independently(tiny_world):
    rows = rows_of(epoch(tiny_world.shards, long_texts=LongTextsConfig(sub_captions=1, per_image=2)))
    assert all(len(long) == 2 for *_, long in rows)
    assert any(long[0] != long[1] for *_, long in rows)


def test_short_and_long_texts_are_padded_separately(tiny_world):
    for batch in epoch(tiny_world.shards, long_texts=LongTextsConfig(sub_captions=3)):
        assert batch.long_ids is not None and batch.long_lengths is not None
        assert batch.short_ids.shape == (8, batch.short_lengths.max())
        assert batch.long_ids.shape == (8, batch.long_lengths.max())
        assert batch.long_ids.shape[1] > batch.short_ids.shape[1]
        assert (batch.long_ids[:, 0] == CLS).all() and (batch.short_ids[:, 1] == CORNER).all()
        assert all(row[-1] == SEP for row in texts(batch.long_ids, batch.long_lengths))


# --- resampled epochs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 5])
def test_resampled_epochs_follow_the_weights(tmp_path, tiny_samples, small_windows, shards):
    folder = write_shards(tmp_path, tiny_samples, shards)
    weights = {"b": 2.0, "blue-": 6.0}  # blue is drawn six times as often as red, black and brown twice as often
    sampled = keys(
        epoch(
            folder,
            BatchSlice(100),
            LongTextsConfig(sub_captions=0),
            epochs="resampled",
            samples_per_epoch=6000,
            weights=weights,
        )
    )
    assert len(sampled) == 6000
    counts = Counter(key.split("-")[0] for key in sampled)
    factors = {"red": 1, "green": 1, "white": 1, "black": 2, "brown": 2, "blue": 6}
    for colour, weight in factors.items():
        share = weight / sum(factors.values())
        assert abs(counts[colour] / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5  # four standard errors
    blue = Counter(key for key in sampled if key.startswith("blue"))
    assert len(blue) == 8 and max(blue.values()) < 1.3 * min(blue.values())


@pytest.mark.slow
def test_a_resampled_epoch_draws_with_replacement(tiny_world):
    batches = epoch(tiny_world.shards, epochs="resampled")
    assert len(keys(batches)) == 48
    assert 1 < len(set(keys(batches))) < 48
    assert rows_of(epoch(tiny_world.shards, epochs="resampled", workers=2)) == rows_of(batches)
    assert keys(epoch(tiny_world.shards, epochs="resampled", epoch=1)) != keys(batches)


def test_a_repeated_sample_has_new_texts(tiny_world):
    texts_of: dict[str, set[Any]] = {}
    for row in rows_of(epoch(tiny_world.shards, BatchSlice(48), epochs="resampled", samples_per_epoch=480)):
        texts_of.setdefault(row[0], set()).add(row[3])
    assert all(len(long_texts) > 1 for long_texts in texts_of.values())


def test_a_weight_that_matches_no_key_is_an_error(tiny_world):
    with pytest.raises(
        ValueError, match=r"weights: no sample's key begins with 'cc3m', 'rred'; keys look like \w+-\w+, "
    ):
        loader(tiny_world.shards, epochs="resampled", weights={"red": 2.0, "rred": 2.0, "cc3m": 1.0})


# --- reading shards -----------------------------------------------------------------------------------------------


def test_the_order_never_changes(tiny_world):
    """A resumed run needs the same batches under every version of the libraries."""
    assert keys(epoch(tiny_world.shards))[:4] == ["black-boat", "white-boat", "green-house", "red-dog"]
    resampled = keys(epoch(tiny_world.shards, epochs="resampled"))
    assert resampled[:4] == [
        "red-bird",
        "white-dog",
        "blue-house",
        "white-house",
    ]


def test_images_are_not_read_when_features_are_stored(tiny_world, monkeypatch):
    reads: list[tuple[int, bytes]] = []

    def pread(file: int, size: int, offset: int) -> bytes:
        data = original(file, size, offset)
        reads.append((size, data))
        return data

    original = os.pread
    monkeypatch.setattr(os, "pread", pread)
    epoch(tiny_world.shards)
    assert len(reads) == 48  # one read per sample
    assert not any(sample.image[:8] in data for _, data in reads for sample in tiny_world.samples.values())


@pytest.mark.slow
def test_tars_with_and_without_an_index_give_equal_samples(tmp_path, tiny_samples):
    """Tars of other programs have other names, another order, and additional files."""
    without, indexed = (write_shards(tmp_path / name, tiny_samples, 2) for name in ("without", "indexed"))
    for path in indexed.glob("*.tar"):
        write_index(path)
    assert rows_of(epoch(indexed)) == rows_of(epoch(without))
    foreign = write_shards(tmp_path / "foreign", tiny_samples, 2)
    for number, name in enumerate(("train-000000.tar", "train-000001.tar")):
        with tarfile.open(foreign / name, "w", format=tarfile.PAX_FORMAT) as tar:
            add_member(tar, "__meta__/a.json", b"{}")
            for sample in tiny_samples[number::2]:
                feature = io.BytesIO()
                np.save(feature, sample.feature)
                folder = f"{'long' * 40}/0.1/{sample.key}"
                add_member(tar, f"{folder}.JPG", b"ignored")
                add_member(tar, f"{folder}.json", json.dumps(sample.info).encode())
                add_member(tar, f"{folder}.npy", feature.getvalue())
                add_member(tar, f"{folder}.txt", b"a caption")
    rows = [(key.rpartition("/")[2], *rest) for key, *rest in rows_of(epoch(foreign))]
    assert [row[:3] for row in rows] == [row[:3] for row in rows_of(epoch(without))]  # texts are drawn by key


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_a_stale_index_is_an_error(tmp_path, tiny_samples):
    folder = write_shards(tmp_path, tiny_samples, 1)
    shard = folder / "train-000000.tar"
    write_index(shard)
    with shard.open("ab") as file:
        file.write(bytes(10240))
    with pytest.raises(ValueError, match=r"train-000000.index.arrow is stale: it describes a tar of \d+ bytes, but"):
        epoch(folder)
    index_path(shard).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"train-000000.index.arrow is not a tar's index .*; remove it"):
        epoch(folder)
    index_path(shard).unlink()
    assert len(epoch(folder)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_differ_from_the_index_are_errors(tmp_path, tiny_samples, workers):
    folder = write_shards(tmp_path, tiny_samples, 2)
    shard = folder / "train-000000.tar"
    write_tar(shard, tiny_samples[:3])
    with pytest.raises(ValueError, match=r"^\S+train-000000.tar has 3 samples, but index.json says 24; rerun the"):
        epoch(folder, workers=workers)
    shard.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"^\S+train-000000.tar is not a complete, uncompressed tar"):
        epoch(folder, workers=workers)
    shard.unlink()
    with pytest.raises(ValueError, match=r"^\S+train-000000.tar does not exist, but index.json lists it"):
        epoch(folder, workers=workers)


def test_an_opened_tar_that_is_truncated_is_an_error(tmp_path, tiny_samples):
    folder = write_shards(tmp_path, tiny_samples, 1)
    steps = loader(folder).steps(0, 6)
    next(steps)
    os.truncate(folder / "train-000000.tar", 600)
    with pytest.raises(ValueError, match=r"train-000000.tar ends inside sample \S+: it is truncated"):
        next(steps)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": b"{", "npy": b"", "png": b""}, "its .json has not `raw`, a caption"),
        ({"json": b'{"raw": "a"}', "npy": b"", "png": b""}, "its .json has not `raw`, .* and `captions`"),
        ({"json": b'{"raw": "...", "captions": {}}', "npy": b""}, "its short caption .* has no words"),
        ({"json": b'{"raw": "a", "captions": {"llava": ["a", " . "]}}', "npy": b""}, "a sub-caption of llava"),
        ({"json": b'{"raw": "a", "captions": {"llava": [null]}}', "npy": b""}, "a sub-caption of llava"),
        ({"json": b'{"raw": "a", "captions": {}}', "npy": b"x" * 40}, "its .npy cannot be read"),
        ({"json": b'{"raw": "a", "captions": {}}', "npy": b"\x93NUMPY\x01\x00"}, "its .npy cannot be read"),
        ({"npy": b"", "png": b""}, "1 samples have no .json .k.; remove them"),
    ],
)
def test_a_broken_sample_is_an_error_naming_it(tmp_path, members, message):
    folder = write_shards(tmp_path, [], 1)
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for ending, data in members.items():
            add_member(tar, f"k.{ending}", data)
    index = read_json(folder / "index.json")
    index["splits"]["train"]["shards"][0]["samples"] = 1
    write_json(folder / "index.json", index)
    with pytest.raises(ValueError, match=rf"^(sample k in )?\S+train-000000.tar: {message}"):
        epoch(folder, BatchSlice(1))


def test_objects_are_never_unpickled(tmp_path, tiny_samples):
    objects = replace(tiny_samples[0], feature=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"its .npy cannot be read \(an array of object"):
        epoch(write_shards(tmp_path, [objects], 1), BatchSlice(1))


def test_a_broken_image_is_an_error_naming_its_sample(tmp_path, tiny_samples):
    folder = write_shards(tmp_path, [replace(tiny_samples[0], image=b"not an image!")], 1)
    with pytest.raises(ValueError, match=rf"^sample {tiny_samples[0].key} in \S+: not a readable image .13 bytes"):
        epoch(folder, BatchSlice(1), transform=training_transform(16), workers=1)


@pytest.mark.slow
def test_augmentation_depends_on_seed_epoch_and_key(tiny_world):
    transform = training_transform(16, augmentation=AugmentationConfig(scale=(0.2, 1.0)))

    def bytes_of(image: torch.Tensor) -> bytes:
        return image.numpy().tobytes()

    def pixels(**more: Any) -> dict[str, bytes]:
        batches = epoch(tiny_world.pixel_shards, transform=transform, **more)
        images = [image for batch in batches for image in batch.images]
        return dict(zip(keys(batches), map(bytes_of, images), strict=True))

    first = pixels()
    assert pixels(workers=2) == first
    for other in (pixels(epoch=1), pixels(seed=1)):
        assert all(other[key] != first[key] for key in first)


# --- workers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers() -> Callable[[], list[psutil.Process]]:
    """Returns the children that this process has started since the fixture."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


@pytest.mark.slow
def test_workers_end_with_the_steps(tiny_world, workers):
    steps = loader(tiny_world.shards, workers=2).steps(0, 1000)
    next(steps)
    assert len(workers()) == 2
    steps.close()
    assert not workers()
    list(loader(tiny_world.shards, workers=2).steps(0, 4))
    assert not workers()


@pytest.mark.integration
def test_a_killed_worker_is_an_error(tiny_world, workers):
    steps = loader(tiny_world.shards, workers=2).steps(0, 10**6)
    next(steps)
    workers()[0].kill()
    with pytest.raises(WorkerLost, match=r"a worker of the loader ended unexpectedly .*; if memory ran out, set"):
        for _ in steps:
            pass


ORPHANS = """
import os, signal, sys
from pathlib import Path
import psutil
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.loader import Loader, BatchSlice
from lotlip.data.tokenizer import TextTokenizer

tokenizer = TextTokenizer("bert-base-uncased")
tokenizer(["a red dog"] * 100)  # on threads, which a fork does not copy
steps = Loader(Path(sys.argv[1]), PretrainConfig(), tokenizer, 0, BatchSlice(8), workers=2).steps(0, 10**6)
next(steps)
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.integration
def test_workers_end_silently_when_their_process_is_killed(tiny_world):
    program = [sys.executable, "-c", ORPHANS, str(tiny_world.shards)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 300
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.1)
