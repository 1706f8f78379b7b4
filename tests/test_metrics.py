"""Retrieval and classification on features whose answers are known."""

import math

import pytest
import torch

from lotlip.evaluation.metrics import chance, class_features, classification, retrieval
from lotlip.models.similarity import late_interaction


def random_case(images=40, per_image=3, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, dim, generator=generator)
    text_image = torch.arange(images).repeat_interleave(per_image)
    text = image[text_image] + 1.5 * torch.randn(images * per_image, dim, generator=generator)
    return image, text, text_image


def token_case(images=30, per_image=2, patches=3, length=5, dim=6, seed=0):
    """Patches, tokens that lie near some of their image's patches, the texts' images, the mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, patches, dim, generator=generator)
    text_image = torch.arange(images).repeat_interleave(per_image)
    near = torch.randint(0, patches, (len(text_image), length), generator=generator)
    text = image[text_image[:, None], near] + 0.7 * torch.randn(len(text_image), length, dim, generator=generator)
    lengths = torch.randint(1, length + 1, (len(text_image), 1), generator=generator)
    return image, text, text_image, torch.arange(length) < lengths


def test_perfect_features_find_everything():
    features = torch.eye(12)
    found = retrieval(features, features, torch.arange(12)).values
    assert found == {
        f"{way}.{name}": 1.0
        for way in ("image_to_text", "text_to_image")
        for name in ("r1", "r5", "r10", "median_rank")
    }


def test_known_ranks():
    # The gallery lies on a quarter circle; text i points a little beside image i − 1's neighbour.
    angles = torch.tensor([0.0, 0.4, 0.8, 1.2])
    image = torch.stack([angles.cos(), angles.sin()], dim=1)
    # texts 0 and 1 point at their images, text 2 at image 3 (its own is second), text 3 at image 0 (its own is last)
    at = torch.tensor([0.0, 0.4, 1.1, -0.1])
    text = torch.stack([at.cos(), at.sin()], dim=1)
    found = retrieval(image, text, torch.arange(4), ks=(1, 2, 3, 4)).values
    assert [found[f"text_to_image.r{k}"] for k in (1, 2, 3, 4)] == pytest.approx([0.5, 0.75, 0.75, 1.0])
    assert found["text_to_image.median_rank"] == pytest.approx(1.5)  # ranks 1, 1, 2, 4
    # image 3 at 1.2: texts by distance 2, 1, 0, 3: rank 4; image 2 at 0.8: text 2 first; 1 and 0 find theirs
    assert [found[f"image_to_text.r{k}"] for k in (1, 2, 3, 4)] == pytest.approx([0.75, 0.75, 0.75, 1.0])


def test_any_of_an_images_texts_counts():
    image = torch.eye(2)
    # image 0's second text points at it, its first at image 1; image 1's only text points at image 1, but less
    text = torch.tensor([[0.1, 1.0], [1.0, 0.0], [0.5, 1.0]])
    found = retrieval(image, text, torch.tensor([0, 0, 1]), ks=(1,)).values
    assert found["image_to_text.r1"] == pytest.approx(0.5)  # image 1 finds image 0's first text before its own
    assert found["text_to_image.r1"] == pytest.approx(2 / 3)
    assert found["image_to_text.median_rank"] == pytest.approx(1.5)


@pytest.mark.parametrize("per_image", [1, 5])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_constant_features_score_chance(per_image, k):
    images = 37
    text_image = torch.arange(images).repeat_interleave(per_image)
    found = retrieval(torch.ones(images, 9), torch.ones(images * per_image, 9), text_image, chunk=8).values
    assert found[f"image_to_text.r{k}"] == pytest.approx(chance(images, per_image, k))
    assert found[f"text_to_image.r{k}"] == pytest.approx(chance(images, 1, k))
    assert found["text_to_image.median_rank"] == pytest.approx((images + 1) / 2)


def test_expected_value_is_the_mean_over_fair_orders():
    # Of zeros and ones, similarities tie in every way; the mean over draws of noise that breaks ties must agree.
    generator = torch.Generator().manual_seed(1)
    image = torch.eye(6)
    text = torch.randint(0, 2, (12, 6), generator=generator) + 0.01
    text_image = torch.arange(6).repeat(2)
    expected = retrieval(image, text, text_image, ks=(1, 3)).values
    similarity = torch.nn.functional.normalize(text, dim=1) @ image.T  # [T, I]
    noisy = similarity + 1e-4 * torch.rand(3000, *similarity.shape, generator=generator)  # [draws, T, I]
    images_found = noisy.argsort(dim=2, descending=True) == text_image[:, None]
    texts_found = text_image[noisy.mT.argsort(dim=2, descending=True)] == torch.arange(6)[:, None]
    for k in (1, 3):
        drawn = {
            "text_to_image": images_found[..., :k].any(dim=2).float().mean().item(),
            "image_to_text": texts_found[..., :k].any(dim=2).float().mean().item(),
        }
        for way, mean in drawn.items():
            assert expected[f"{way}.r{k}"] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("chunk", [1, 7, 40, 4096])
def test_chunks_change_nothing(chunk):
    image, text, text_image = random_case()
    expected = retrieval(image, text, text_image).values
    assert retrieval(image, text, text_image, chunk=chunk).values == pytest.approx(expected)


def test_order_and_length_of_features_change_nothing():
    image, text, text_image = random_case()
    expected = retrieval(image, text, text_image).values
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randperm(len(image), generator=generator), torch.randperm(len(text), generator=generator)
    new_place = images.argsort()
    lengths = 0.1 + torch.rand(len(text), 1, generator=generator)
    shuffled = retrieval(image[images] * 3, (text * lengths)[texts], new_place[text_image[texts]]).values
    assert shuffled == pytest.approx(expected)
    assert 0.1 < expected["text_to_image.r1"] < 0.9, "the case must leave room for a mistake"


def test_agrees_with_open_clip():
    train = pytest.importorskip("open_clip_train.train")
    image, text, text_image = random_case(per_image=1)
    image, text = (torch.nn.functional.normalize(features, dim=1) for features in (image, text))
    reference = train.get_clip_metrics(image, text, torch.tensor(100.0))
    found = retrieval(image, text, text_image, chunk=11).values
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert found[f"{way}.r{k}"] == pytest.approx(reference[f"{way}_R@{k}"])
        # theirs is rounded down to a whole rank
        assert math.floor(found[f"{way}.median_rank"]) == reference[f"{way}_median_rank"]


def test_chance_is_exact():
    assert chance(1000, 1, 1) == pytest.approx(0.001)
    assert chance(1000, 1, 10) == pytest.approx(0.01)
    assert chance(2, 2, 2) == pytest.approx(1 - 1 / 6)  # both of two draws from four texts are the other image's
    assert chance(3, 1, 10) == 1.0


def test_classification_by_hand():
    classes = torch.eye(7)
    images = torch.eye(7) + 0.5 * torch.eye(7).roll(1, dims=1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])  # the last two are wrong
    found = classification(images, classes, labels, chunk=3).values
    assert found["top1"] == pytest.approx(5 / 7)
    # the wrong labels tie with four other classes of similarity 0, behind two: places 3, 4, 5 of 5 equal ones
    assert found["top5"] == pytest.approx((5 + 2 * 3 / 5) / 7)


def test_constant_features_classify_by_chance():
    found = classification(torch.ones(10, 4), torch.ones(20, 4), torch.arange(10)).values
    assert found == pytest.approx({"top1": 1 / 20, "top5": 5 / 20})


def test_class_features_average_directions():
    features = class_features([torch.tensor([[10.0, 0.0], [0.0, 0.1]]), torch.tensor([[0.0, 2.0]])])
    assert features.tolist() == [pytest.approx([math.sqrt(0.5)] * 2), pytest.approx([0.0, 1.0])]


@pytest.mark.parametrize(
    ("text_image", "message"),
    [([0, 1, 1], "0 … 2 at least once"), ([0, 1, 3], "and no other"), ([0, 1], "one per text")],
)
def test_indices_that_do_not_fit_are_refused(text_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval(torch.eye(3), torch.eye(3), torch.tensor(text_image))


def test_nan_is_refused_not_rewarded():
    features = torch.eye(3)
    broken = features.clone()
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match="text_features: 1 of 3 rows"):
        retrieval(features, broken, torch.arange(3))


def test_labels_without_a_class_are_refused():
    with pytest.raises(ValueError, match="between 0 and 3"):
        classification(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="labels has shape"):
        classification(torch.eye(3), torch.eye(3), torch.tensor([0, 1]))


def test_late_interaction_ranks_by_each_ways_own_similarity():
    image, text, text_image, mask = token_case()
    found = retrieval(image, text, text_image, ks=(1, 3), text_mask=mask).values
    unit = torch.nn.functional.normalize
    to_text, to_image = late_interaction(unit(image, dim=-1), unit(text, dim=-1), mask)
    for way, similarity, own in (
        ("image_to_text", to_text, torch.arange(30)[:, None] == text_image),
        ("text_to_image", to_image.T, text_image[:, None] == torch.arange(30)),
    ):
        hits = own.gather(1, similarity.argsort(dim=1, descending=True))  # [Q, G], what belongs to the query
        for k in (1, 3):
            assert found[f"{way}.r{k}"] == pytest.approx(hits[:, :k].any(dim=1).float().mean().item())
        ranks = 1 + hits.int().argmax(dim=1).double()
        assert found[f"{way}.median_rank"] == pytest.approx(ranks.quantile(0.5).item())
        assert 0.1 < found[f"{way}.r1"] < 0.9, "the case must leave room for a mistake"
    wrong = (to_image.argmax(dim=1), to_text.argmax(dim=0))
    assert not torch.equal(wrong[0], to_text.argmax(dim=1)) and not torch.equal(wrong[1], to_image.argmax(dim=0))


def test_one_patch_and_one_token_are_cosine():
    image, text, text_image = random_case()
    mask = torch.ones(len(text), 1, dtype=torch.bool)
    late = retrieval(image[:, None], text[:, None], text_image, text_mask=mask).values
    assert late == pytest.approx(retrieval(image, text, text_image).values)
    labels = torch.arange(40) % 20
    late = classification(image[:, None], text[:20, None], labels, text_mask=mask[:20]).values
    assert late == pytest.approx(classification(image, text[:20], labels).values)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_chunks_of_late_interaction_change_nothing(chunk):
    image, text, text_image, mask = token_case()
    expected = retrieval(image, text, text_image, text_mask=mask).values
    assert retrieval(image, text, text_image, chunk=chunk, text_mask=mask).values == pytest.approx(expected)
    prompt_class = torch.arange(60) % 12
    expected = classification(image, text, text_image[::2] % 12, text_mask=mask, prompt_class=prompt_class).values
    found = classification(image, text, text_image[::2] % 12, chunk, text_mask=mask, prompt_class=prompt_class).values
    assert found == pytest.approx(expected)


def test_padding_and_length_of_tokens_change_nothing():
    image, text, text_image, mask = token_case()
    expected = retrieval(image, text, text_image, text_mask=mask).values
    padded = (3 * text).masked_fill(~mask[..., None], math.nan)
    assert retrieval(image / 2, padded, text_image, text_mask=mask).values == pytest.approx(expected)


def test_nan_in_a_token_or_a_patch_is_refused():
    image, text, text_image, mask = token_case()
    broken = text.clone()
    broken[[3, 8], 0, 1] = math.nan
    with pytest.raises(ValueError, match="text_features: 2 of 60 rows"):
        retrieval(image, broken, text_image, text_mask=mask)
    broken = image.clone()
    broken[4, 2, 1] = math.inf
    with pytest.raises(ValueError, match="image_features: 1 of 30 rows"):
        retrieval(broken, text, text_image, text_mask=mask)


def test_a_classs_prompts_are_averaged_by_their_similarities():
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    images = torch.tensor([[east, north], [between, between]])
    # the first class has two prompts: "east" and "north"; the second one: "between"; the third one: "east north"
    prompts = torch.tensor([[east, east], [between, between], [north, north], [east, north]])
    mask = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
    prompt_class = torch.tensor([0, 1, 0, 2])
    # image → class: [(0.5 + 0.5) / 2, (0.6 + 0.8) / 2, 1] and [(0.6 + 0.8) / 2, 1, 0.8]
    for labels, expected in (([2, 1], 1.0), ([1, 0], 0.0), ([2, 2], 0.5)):
        found = classification(images, prompts, torch.tensor(labels), text_mask=mask, prompt_class=prompt_class).values
        assert found["top1"] == expected
    # the sum instead of the mean would put the first class ahead for the second image: 1.4
    found = classification(images, prompts, torch.tensor([2, 0]), text_mask=mask, prompt_class=prompt_class).values
    assert found["top1"] == 0.5


@pytest.mark.parametrize(
    ("prompt_class", "message"),
    [([0, 1, 1, 3], "prompt_class must name each of the classes 0 … 3"), ([0, 1], "prompt_class has shape")],
)
def test_prompts_without_a_class_are_refused(prompt_class, message):
    image, text, _, mask = token_case()
    with pytest.raises(ValueError, match=message):
        labels = torch.zeros(30, dtype=torch.int64)
        classification(image, text[:4], labels, text_mask=mask[:4], prompt_class=torch.tensor(prompt_class))


def test_features_of_another_kind_are_refused():
    image, text, text_image, mask = token_case()
    with pytest.raises(ValueError, match=r"image_features has shape \[30, 3, 6\]; it needs \[rows, D\]"):
        retrieval(image, text, text_image)
    with pytest.raises(ValueError, match=r"image_features has shape \[30, 6\]; it needs \[I, P, D\]"):
        retrieval(image[:, 0], text, text_image, text_mask=mask)
    for wrong in (text[:, 0], text[:, :4]):
        with pytest.raises(ValueError, match=r"text_mask \[60, 5\] do not fit"):
            retrieval(image, wrong, text_image, text_mask=mask)
