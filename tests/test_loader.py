"""From shards to batches: every sample once, the same ones however the work is split, and texts as they were drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lotlip.config import LongTexts
from lotlip.data.images import decode_rgb
from lotlip.data.loader import Batch, Rows, batches
from lotlip.data.tokenizer import TextTokenizer
from tests.conftest import TinySample, TinyWorld, write_shards, write_tar

TOKENIZER = TextTokenizer("bert-base-uncased", 48, 1)
CLS, SEP, CORNER = 101, 102, 30522
ONE = LongTexts(sub_captions=1)


def epoch(
    shards: list[Path],
    rows: Rows | None = None,
    long_texts: LongTexts = ONE,
    seed: int = 0,
    epoch: int = 0,
    **more: Any,
) -> list[Batch]:
    return list(batches(shards, rows or Rows(8), TOKENIZER, long_texts, seed, epoch, **more))


def keys(found: list[Batch]) -> list[str]:
    return [key for batch in found for key in batch.keys]


def texts(ids: torch.Tensor, lengths: torch.Tensor) -> list[tuple[int, ...]]:
    """Token ids without padding."""
    return [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]


def rows_of(found: list[Batch]) -> list[tuple[Any, ...]]:
    """Everything that is known of each sample, in order."""
    rows: list[tuple[Any, ...]] = []
    for batch in found:
        raw = texts(batch.raw_ids, batch.raw_lengths)
        assert batch.long_ids is not None and batch.long_lengths is not None
        long = texts(batch.long_ids, batch.long_lengths)
        per_image = len(long) // len(raw)
        rows += [
            (key, tuple(image.tolist()), short, tuple(long[i * per_image : (i + 1) * per_image]))
            for i, (key, image, short) in enumerate(zip(batch.keys, batch.images, raw, strict=True))
        ]
    return rows


def encoded(*sub_captions: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode([list(sub_captions)])[0])


@pytest.mark.parametrize("shards", [1, 3, 5])
def test_an_epoch_has_every_sample_once(tmp_path, tiny_samples, shards):
    folder = write_shards(tmp_path, tiny_samples, shards)
    found = epoch(sorted(folder.glob("*.tar")))
    assert [len(batch.keys) for batch in found] == [8] * 6
    assert Counter(keys(found)) == Counter(sample.key for sample in tiny_samples)


def test_the_rest_that_fills_no_batch_is_left_out(tiny_world):
    found = epoch(tiny_world.train_shards(), Rows(10))
    assert [len(batch.keys) for batch in found] == [10] * 4
    assert len(set(keys(found))) == 40


def test_epochs_and_seeds_differ_and_each_repeats_exactly(tiny_world):
    shards = tiny_world.train_shards()
    first = rows_of(epoch(shards))
    assert rows_of(epoch(shards)) == first
    assert keys(epoch(shards, epoch=1)) != keys(epoch(shards))
    assert keys(epoch(shards, seed=1)) != keys(epoch(shards))
    again = {row[0]: row[3] for row in rows_of(epoch(shards, epoch=1))}
    assert any(again[row[0]] != row[3] for row in first)  # other long texts are drawn, too


def test_samples_are_mixed_over_shards(tmp_path, tiny_samples):
    folder = write_shards(tmp_path, tiny_samples, 4)
    origin = {sample.key: number % 4 for number, sample in enumerate(tiny_samples)}
    assert all(len({origin[key] for key in batch.keys}) > 1 for batch in epoch(sorted(folder.glob("*.tar"))))


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_batches_do_not_depend_on_how_the_work_is_split(tiny_world, processes, accumulation):
    shards = tiny_world.train_shards()
    whole = rows_of(epoch(shards))
    shares = [epoch(shards, Rows(8, rank, processes, accumulation)) for rank in range(processes)]
    assert all(len(share) == 6 * accumulation for share in shares)
    # micro-batch by micro-batch, the first process's rows first
    together = [share[number] for number in range(6 * accumulation) for share in shares]
    assert rows_of(together) == whole


def test_a_run_resumes_at_the_right_batch(tiny_world):
    shards = tiny_world.train_shards()
    whole = epoch(shards)
    for skip in (1, 5):
        assert rows_of(epoch(shards, skip=skip)) == rows_of(whole[skip:])
    assert epoch(shards, skip=6) == []
    part = Rows(8, rank=1, processes=2, accumulation=2)
    assert rows_of(epoch(shards, part, skip=4)) == rows_of(epoch(shards, part)[8:])


def test_stored_features_and_pixels_are_those_of_the_sample(tiny_world: TinyWorld):
    for batch in epoch(tiny_world.train_shards()):
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert np.array_equal(image.numpy(), tiny_world.samples[key].feature)

    def corner(data: bytes) -> np.ndarray:
        return np.array(decode_rgb(data).getpixel((0, 0)), dtype=np.float32)

    for shards in (tiny_world.train_shards(), sorted(tiny_world.pixel_shards.glob("*.tar"))):
        for batch in epoch(shards, transform=corner):
            for key, image in zip(batch.keys, batch.images, strict=True):
                assert np.array_equal(image.numpy(), corner(tiny_world.samples[key].image))


def test_a_sample_without_its_feature_says_how_to_get_one(tiny_world):
    shard = sorted(tiny_world.pixel_shards.glob("*.tar"))[:1]
    with pytest.raises(ValueError, match=r"sample \S+ in \S+train-000000.tar has no stored feature; set shard.store_f"):
        epoch(shard)


def test_raw_captions_come_whole_and_long_texts_from_the_captions(tiny_world: TinyWorld):
    for key, _, raw, long in rows_of(epoch(tiny_world.train_shards(), long_texts=LongTexts(sub_captions=2))):
        info = tiny_world.samples[key].info
        assert raw == encoded(info["raw"])
        windows = {encoded(*parts[i : i + 2]) for parts in info["captions"].values() for i in range(len(parts) - 1)}
        assert len(long) == 1 and long[0] in windows


def test_only_the_captioners_that_are_named_are_drawn_from(tiny_world: TinyWorld):
    found = {}
    for names in (["llava"], ["gpt"], ["llava", "gpt"], []):
        found[tuple(names)] = rows_of(
            epoch(tiny_world.train_shards(), long_texts=LongTexts(sub_captions=1, captioners=names))
        )
    for names in (("llava",), ("gpt",)):
        for key, _, _, long in found[names]:
            assert long[0] in {encoded(part) for part in tiny_world.samples[key].info["captions"][names[0]]}
    assert found[()] == found["llava", "gpt"]
    assert found[()] not in (found[("llava",)], found[("gpt",)])


def described(key: str, sample: TinySample, raw: str, captions: dict[str, list[str]]) -> TinySample:
    return TinySample(key, sample.image, sample.feature, {"raw": raw, "captions": captions})


def test_a_raw_caption_stands_in_where_no_long_one_is(tmp_path, tiny_samples):
    samples = [
        described("none", tiny_samples[0], "a dog. it runs", {}),
        described("empty", tiny_samples[1], "a cat. it sits", {"llava": []}),
        described("other", tiny_samples[2], "a car. it is red", {"gpt": ["not asked for"]}),
        described("all", tiny_samples[3], "a boat", {"llava": ["a long boat"]}),
    ]
    shard = write_tar(tmp_path / "train-000000.tar", samples)
    long_texts = LongTexts(sub_captions=3, captioners=["llava"])
    found = {row[0]: row[3] for row in rows_of(epoch([shard], Rows(4), long_texts))}
    assert found == {
        "none": (encoded("a dog", "it runs"),),
        "empty": (encoded("a cat", "it sits"),),
        "other": (encoded("a car", "it is red"),),
        "all": (encoded("a long boat"),),
    }


def test_without_long_texts_there_are_none(tiny_world):
    found = epoch(tiny_world.train_shards(), long_texts=LongTexts(sub_captions=0))
    assert all(batch.long_ids is None and batch.long_lengths is None for batch in found)
    assert found[0].texts["long_ids"] is None


def test_long_texts_of_an_image_stand_in_a_row(tmp_path, tiny_samples):
    samples = [
        described(f"s{number}", tiny_samples[number], "raw", {"llava": [word] * 3})
        for number, word in enumerate(["red", "green", "blue", "white"])
    ]
    shard = write_tar(tmp_path / "train-000000.tar", samples)
    (batch,) = epoch([shard], Rows(4), LongTexts(sub_captions=1, per_image=3))
    assert batch.long_ids is not None and batch.long_ids.shape[0] == 12
    for key, *_, long in rows_of([batch]):
        word = ["red", "green", "blue", "white"][int(key[1])]
        assert long == (encoded(word),) * 3


def test_several_long_texts_are_drawn_apart(tiny_world):
    found = rows_of(epoch(tiny_world.train_shards(), long_texts=LongTexts(sub_captions=1, per_image=2)))
    assert all(len(long) == 2 for *_, long in found)
    assert any(long[0] != long[1] for *_, long in found)


def test_short_and_long_texts_are_padded_apart(tiny_world):
    for batch in epoch(tiny_world.train_shards(), long_texts=LongTexts(sub_captions=3)):
        assert batch.long_ids is not None and batch.long_lengths is not None
        assert batch.raw_ids.shape == (8, batch.raw_lengths.max())
        assert batch.long_ids.shape == (8, batch.long_lengths.max())
        assert batch.long_ids.shape[1] > batch.raw_ids.shape[1]
        assert (batch.long_ids[:, 0] == CLS).all() and (batch.raw_ids[:, 1] == CORNER).all()
        assert all(row[-1] == SEP for row in texts(batch.long_ids, batch.long_lengths))
