"""Similarities: known values, a loop over all pairs, padding, and limited memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from lotlip.objectives.similarity import cosine, late_interaction


def random_case(
    images: int, patches: int, lengths: list[int], padding: int = 0, width: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    length = max(lengths) + padding
    image = torch.randn(images, patches, width, generator=generator, dtype=dtype)
    text = torch.randn(len(lengths), length, width, generator=generator, dtype=dtype)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return normalize(image, dim=-1), normalize(text, dim=-1), mask


def naive(images: Tensor, texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """FILIP's equations 3 to 5, one image and text at a time."""
    to_text, to_image = torch.zeros(2, len(images), len(texts), dtype=images.dtype)
    for i, patches in enumerate(images.tolist()):
        for t, padded in enumerate(texts.tolist()):
            tokens = [token for token, real in zip(padded, mask[t].tolist(), strict=True) if real]
            pairs = [[sum(a * b for a, b in zip(p, w, strict=True)) for w in tokens] for p in patches]
            to_text[i, t] = sum(max(row) for row in pairs) / len(patches)
            to_image[i, t] = sum(max(column) for column in zip(*pairs, strict=True)) / len(tokens)
    return to_text, to_image


def test_two_by_two_by_hand():
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    images = torch.tensor([[east, north], [between, between]])
    texts = torch.tensor([[east, between], [north, east]])
    mask = torch.tensor([[True, True], [True, False]])  # the second text is "north" alone
    to_text, to_image = late_interaction(images, texts, mask)
    # by patch: east finds 1 and north 0.8 in the first text, 0 and 1 in the second; "between" finds itself, or 0.8
    torch.testing.assert_close(to_text, torch.tensor([[0.9, 0.5], [1.0, 0.8]]))
    # by token: east finds 1 and "between" 0.8 in the first image, 0.6 and 1 in the second; north finds 1, or 0.8
    torch.testing.assert_close(to_image, torch.tensor([[0.9, 1.0], [0.8, 0.8]]))


def test_cosine_is_the_same_both_ways():
    images, texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    to_text, to_image = cosine(images, texts)
    torch.testing.assert_close(to_text, torch.tensor([[0.0, 1.0, 0.8], [0.8, 0.6, 0.96]]))
    assert to_image is to_text


@pytest.mark.slow
@given(
    images=st.integers(1, 4),
    patches=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    padding=st.integers(0, 2),
    pairs_at_once=st.sampled_from([1, 7, 40, 1000]),
    gradients=st.booleans(),
)
def test_late_interaction_equals_a_loop_over_pairs(images, patches, lengths, padding, pairs_at_once, gradients):
    image, text, mask = random_case(images, patches, lengths, padding)
    similarities = late_interaction(image.requires_grad_(gradients), text, mask, pairs_at_once)
    for similarity, expected in zip(similarities, naive(image, text, mask), strict=True):
        torch.testing.assert_close(similarity.detach(), expected, atol=1e-6, rtol=0)


def test_late_interaction_of_one_patch_and_one_token_is_cosine():
    image, text, mask = random_case(5, 1, [1] * 7)
    for similarity, expected in zip(late_interaction(image, text, mask), cosine(image[:, 0], text[:, 0]), strict=True):
        torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("value", [0.0, 100.0, -100.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_changes_neither_similarities_nor_gradients(value, extra):
    image, text, mask = random_case(3, 4, [2, 5, 1])
    padded = text.masked_fill(~mask[..., None], value)
    padded = torch.cat([padded, torch.full((3, extra, 4), value)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], dim=1)
    results = []
    for texts, masks in ((text, mask), (padded, longer)):
        leaves = image.clone().requires_grad_(), texts.clone().requires_grad_()
        similarities = late_interaction(*leaves, masks)
        (similarities[0].square().sum() + similarities[1].exp().sum()).backward()
        results.append(
            [*similarities, leaves[0].grad, leaves[1].grad[:, : mask.shape[1]], leaves[1].grad[:, mask.shape[1] :]]
        )
    for expected, padded_result in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(padded_result, expected, atol=1e-6, rtol=0)
    assert not results[1][3][~mask].any() and not results[1][4].any()  # padding has no gradient


def test_masked_tokens_may_be_anywhere():
    image, text, _ = random_case(3, 4, [5, 5])
    mask = torch.tensor([[False, True, False, True, True], [False, False, True, False, False]])
    for similarity, expected in zip(late_interaction(image, text, mask), naive(image, text, mask), strict=True):
        torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)


def test_nan_in_an_image_spreads_to_its_similarities():
    image, text, mask = random_case(3, 4, [2, 5, 1])
    image[1, 2] = math.nan
    for similarity in late_interaction(image, text, mask):
        assert similarity[1].isnan().all() and similarity[[0, 2]].isfinite().all()


@pytest.mark.slow
def test_gradients_match_finite_differences():
    image, text, mask = random_case(3, 4, [2, 5, 1], dtype=torch.float64)
    image.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: late_interaction(i, t, mask, pairs_at_once=30), (image, text))


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest result of an operation."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("pairs_at_once", [50, 500, 4000])
def test_the_number_of_pairs_in_memory_is_limited(pairs_at_once):
    image, text, mask = random_case(12, 7, [6] * 10, width=2)  # 12 · 7 · 10 · 6 = 5040 pairs
    image.requires_grad_(), text.requires_grad_()
    saved = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            to_text, to_image = late_interaction(image, text, mask, pairs_at_once)
        assert max(saved) < 1000, "a block of pairs is saved for the backward pass"
        (to_text + to_image).sum().backward()
    inputs = max(image.numel(), text.numel())
    assert largest.numbers <= max(pairs_at_once, inputs), "too many pairs at once"


def test_adjacent_short_texts_are_not_padded():
    image, text, mask = random_case(4, 6, [2] * 8 + [10] * 2)
    with _LargestTensor() as largest:
        late_interaction(image, text, mask, pairs_at_once=4 * 6 * 10 * 8)
    assert largest.numbers == 4 * 6 * 2 * 10  # the last two texts; the first eight have 4 · 6 · 8 · 2 pairs


def test_texts_without_tokens_are_an_error():
    image, text, mask = random_case(2, 3, [2, 4, 1])
    mask[1] = False
    with pytest.raises(ValueError, match="1 of 3 texts have no token"):
        late_interaction(image, text, mask)


def test_a_mask_of_another_shape_is_an_error():
    image, text, mask = random_case(2, 3, [2, 4, 1])
    with pytest.raises(ValueError, match=r"shape \[3, 3\]; it needs \[3, 4\]"):
        late_interaction(image, text, mask[:, :3])
