"""The best recall that a benchmark allows: identical texts and identical images cannot be told apart by any model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import comb, fsum
from typing import Any

DIRECTIONS = ("image_to_text", "text_to_image")


def ceilings(
    texts: Sequence[Hashable], text_image: Sequence[int], images: Sequence[Hashable], ks: Iterable[int]
) -> dict[str, float]:
    """The highest recalls that `lotlip.evaluate.metrics.retrieval` can give on a benchmark, whatever the model.

    Equal texts have equal similarities to every image, and equal images to every text. `retrieval` orders equal
    similarities by a fair draw and scores the expected value, so a text that two images share is found by half of
    each. Each recall is maximized alone.

    The value is exact for text→image. For image→text it is exact for k = 1, and for every k where all images differ or
    each has one text; where several copies of an image have several texts each, it is an upper bound for k > 1.

    Args:
        texts: the texts, or what stands for them; equal where the texts are equal, [T].
        text_image: index of each text's image, [T].
        images: what stands for each image, such as a hash of its bytes; equal where the images are equal, [I].
        ks: the ranks up to which a hit counts.

    Returns:
        `image_to_text.r<k>` and `text_to_image.r<k>` as fractions.
    """
    asked = sorted(set(text_image))  # retrieval is among the images that have a text
    copies = Counter(images[image] for image in asked)
    repeats = Counter(texts)
    own: dict[int, Counter[Hashable]] = defaultdict(Counter)  # image → text → how many of its texts are that text
    owners: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)  # text → distinct image → texts with that pair
    for text, image in zip(texts, text_image, strict=True):
        own[image][text] += 1
        owners[text][images[image]] += 1
    groups: dict[Hashable, list[int]] = defaultdict(list)  # distinct image → its copies
    for image in asked:
        groups[images[image]].append(image)
    found = {}
    for k in ks:
        by_image = fsum(_image_hits([own[image] for image in group], repeats, k) for group in groups.values())
        by_text = fsum(_filled(k, pairs, copies) for pairs in owners.values())
        found[f"image_to_text.r{k}"] = by_image / len(asked)
        found[f"text_to_image.r{k}"] = by_text / len(texts)
    return found


def repeated(values: Iterable[Hashable]) -> int:
    """How many of the values are equal to an earlier one."""
    return sum(count - 1 for count in Counter(values).values())


def repeats_in_words(protocol: Mapping[str, Any]) -> str:
    """The counts of repeated texts and images in a protocol, as a phrase.

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
    """The most hits that copies of one image can have, given how many texts of each kind every copy has.

    One copy does best with one of its texts in front of all others. Several copies share one order of the texts.
    """
    alone = sum(max(_hit(k, count, repeats[text]) for text, count in own.items()) for own in group)
    if len(group) == 1:
        return alone
    together: Counter[Hashable] = Counter()
    for own in group:
        together.update(own)
    return min(alone, _filled(k, together, repeats))


def _hit(k: int, own: int, equal: int) -> float:
    """Chance that a fair draw of `k` of `equal` equal texts has one of the `own`."""
    return 1.0 if k > equal - own else 1 - comb(equal - own, k) / comb(equal, k)


def _filled(k: int, hits: Mapping[Hashable, int], sizes: Mapping[Hashable, int]) -> float:
    """The most hits in `k` places, where a group of `sizes` equal candidates has `hits`, spread evenly over it."""
    total, left = 0.0, k
    for group in sorted(hits, key=lambda group: hits[group] / sizes[group], reverse=True):
        places = min(left, sizes[group])
        total += hits[group] * places / sizes[group]
        left -= places
        if not left:
            break
    return total
