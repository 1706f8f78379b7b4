"""The best possible recall on a benchmark with identical texts or images, which no model can tell apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import comb, fsum
from typing import Any

DIRECTIONS = ("image_to_text", "text_to_image")


def ceilings(
    texts: Sequence[Hashable], text_image: Sequence[int], images: Sequence[Hashable], ks: Iterable[int]
) -> dict[str, float]:
    """Computes the highest recalls that any model can reach in `lotlip.evaluate.metrics.retrieval`.

    Equal texts have equal similarities to every image, and equal images to every text. `retrieval` breaks ties at
    random and returns the expected value, so each of two images that share a text finds it in half of the draws. Each
    recall is maximized separately.

    The value is exact for text→image. For image→text it is exact for k = 1, and for every k if all images differ or
    each has one text. If several copies of an image have several texts each, it is an upper bound for k > 1.

    Args:
        texts: the texts or stand-ins such as hashes, equal for equal texts, [T].
        text_image: index of each text's image, [T].
        images: the images or stand-ins such as hashes, equal for equal images, [I].
        ks: ranks up to which a hit counts.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions.
    """
    queries = sorted(set(text_image))  # retrieval is among the images that have a text
    copies = Counter(images[image] for image in queries)
    repeats = Counter(texts)
    texts_of: dict[int, Counter[Hashable]] = defaultdict(Counter)  # image → text → number of its texts equal to it
    images_of: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)  # text → distinct image → number of such pairs
    for text, image in zip(texts, text_image, strict=True):
        texts_of[image][text] += 1
        images_of[text][images[image]] += 1
    groups: dict[Hashable, list[int]] = defaultdict(list)  # distinct image → its copies
    for image in queries:
        groups[images[image]].append(image)
    recalls = {}
    for k in ks:
        by_image = fsum(_image_hits([texts_of[image] for image in group], repeats, k) for group in groups.values())
        by_text = fsum(_max_hits(k, pairs, copies) for pairs in images_of.values())
        recalls[f"image_to_text.r{k}"] = by_image / len(queries)
        recalls[f"text_to_image.r{k}"] = by_text / len(texts)
    return recalls


def repeated(values: Iterable[Hashable]) -> int:
    """Counts the values that are equal to an earlier one."""
    return sum(count - 1 for count in Counter(values).values())


def repeats_in_words(protocol: Mapping[str, Any]) -> str:
    """States the numbers of repeated texts and images in a protocol.

    >>> repeats_in_words({"short_texts": 288, "repeated_short_texts": 142, "images": 288, "repeated_images": 0})
    '142 of 288 short texts that repeat another'
    """
    counts = {
        f"{kind} texts": (protocol.get(f"repeated_{kind}_texts", 0), protocol.get(f"{kind}_texts", 0))
        for kind in ("long", "short")
    }
    counts["images"] = (protocol.get("repeated_images", 0), protocol.get("images", 0))
    parts = [f"{count:,} of {number:,} {what}" for what, (count, number) in counts.items() if count]
    return f"{' and '.join(parts)} that repeat another" if parts else "no repeated text or image"


def _image_hits(group: Sequence[Mapping[Hashable, int]], repeats: Mapping[Hashable, int], k: int) -> float:
    """The maximum number of hits of the copies of one image, given each copy's texts with their counts.

    A single copy is best served by ranking one of its texts first. Several copies share one ranking of the texts.
    """
    separately = sum(max(_hit(k, count, repeats[text]) for text, count in texts.items()) for texts in group)
    if len(group) == 1:
        return separately
    combined: Counter[Hashable] = Counter()
    for texts in group:
        combined.update(texts)
    return min(separately, _max_hits(k, combined, repeats))


def _hit(k: int, matching: int, equal: int) -> float:
    """Probability that `k` random draws from `equal` equal texts include one of the `matching`."""
    return 1.0 if k > equal - matching else 1 - comb(equal - matching, k) / comb(equal, k)


def _max_hits(k: int, hits: Mapping[Hashable, int], sizes: Mapping[Hashable, int]) -> float:
    """The maximum number of hits in the first `k` ranks, if each group of equal candidates has its hits evenly."""
    total, left = 0.0, k
    for group in sorted(hits, key=lambda group: hits[group] / sizes[group], reverse=True):
        places = min(left, sizes[group])
        total += hits[group] * places / sizes[group]
        left -= places
        if not left:
            break
    return total
