"""The ceiling of recall, against every order that a model could give, scored by the metric itself."""

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
    """Every way in which items can be ranked, ties included, as a level for each item."""
    for levels in itertools.product(range(items), repeat=items):
        if set(levels) == set(range(max(levels) + 1)):
            yield levels


def scores(similarity: torch.Tensor, owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hits of each query, by the code that scores models; similarity is [I, T]."""

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
    """The best of all orders: rows of distinct images, and columns of distinct texts, can be chosen one by one."""
    text_kinds, image_kinds = sorted(set(texts)), sorted(set(images))
    best = dict.fromkeys((f"{way}.r{k}" for way in ("image_to_text", "text_to_image") for k in KS), 0.0)
    owners = torch.tensor(owner)
    for kind in image_kinds:  # images → texts: the order of distinct texts that this image sees
        rows = torch.tensor([image == kind for image in images])
        most = dict.fromkeys(KS, 0.0)
        for levels in weak_orders(len(text_kinds)):
            row = torch.tensor([float(levels[text_kinds.index(text)]) for text in texts])
            found = scores(row.expand(len(images), -1), owners)
            most = {k: max(most[k], float(found[f"image_to_text.r{k}"][rows].sum())) for k in KS}
        for k in KS:
            best[f"image_to_text.r{k}"] += most[k] / len(images)
    for kind in text_kinds:
        columns = torch.tensor([text == kind for text in texts])
        most = dict.fromkeys(KS, 0.0)
        for levels in weak_orders(len(image_kinds)):
            column = torch.tensor([float(levels[image_kinds.index(image)]) for image in images])
            found = scores(column[:, None].expand(-1, len(texts)), owners)
            most = {k: max(most[k], float(found[f"text_to_image.r{k}"][columns].sum())) for k in KS}
        for k in KS:
            best[f"text_to_image.r{k}"] += most[k] / len(texts)
    return best


@st.composite
def small_benchmarks(draw):
    """Up to five texts of up to four images, texts and images of few kinds; texts of an image side by side."""
    images = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    extra = draw(st.lists(st.integers(0, len(images) - 1), max_size=5 - len(images)))
    owner = sorted([*range(len(images)), *extra])
    texts = draw(st.lists(st.integers(0, 2), min_size=len(owner), max_size=len(owner)))
    return texts, owner, images


@settings(max_examples=40, deadline=None)
@given(small_benchmarks())
def test_the_ceiling_is_the_best_that_any_order_scores(benchmark):
    texts, owner, images = benchmark
    best, found = brute_force(texts, owner, images), ceilings(texts, owner, images, KS)
    exact_everywhere = len(set(images)) == len(images) or len(owner) == len(images)
    for metric, value in found.items():
        if metric.endswith(".r1") or metric.startswith("text_to_image") or exact_everywhere:
            assert value == pytest.approx(best[metric])
        else:
            assert value >= best[metric] - 1e-9


def test_the_ceiling_is_one_where_nothing_is_repeated():
    assert set(ceilings("abcde", [0, 1, 2, 2, 0], "xyz", KS).values()) == {1.0}


def test_shared_captions_lower_the_ceiling_by_the_share_of_distinct_ones():
    texts = [number % 146 for number in range(288)]
    found = ceilings(texts, range(288), range(288), (1, 5))
    assert found["image_to_text.r1"] == found["text_to_image.r1"] == pytest.approx(146 / 288)
    assert found["image_to_text.r5"] == found["text_to_image.r5"] == 1
    assert repeated(texts) == 142


class Knowing:
    """A model that understands: texts and images of one colour have one feature."""

    colours = ("red", "green", "blue")

    def texts(self, texts):
        return torch.stack([torch.eye(3)[self.colours.index(text)] for text in texts]), None


def test_a_model_that_understands_reaches_the_ceiling_and_it_is_told_with_the_repeats():
    content = [b"1", b"2", b"3", b"3", b"4"]
    names = ["red", "red", "green", "green", "blue"]
    asked = Benchmark(
        "toy", [str(n) for n in range(5)], content.__getitem__, {"short": ImageTexts(names, [0, 1, 2, 3, 4])}
    )
    images = torch.stack([torch.eye(3)[Knowing.colours.index(name)] for name in names])
    limit, repeats = limits(asked)
    assert limit["short.text_to_image.r1"] == limit["short.image_to_text.r1"] == pytest.approx(3 / 5)
    assert repeats == {"repeated_short_texts": 2, "repeated_images": 1}
    scored = evaluate(Knowing(), asked, images).values  # type: ignore[arg-type]
    assert {metric: scored[metric] for metric in limit} == pytest.approx(limit)
