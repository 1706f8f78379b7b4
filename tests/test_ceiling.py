"""The ceiling of recall, compared with the best score over all rankings."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lotlip.evaluate.benchmarks import Benchmark, ImageTexts
from lotlip.evaluate.ceiling import ceilings, repeated
from lotlip.evaluate.evaluate import evaluate, limits
from lotlip.evaluate.metrics import Compare, _outcomes, _rank_both_directions

KS = (1, 2, 3, 5)


def weak_orders(items: int):
    """Every ranking of the items, including ties, as a level for each item."""
    for levels in itertools.product(range(items), repeat=items):
        if set(levels) == set(range(max(levels) + 1)):
            yield levels


def scores(similarity: torch.Tensor, owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hits of each query by the metric's own code; similarity is [I, T]."""

    def compare(rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return similarity[rows, columns].clone(), similarity[rows, columns].clone()

    checked: Compare = compare
    by_image, by_text = _rank_both_directions(checked, owner, 512)
    return {
        f"{direction}.r{k}": hits
        for direction, places in (("image_to_text", by_image), ("text_to_image", by_text))
        for k in KS
        for hits in [_outcomes(places, KS)[f"r{k}"]]
    }


def brute_force(texts: list[int], owner: list[int], images: list[int]) -> dict[str, float]:
    """The best score of all rankings; each distinct image or text can be ranked independently."""
    text_kinds, image_kinds = sorted(set(texts)), sorted(set(images))
    best = dict.fromkeys((f"{direction}.r{k}" for direction in ("image_to_text", "text_to_image") for k in KS), 0.0)
    owners = torch.tensor(owner)
    for kind in image_kinds:  # images → texts: rankings of the distinct texts
        rows = torch.tensor([image == kind for image in images])
        best_hits = dict.fromkeys(KS, 0.0)
        for levels in weak_orders(len(text_kinds)):
            row = torch.tensor([float(levels[text_kinds.index(text)]) for text in texts])
            hits = scores(row.expand(len(images), -1), owners)
            best_hits = {k: max(best_hits[k], float(hits[f"image_to_text.r{k}"][rows].sum())) for k in KS}
        for k in KS:
            best[f"image_to_text.r{k}"] += best_hits[k] / len(images)
    for kind in text_kinds:
        columns = torch.tensor([text == kind for text in texts])
        best_hits = dict.fromkeys(KS, 0.0)
        for levels in weak_orders(len(image_kinds)):
            column = torch.tensor([float(levels[image_kinds.index(image)]) for image in images])
            hits = scores(column[:, None].expand(-1, len(texts)), owners)
            best_hits = {k: max(best_hits[k], float(hits[f"text_to_image.r{k}"][columns].sum())) for k in KS}
        for k in KS:
            best[f"text_to_image.r{k}"] += best_hits[k] / len(texts)
    return best


@st.composite
def small_benchmarks(draw):
    """Up to five texts of up to four images, of few distinct kinds. Texts of an image are adjacent."""
    images = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    extra = draw(st.lists(st.integers(0, len(images) - 1), max_size=5 - len(images)))
    owner = sorted([*range(len(images)), *extra])
    texts = draw(st.lists(st.integers(0, 2), min_size=len(owner), max_size=len(owner)))
    return texts, owner, images


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(small_benchmarks())
def test_the_ceiling_is_the_best_score_of_all_orders(benchmark):
    texts, owner, images = benchmark
    best, ceiling = brute_force(texts, owner, images), ceilings(texts, owner, images, KS)
    exact_everywhere = len(set(images)) == len(images) or len(owner) == len(images)
    for metric, value in ceiling.items():
        if metric.endswith(".r1") or metric.startswith("text_to_image") or exact_everywhere:
            assert value == pytest.approx(best[metric])
        else:
            assert value >= best[metric] - 1e-9


def test_the_ceiling_is_one_without_repeats():
    assert set(ceilings("abcde", [0, 1, 2, 2, 0], "xyz", KS).values()) == {1.0}


def test_repeated_captions_lower_the_ceiling_to_the_distinct_fraction():
    texts = [number % 146 for number in range(288)]
    ceiling = ceilings(texts, range(288), range(288), (1, 5))
    assert ceiling["image_to_text.r1"] == ceiling["text_to_image.r1"] == pytest.approx(146 / 288)
    assert ceiling["image_to_text.r5"] == ceiling["text_to_image.r5"] == 1
    assert repeated(texts) == 142


class PerfectEncoder:
    """Texts and images of one colour have the same feature."""

    colours = ("red", "green", "blue")

    def texts(self, texts):
        return torch.stack([torch.eye(3)[self.colours.index(text)] for text in texts]), None


def test_a_perfect_encoder_reaches_the_ceiling():
    content = [b"1", b"2", b"3", b"3", b"4"]
    names = ["red", "red", "green", "green", "blue"]
    benchmark = Benchmark(
        "toy", [str(n) for n in range(5)], content.__getitem__, {"short": ImageTexts(names, [0, 1, 2, 3, 4])}
    )
    images = torch.stack([torch.eye(3)[PerfectEncoder.colours.index(name)] for name in names])
    limit, repeats = limits(benchmark)
    assert limit["short.text_to_image.r1"] == limit["short.image_to_text.r1"] == pytest.approx(3 / 5)
    assert repeats == {"repeated_short_texts": 2, "repeated_images": 1}
    scores = evaluate(PerfectEncoder(), benchmark, images).values  # type: ignore[arg-type]
    assert {metric: scores[metric] for metric in limit} == pytest.approx(limit)
