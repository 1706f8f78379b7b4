"""The dual encoder, called like the CLIP models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lotlip.core.files import read_json
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.lotlip import LotlipModel
from tests.conftest import IMAGE_SIZE, TEXT

TEXTS = ["a red dog. it runs", "one big white house under the sky", "cat"]


def build(tiny_tower: Path, **more: object) -> LotlipModel:
    torch.manual_seed(1)
    config = LotlipConfig(
        text_config={**TEXT, "vocab_size": 30524},
        image_config=read_json(tiny_tower / "config.json"),
        embed_dim=32,
        context_length=32,
        **more,  # type: ignore[arg-type]
    )
    return LotlipModel(config).eval()


@pytest.fixture(scope="module")
def model(tiny_tower: Path) -> LotlipModel:
    return build(tiny_tower)


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    ids, lengths = TextTokenizer("bert-base-uncased", 32, 2)(TEXTS)
    return torch.from_numpy(ids), torch.from_numpy(lengths)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))


def mask_of(texts: tuple[Tensor, Tensor]) -> Tensor:
    return (torch.arange(texts[0].shape[1]) < texts[1][:, None]).long()


def test_text_features_are_the_cls_features(model, texts):
    with torch.no_grad():
        features = model.encode_text(*texts)
        output = model.get_text_features(texts[0], mask_of(texts))
    torch.testing.assert_close(output.pooler_output, features[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.pooler_output.norm(dim=-1), torch.ones(3))
    assert output.last_hidden_state.shape == (*texts[0].shape, TEXT["hidden_size"])


def test_the_padding_token_replaces_a_missing_mask(model, texts):
    with torch.no_grad():
        expected = model.get_text_features(texts[0], mask_of(texts)).pooler_output
        features = model.get_text_features(texts[0]).pooler_output
        wider = model.get_text_features(torch.nn.functional.pad(texts[0], (0, 5))).pooler_output
    assert torch.equal(features, expected)
    torch.testing.assert_close(wider, expected, atol=1e-6, rtol=0)


def test_left_padded_texts_are_an_error(model, texts):
    with pytest.raises(ValueError, match="padded at the end; set the tokenizer's padding_side to 'right'"):
        model.get_text_features(texts[0].flip(1), mask_of(texts).flip(1))


def test_image_features_are_the_towers_normalised_features(model, pixels):
    with torch.no_grad():
        output = model.get_image_features(pixels)
        expected = normalize(model.image_tower.trunk(pixels), dim=-1)
    torch.testing.assert_close(output.pooler_output, expected)
    assert output.last_hidden_state.shape == (3, 17, 32)


def test_logits_are_scaled_cosines(model, texts, pixels):
    with torch.no_grad():
        output = model(input_ids=texts[0][:2], pixel_values=pixels, attention_mask=mask_of(texts)[:2])
    assert output.logits_per_image.shape == (3, 2)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    expected = output.image_embeds @ output.text_embeds.T / 0.07
    torch.testing.assert_close(output.logits_per_image, expected)
    assert output.loss is None


def test_the_loss_matches_images_and_texts_of_equal_index(model, texts, pixels):
    with torch.no_grad():
        output = model(texts[0], pixels, mask_of(texts), return_loss=True)
    index = torch.arange(3)
    expected = (cross_entropy(output.logits_per_image, index) + cross_entropy(output.logits_per_text, index)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_return_dict_false_gives_tuples(model, texts, pixels):
    with torch.no_grad():
        output = model(texts[0], pixels, return_dict=False)
        features = model.get_image_features(pixels, return_dict=False)
    assert isinstance(output, tuple)
    assert isinstance(features, tuple)
    assert output[0].shape == (3, 3)


def test_siglips_logits_have_a_bias(tiny_tower, texts, pixels):
    model = build(tiny_tower, logit_bias=True)
    with torch.no_grad():
        output = model(texts[0], pixels, return_loss=True)
    torch.testing.assert_close(output.logits_per_image, 10 * output.image_embeds @ output.text_embeds.T - 10)
    signs = 2 * torch.eye(3) - 1
    expected = -torch.nn.functional.logsigmoid(signs * output.logits_per_image).sum() / 3
    torch.testing.assert_close(output.loss.squeeze(), expected)


def test_late_interaction_equals_filips(tiny_tower, texts, pixels):
    model = build(tiny_tower, similarity="late-interaction", corner_tokens=0)
    ids, lengths = TextTokenizer("bert-base-uncased", 32)(TEXTS)
    with torch.no_grad():
        output = model(torch.from_numpy(ids), pixels, return_loss=True)
        tokens, mask = model.encode_text_tokens(torch.from_numpy(ids), torch.from_numpy(lengths))
        patches = model.encode_image_patches(pixels)
    assert patches.shape == (3, 16, 32)
    for image in range(3):
        for text in range(3):
            cosines = patches[image] @ tokens[text][mask[text]].T  # [P, its tokens]
            per_image, per_text = cosines.amax(dim=1).mean() / 0.07, cosines.amax(dim=0).mean() / 0.07
            torch.testing.assert_close(output.logits_per_image[image, text], per_image, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(output.logits_per_text[text, image], per_text, atol=1e-4, rtol=1e-5)
    index = torch.arange(3)
    expected = (cross_entropy(output.logits_per_image, index) + cross_entropy(output.logits_per_text, index)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_gradients_flow_to_both_towers(tiny_tower, texts, pixels):
    model = build(tiny_tower)
    model(texts[0], pixels, return_loss=True).loss.backward()
    for name in ("text.proj.weight", "image.trunk.cls_token", "logit_scale"):
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_image_features_need_an_image_tower(tiny_tower, pixels):
    config = build(tiny_tower).config
    model = LotlipModel(config, image_tower=False)
    with pytest.raises(ValueError, match="built without its image tower"):
        model.get_image_features(pixels)


def test_bf16_features_are_near_fp32(tiny_tower, texts, pixels):
    model = build(tiny_tower)
    with torch.no_grad():
        expected = model(texts[0], pixels)
        output = model.bfloat16()(texts[0], pixels.bfloat16())
    assert output.text_embeds.dtype == torch.bfloat16
    for name in ("text_embeds", "image_embeds"):
        cosine = torch.nn.functional.cosine_similarity(output[name].float(), expected[name], dim=-1)
        assert cosine.min() > 0.99, name


def test_the_default_configuration_has_the_released_size():
    config = LotlipConfig()
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (768, 30524)
    with torch.device("meta"):
        model = LotlipModel(config)
    count = sum(parameter.numel() for parameter in model.image_tower.parameters())
    assert count == pytest.approx(85.8e6, rel=1e-3)  # ViT-B/16
    assert sum(parameter.numel() for parameter in model.text.transformer.parameters()) == pytest.approx(
        109.5e6, rel=1e-3
    )
