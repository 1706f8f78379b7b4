"""Attention maps: known values, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lotlip.data.tokenizer import TextTokenizer
from lotlip.evaluate.attention import (
    normalised_entropy,
    phrase_mask,
    relevance_maps,
    rollout,
    sub_caption_shares,
    sub_captions,
    text_attention,
    text_layers,
)
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from tests.conftest import IMAGE_SIZE, TEXT

TEXTS = ["a red house", "There is a dog. The dog is brown. The sky is open.", "two cars. one boat"]


def make(image: dict[str, Any] | None = None, **changes: Any) -> LotlipModel:
    """A model with random weights; `image` changes its image tower."""
    tower = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, **(image or {})}
    config = LotlipConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "vocab_size": 30530, **changes.pop("text", {})},
        image_config={"timm_model": "vit_scenes", "image_size": IMAGE_SIZE, "kwargs": tower, **changes.pop("vit", {})},
        **{"embed_dim": 32, "context_length": 32, **changes},
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LotlipModel(config).eval()
        for weight in model.image_tower.parameters():
            if weight.ndim > 1:  # initial weights would give uniform attention
                torch.nn.init.normal_(weight, std=0.3)
    return model


def tokens(model: LotlipModel, texts: list[str] = TEXTS) -> tuple[Tensor, Tensor]:
    config = model.config
    tokenizer = TextTokenizer("bert-base-uncased", 32, config.corner_tokens, config.register_tokens)
    ids, lengths = map(torch.from_numpy, tokenizer(texts))
    return ids, lengths


def pixels(number: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> LotlipModel:
    return make()


# --- images -------------------------------------------------------------------------------------------------------


def naive_map(model: LotlipModel, image: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """One image's map by its definition, with full attention matrices and their gradients layer by layer."""
    trunk: Any = model.image_tower.trunk
    hidden = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(image)))
    attentions = []
    for block in trunk.blocks:
        normed = block.norm1(hidden)
        number, length, width = normed.shape
        heads = block.attn.num_heads
        query, key, value = block.attn.qkv(normed).view(number, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) * (width // heads) ** -0.5).softmax(dim=-1)
        attentions.append(attention)
        hidden = hidden + block.attn.proj((attention @ value).transpose(1, 2).reshape(number, length, width))
        hidden = hidden + block.mlp(block.norm2(hidden))
    feature = torch.nn.functional.normalize(trunk.norm(hidden)[:, 0], dim=-1)
    text = model.encode_text(ids, lengths)[:, 0].detach()
    gradients = torch.autograd.grad((feature * text).sum(), attentions)
    relevance = torch.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient)[0].clamp(min=0).mean(dim=0) @ relevance
    patches = relevance[0, 1:].detach()
    return (patches / patches.sum()).view(4, 4)


def test_a_map_follows_its_definition(model: LotlipModel) -> None:
    ids, lengths = tokens(model)
    maps = relevance_maps(model, pixels(), ids, lengths)
    for number in range(3):
        one = slice(number, number + 1)
        expected = naive_map(model, pixels()[one], ids[one], lengths[one])
        torch.testing.assert_close(maps[number], expected, atol=1e-6, rtol=1e-4)


def test_maps_sum_to_one_and_do_not_depend_on_the_batch(model: LotlipModel) -> None:
    ids, lengths = tokens(model)
    maps = relevance_maps(model, pixels(), ids, lengths)
    assert maps.shape == (3, 4, 4)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))
    assert maps.std() > 0.01
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        relevance_maps(model, pixels()[order], ids[order], lengths[order]), maps[order], atol=1e-6, rtol=1e-4
    )


def test_a_map_depends_on_the_text(model: LotlipModel) -> None:
    ids, lengths = tokens(model)
    maps = relevance_maps(model, pixels()[:1].expand(3, -1, -1, -1), ids, lengths)
    assert (maps[0] - maps[1]).abs().max() > 0.01


def test_images_may_have_several_texts_each(model: LotlipModel) -> None:
    ids, lengths = tokens(model)
    image = torch.tensor([1, 0, 1])
    together = relevance_maps(model, pixels()[:2], ids, lengths, image)
    torch.testing.assert_close(together, relevance_maps(model, pixels()[image], ids, lengths), atol=1e-6, rtol=1e-4)


def test_computing_maps_does_not_change_the_model() -> None:
    model = make()
    ids, lengths = tokens(model)
    model.image_tower.requires_grad_(False)
    model.text.proj.weight.grad = torch.ones_like(model.text.proj.weight)
    trunk: Any = model.image_tower.trunk
    trunk.blocks[0].attn.fused_attn, trunk.blocks[1].attn.fused_attn = True, False
    first = relevance_maps(model, pixels(), ids, lengths)
    text_attention(model, ids, lengths)
    assert [block.attn.fused_attn for block in trunk.blocks] == [True, False]
    assert not any(block.attn.attn_drop._forward_hooks for block in trunk.blocks)
    assert torch.equal(model.text.proj.weight.grad, torch.ones_like(model.text.proj.weight))
    assert all(weight.grad is None for weight in model.image_tower.parameters())
    assert model.text.transformer.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        repeated = relevance_maps(model, pixels().clone(), *(batch.clone() for batch in (ids, lengths)))
    assert torch.equal(first, repeated)


def test_the_fused_kernel_is_restored_after_a_failure() -> None:
    model = make()
    ids, lengths = tokens(model)
    trunk: Any = model.image_tower.trunk
    trunk.blocks[0].attn.fused_attn = True
    with pytest.raises(Exception, match=r"shape|size|channels|height"):
        relevance_maps(model, torch.zeros(3, 3, 2 * IMAGE_SIZE, IMAGE_SIZE), ids, lengths)
    assert trunk.blocks[0].attn.fused_attn
    assert not trunk.blocks[0].attn.attn_drop._forward_hooks


def test_an_image_without_relevance_has_a_uniform_map() -> None:
    model = make()
    ids, lengths = tokens(model)
    trunk: Any = model.image_tower.trunk
    for block in trunk.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)  # attention does not reach the output
    assert torch.equal(relevance_maps(model, pixels(), ids, lengths), torch.full((3, 4, 4), 1 / 16))


def test_register_tokens_of_an_image_tower_are_not_patches() -> None:
    model = make({"reg_tokens": 3})
    ids, lengths = tokens(model)
    maps = relevance_maps(model, pixels(), ids, lengths)
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))


def test_maps_of_images_that_are_not_square() -> None:
    model = make({"img_size": [8, IMAGE_SIZE]})
    ids, lengths = tokens(model)
    assert relevance_maps(model, pixels()[:, :, :8], ids, lengths).shape == (3, 2, 4)


@pytest.mark.slow
def test_models_without_maps_are_errors() -> None:
    ids, lengths = tokens(make())
    with pytest.raises(ValueError, match="late interaction"):
        relevance_maps(make(similarity="late-interaction"), pixels(), ids, lengths)
    with pytest.raises(ValueError, match="late interaction"):
        text_attention(make(similarity="late-interaction"), ids, lengths)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        relevance_maps(make().train(), pixels(), ids, lengths)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        text_attention(make().train(), ids, lengths)


# --- texts --------------------------------------------------------------------------------------------------------


def test_rollout_is_the_product_of_the_layers() -> None:
    first = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    second = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    product = (torch.eye(2) + second[0]) @ (torch.eye(2) + first[0])
    assert torch.equal(rollout([first, second], 2), product[None])
    assert torch.equal(rollout([first, second]), product[None, :1])


@pytest.mark.parametrize("corner_mask", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "albert"])
def test_attention_equals_the_models_own_outputs(kind: str, corner_mask: bool) -> None:
    model = make(text={"model_type": kind, "pad_token_id": 0}, corner_mask=corner_mask)
    ids, lengths = tokens(model)
    with torch.inference_mode():
        hidden, layers = text_layers(model.text, ids, lengths)
        usual, _ = model.text.hidden_states(ids, lengths)
    for text, length in enumerate(lengths):
        torch.testing.assert_close(hidden[text, :length], usual[text, :length], atol=1e-5, rtol=1e-4)
        for layer in layers:
            torch.testing.assert_close(layer[text].sum(dim=-1), torch.ones_like(layer[text, ..., 0]))
            assert not layer[text, :, :length, length:].any()  # no token attends to padding
            if corner_mask:
                assert not layer[text, :, 3:length, 1:3].any()  # words do not attend to corner tokens


@pytest.mark.parametrize(("corners", "registers"), [(2, 0), (0, 0), (0, 2), (1, 1)])
def test_text_attention_covers_words_only(corners: int, registers: int) -> None:
    model = make(corner_tokens=corners, register_tokens=registers)
    ids, lengths = tokens(model)
    attention = text_attention(model, ids, lengths)
    assert attention.shape == (3, 1 + corners, ids.shape[1])
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 1 + corners))
    numbers = sub_captions(model, ids, lengths)
    assert not attention.masked_select(numbers[:, None] < 0).any()
    first_word = 1 + corners + registers
    expected = [-1] * first_word + [0] * 4 + [-1] + [1] * 4 + [-1] + [2] * 4 + [-1]
    assert numbers[1, : lengths[1]].tolist() == expected
    assert numbers.amax(dim=1).tolist() == [0, 2, 1]


@pytest.mark.slow
def test_a_texts_attention_does_not_depend_on_its_batch(model: LotlipModel) -> None:
    ids, lengths = tokens(model)
    alone, length = tokens(model, TEXTS[:1])
    together = text_attention(model, ids, lengths)[:1, :, : int(length)]
    torch.testing.assert_close(text_attention(model, alone, length), together, atol=1e-6, rtol=1e-4)


def test_a_text_without_words_has_no_attention(model: LotlipModel) -> None:
    ids, lengths = tokens(model, ["", "a dog"])
    attention = text_attention(model, ids, lengths)
    assert not attention[0].any()
    assert sub_captions(model, ids, lengths)[0].max() == -1


def test_shares_and_their_entropy_have_known_values() -> None:
    number = torch.tensor([[-1, 0, 0, 0, -1, 1, -1], [-1, 0, 0, -1, -1, -1, -1]])
    attention = torch.tensor([[[0, 0.2, 0.2, 0.1, 0, 0.5, 0]], [[0, 0.4, 0.6, 0, 0, 0, 0]]])
    shares, by_tokens = sub_caption_shares(attention, number)
    torch.testing.assert_close(shares, torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]))
    torch.testing.assert_close(by_tokens, torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    count = (by_tokens > 0).sum(dim=-1)
    uniform = normalised_entropy(shares, count)
    assert uniform.shape == (2, 1)
    assert uniform[0].item() == pytest.approx(1)
    assert uniform[1].isnan().all()  # one sub-caption
    known = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert normalised_entropy(by_tokens, count)[0].item() == pytest.approx(known)
    assert normalised_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([2])).item() == 0


def test_a_phrase_is_found_at_any_position() -> None:
    text = torch.tensor([5, 6, 7, 5, 6, 9])
    assert phrase_mask(torch.tensor([5, 6]), text).tolist() == [True, True, False, True, True, False]
    assert not phrase_mask(torch.tensor([6, 5]), text).any()
    assert not phrase_mask(torch.tensor([1] * 7), text).any()
