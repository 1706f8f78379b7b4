"""Retrieval and classification of features with known scores."""

import math
import statistics

import pytest
import torch
from scipy.stats import binom

from lotlip.evaluate.metrics import (
    Candidates,
    best_candidates,
    chance,
    class_features,
    classification,
    retrieval,
    retrieval_by_candidates,
    retrieval_by_pairs,
    summary,
)
from lotlip.objectives.similarity import late_interaction


def random_case(images=40, per_image=3, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, dim, generator=generator)
    text_image = torch.arange(images).repeat_interleave(per_image)
    text = image[text_image] + 1.5 * torch.randn(images * per_image, dim, generator=generator)
    return image, text, text_image


def token_case(images=30, per_image=2, patches=3, length=5, dim=6, seed=0):
    """Patches, tokens near some of their image's patches, the image of each text, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, patches, dim, generator=generator)
    text_image = torch.arange(images).repeat_interleave(per_image)
    near = torch.randint(0, patches, (len(text_image), length), generator=generator)
    text = image[text_image[:, None], near] + 0.7 * torch.randn(len(text_image), length, dim, generator=generator)
    lengths = torch.randint(1, length + 1, (len(text_image), 1), generator=generator)
    return image, text, text_image, torch.arange(length) < lengths


def test_perfect_features_score_one():
    features = torch.eye(12)
    scores = retrieval(features, features, torch.arange(12)).values
    assert scores == {
        f"{direction}.{name}": 1.0
        for direction in ("image_to_text", "text_to_image")
        for name in ("r1", "r5", "r10", "mean_rank", "median_rank")
    }


def test_known_ranks():
    # The gallery lies on a quarter circle. Text i points slightly away from image i − 1's neighbour.
    angles = torch.tensor([0.0, 0.4, 0.8, 1.2])
    image = torch.stack([angles.cos(), angles.sin()], dim=1)
    # texts 0 and 1 point at their images, text 2 at image 3 (its own is second), text 3 at image 0 (its own is last)
    at = torch.tensor([0.0, 0.4, 1.1, -0.1])
    text = torch.stack([at.cos(), at.sin()], dim=1)
    scores = retrieval(image, text, torch.arange(4), ks=(1, 2, 3, 4)).values
    assert [scores[f"text_to_image.r{k}"] for k in (1, 2, 3, 4)] == pytest.approx([0.5, 0.75, 0.75, 1.0])
    assert scores["text_to_image.median_rank"] == pytest.approx(1.5)  # ranks 1, 1, 2, 4
    assert scores["text_to_image.mean_rank"] == pytest.approx(2)
    # image 3 at 1.2: texts by distance 2, 1, 0, 3: rank 4; image 2 at 0.8: text 2 first; 1 and 0 find theirs
    assert [scores[f"image_to_text.r{k}"] for k in (1, 2, 3, 4)] == pytest.approx([0.75, 0.75, 0.75, 1.0])


def test_any_text_of_an_image_counts():
    image = torch.eye(2)
    # image 0's second text points at it, its first at image 1; image 1's only text points at image 1, but less
    text = torch.tensor([[0.1, 1.0], [1.0, 0.0], [0.5, 1.0]])
    scores = retrieval(image, text, torch.tensor([0, 0, 1]), ks=(1,)).values
    assert scores["image_to_text.r1"] == pytest.approx(0.5)  # image 1 finds image 0's first text before its own
    assert scores["text_to_image.r1"] == pytest.approx(2 / 3)
    assert scores["image_to_text.median_rank"] == pytest.approx(1.5)


@pytest.mark.parametrize("per_image", [1, 5])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_constant_features_score_chance(per_image, k):
    images = 37
    text_image = torch.arange(images).repeat_interleave(per_image)
    scores = retrieval(torch.ones(images, 9), torch.ones(images * per_image, 9), text_image, chunk=8).values
    assert scores[f"image_to_text.r{k}"] == pytest.approx(chance(images, per_image, k))
    assert scores[f"text_to_image.r{k}"] == pytest.approx(chance(images, 1, k))
    assert scores["text_to_image.median_rank"] == scores["text_to_image.mean_rank"] == pytest.approx((images + 1) / 2)
    others = images * per_image - per_image
    assert scores["image_to_text.mean_rank"] == pytest.approx(1 + others / (per_image + 1))


def test_expected_value_is_the_mean_over_fair_orders():
    # Features of zeros and ones tie in every way; the mean over random tie-breaks must agree.
    generator = torch.Generator().manual_seed(1)
    image = torch.eye(6)
    text = torch.randint(0, 2, (12, 6), generator=generator) + 0.01
    text_image = torch.arange(6).repeat(2)
    expected = retrieval(image, text, text_image, ks=(1, 3)).values
    similarity = torch.nn.functional.normalize(text, dim=1) @ image.T  # [T, I]
    noisy = similarity + 1e-4 * torch.rand(3000, *similarity.shape, generator=generator)  # [draws, T, I]
    images_found = noisy.argsort(dim=2, descending=True) == text_image[:, None]
    texts_found = text_image[noisy.mT.argsort(dim=2, descending=True)] == torch.arange(6)[:, None]
    for direction, hits in (("text_to_image", images_found), ("image_to_text", texts_found)):
        for k in (1, 3):
            assert expected[f"{direction}.r{k}"] == pytest.approx(
                hits[..., :k].any(dim=2).float().mean().item(), abs=0.01
            )
        ranks = 1 + hits.int().argmax(dim=2).float()
        assert expected[f"{direction}.mean_rank"] == pytest.approx(ranks.mean().item(), abs=0.02)


def tied_case(seed):
    """Features with few values, so many similarities tie. Images have one to four texts, in random order."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 3, (23, 3), generator=generator).float() + 0.5
    text_image = torch.cat([torch.arange(23), torch.randint(0, 23, (30,), generator=generator)])
    text = image[text_image] + torch.randint(0, 2, (53, 3), generator=generator)
    return image, text, text_image[torch.randperm(53, generator=generator)]


def reference_scores(image, text, text_image, ks):
    """The scores by counting, query by query, in double precision."""
    similarity = torch.nn.functional.normalize(image.double(), dim=1) @ torch.nn.functional.normalize(text.double()).T
    scores = {}
    for direction, matrix, queries, gallery in (
        ("image_to_text", similarity, list(range(len(image))), text_image.tolist()),
        ("text_to_image", similarity.T, text_image.tolist(), list(range(len(image)))),
    ):
        hits, ranks = dict.fromkeys(ks, 0.0), []
        for row, query in zip(matrix.tolist(), queries, strict=True):
            best = max(value for value, owner in zip(row, gallery, strict=True) if owner == query)
            better = sum(value > best + 1e-6 for value in row)
            ties = [owner == query for value, owner in zip(row, gallery, strict=True) if abs(value - best) <= 1e-6]
            matching, tied = sum(ties), len(ties)
            ranks.append(1 + better + (tied - matching) / (matching + 1))
            for k in ks:
                places = min(max(k - better, 0), tied)
                hits[k] += 1 - math.comb(tied - matching, places) / math.comb(tied, places)
        scores |= {f"{direction}.r{k}": hits[k] / len(queries) for k in ks}
        scores |= {
            f"{direction}.mean_rank": statistics.fmean(ranks),
            f"{direction}.median_rank": statistics.median(ranks),
        }
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 40, 4096])
def test_chunks_give_the_scores_of_the_full_matrix(chunk):
    for case in (random_case(), random_case(per_image=1, seed=3), tied_case(0), tied_case(1)):
        expected = reference_scores(*case, (1, 2, 5))
        result = retrieval(*case, ks=(1, 2, 5), chunk=chunk)
        assert result.values == pytest.approx(expected)
        assert result.intervals.keys() == {name for name in expected if not name.endswith("median_rank")}


def test_order_and_norm_of_features_do_not_change_the_scores():
    image, text, text_image = random_case()
    expected = retrieval(image, text, text_image).values
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randperm(len(image), generator=generator), torch.randperm(len(text), generator=generator)
    new_place = images.argsort()
    lengths = 0.1 + torch.rand(len(text), 1, generator=generator)
    shuffled = retrieval(image[images] * 3, (text * lengths)[texts], new_place[text_image[texts]]).values
    assert shuffled == pytest.approx(expected)
    assert 0.1 < expected["text_to_image.r1"] < 0.9, "the case must be able to fail"


def test_retrieval_agrees_with_open_clip():
    train = pytest.importorskip("open_clip_train.train")
    image, text, text_image = random_case(per_image=1)
    image, text = (torch.nn.functional.normalize(features, dim=1) for features in (image, text))
    reference = train.get_clip_metrics(image, text, torch.tensor(100.0))
    scores = retrieval(image, text, text_image, chunk=11).values
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert scores[f"{direction}.r{k}"] == pytest.approx(reference[f"{direction}_R@{k}"])
        assert scores[f"{direction}.mean_rank"] == pytest.approx(reference[f"{direction}_mean_rank"])
        # open_clip rounds down
        assert math.floor(scores[f"{direction}.median_rank"]) == reference[f"{direction}_median_rank"]


def test_accuracy_agrees_with_scikit_learn():
    """open_clip's own `accuracy` is not the reference, because it fails with NumPy 2."""
    reference = pytest.importorskip("sklearn.metrics")
    image, classes, _ = random_case(images=12, per_image=1)
    image, classes = (torch.nn.functional.normalize(features, dim=1) for features in (image, classes))
    labels = torch.arange(12).roll(2) % 9
    scores = classification(image, classes, labels, chunk=5).values
    for k in (1, 5):
        expected = reference.top_k_accuracy_score(labels, image @ classes.T, k=k, labels=range(12))
        assert scores[f"top{k}"] == pytest.approx(expected)
    assert 0 < scores["top1"] < scores["top5"] < 1, "the case must be able to fail"


def test_chance_is_exact():
    assert chance(1000, 1, 1) == pytest.approx(0.001)
    assert chance(1000, 1, 10) == pytest.approx(0.01)
    assert chance(2, 2, 2) == pytest.approx(1 - 1 / 6)  # a miss takes two draws of the other image's texts
    assert chance(3, 1, 10) == 1.0


def test_classification_by_hand():
    classes = torch.eye(7)
    images = torch.eye(7) + 0.5 * torch.eye(7).roll(1, dims=1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])  # the last two are wrong
    scores = classification(images, classes, labels, chunk=3).values
    assert scores["top1"] == pytest.approx(5 / 7)
    # the wrong labels tie with four other classes behind two: of the five tied places, three are in the top 5
    assert scores["top5"] == pytest.approx((5 + 2 * 3 / 5) / 7)


def test_constant_features_classify_at_chance():
    scores = classification(torch.ones(10, 4), torch.ones(20, 4), torch.arange(10)).values
    assert scores == pytest.approx({"top1": 1 / 20, "top5": 5 / 20})


# --- intervals ----------------------------------------------------------------------------------------------------


def hits(share, number, seed=0):
    return (torch.rand(number, generator=torch.Generator().manual_seed(seed)) < share).double()


def interval(outcome, cluster=None, **settings):
    clusters = torch.arange(len(outcome)) if cluster is None else cluster
    return summary({"r1": outcome}, clusters, **settings).intervals["r1"]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "number"), [(0.5, 1000), (0.9, 400), (0.02, 2000)])
def test_the_interval_of_a_proportion_is_binomial(share, number):
    outcome = hits(share, number)
    ends = binom.ppf([0.025, 0.975], number, outcome.mean().item()) / number
    assert interval(outcome, resamples=8000) == pytest.approx(ends, abs=1.5 / number)


@pytest.mark.slow
def test_intervals_have_their_nominal_coverage():
    covered = 0
    for seed in range(300):
        low, high = interval(hits(0.3, 300, seed), resamples=300, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 300 <= 0.98  # 0.95 ± 2.4 standard deviations


def test_texts_of_an_image_are_resampled_together():
    """Five texts of an image that are all hits or all misses carry no more information than one."""
    outcome, image = hits(0.4, 300), torch.arange(300).repeat_interleave(5)
    alone, together = interval(outcome), interval(outcome.repeat_interleave(5), image)
    assert together == pytest.approx(alone)  # the same images are resampled
    low, high = interval(outcome.repeat_interleave(5))
    assert high - low == pytest.approx((alone[1] - alone[0]) / math.sqrt(5), rel=0.1)


@pytest.mark.slow
def test_intervals_of_mean_ranks_agree_with_plain_resampling():
    """Images have one, two or three texts, whose ranks are resampled together."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(250).repeat_interleave(torch.arange(250) % 3 + 1)
    ranks = torch.randint(1, 40, (len(image),), generator=generator).double() ** 2
    result = summary({"mean_rank": ranks}, image, resamples=4000)
    assert result.values["mean_rank"] == pytest.approx(ranks.mean().item())
    image_ranks = [ranks[image == number] for number in range(250)]
    drawn = torch.randint(250, (4000, 250), generator=generator).tolist()
    means = torch.stack([torch.cat([image_ranks[number] for number in sample]).mean() for sample in drawn])
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert result.intervals["mean_rank"] == pytest.approx(ends, rel=0.02)


def test_equal_seeds_give_equal_intervals_and_zero_resamples_give_none():
    case = random_case()
    assert retrieval(*case) == retrieval(*case)
    assert retrieval(*case, seed=1).intervals != retrieval(*case).intervals
    assert retrieval(*case, resamples=0).intervals == {}
    result = classification(case[0], case[1][:20], torch.arange(40) % 20)
    assert result.intervals.keys() == result.values.keys()
    assert all(low < result.values[name] < high for name, (low, high) in result.intervals.items())


# --- classification -----------------------------------------------------------------------------------------------


def test_class_features_average_directions():
    features = class_features([torch.tensor([[10.0, 0.0], [0.0, 0.1]]), torch.tensor([[0.0, 2.0]])])
    assert features.tolist() == [pytest.approx([math.sqrt(0.5)] * 2), pytest.approx([0.0, 1.0])]


@pytest.mark.parametrize(
    ("text_image", "message"),
    [([0, 1, 1], "0 … 2 at least once"), ([0, 1, 3], "and nothing else"), ([0, 1], "one per text")],
)
def test_invalid_text_image_indices_are_rejected(text_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval(torch.eye(3), torch.eye(3), torch.tensor(text_image))


def test_nan_features_are_rejected():
    features = torch.eye(3)
    broken = features.clone()
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match="text_features: 1 of 3 rows"):
        retrieval(features, broken, torch.arange(3))


def test_labels_without_a_class_are_rejected():
    with pytest.raises(ValueError, match="are in 0 … 3"):
        classification(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="labels has shape"):
        classification(torch.eye(3), torch.eye(3), torch.tensor([0, 1]))


def test_late_interaction_ranks_each_direction_by_its_own_similarity():
    image, text, text_image, mask = token_case()
    scores = retrieval(image, text, text_image, ks=(1, 3), text_mask=mask).values
    unit = torch.nn.functional.normalize
    to_text, to_image = late_interaction(unit(image, dim=-1), unit(text, dim=-1), mask)
    for direction, similarity, matching in (
        ("image_to_text", to_text, torch.arange(30)[:, None] == text_image),
        ("text_to_image", to_image.T, text_image[:, None] == torch.arange(30)),
    ):
        hits = matching.gather(1, similarity.argsort(dim=1, descending=True))  # [Q, G], matches in ranked order
        for k in (1, 3):
            assert scores[f"{direction}.r{k}"] == pytest.approx(hits[:, :k].any(dim=1).float().mean().item())
        ranks = 1 + hits.int().argmax(dim=1).double()
        assert scores[f"{direction}.median_rank"] == pytest.approx(ranks.quantile(0.5).item())
        assert 0.1 < scores[f"{direction}.r1"] < 0.9, "the case must be able to fail"
    wrong = (to_image.argmax(dim=1), to_text.argmax(dim=0))
    assert not torch.equal(wrong[0], to_text.argmax(dim=1)) and not torch.equal(wrong[1], to_image.argmax(dim=0))


def test_one_patch_and_one_token_score_as_cosine():
    image, text, text_image = random_case()
    mask = torch.ones(len(text), 1, dtype=torch.bool)
    late = retrieval(image[:, None], text[:, None], text_image, text_mask=mask).values
    assert late == pytest.approx(retrieval(image, text, text_image).values)
    labels = torch.arange(40) % 20
    late = classification(image[:, None], text[:20, None], labels, text_mask=mask[:20]).values
    assert late == pytest.approx(classification(image, text[:20], labels).values)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_chunks_do_not_change_late_interaction(chunk):
    image, text, text_image, mask = token_case()
    expected = retrieval(image, text, text_image, text_mask=mask).values
    assert retrieval(image, text, text_image, chunk=chunk, text_mask=mask).values == pytest.approx(expected)
    prompt_class = torch.arange(60) % 12
    expected = classification(image, text, text_image[::2] % 12, text_mask=mask, prompt_class=prompt_class).values
    scores = classification(image, text, text_image[::2] % 12, chunk, text_mask=mask, prompt_class=prompt_class).values
    assert scores == pytest.approx(expected)


def test_padding_and_norm_of_tokens_do_not_change_the_scores():
    image, text, text_image, mask = token_case()
    expected = retrieval(image, text, text_image, text_mask=mask).values
    padded = (3 * text).masked_fill(~mask[..., None], math.nan)
    assert retrieval(image / 2, padded, text_image, text_mask=mask).values == pytest.approx(expected)


def test_nan_in_a_token_or_patch_is_rejected():
    image, text, text_image, mask = token_case()
    broken = text.clone()
    broken[[3, 8], 0, 1] = math.nan
    with pytest.raises(ValueError, match="text_features: 2 of 60 rows"):
        retrieval(image, broken, text_image, text_mask=mask)
    broken = image.clone()
    broken[4, 2, 1] = math.inf
    with pytest.raises(ValueError, match="image_features: 1 of 30 rows"):
        retrieval(broken, text, text_image, text_mask=mask)


def test_similarities_of_a_classs_prompts_are_averaged():
    east, north, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    images = torch.tensor([[east, north], [between, between]])
    # the first class has two prompts: "east" and "north"; the second one: "between"; the third one: "east north"
    prompts = torch.tensor([[east, east], [between, between], [north, north], [east, north]])
    mask = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
    prompt_class = torch.tensor([0, 1, 0, 2])
    # image → class: [(0.5 + 0.5) / 2, (0.6 + 0.8) / 2, 1] and [(0.6 + 0.8) / 2, 1, 0.8]
    for labels, expected in (([2, 1], 1.0), ([1, 0], 0.0), ([2, 2], 0.5)):
        scores = classification(images, prompts, torch.tensor(labels), text_mask=mask, prompt_class=prompt_class).values
        assert scores["top1"] == expected
    # the sum instead of the mean would put the first class ahead for the second image: 1.4
    scores = classification(images, prompts, torch.tensor([2, 0]), text_mask=mask, prompt_class=prompt_class).values
    assert scores["top1"] == 0.5


@pytest.mark.parametrize(
    ("prompt_class", "message"),
    [([0, 1, 1, 3], "prompt_class must contain each of the classes 0 … 3"), ([0, 1], "prompt_class has shape")],
)
def test_invalid_prompt_classes_are_rejected(prompt_class, message):
    image, text, _, mask = token_case()
    with pytest.raises(ValueError, match=message):
        labels = torch.zeros(30, dtype=torch.int64)
        classification(image, text[:4], labels, text_mask=mask[:4], prompt_class=torch.tensor(prompt_class))


def test_features_of_the_wrong_shape_are_rejected():
    image, text, text_image, mask = token_case()
    with pytest.raises(ValueError, match=r"image_features has shape \[30, 3, 6\]; expected \[rows, D\]"):
        retrieval(image, text, text_image)
    with pytest.raises(ValueError, match=r"image_features has shape \[30, 6\]; expected \[I, P, D\]"):
        retrieval(image[:, 0], text, text_image, text_mask=mask)
    for wrong in (text[:, 0], text[:, :4]):
        with pytest.raises(ValueError, match=r"text_mask \[60, 5\] do not match"):
            retrieval(image, wrong, text_image, text_mask=mask)


# --- similarities that are given --------------------------------------------------------------------------------------


def recalls(scores):
    """Recall at k and its intervals only."""
    return [{n: v for n, v in part.items() if ".r" in n} for part in (scores.values, scores.intervals)]


@pytest.mark.parametrize("chunk", [7, 512])
def test_similarities_of_all_pairs_give_what_their_features_give(chunk):
    image, text, text_image = random_case()
    shuffled = torch.randperm(len(text), generator=torch.Generator().manual_seed(1))
    text, text_image = text[shuffled], text_image[shuffled]
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    before = similarity.clone()
    found = retrieval_by_pairs(similarity, text_image, chunk=chunk)
    expected = retrieval(image, text, text_image)
    assert found.values == pytest.approx(recalls(expected)[0])
    assert set(found.intervals) == set(recalls(expected)[1])
    assert torch.equal(similarity, before)


def ranked_again(similarity, features, text_image, top, **settings):
    """Scores of the best `top` candidates by the features, ranked by a similarity, [I, T]."""
    texts, images = best_candidates(*features, top)
    pairs = Candidates(texts, similarity.gather(1, texts)), Candidates(images, similarity.T.gather(1, images))
    return retrieval_by_candidates(*pairs, text_image, **settings).values


def test_all_candidates_ranked_again_give_what_all_pairs_give():
    image, text, text_image = random_case()
    similarity = torch.randn(40, 120, generator=torch.Generator().manual_seed(2))
    similarity[torch.arange(40).repeat_interleave(3), torch.arange(120)] += 1.5
    similarity = (similarity * 2).round() / 2  # with ties
    found = ranked_again(similarity, (image, text), text_image, 200)
    assert found == pytest.approx(retrieval_by_pairs(similarity, text_image).values)
    assert 0.1 < found["text_to_image.r1"] < found["text_to_image.r5"] < 1


def test_candidates_ranked_again_by_hand():
    """The own image of text 2 is not among its best two by features, although it would be the best."""
    image = torch.eye(4)
    text = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [3, 2, 1, 0], [0, 1, 2, 3]])
    text_image = torch.arange(4)
    # images of the best two texts by features: text 0: images 0, 1; 1: 1, 2; 2: 0, 1 (not its own); 3: 3, 2
    better = torch.tensor([[0.1, 0.0, 0.9, 0.0], [0.2, 0.5, 0.8, 0.0], [0.9, 0.5, 1.0, 0.7], [0.9, 0.0, 0.0, 0.6]])
    found = ranked_again(better, (image, text), text_image, 2, ks=(1, 2))
    # text 0: image 1 ahead of its own; text 1: its own and image 2 tie; text 3: image 2 ahead
    assert found["text_to_image.r1"] == pytest.approx(0.5 / 4)
    assert found["text_to_image.r2"] == pytest.approx(3 / 4)


def test_too_few_candidates_for_a_recall_are_an_error():
    image, text, text_image = random_case()
    similarity = torch.randn(40, 120)
    with pytest.raises(ValueError, match="texts_of_images has 9 of 120 candidates, too few for recall at 10"):
        ranked_again(similarity, (image, text), text_image, 9)
    assert ranked_again(similarity, (image, text), text_image, 9, ks=(1, 5))


def test_similarities_that_are_no_numbers_are_an_error():
    image, text, text_image = random_case()
    similarity = torch.randn(40, 120)
    similarity[3, 4] = torch.nan
    with pytest.raises(ValueError, match="similarity: 1 of 40 rows are not finite"):
        retrieval_by_pairs(similarity, text_image)
    with pytest.raises(ValueError, match="texts_of_images: 1 of 40 rows are not finite"):
        ranked_again(similarity, (image, text), text_image, 120)
