"""Modules that only an objective needs, and the cosines of features that texts pool."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, layer_norm, normalize

from lotlip.objectives.conditioned import ConditionedPooling, TextQueries, conditioned_scores
from lotlip.objectives.masks import MaskNetwork, masked_cosine


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_a_mask_depends_on_tokens_without_padding_and_gradients():
    network = MaskNetwork(token_width=8, width=6, heads=2)
    tokens, real = torch.randn(3, 5, 8, requires_grad=True), torch.arange(5) < torch.tensor([[5], [2], [3]])
    torch.nn.init.normal_(network.channels.weight)
    masks = network(tokens, real)
    assert masks.shape == (3, 6) and masks.min() > 0 and masks.max() < 1
    noise = torch.randn_like(tokens)
    torch.testing.assert_close(network(tokens + noise * ~real[..., None], real), masks)
    assert (network(tokens + noise * real[..., None], real) - masks).abs().amin(dim=0).max() > 1e-3
    masks.sum().backward()
    assert tokens.grad is None
    assert all(value.grad is not None and value.grad.any() for value in network.parameters() if value.ndim > 1)


def test_new_masks_select_every_channel():
    masks = MaskNetwork(8, 6, 2)(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool))
    images, texts = normalize(torch.randn(4, 6), dim=-1), normalize(torch.randn(3, 6), dim=-1)
    torch.testing.assert_close(masked_cosine(images, texts, masks)[0], images @ texts.T)


def plain_score(tokens: torch.Tensor, text: torch.Tensor, module: ConditionedPooling, heads: int) -> torch.Tensor:
    """The cosine of one text and one image's pooled feature, with torch's own attention; tokens [P, D], text [D]."""
    width = len(text)
    attention = torch.nn.MultiheadAttention(width, heads, add_zero_attn=True)
    attention.load_state_dict(
        {
            "in_proj_weight": module.inputs,
            "in_proj_bias": module.input_bias,
            "out_proj.weight": module.output,
            "out_proj.bias": module.output_bias,
        }
    )
    query, key, value = (
        layer_norm(values, (width,), *norm)
        for values, norm in (
            (text[None] * width**0.5, module.norm_query),
            (tokens, module.norm_key),
            (tokens, module.norm_value),
        )
    )
    return cosine_similarity(attention(query, key, value)[0][0], text, dim=0)


@pytest.mark.parametrize("values_at_once", [1, 20, 2**17])
def test_conditioned_scores_are_those_of_each_pair(values_at_once):
    """However many texts are scored at a time. Biases and norms are no longer those of the start."""
    module = ConditionedPooling(token_width=10, width=8, heads=2)
    for values in module.parameters():
        torch.nn.init.normal_(values)
    with torch.no_grad():
        tokens, pooling = module(torch.randn(7, 4, 10))
        texts = normalize(torch.randn(5, 8), dim=-1)
        queries = TextQueries.of(texts, pooling, heads=2)
        scores = conditioned_scores(tokens, queries, pooling, values_at_once)
        every = [[plain_score(tokens[image], text, module, heads=2) for text in texts] for image in range(7)]
        torch.testing.assert_close(scores, torch.tensor(every), atol=1e-6, rtol=1e-5)
        some = conditioned_scores(tokens[3:], queries.part(torch.tensor([4, 0, 4])), pooling, values_at_once)
        torch.testing.assert_close(some, scores[3:][:, [4, 0, 4]], atol=1e-6, rtol=1e-5)


def test_a_pooled_feature_of_nothing_has_no_similarity():
    module = ConditionedPooling(token_width=8, width=8, heads=2)
    torch.nn.init.zeros_(module.output)
    tokens, pooling = module(torch.randn(1, 4, 8))
    queries = TextQueries.of(normalize(torch.randn(3, 8), dim=-1), pooling, heads=2)
    assert conditioned_scores(tokens, queries, pooling).tolist() == [[0, 0, 0]]


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"loss.conditioned.heads is 3, which does not divide .* width 8"):
        ConditionedPooling(10, 8, 3)
