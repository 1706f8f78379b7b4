"""Properties of sub-captions and windows of them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotlip.data.text import draw_caption, join_sub_captions, sample_long_text, split_sub_captions

# Sub-captions are stripped, not empty and without sentence ends.
sub_caption = st.text(min_size=1).map(
    lambda text: text.replace(".", "").replace("\n", "").replace("</s>", "").strip()
).filter(lambda text: text and "</s>" not in text)  # fmt: skip
seeds = st.integers(0, 2**32)


def numbered(lengths: dict[str, int]) -> dict[str, list[str]]:
    """Captions whose sub-captions name their captioner and number."""
    return {name: [f"{name} {number}" for number in range(length)] for name, length in lengths.items()}


captions = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 6), min_size=1).filter(
    lambda lengths: sum(lengths.values()) > 0
).map(numbered)  # fmt: skip


def test_sentences_end_at_full_stop_newline_and_end_token():
    assert split_sub_captions(" A dog. It runs\nfast</s>home..\n") == ["A dog", "It runs", "fast", "home"]
    assert split_sub_captions(" .\n</s>") == []
    assert split_sub_captions("Really? Yes! 3,5") == ["Really? Yes! 3,5"]


@given(st.lists(sub_caption))
def test_split_undoes_join(sub_captions):
    assert split_sub_captions(join_sub_captions(sub_captions)) == sub_captions


@given(st.text())
def test_split_gives_stripped_parts_of_the_text_in_order(text):
    parts = split_sub_captions(text)
    place = 0
    for part in parts:
        assert part == part.strip() != ""
        assert not {".", "\n"} & set(part)
        place = text.index(part, place) + len(part)
    assert split_sub_captions(join_sub_captions(parts)) == parts


@pytest.mark.slow
@given(captions, st.integers(1, 8), seeds)
def test_a_window_is_inside_one_caption(captions, length, seed):
    window = sample_long_text(captions, "window", length, random.Random(seed))
    (author,) = {part.split()[0] for part in window}
    caption = captions[author]
    assert len(window) == min(length, len(caption))
    start = caption.index(window[0])
    assert window == caption[start : start + len(window)]


@given(captions, st.integers(1, 30), seeds)
def test_a_window_across_captions_is_consecutive_in_their_concatenation(captions, length, seed):
    window = sample_long_text(captions, "window", length, random.Random(seed), "across-captions")
    row = [part for name in sorted(captions) for part in captions[name]]
    assert len(window) == min(length, len(row))
    start = row.index(window[0])
    assert window == row[start : start + len(window)]


@given(captions, st.integers(1, 8), seeds, st.sampled_from(["within-caption", "across-captions"]))
def test_the_order_of_captioners_does_not_matter(captions, length, seed, window):
    backwards = dict(reversed(captions.items()))
    first = sample_long_text(captions, "window", length, random.Random(seed), window)
    assert sample_long_text(backwards, "window", length, random.Random(seed), window) == first


@pytest.mark.parametrize("window", ["within-caption", "across-captions"])
def test_every_start_of_a_window_is_about_equally_frequent(window):
    captions = numbered({"a": 5, "b": 0, "c": 5})
    rng = random.Random(0)
    starts = Counter(sample_long_text(captions, "window", 3, rng, window)[0] for _ in range(4000))
    if window == "within-caption":
        expected = {f"{name} {number}" for name in "ac" for number in range(3)}
    else:
        expected = {f"a {number}" for number in range(5)} | {f"c {number}" for number in range(3)}
    assert set(starts) == expected
    assert min(starts.values()) > 0.8 * 4000 / len(expected)


def test_captioners_are_equally_frequent_whatever_their_length():
    rng = random.Random(0)
    authors = Counter(
        sample_long_text(numbered({"a": 1, "b": 50}), "window", 1, rng)[0].split()[0] for _ in range(2000)
    )
    assert 850 < authors["a"] < 1150


@pytest.mark.parametrize("window", ["within-caption", "across-captions"])
@pytest.mark.parametrize("captions", [{}, {"a": []}, {"a": [], "b": []}])
def test_no_captions_are_an_error(captions, window):
    with pytest.raises(ValueError, match="no captioner wrote anything"):
        sample_long_text(captions, "window", 1, random.Random(0), window)


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_window_is_an_error(length):
    with pytest.raises(ValueError, match=f"at least 1 sub-caption, not {length}"):
        sample_long_text({"a": ["x"]}, "window", length, random.Random(0))


SENTENCES = [f"s{number}" for number in range(1, 6)]


def test_all_is_the_full_caption_of_one_captioner():
    captions = {"a": ["a1", "a2"], "b": SENTENCES}
    samples = {tuple(sample_long_text(captions, "all", 1, random.Random(seed))) for seed in range(50)}
    assert samples == {("a1", "a2"), tuple(SENTENCES)}


def test_first_is_a_prefix_of_uniformly_random_length():
    samples = [sample_long_text({"a": SENTENCES}, "first", 1, random.Random(seed)) for seed in range(2000)]
    assert all(text == SENTENCES[: len(text)] for text in samples)
    lengths = Counter(map(len, samples))
    assert lengths.keys() == {1, 2, 3, 4, 5}
    assert min(lengths.values()) > 300


def test_without_first_drops_the_first_and_shuffles_the_others():
    samples = [sample_long_text({"a": SENTENCES}, "without-first", 1, random.Random(seed)) for seed in range(2000)]
    assert all(set(text) <= set(SENTENCES[1:]) and len(set(text)) == len(text) for text in samples)
    lengths = Counter(map(len, samples))
    assert lengths.keys() == {1, 2, 3, 4}
    assert min(lengths.values()) > 400
    assert any(text != sorted(text) for text in samples)
    assert sample_long_text({"a": ["only"]}, "without-first", 1, random.Random(0)) == ["only"]


def test_merged_sub_captions_are_neighbours_half_of_the_time():
    samples = [sample_long_text({"a": SENTENCES}, "merged", 3, random.Random(seed)) for seed in range(3000)]
    assert all(set(text) <= set(SENTENCES) and len(set(text)) == len(text) for text in samples)
    lengths = Counter(map(len, samples))
    assert lengths.keys() == {1, 2, 3}
    assert min(lengths.values()) > 900
    pairs = [text for text in samples if len(text) == 2]
    neighbours = sum(SENTENCES.index(first) + 1 == SENTENCES.index(second) for first, second in pairs) / len(pairs)
    assert neighbours == pytest.approx(0.5 + 0.5 * 4 / 20, abs=0.05)  # 4 of 20 ordered pairs are neighbours
    short = [sample_long_text({"a": ["only"]}, "merged", 3, random.Random(seed)) for seed in range(20)]
    assert short == [["only"]] * 20


@pytest.mark.parametrize(("sampler", "expected"), [("summary", ["s1"]), ("details", ["s2", "s3", "s4", "s5"])])
def test_summary_is_the_first_and_details_are_the_others_in_order(sampler, expected):
    assert sample_long_text({"a": SENTENCES}, sampler, 1, random.Random(0)) == expected
    assert sample_long_text({"a": ["only"]}, sampler, 1, random.Random(0)) == ["only"]


def test_a_subset_may_contain_the_first_and_is_shuffled():
    samples = [sample_long_text({"a": SENTENCES}, "subset", 1, random.Random(seed)) for seed in range(2000)]
    assert Counter(map(len, samples)).keys() == {1, 2, 3, 4, 5}
    assert all(len(set(text)) == len(text) for text in samples)
    assert 1000 < sum("s1" in text for text in samples) < 1400  # 3 of 5 on average
    assert any(text != sorted(text) for text in samples)


@given(captions, seeds, st.sampled_from(["all", "first", "without-first", "summary", "details", "subset"]))
def test_the_first_draw_is_that_of_the_caption(captions, seed, sampler):
    caption = draw_caption(captions, random.Random(seed))
    assert set(sample_long_text(captions, sampler, 1, random.Random(seed))) <= set(caption)
