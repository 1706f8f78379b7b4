"""The short text of a training step: the short caption, a rewrite, or sentences of the long caption."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, normalize

from lotlip.core.files import read_json, write_json
from lotlip.data.token_ids import write_token_ids
from lotlip.data.tokenizer import TextTokenizer
from lotlip.objectives.contrastive import lotlip_loss, principal_components
from lotlip.pretrain.config import LongTextsConfig, PretrainConfig, ShortTextsConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from lotlip.pretrain.loader import Batch, BatchSlice, Loader
from tests.conftest import TinySample, TinyWorld, write_shards

CONTEXT = 48
TOKENIZER = TextTokenizer("bert-base-uncased", CONTEXT, 1)
REWRITERS = ["rewrite-1", "rewrite-2", "rewrite-3", "rewrite-4"]
LONG = {"llava": ["l1", "l2", "l3", "l4"], "gpt": ["g1", "g2", "g3"]}


def with_rewrites(samples: list[TinySample]) -> list[TinySample]:
    """Samples with rewrites of four rewriters; the last rewriter lacks every other image."""
    rewritten = []
    for number, sample in enumerate(samples):
        rewrites = {name: [f"again {name[-1]}", "and on"] for name in REWRITERS[: 3 + number % 2]}
        rewritten.append(replace(sample, info={"raw": "raw caption", "captions": {**LONG, **rewrites}}))
    return rewritten


def shards_of(folder: Path, samples: list[TinySample], rewriters: list[str], token_ids: bool = False) -> Path:
    folder = write_shards(folder, samples, 3)
    write_json(folder / "index.json", {**read_json(folder / "index.json"), "rewriters": rewriters})
    for tar in folder.glob("*.tar") if token_ids else ():
        assert write_token_ids(tar, "bert-base-uncased")
    return folder


@pytest.fixture
def shards(tmp_path, tiny_samples) -> Path:
    return shards_of(tmp_path, with_rewrites(tiny_samples), REWRITERS)


def batches(shards: Path, short: dict[str, Any], long: dict[str, Any] | None = None, **more: Any) -> list[Batch]:
    part, workers = more.get("part", BatchSlice(8)), more.get("workers", 0)
    config = PretrainConfig(short_texts=ShortTextsConfig(**short), long_texts=LongTextsConfig(**(long or {})))
    loader = Loader(shards, config, TOKENIZER, 3, part, workers=workers)
    return [batch for step in loader.steps(0, more.get("steps", 6)) for batch in step]


def texts(ids: torch.Tensor, lengths: torch.Tensor) -> list[str]:
    """Sub-captions joined by spaces, without special tokens."""
    return [TOKENIZER._tokenizer.decode(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]


def short_texts(read: list[Batch]) -> list[str]:
    return [text for batch in read for text in texts(batch.short_ids, batch.short_lengths)]


def pairs(read: list[Batch]) -> list[tuple[str, str]]:
    """The short text and the long text of each image."""
    long = [
        text
        for batch in read
        if batch.long_ids is not None and batch.long_lengths is not None
        for text in texts(batch.long_ids, batch.long_lengths)
    ]
    return list(zip(short_texts(read), long, strict=True))


def test_the_short_caption_and_rewrites_have_equal_probability(shards):
    counts = Counter(short_texts(batches(shards, {"sampler": "raw-or-rewrite"}, steps=120)))
    total = sum(counts.values())
    # half of the images lack the last rewrite; the short caption replaces it
    expected = {"raw caption": 0.3, "again 4 and on": 0.1} | {f"again {number} and on": 0.2 for number in (1, 2, 3)}
    assert counts.keys() == expected.keys()
    for text, share in expected.items():
        assert counts[text] / total == pytest.approx(share, abs=0.04)


def test_only_named_rewriters_are_used(shards):
    texts_read = set(short_texts(batches(shards, {"sampler": "raw-or-rewrite", "rewriters": ["rewrite-2"]})))
    assert texts_read == {"raw caption", "again 2 and on"}


@pytest.mark.parametrize("long", [{}, {"sampler": "all"}, {"window": "across-captions", "per_image": 2}])
def test_rewrites_do_not_change_long_texts(tmp_path, tiny_samples, shards, long):
    without_rewrites = [replace(s, info={"raw": "raw caption", "captions": LONG}) for s in with_rewrites(tiny_samples)]
    expected_batches = batches(shards_of(tmp_path / "plain", without_rewrites, []), {}, long)
    for batch, expected in zip(batches(shards, {}, long), expected_batches, strict=True):
        for name, value in vars(expected).items():
            assert torch.equal(vars(batch)[name], value) if isinstance(value, torch.Tensor) else True
        assert batch.keys == expected.keys


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "short",
    [
        {"sampler": "raw-or-rewrite"},
        {"sampler": "without-first", "random_offset": True},
        {"sampler": "subset"},
        {"sampler": "details"},
        {"sampler": "summary", "random_offset": True},
    ],
)
def test_texts_do_not_depend_on_workers_processes_and_token_ids(tmp_path, tiny_samples, shards, short):
    def rows(read: list[Batch]) -> dict[str, Any]:
        offsets = [None if b.short_offsets is None else b.short_offsets.tolist() for b in read]
        places = [(key, o and o[i]) for b, o in zip(read, offsets, strict=True) for i, key in enumerate(b.keys)]
        return dict(zip(places, pairs(read), strict=True))

    stored = shards_of(tmp_path / "stored", with_rewrites(tiny_samples), REWRITERS, token_ids=True)
    long = {"sampler": "all"}
    expected = rows(batches(shards, short, long))
    assert rows(batches(stored, short, long, workers=2)) == expected
    halves = [batches(stored, short, long, part=BatchSlice(8, rank, 2, micro_batches=2)) for rank in (0, 1)]
    assert rows(halves[0]) | rows(halves[1]) == expected
    assert rows(batches(shards, short, long, steps=12)).keys() > expected.keys() or not short.get("random_offset")


@pytest.mark.parametrize("per_image", [1, 2])
def test_sentences_come_from_the_caption_of_the_first_long_text(shards, per_image):
    read = batches(shards, {"sampler": "without-first"}, {"sampler": "all", "per_image": per_image}, steps=12)
    shorts = short_texts(read)
    firsts = [
        text
        for batch in read
        if batch.long_ids is not None and batch.long_lengths is not None
        for text in texts(batch.long_ids, batch.long_lengths)[::per_image]
    ]
    for short, long in zip(shorts, firsts, strict=True):
        sentences, long_sentences = short.split(), long.split()
        assert set(sentences) <= set(long_sentences[1:]) and len(set(sentences)) == len(sentences)
    assert {text[0] for text in shorts} == {"l", "g"}
    assert any(text.split() != sorted(text.split()) for text in shorts)


def test_an_image_without_long_captions_keeps_its_short_caption(tmp_path, tiny_samples):
    samples = [replace(s, info={"raw": "a dog", "captions": {"rewrite-1": ["x"]}}) for s in tiny_samples]
    read = batches(shards_of(tmp_path, samples, ["rewrite-1"]), {"sampler": "without-first"})
    assert set(short_texts(read)) == {"a dog"}
    assert {long for _, long in pairs(read)} == {"a dog"}


def test_offsets_range_from_zero_to_the_end_of_the_context(shards):
    read = batches(shards, {"random_offset": True}, steps=120)
    offsets = torch.cat([batch.short_offsets for batch in read if batch.short_offsets is not None])
    lengths = torch.cat([batch.short_lengths for batch in read])
    assert offsets.min() == 0
    assert (offsets + lengths).max() == CONTEXT
    assert offsets.float().mean().item() == pytest.approx((CONTEXT - lengths).float().mean().item() / 2, rel=0.1)
    assert all(batch.short_offsets is None for batch in batches(shards, {}))


def test_offsets_change_only_the_short_text_features(tiny_world: TinyWorld, shards):
    text = {"config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}}
    config = PretrainConfig(
        text={**text, "context_length": CONTEXT, "corner_tokens": 1}, short_texts={"random_offset": True}
    )
    model = build_for_pretraining(config, tiny_world.image_tower).eval()
    (batch, *_) = batches(shards, {"random_offset": True})
    with torch.no_grad():
        shifted = model(batch.images, **batch.texts)["text_features"]
        unshifted = model(batch.images, **replace(batch, short_offsets=None).texts)["text_features"]
    assert (shifted[:, 0] - unshifted[:, 0]).abs().amax(dim=-1)[batch.short_offsets > 0].min() > 1e-5
    torch.testing.assert_close(shifted[:, 1:], unshifted[:, 1:])


def test_settings_give_the_loss_of_debias_clip():
    draw = torch.Generator().manual_seed(0)
    images, short, long = (normalize(torch.randn(9, 16, generator=draw), dim=-1) for _ in range(3))
    settings = PretrainConfig(loss={"short_loss_fraction": 0.1, "image_components": 4}).loss
    losses = lotlip_loss(images, torch.stack([short, long], dim=1), torch.tensor([20.0]), **settings.arguments())

    def infonce(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        logits, index = 20 * images @ texts.T, torch.arange(9)
        return (cross_entropy(logits, index) + cross_entropy(logits.T, index)) / 2

    expected = 0.1 * infonce(principal_components(images, 4), short) + 0.9 * infonce(images, long)
    torch.testing.assert_close(losses["loss"], expected)


def test_a_tower_that_cannot_shift_positions_is_an_error(tiny_world: TinyWorld):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"config": {"model_type": "modernbert", **sizes}, "context_length": CONTEXT}
    config = PretrainConfig(text=text, short_texts={"random_offset": True})
    with pytest.raises(ValueError, match="a modernbert encoder cannot move words"):
        build_for_pretraining(config, tiny_world.image_tower)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_texts": {"rewriters": ["r"]}}, "rewriters have no effect with sampler raw"),
        (
            {"short_texts": {"random_offset": True}, "similarity": "late-interaction", "text": {"corner_tokens": 0}},
            "late",
        ),
    ],
)
def test_settings_without_effect_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(**settings)
