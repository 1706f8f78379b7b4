"""The losses: known values, open_clip's losses as references, and two processes compared with one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, logsigmoid, multi_head_attention_forward, normalize

from lotlip.objectives.conditioned import TextQueries, choose_partners, conditioned_loss, conditioned_scores
from lotlip.objectives.contrastive import OBJECTIVES, lotlip_loss, principal_components
from lotlip.objectives.similarity import late_interaction
from tests.training import ROOT

SCALE = torch.tensor([2.0])
BIAS = torch.tensor([-0.5])
VARIANTS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "siglip": {"objective": "siglip", "logit_bias": BIAS},
    "principal components": {"image_components": 2},
    "siglip of principal components": {"objective": "siglip", "logit_bias": BIAS, "image_components": 3},
    "fraction of variance": {"image_components": 0.6, "text_components": 0.7},
    "components of texts": {"text_components": 2},
    "label smoothing": {"label_smoothing": 0.1},
    "margin": {"hard_negative_margin": 0.5},
    "siglip with a margin": {"objective": "siglip", "logit_bias": BIAS, "hard_negative_margin": 0.25},
    "everything": {"label_smoothing": 0.2, "hard_negative_margin": 0.5, "image_components": 3, "text_components": 2},
    "late interaction": {"text_mask": None},
    "siglip of late interaction": {"objective": "siglip", "logit_bias": BIAS, "text_mask": None},
    "masks": {"channel_masks": None, "mask_penalty": 0.1},
    "masks with everything": {
        "channel_masks": None,
        "mask_penalty": 0.3,
        "label_smoothing": 0.1,
        "hard_negative_margin": 0.5,
    },
    "siglip of masks": {"objective": "siglip", "logit_bias": BIAS, "channel_masks": None, "mask_penalty": 0.1},
    "conditioned": {"objective": "siglip", "logit_bias": BIAS, "image_tokens": None},
    "conditioned with everything": {
        "objective": "siglip",
        "logit_bias": BIAS,
        "image_tokens": None,
        "conditioned_weight": 0.3,
        "channel_masks": None,
        "mask_penalty": 0.1,
        "hard_negative_margin": 0.25,
    },
}
HEADS = 2  # attention heads of the pooling


def random_features(batch: int = 8, number: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(batch, width, generator=generator)
    texts = torch.randn(batch, number, width, generator=generator)
    return normalize(images, dim=-1), normalize(texts, dim=-1)


def random_tokens(batch: int = 8, number: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [B, 3, D], tokens [B, N, 5, D] and their mask. Texts in the second half of the batch are shorter."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(batch, 3, width, generator=generator)
    texts = torch.randn(batch, number, 5, width, generator=generator)
    longest = torch.where(torch.arange(batch) < batch // 2, 5, 3)[:, None]
    lengths = 1 + torch.randint(0, 100, (batch, number), generator=generator) % longest
    return normalize(images, dim=-1), normalize(texts, dim=-1), torch.arange(5) < lengths[..., None]


def additional_inputs(settings: dict[str, Any], texts: Tensor) -> dict[str, Any]:
    """Channel masks, or patches and the weights of their pooling, for the settings that need them."""
    generator = torch.Generator().manual_seed(7)
    inputs: dict[str, Any] = {}
    if "channel_masks" in settings:
        inputs["channel_masks"] = torch.rand(texts.shape, generator=generator)
    if "image_tokens" in settings:
        width = texts.shape[-1]
        pooling = torch.randn(4 * width + 10, width, generator=generator)
        patches = torch.randn(len(texts), 3, width, generator=generator)
        draws = torch.randint(10**6, (len(texts), 2), generator=generator)
        inputs |= {"image_tokens": patches, "pooling": pooling, "pooling_heads": HEADS, "draws": draws}
    return inputs


def case(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features and settings of a variant."""
    settings = dict(VARIANTS[variant])
    if "text_mask" in settings:
        images, texts, settings["text_mask"] = random_tokens()
    else:
        images, texts = random_features()
    settings |= additional_inputs(settings, texts)
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            settings[name] = value.to(dtype)
    return images.to(dtype), texts.to(dtype), settings


def plain_loss(images: Tensor, texts: Tensor, scale: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The loss by its equations, one kind of text at a time."""
    number = texts.shape[1]
    mask, components = settings.get("text_mask"), settings.get("image_components", 0)
    terms = []
    for n in range(number):
        if mask is not None:
            term = plain_term(*late_interaction(images, texts[:, n], mask[:, n]), None, scale, settings)
        elif "channel_masks" in settings:
            m = settings["channel_masks"][:, n]
            chosen = (m >= 0.5).to(m) + m - m.detach()
            similarity = (normalize(images[:, None] * chosen, dim=-1) * texts[:, n]).sum(-1)
            term = (
                plain_term(similarity, similarity, texts[:, n], scale, settings) + settings["mask_penalty"] * m.mean()
            )
        else:
            rebuilt = projection(images, components) if components and n == 0 else images
            kinds = [(rebuilt, texts[:, n])]
            if n and settings.get("text_components"):
                kinds.append((images, projection(texts[:, n], settings["text_components"])))
            term = sum((plain_term(i @ t.T, i @ t.T, t, scale, settings) for i, t in kinds), torch.zeros(()))
        terms.append(term / number)
    if "image_tokens" in settings:
        weight = settings.get("conditioned_weight", 0.5)
        terms = [(1 - weight) * term for term in terms]
        conditioned = {"conditioned": weight * plain_conditioned(texts, scale, settings)}
        return {"raw": terms[0], "long": sum(terms[1:]), "loss": sum(terms) + conditioned["conditioned"], **conditioned}
    return {"raw": terms[0], "long": sum(terms[1:], torch.zeros(())), "loss": sum(terms, torch.zeros(()))}


def plain_term(
    to_text: Tensor, to_image: Tensor, texts: Tensor | None, scale: Tensor, settings: dict[str, Any]
) -> Tensor:
    """The loss of one kind of text: similarities [T, T] with a row per image, and text features for the margin."""
    batch = len(to_text)
    index = torch.arange(batch)
    if texts is not None and (margin := settings.get("hard_negative_margin")):
        constant = texts.detach()
        between = constant @ constant.T
        between[index, index] = 0
        to_text = to_image = to_text + margin * between
    if settings.get("objective") == "siglip":
        z = -torch.ones(batch, batch, dtype=to_text.dtype)
        z[index, index] = 1
        bias = settings["logit_bias"]
        ways = [-logsigmoid(z * (scale * way + bias)).sum() / batch for way in (to_text, to_image)]
    else:
        smoothing = settings.get("label_smoothing", 0.0)
        rows = (scale * to_text, (scale * to_image).T)
        ways = [cross_entropy(logits, index, label_smoothing=smoothing) for logits in rows]
    return (ways[0] + ways[1]) / 2


def plain_conditioned(texts: Tensor, scale: Tensor, settings: dict[str, Any]) -> Tensor:
    """FLAIR's L_tcs with torch's attention, one image and text at a time."""
    (images, number, width), patches = texts.shape, settings["image_tokens"]
    parts = settings["pooling"].split([3 * width, width, 3, 1, 2, 2, 2])
    inputs, output, input_bias, output_bias, *norms = parts
    partners = choose_partners(settings["draws"], 0, images, number)
    total = torch.zeros((), dtype=texts.dtype)
    for image, of_image in enumerate(partners):
        for text in of_image.tolist():
            feature = texts[text // number, text % number]
            query, key, value = (
                layer_norm(rows, (width,), norm[0], norm[1])
                for rows, norm in zip((feature[None] * width**0.5, patches[image], patches[image]), norms, strict=True)
            )
            pooled, _ = multi_head_attention_forward(
                query, key, value, width, HEADS, inputs, input_bias.flatten(), None, None, True, 0.0, output,
                output_bias[0],
            )  # fmt: skip
            logit = scale * normalize(pooled, dim=-1) @ feature + settings["logit_bias"]
            total = total - logsigmoid(logit if text // number == image else -logit).sum()
    return total / (images + number - 1)


def projection(features: Tensor, number: float) -> Tensor:
    """Reconstruction from principal components, which numpy's SVD computes; the directions are constants."""
    mean = features.mean(dim=0)
    constant = features.detach().double().numpy()
    _, values, directions = np.linalg.svd(constant - constant.mean(axis=0))
    if number < 1:  # the fewest components that explain this fraction of the variance
        shares = (values**2).cumsum() / (values**2).sum()
        number = 1 + int((shares < number).sum())
    directions = directions[: int(number)]
    projector = torch.from_numpy(directions.T @ directions).to(features.dtype)
    return (features - mean) @ projector + mean


def test_two_by_two_by_hand():
    images = torch.eye(2)
    short = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # logits, image by text: [[2, 1.2], [0, 1.6]]
    long = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # each text is the other image's: [[0, 2], [2, 0]]
    losses = lotlip_loss(images, torch.stack([short, long], dim=1), SCALE)

    def entropy(own: float, other: float) -> float:
        return math.log(1 + math.exp(other - own))

    image_to_text = (entropy(2, 1.2) + entropy(1.6, 0)) / 2
    text_to_image = (entropy(2, 0) + entropy(1.6, 1.2)) / 2
    assert losses["raw"].item() == pytest.approx((image_to_text + text_to_image) / 2 / 2, abs=1e-6)
    assert losses["long"].item() == pytest.approx(entropy(0, 2) / 2, abs=1e-6)
    assert losses["loss"].item() == pytest.approx((losses["raw"] + losses["long"]).item(), abs=1e-7)


def test_constant_features_cost_the_logarithm_of_the_batch():
    images = torch.ones(8, 4) / 2
    losses = lotlip_loss(images, torch.ones(8, 3, 4) / 2, SCALE)
    assert losses["loss"].item() == pytest.approx(math.log(8), abs=1e-6)
    assert losses["raw"].item() == pytest.approx(math.log(8) / 3, abs=1e-6)


def test_the_loss_of_one_text_equals_open_clips():
    from open_clip.loss import ClipLoss

    images, texts = random_features(number=1)
    losses = lotlip_loss(images, texts, SCALE)
    assert losses["long"].item() == 0
    torch.testing.assert_close(losses["loss"], ClipLoss()(images, texts[:, 0], SCALE[0]))


def test_the_loss_of_several_texts_is_the_mean_of_open_clips():
    from open_clip.loss import ClipLoss

    images, texts = random_features()
    expected = torch.stack([ClipLoss()(images, texts[:, n], SCALE[0]) for n in range(4)])
    losses = lotlip_loss(images, texts, SCALE)
    torch.testing.assert_close(losses["loss"], expected.mean())
    torch.testing.assert_close(losses["raw"], expected[0] / 4)


@pytest.mark.parametrize("features", [2, 4, 7])
def test_short_loss_fraction_does_not_depend_on_the_number_of_texts(features):
    images, texts = random_features(number=features)
    each = [lotlip_loss(images, texts[:, i : i + 1], SCALE)["loss"] for i in range(features)]
    losses = lotlip_loss(images, texts, SCALE, short_loss_fraction=0.4)
    torch.testing.assert_close(losses["raw"], 0.4 * each[0])
    torch.testing.assert_close(losses["loss"], 0.4 * each[0] + 0.6 * sum(each[1:]) / (features - 1))
    alone = lotlip_loss(images, texts[:, :1], SCALE, short_loss_fraction=0.4)  # there is no long caption
    torch.testing.assert_close(alone["loss"], each[0])


def test_weights_scale_their_terms():
    images, texts = random_features()
    plain = lotlip_loss(images, texts, SCALE)
    weighted = lotlip_loss(images, texts, SCALE, short_loss_weight=3.0, long_loss_weight=0.5)
    torch.testing.assert_close(weighted["raw"], 3 * plain["raw"])
    torch.testing.assert_close(weighted["long"], 0.5 * plain["long"])
    torch.testing.assert_close(weighted["loss"], weighted["raw"] + weighted["long"])


def test_siglip_by_hand():
    images = torch.eye(2)
    short = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # logits − 0.5, image by text: [[2, 1.2], [0, 1.6]]
    long = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # each text is the other image's: [[0, 2], [2, 0]]
    losses = lotlip_loss(images, torch.stack([short, long], dim=1), SCALE, objective="siglip", logit_bias=BIAS)

    def cost(logit: float) -> float:  # of this logit for a pair that does not match
        return math.log(1 + math.exp(logit))

    assert losses["raw"].item() == pytest.approx((cost(-1.5) + cost(0.7) + cost(-0.5) + cost(-1.1)) / 2 / 2, abs=1e-6)
    assert losses["long"].item() == pytest.approx((2 * cost(0.5) + 2 * cost(1.5)) / 2 / 2, abs=1e-6)


@pytest.mark.parametrize("number", [1, 4])
def test_siglip_equals_open_clips(number):
    from open_clip.loss import SigLipLoss

    images, texts = random_features(number=number)
    expected = torch.stack([SigLipLoss()(images, texts[:, n], SCALE[0], BIAS[0]) for n in range(number)])
    losses = lotlip_loss(images, texts, SCALE, objective="siglip", logit_bias=BIAS)
    torch.testing.assert_close(losses["loss"], expected.mean())
    torch.testing.assert_close(losses["raw"], expected[0] / number)


def test_late_interaction_by_hand():
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    images = torch.tensor([[east, north], [between, between]])
    texts = torch.tensor([[[east, between]], [[north, east]]])
    mask = torch.tensor([[[True, True]], [[True, False]]])
    # image → text [[0.9, 0.5], [1, 0.8]] and text → image [[0.9, 1], [0.8, 0.8]], as in test_similarity

    def entropy(own: float, other: float) -> float:
        return math.log(1 + math.exp(2 * (other - own)))

    image_to_text = (entropy(0.9, 0.5) + entropy(0.8, 1.0)) / 2  # rows of the first matrix
    text_to_image = (entropy(0.9, 0.8) + entropy(0.8, 1.0)) / 2  # columns of the second matrix
    losses = lotlip_loss(images, texts, SCALE, text_mask=mask)
    assert losses["loss"].item() == pytest.approx((image_to_text + text_to_image) / 2, abs=1e-6)

    def cost(similarity: float) -> float:
        return math.log(1 + math.exp(2 * similarity - 0.5))

    def gain(similarity: float) -> float:
        return math.log(1 + math.exp(0.5 - 2 * similarity))

    image_to_text = (gain(0.9) + cost(0.5) + cost(1.0) + gain(0.8)) / 2
    text_to_image = (gain(0.9) + cost(1.0) + cost(0.8) + gain(0.8)) / 2
    losses = lotlip_loss(images, texts, SCALE, text_mask=mask, objective="siglip", logit_bias=BIAS)
    assert losses["loss"].item() == pytest.approx((image_to_text + text_to_image) / 2, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_late_interaction_of_one_patch_and_one_token_is_cosine(objective):
    images, texts = random_features()
    settings = {"objective": objective, "logit_bias": BIAS}
    mask = torch.ones(8, 4, 1, dtype=torch.bool)
    late = lotlip_loss(images[:, None], texts[:, :, None], SCALE, text_mask=mask, **settings)
    for name, expected in lotlip_loss(images, texts, SCALE, **settings).items():
        torch.testing.assert_close(late[name], expected)


@pytest.mark.parametrize("at_once", [1, 3 * 4 * 8, 10**6])  # blocks of one text, of three and two, one block
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_follows_its_equations(variant, at_once):
    images, texts, settings = case(variant, torch.float64)
    leaves = [images.requires_grad_(), texts.requires_grad_(), SCALE.double().requires_grad_()]
    leaves += [settings[name].requires_grad_() for name in LEARNED if name in settings]
    losses = lotlip_loss(*leaves[:3], **settings, logits_at_once=at_once)
    expected = plain_loss(*leaves[:3], settings)
    assert expected.keys() | {"recall"} == losses.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name].to(losses[name]))
    gradients = [torch.autograd.grad(loss["loss"], leaves) for loss in (losses, expected)]
    for first, second in zip(*gradients, strict=True):
        assert first.any()
        torch.testing.assert_close(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match_finite_differences(variant):
    images, texts, settings = case(variant, torch.float64)
    images, texts, scale = images[:4], texts[:4, :2], SCALE.double().requires_grad_()
    for name in ("text_mask", "channel_masks"):
        if name in settings:
            settings[name] = settings[name][:4, :2]
    if "image_tokens" in settings:
        settings |= {name: settings[name][:4] for name in ("image_tokens", "draws")}
    # The directions of components and the texts in a margin are constants by design.
    images.requires_grad_("image_components" not in settings)
    texts.requires_grad_(not {"text_components", "hard_negative_margin"} & settings.keys())
    leaves = [leaf for leaf in (images, texts, scale) if leaf.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: lotlip_loss(images, texts, scale, **settings)["loss"], leaves)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match_those_of_the_equations(variant):
    images, texts, settings = case(variant, torch.float64)
    leaves = [images.requires_grad_(), texts.requires_grad_(), SCALE.double().requires_grad_()]
    gradients = torch.autograd.grad(lotlip_loss(*leaves, **settings)["loss"], leaves)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(plain_loss(*leaves, settings)["loss"], leaves), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_matching_features_attract(objective, late):
    # Texts are a basis and have one token each, so the gradient of the features is that of the similarities.
    texts = torch.eye(6)[:, None]
    images = normalize(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)), dim=-1).requires_grad_()
    mask = torch.ones(6, 1, 1, dtype=torch.bool) if late else None
    features = (images[:, None], texts[:, :, None]) if late else (images, texts)
    lotlip_loss(*features, SCALE, logit_bias=BIAS, objective=objective, text_mask=mask)["loss"].backward()
    matching = torch.eye(6, dtype=torch.bool)
    assert (images.grad[matching] < 0).all() and (images.grad[~matching] > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matching_features_cost_nothing(objective):
    sure = {"logit_scale": torch.tensor([100.0]), "logit_bias": torch.tensor([-50.0]), "objective": objective}
    assert lotlip_loss(torch.eye(4), torch.eye(4)[:, None], **sure)["loss"].item() == pytest.approx(0, abs=1e-6)
    assert lotlip_loss(torch.eye(4), torch.eye(4).roll(1, 0)[:, None], **sure)["loss"].item() > 50


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_recall_is_the_fraction_of_texts_nearest_to_their_own_image(at_once):
    images = torch.eye(4)
    short = torch.eye(4)  # all are nearest to their own image
    long = torch.eye(4)[[0, 1, 3, 2]]  # half of them are
    losses = lotlip_loss(images, torch.stack([short, long], dim=1), SCALE, logits_at_once=at_once)
    assert losses["recall"].item() == 0.75 and not losses["recall"].requires_grad
    same = torch.ones(4, 1, 4) / 2
    assert lotlip_loss(images, same, SCALE)["recall"].item() == 0  # no image is nearer than the others


def test_a_margin_does_not_change_the_recall():
    """With the margin, texts of a new model would seem to find their images less often than by chance."""
    images, texts = random_features()
    texts = normalize(texts + 3 * images[:, None], dim=-1)
    plain, margin = (lotlip_loss(images, texts, SCALE, hard_negative_margin=m) for m in (0.0, 1.0))
    assert margin["recall"] == plain["recall"] > 0.5
    assert margin["loss"] > plain["loss"]


def test_blocks_save_few_logits_for_the_backward_pass():
    """The backward pass computes each block again."""
    images, texts = random_features(batch=64, number=2)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    texts.requires_grad_()
    sizes = []
    for at_once in (64 * 2 * 8, 10**6):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lotlip_loss(images, texts, SCALE, logits_at_once=at_once)
        sizes.append(max(saved.values()))
    assert sizes[1] >= 64 * 64 * 2 * 4  # all logits
    assert sizes[0] < sizes[1] / 2


def test_a_bias_does_not_change_infonce():
    images, texts = random_features()
    bias = BIAS.clone().requires_grad_()
    loss = lotlip_loss(images, texts, SCALE, logit_bias=bias)["loss"]
    torch.testing.assert_close(loss, lotlip_loss(images, texts, SCALE)["loss"])
    assert torch.autograd.grad(loss, bias)[0].item() == pytest.approx(0, abs=1e-6)  # not None: engines need a gradient


@pytest.mark.slow
@given(batch=st.integers(1, 12), width=st.integers(1, 8), number=st.integers(1, 10))
def test_principal_components_equal_numpys(batch, width, number):
    generator = torch.Generator().manual_seed(batch + 100 * width)
    features = normalize(torch.randn(batch, width, generator=generator, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(principal_components(features, number), projection(features, number))


def test_principal_components_by_hand():
    features = torch.tensor([[5.0, 1.0], [5.0, -1.0], [7.0, 0.0], [3.0, 0.0]])  # they vary along the first axis most
    rebuilt = principal_components(features, 1)
    torch.testing.assert_close(rebuilt, torch.tensor([[5.0, 0.0], [5.0, 0.0], [7.0, 0.0], [3.0, 0.0]]))


def test_all_principal_components_reconstruct_the_features():
    images, texts = random_features()
    for number in (6, 32):
        torch.testing.assert_close(principal_components(images, number), images)
        expected = lotlip_loss(images, texts, SCALE)
        for name, loss in lotlip_loss(images, texts, SCALE, image_components=number).items():
            torch.testing.assert_close(loss, expected[name])


def test_principal_components_have_the_gradient_of_a_projection():
    images = random_features()[0].double().requires_grad_()
    target = torch.randn(8, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((rebuilt * target).sum(), images)[0]
        for rebuilt in (principal_components(images, 2), projection(images, 2))
    ]
    torch.testing.assert_close(*gradients)


def test_equal_eigenvalues_do_not_break_the_gradient():
    images = torch.eye(4).requires_grad_()
    principal_components(images, 2).square().sum().backward()
    assert images.grad.isfinite().all()


def test_principal_components_keep_the_dtype():
    images, _ = random_features()
    rounded = principal_components(images.bfloat16(), 2)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), projection(images, 2), atol=0.02, rtol=0)


def test_image_components_change_only_the_loss_of_short_captions():
    from open_clip.loss import ClipLoss

    images, texts = random_features()
    full, losses = lotlip_loss(images, texts, SCALE), lotlip_loss(images, texts, SCALE, image_components=2)
    torch.testing.assert_close(losses["long"], full["long"])
    expected = ClipLoss()(projection(images, 2), texts[:, 0], SCALE[0]) / 4
    torch.testing.assert_close(losses["raw"], expected)
    assert not torch.isclose(losses["raw"], full["raw"], rtol=1e-3), "the case must be able to fail"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_an_image_makes_the_loss_nan(variant):
    images, texts, settings = case(variant)
    images[3] = math.nan
    assert lotlip_loss(images, texts, SCALE, **settings)["loss"].isnan()  # training names the sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_the_batch_does_not_change_the_losses(variant):
    images, texts, settings = case(variant)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    expected = lotlip_loss(images, texts, SCALE, **settings)
    for name in settings.keys() & {"text_mask", "channel_masks", "image_tokens", "draws"}:
        settings[name] = settings[name][order]
    for name, value in lotlip_loss(images[order], texts[order], SCALE, **settings).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "hinge"}, "unknown objective 'hinge'; use one of infonce, siglip"),
        ({"objective": "siglip"}, "siglip needs logit_bias"),
        ({"image_components": -1}, "components is -1"),
        ({"text_components": 1.5}, "components is 1.5; it must be a whole number from 1, or a share"),
        ({"objective": "siglip", "logit_bias": BIAS, "label_smoothing": 0.1}, "label_smoothing needs the objective"),
        ({"channel_masks": torch.ones(8, 4, 6), "image_components": 2}, "channel_masks select from the full features"),
        ({"channel_masks": torch.ones(8, 4, 5)}, r"channel_masks \[8, 4, 5\] and text_features \[8, 4, 6\] do not"),
        ({"image_tokens": torch.ones(8, 3, 6)}, "need the objective siglip"),
        ({"pooling": torch.ones(34, 6)}, "image_tokens, pooling and draws belong together"),
        ({"text_mask": torch.ones(8, 4, 5, dtype=torch.bool)}, r"expected \[B, P, D\] and \[B, N, L, D\]"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        lotlip_loss(*random_features(), SCALE, **settings)


def test_mismatched_features_are_rejected():
    images, texts = random_features()
    patches, tokens, mask = random_tokens()
    for name in ("image_components", "text_components", "hard_negative_margin"):
        with pytest.raises(ValueError, match=r"need one feature per image and text, .* set them to 0"):
            lotlip_loss(patches, tokens, SCALE, text_mask=mask, **{name: 0.5})
    with pytest.raises(ValueError, match="late interaction does not have; leave out text_mask"):
        lotlip_loss(patches, tokens, SCALE, text_mask=mask, channel_masks=torch.ones(8, 2, 6))
    for wrong in ((images, texts[:, 0]), (images[:7], texts), (images[:, :5], texts), (patches, tokens)):
        with pytest.raises(ValueError, match=r"text_mask none do not match; expected \[B, D\] and \[B, N, D\]$"):
            lotlip_loss(*wrong, SCALE)
    for wrong in ((patches[:7], tokens, mask), (patches, tokens, mask[..., :4]), (patches[:, 0], tokens, mask)):
        with pytest.raises(ValueError, match="with text_mask"):
            lotlip_loss(*wrong[:2], SCALE, text_mask=wrong[2])


VECTORS = Path(os.environ.get("LOTLIP_METHOD_VECTORS", Path(__file__).parent / "data" / "methods"))
LONG_CLIP, HIMO = "longclip_image_components_", "himo_text_components_"


def method_vectors() -> dict[str, Tensor]:
    """Features, components and losses computed by the released code of HiMo-CLIP and Long-CLIP."""
    size = json.loads((VECTORS / "case.json").read_text())
    vectors = load_file(VECTORS / "components.safetensors")
    for name in ("image", "short", "long"):
        assert vectors[name].shape == (size["batch"], size["width"])
    return vectors


def in_names(vectors: dict[str, Tensor], start: str) -> list[float]:
    """The numbers at the end of the names that start so, such as 32 of longclip_image_components_32."""
    return [float(name.removeprefix(start)) for name in vectors if name.startswith(start)]


def test_long_clips_loss_equals_its_release():
    vectors = method_vectors()
    (number,) = in_names(vectors, LONG_CLIP)
    texts = torch.stack([vectors["short"], vectors["long"]], dim=1)
    losses = lotlip_loss(
        vectors["image"], texts, vectors["logit_scale"].exp(), image_components=number, label_smoothing=0.1
    )
    rebuilt = principal_components(vectors["image"], number)
    torch.testing.assert_close(rebuilt, vectors[f"{LONG_CLIP}{number:g}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(2 * losses["raw"], vectors["longclip_loss_short"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(2 * losses["long"], vectors["longclip_loss_long"][0], atol=1e-5, rtol=0)


def test_himo_clips_loss_equals_its_release():
    vectors = method_vectors()
    texts = torch.stack([vectors["short"], vectors["long"]], dim=1)
    shares = in_names(vectors, HIMO)
    assert shares
    for share in shares:
        losses = lotlip_loss(
            vectors["image"],
            texts,
            vectors["logit_scale"].exp(),
            text_components=share,
            label_smoothing=0.1,
            short_loss_fraction=0.0,
        )
        rebuilt = principal_components(vectors["long"], share)
        torch.testing.assert_close(rebuilt, vectors[f"{HIMO}{share:g}"], atol=1e-5, rtol=0)
        expected = vectors[f"himo_loss_text_{share:g}"] + vectors[f"himo_loss_components_{share:g}"]
        torch.testing.assert_close(losses["long"], expected[0], atol=1e-5, rtol=0)


def test_flairs_loss_equals_its_release(monkeypatch):
    vectors = load_file(VECTORS / "flair.safetensors")
    size = json.loads((VECTORS / "case.json").read_text())["flair"]
    images, number, heads = size["batch"], size["texts_per_image"], size["heads"]
    tokens, meets = vectors["image_tokens"], vectors["meets"]
    width = tokens.shape[2]
    assert tokens.shape == (images, size["patches"], width) and meets.shape == (images, number + images - 1)
    texts = normalize(vectors["text_features"], dim=-1).view(images, number, width)
    attention = [vectors[f"pool.attn.{name}"] for name in ("in_proj_weight", "out_proj.weight", "in_proj_bias")]
    norms = [vectors[f"pool.ln_{name}.{part}"] for name in "qkv" for part in ("weight", "bias")]
    rows = [*attention, vectors["pool.attn.out_proj.bias"], *norms]
    pooling = torch.cat([row.reshape(-1, width) for row in rows])
    scale, bias = vectors["logit_scale_exp"], vectors["logit_bias"]
    every = texts.flatten(0, 1)
    scores = conditioned_scores(tokens, TextQueries.of(every, pooling, heads), pooling).gather(1, meets)
    torch.testing.assert_close(scores, (vectors["conditioned"] * every[meets]).sum(-1), atol=1e-5, rtol=0)
    for at_once in (1, 10**6):
        conditioned = conditioned_loss(
            tokens, texts, meets, pooling, scale, bias, heads=heads, first=0, values_at_once=at_once
        )
        torch.testing.assert_close(conditioned, vectors["loss_text_conditioned"], atol=1e-5, rtol=0)
    feature = normalize(vectors["image_feature"], dim=-1)
    sigmoid = {"objective": "siglip", "logit_bias": bias}
    alone = lotlip_loss(feature, texts, scale, **sigmoid)["loss"]
    torch.testing.assert_close(alone, vectors["loss_multi_positive"][0], atol=1e-5, rtol=0)
    # the release's random texts of other images instead of those that the draws choose
    monkeypatch.setattr("lotlip.objectives.conditioned.choose_partners", lambda *_: meets)
    pooled_too = {"image_tokens": tokens, "pooling": pooling, "pooling_heads": heads}
    losses = lotlip_loss(feature, texts, scale, **sigmoid, **pooled_too, draws=torch.zeros(images, 2).long())
    torch.testing.assert_close(losses["raw"] + losses["long"], vectors["loss_multi_positive"][0] / 2)
    torch.testing.assert_close(losses["conditioned"], vectors["loss_text_conditioned"][0] / 2)
    torch.testing.assert_close(losses["loss"], vectors["loss"][0], atol=1e-5, rtol=0)


def test_partners_are_an_images_own_texts_and_one_of_each_other_image():
    draws = torch.randint(2**32, (200, 2), generator=torch.Generator().manual_seed(0))
    chosen = choose_partners(draws, 50, 100, 4)
    assert chosen.shape == (100, 4 + 199)
    for image, partners in enumerate(chosen.tolist(), start=50):
        assert sorted(partner // 4 for partner in partners) == sorted([*range(200), *[image] * 3])
        assert {4 * image + text for text in range(4)} <= set(partners)
    others = chosen[:, 4:] % 4
    assert 0.2 < torch.bincount(others.flatten()).min() / others.numel() < 0.25  # uniform over the texts
    assert not torch.equal(others[0], others[1])


def test_smartclips_loss_is_a_twentieth_of_its_release():
    """The release's loss is 10 (L₁ + L₂) + 2 mean|m|."""
    images, texts = random_features(number=1)
    masks = torch.rand(texts.shape, generator=torch.Generator().manual_seed(9))
    similarity = torch.einsum("itd,td->it", normalize(images[:, None] * (masks[:, 0] >= 0.5), dim=-1), texts[:, 0])
    index = torch.arange(len(images))
    infonce = cross_entropy(100 * similarity.T, index) + cross_entropy(100 * similarity, index)
    loss = lotlip_loss(images, texts, torch.tensor([100.0]), channel_masks=masks, mask_penalty=0.1)["loss"]
    torch.testing.assert_close(20 * loss, 10 * infonce + 2 * masks.mean())


def test_a_text_that_selects_no_channel_has_finite_gradients():
    images, texts = random_features()
    masks = torch.full_like(texts, 0.4).requires_grad_()
    images.requires_grad_()
    lotlip_loss(images, texts, SCALE, channel_masks=masks)["loss"].backward()
    assert images.grad.isfinite().all() and masks.grad.isfinite().all()


# Differentiable inputs besides features and scale.
LEARNED = ("logit_bias", "channel_masks", "image_tokens", "pooling")


def loss_and_gradients(variant: str, part: slice, at_once: int = 10**6) -> dict[str, Tensor]:
    """The loss of this process's rows and the gradients of linear towers, temperature and bias.

    Texts are padded to the longest of this process. The gradient of the gathered features comes out of a matrix
    product, so its memory is not in row order.
    """
    settings = dict(VARIANTS[variant])
    images, texts = random_features()
    if "text_mask" in settings:
        images, texts, mask = random_tokens()
        longest = int(mask[part].sum(dim=-1).max())
        texts, settings["text_mask"] = texts[..., :longest, :], mask[part, :, :longest]
    generator = torch.Generator().manual_seed(1)
    learned = {
        "image weight": torch.randn(6, 6, generator=generator),
        "text weight": torch.randn(6, 6, generator=generator),
        "log_scale": torch.tensor([1.5]),
        "bias": BIAS.clone(),
    }
    inputs = additional_inputs(settings, texts)
    if "pooling" in inputs:
        learned |= {"patch weight": torch.randn(6, 6, generator=generator), "pooling": inputs["pooling"]}
    if "channel_masks" in inputs:
        learned["mask weight"] = torch.randn(6, 6, generator=generator)
    for value in learned.values():
        value.requires_grad_()
    if "pooling" in inputs:
        tokens, draws = inputs["image_tokens"][part] @ learned["patch weight"], inputs["draws"][part]
        settings |= inputs | {"image_tokens": tokens, "draws": draws}
    if "channel_masks" in inputs:
        settings["channel_masks"] = (inputs["channel_masks"][part] @ learned["mask weight"]).sigmoid()
    losses = lotlip_loss(
        normalize(images[part] @ learned["image weight"], dim=-1),
        normalize(texts[part] @ learned["text weight"], dim=-1),
        learned["log_scale"].exp(),
        **settings | {"logit_bias": learned["bias"]},
        short_loss_weight=0.7,
        long_loss_weight=1.3,
        logits_at_once=at_once,
    )
    losses["loss"].backward()
    gradients = {name: value.grad for name, value in learned.items() if value.grad is not None}
    return {"loss": losses["loss"].detach(), "recall": losses["recall"], **gradients}


SIZES = (1, 3 * 4 * 8, 10**6)  # blocks of one text, of three and one, one block


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    results = {(variant, size): loss_and_gradients(variant, part, size) for variant in VARIANTS for size in SIZES}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.integration
def test_two_processes_have_the_loss_and_the_gradients_of_one(forked, tmp_path):
    lengths = random_tokens()[2].sum(dim=-1)
    assert lengths[:4].max() > lengths[4:].max(), "the two processes must have texts of different lengths"
    launcher = ["-m", "flows.runtime.local_launch", "2"]
    subprocess.run([sys.executable, *launcher, "tests.test_losses", str(tmp_path)], cwd=ROOT, check=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for variant, size in first:
        one = loss_and_gradients(variant, slice(0, 8))
        inputs = ("channel_masks" in VARIANTS[variant]) + 2 * ("image_tokens" in VARIANTS[variant])
        assert len(one) == 6 + inputs
        for name, expected in one.items():
            mean = (first[variant, size][name] + second[variant, size][name]) / 2
            torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-6, msg=lambda m: f"{variant}, {name}: {m}")  # noqa: B023
        assert torch.equal(first[variant, size]["loss"], second[variant, size]["loss"])


if __name__ == "__main__":  # as the test above starts it
    _process(int(os.environ["RANK"]), sys.argv[1])
