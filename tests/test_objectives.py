"""Modules of objectives, and retrieval with text-conditioned features."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from lotlip.objectives.conditioned import (
    ConditionedPooling,
    conditioned_scores,
    pooled_features,
    queries,
    reranked_scores,
)
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


def pooled_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projected patches of 7 images, 5 texts, and weights of the pooling."""
    tokens, pooling = ConditionedPooling(token_width=10, width=8, heads=2)(torch.randn(7, 4, 10))
    return tokens, normalize(torch.randn(5, 8), dim=-1), pooling


def test_conditioned_scores_equal_those_of_single_pairs():
    tokens, texts, pooling = pooled_case()
    scores = conditioned_scores(tokens, texts, pooling, heads=2)
    for image in range(7):
        for text in range(5):
            query = queries(texts[text], pooling)[None, None]
            pooled = pooled_features(tokens[image : image + 1], query, pooling, heads=2)[0, 0]
            torch.testing.assert_close(scores[image, text], cosine_similarity(pooled, texts[text], dim=0))


def test_reranking_changes_only_the_best_candidates():
    tokens, texts, pooling = pooled_case()
    scores = normalize(torch.randn(5, 8), dim=-1) @ normalize(torch.randn(7, 8), dim=-1).T
    every = conditioned_scores(tokens, texts, pooling, heads=2).T
    reranked = reranked_scores(scores, tokens, texts, pooling, heads=2, top=3)
    for text in range(5):
        best = scores[text].topk(3).indices
        order = reranked[text].argsort(descending=True)
        assert order[:3].tolist() == best[every[text, best].argsort(descending=True)].tolist()
        assert order[3:].tolist() == scores[text].argsort(descending=True)[3:].tolist()
    torch.testing.assert_close(reranked_scores(scores, tokens, texts, pooling, heads=2, top=9), every)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"loss.conditioned.heads is 3, which does not divide .* width 8"):
        ConditionedPooling(10, 8, 3)
