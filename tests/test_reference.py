"""Comparison with a plain implementation of the released algorithm, over sizes, encoders and image towers."""

from __future__ import annotations

import copy
import json
import random
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from lotlip.models.vision.image_tower import build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.model import LotlipForPreTraining

# --- the released algorithm, one caption, token pair and feature at a time ----------------------------------------


@lru_cache
def vocabulary() -> dict[str, int]:
    file = files("lotlip.data") / "bert-base-uncased" / "tokenizer.json"
    return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]


def word_pieces(word: str) -> list[int]:
    """Splits a word like BERT, longest known piece first. Every word must have pieces."""
    ids, start = [], 0
    while start < len(word):
        end = len(word)
        while ("##" if start else "") + word[start:end] not in vocabulary():
            end -= 1
        ids.append(vocabulary()[("##" if start else "") + word[start:end]])
        start = end
    return ids


def token_ids(caption: str, context_length: int, corner_tokens: int) -> list[int]:
    """`[CLS] [Cor 1] … [Cor m] words [SEP] words [SEP]`, without padding, for ASCII captions."""
    cls, sep, words = vocabulary()["[CLS]"], vocabulary()["[SEP]"], len(vocabulary())
    for end in ("</s>", "."):
        caption = caption.replace(end, "\n")
    ids = [cls] + [words + number for number in range(corner_tokens)]
    for sentence in [part for part in caption.lower().split("\n") if part.strip()]:
        for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", sentence):
            ids += word_pieces(word)
        ids.append(sep)
    return ids if len(ids) <= context_length else [*ids[: context_length - 1], sep]


def is_visible(query: int, key: int, length: int, corner_tokens: int) -> bool:
    """Whether position `query` of a text of `length` tokens attends to position `key`."""
    if key >= length:
        return False
    if query == key:
        return True
    if query <= corner_tokens:  # [CLS] or a corner token
        return key > corner_tokens
    return not 1 <= key <= corner_tokens


def additive_mask(rows: list[list[int]], width: int, corner_tokens: int) -> Tensor:
    """0 where a token attends to another and a very negative number elsewhere, [B, 1, width, width]."""
    blocked = torch.finfo(torch.float32).min
    masks = []
    for row in rows:
        pairs = [[is_visible(query, key, len(row), corner_tokens) for key in range(width)] for query in range(width)]
        masks.append([[[0.0 if visible else blocked for visible in line] for line in pairs]])
    return torch.tensor(masks)


def text_features(model: LotlipModel, rows: list[list[int]], width: int, masked_corners: int) -> Tensor:
    """Normalised features of [CLS] and each corner token, [B, 1 + m, D], with texts padded to `width`."""
    config = copy.deepcopy(model.config.text_config)
    encoder = AutoModel.from_config(config, attn_implementation="eager").eval()
    encoder.load_state_dict(model.text.transformer.state_dict())
    assert encoder.config._attn_implementation == "eager"
    ids = torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in rows])
    mask = additive_mask(rows, width, masked_corners)
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    dense = model.text.pooler or encoder.pooler
    dense = getattr(dense, "dense", dense)
    features = []
    for token in range(1 + model.config.corner_tokens):
        pooled = torch.tanh(hidden[:, token] @ dense.weight.T + dense.bias)
        feature = pooled @ model.text.proj.weight.T
        features.append(feature / feature.norm(dim=1, keepdim=True))
    return torch.stack(features, dim=1)


def image_features(model: LotlipModel, pixel_values: Tensor) -> Tensor:
    spec = model.config.image_config
    options = {"global_pool": "token", "img_size": spec["image_size"], **spec["kwargs"]}
    trunk = timm.create_model(spec["model"], num_classes=0, **options).eval()
    trunk.load_state_dict(model.image_tower.trunk.state_dict())
    feature = trunk(pixel_values)
    return feature / feature.norm(dim=1, keepdim=True)


def losses(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The loss terms of short captions and long texts, for images [B, D] and texts [B, N, D]."""
    target = torch.arange(len(images))
    terms = []
    for number in range(texts.shape[1]):
        logits = scale * images @ texts[:, number].T
        terms.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return terms[0] / len(terms), sum(terms[1:], torch.tensor(0.0)) / len(terms)


def assert_near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# --- models and texts ---------------------------------------------------------------------------------------------

# Large weights, so that texts differ in their features and a wrong mask shows.
SPREAD = {"initializer_range": 0.2}
WORDS = (
    """the red blue lighthouse unbelievably tall dogs, (left) bicyclist's 3,500 tree-lined "open" and xylophonists"""
)
ENDS = [". ", ".", "\n", "</s>", "... ", " . ", ".\n"]


def caption(rng: random.Random, sentences: int) -> str:
    return "".join(
        " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 9))) + rng.choice(ENDS) for _ in range(sentences)
    )


def bert(words: int, width: int = 32, heads: int = 4, layers: int = 2) -> Any:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    return AutoConfig.for_model("bert", vocab_size=words, intermediate_size=2 * width, **sizes, **SPREAD)


@lru_cache
def bert_model(corner_tokens: int, corner_mask: bool = True, **sizes: int) -> LotlipForPreTraining:
    """A model for bert-base-uncased's word pieces and images of 32 pixels."""
    torch.manual_seed(corner_tokens)
    text = bert(len(vocabulary()) + corner_tokens, **sizes)
    image = ImageTowerSpec("test_vit", 32, {"patch_size": 8, "depth": 1}).to_json()
    config = LotlipConfig(text, image, 64, 256, corner_tokens, corner_mask)
    model = LotlipForPreTraining(config).eval()
    with torch.no_grad():
        for weight in model.image_tower.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
        model.logit_scale.fill_(corner_tokens + 1.5)  # 4.5 to 245; the largest is clamped
    return model


def check_all(model: LotlipForPreTraining, context_length: int, batch: int) -> None:
    """Compares token ids, features and losses of a batch with two long texts per image."""
    corner_tokens = model.config.corner_tokens
    masked_corners = corner_tokens if model.config.corner_mask else 0
    rng = random.Random(f"{corner_tokens} {context_length} {batch}")
    short = [caption(rng, 1) for _ in range(batch)]
    long = [caption(rng, sentences) for _ in range(batch) for sentences in (2, rng.randint(20, 40))]
    tokenizer = TextTokenizer("bert-base-uncased", context_length, corner_tokens)
    ours, references = [], []
    for texts in (short, long):
        rows = [token_ids(text, context_length, corner_tokens) for text in texts]
        assert tokenizer.encode(texts) == rows
        references.append(text_features(model, rows, context_length, masked_corners))
        ours += [torch.from_numpy(part) for part in tokenizer(texts)]
    pixel_values = torch.randn(batch, 3, 32, 32)
    expected = image_features(model, pixel_values)
    trained = torch.cat([references[0][:, :1], references[1].reshape(batch, -1, 64)], dim=1)
    output = model(pixel_values, *ours)
    assert_near(output["image_features"], expected)
    assert_near(output["text_features"], trained)
    scale = model.logit_scale.exp().clamp(max=100)
    assert_near(output["logit_scale"] / scale, torch.ones(1))
    loss = lotlip_loss(**output)
    for name, term in zip(("raw", "long"), losses(expected, trained, scale), strict=True):
        torch.testing.assert_close(loss[name].reshape(()), term.reshape(()), atol=1e-4, rtol=1e-5)
    ids, lengths = ours[2:]
    attention_mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    assert_near(model.get_text_features(ids, attention_mask).pooler_output, references[1][:, 0])
    assert_near(model.get_image_features(pixel_values).pooler_output, expected)


# --- tests --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("context_length", "batch"), [(8, 2), (30, 1), (77, 3), (200, 2)])
@pytest.mark.parametrize("corner_tokens", range(5))
@torch.no_grad()
def test_corner_tokens_context_and_batch_match_the_reference(corner_tokens, context_length, batch):
    check_all(bert_model(corner_tokens), context_length, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads", "layers"), [(16, 1, 1), (16, 8, 3), (48, 3, 1), (64, 2, 4), (128, 2, 2)])
@torch.no_grad()
def test_sizes_of_the_text_tower_match_the_reference(width, heads, layers):
    check_all(bert_model(2, width=width, heads=heads, layers=layers), 40, 2)


@pytest.mark.slow
@torch.no_grad()
def test_the_corner_mask_can_be_off():
    check_all(bert_model(2, corner_mask=False), 40, 2)


@torch.no_grad()
def test_a_different_mask_changes_the_features():
    rows = [token_ids("a red dog. it runs", 40, 2)]
    model = bert_model(2)
    with_mask, without = (text_features(model, rows, 40, masked) for masked in (2, 0))
    assert (with_mask - without).abs().amax(dim=2).min() > 1e-2


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 12},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64},
    "albert": {"embedding_size": 12, "num_hidden_groups": 2, "inner_group_num": 2},
}


@pytest.mark.parametrize("corner_tokens", [0, 1, 3])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_encoders_match_the_reference(encoder, corner_tokens, tiny_tower):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    known = {"vocab_size": 50 + corner_tokens, "max_position_embeddings": 64, **SPREAD}
    special = ENCODERS[encoder]
    torch.manual_seed(0)
    text = AutoConfig.for_model(encoder, **known, **({} if "dim" in special else sizes), **special)
    model = LotlipModel(LotlipConfig(text, None, 16, 60, corner_tokens), image_tower=False).eval()
    words, corners = random.Random(0), list(range(50, 50 + corner_tokens))
    rows = [[2, *corners, *(words.randrange(5, 50) for _ in range(length)), 3] for length in (1, 40, 9)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((3, int(lengths.max())), text.pad_token_id)
    for tokens, row in zip(ids, rows, strict=True):
        tokens[: len(row)] = torch.tensor(row)
    features = model.encode_text(ids, lengths)
    assert (features[0] - features[1]).abs().max() > 1e-2
    assert_near(features, text_features(model, rows, 60, corner_tokens))


VITS: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch16_224.augreg_in21k": {"embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_clip_224": {"embed_dim": 48, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "beit_base_patch16_224": {"embed_dim": 48, "num_heads": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_image_towers_match_the_reference(name):
    kwargs = {"depth": 2, **VITS[name]}
    size = kwargs.pop("img_size", 64)
    torch.manual_seed(0)
    spec = ImageTowerSpec(name, size, {"global_pool": "token", **kwargs}, pooling="model")
    width, image = build_image_tower(spec).width, spec.to_json()
    model = LotlipModel(LotlipConfig(bert(100), image, width)).eval()
    for weight in model.image_tower.parameters():
        weight.normal_(std=0.1)  # weights initialised with zeros would hide what they multiply
    pixel_values = torch.randn(3, 3, size, size)
    features = model.get_image_features(pixel_values)
    expected = image_features(model, pixel_values)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert_near(features.pooler_output, expected)
    cls = F.normalize(features.last_hidden_state[:, 0], dim=-1)
    if "distilled" not in name:  # timm averages [CLS] and the distillation token
        assert_near(cls, expected)
    patches = model.encode_image_patches(pixel_values)
    assert patches.shape == (3, {16: 16, 32: 4, 14: 16}[int(name.split("patch")[1][:2])], width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "swin_tiny_patch4_window7_224"])
def test_an_image_tower_needs_cls(name):
    with pytest.raises(ValueError, match=rf"{name} has no \[CLS\] token"):
        build_image_tower(ImageTowerSpec(name, 224, {}))
