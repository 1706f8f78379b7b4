"""Do more true sentences raise the similarity, and how much does retrieval depend on the order of sentences?

HiMo@K is of HiMo-CLIP (arXiv 2511.06653). Swapped and deleted sentences are the robustness test of DeBias-CLIP (arXiv
2602.22419). Both work on the long texts of any benchmark. All scores are over the same texts: those with at least
`SENTENCES` sentences, or the first of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lotlip.data.text import SENTENCE_ENDS
from lotlip.evaluate.benchmarks import ImageTexts
from lotlip.evaluate.encoders import Encoder
from lotlip.evaluate.metrics import TOLERANCE, Scores, comparison, retrieval, summary
from lotlip.evaluate.score_names import SENTENCES

GROWING, CORRELATED = (2, 3), (SENTENCES,)  # values of K; HiMo@K is a share or a correlation
_CHUNK = 512  # texts whose prefixes are encoded together
_END = re.compile(SENTENCE_ENDS["unicode"])  # the same for all models, so that they are asked the same


def sentence_scores(
    encoder: Encoder, texts: ImageTexts, images: Tensor, whole: Scores | None = None, most: int | None = None
) -> Scores:
    """Computes HiMo@K, and R@1 with unchanged texts, with two swapped sentences, and without the first sentence.

    Args:
        encoder: the model.
        texts: the long texts of a benchmark.
        images: the encoder's features of the benchmark's images, [I, D] or [I, P, D].
        whole: the retrieval scores of all `texts`, which are those of the unchanged texts if all texts count; None:
            they are computed.
        most: maximum number of texts, see `counted_texts`.

    Returns:
        `prefixes.himo<K>`, see `himo`; `unchanged`, `swapped` and `deleted`, each with `.image_to_text.r1` and
        `.text_to_image.r1`. Retrieval is among the texts that count and their images. Empty if fewer than two texts
        count.
    """
    counted = counted_texts(texts, most)
    if len(counted.texts) < 2:
        return Scores()
    with_text, image = torch.tensor(counted.image).unique(return_inverse=True)
    images = images[with_text]
    scores = summary(_himo_by_text(encoder, counted.texts, images[image]), image).under("prefixes")
    for name, change in CHANGES.items():
        if whole and name == UNCHANGED and len(counted.texts) == len(texts.texts):
            found = whole
        else:
            features, mask = encoder.texts([change(text) for text in counted.texts])
            found = retrieval(images, features, image, (1,), text_mask=mask)
        r1 = [metric for metric in found.values if metric.endswith(".r1")]
        scores |= Scores({m: found.values[m] for m in r1}, {m: found.intervals[m] for m in r1}).under(name)
    return scores


def counted_texts(texts: ImageTexts, most: int | None = None) -> ImageTexts:
    """Selects the texts with at least `SENTENCES` sentences; the first `most` of them, or all."""
    long = [number for number, text in enumerate(texts.texts) if len(_sentences(text)) >= SENTENCES][:most]
    return ImageTexts([texts.texts[number] for number in long], [texts.image[number] for number in long])


def asked_texts(texts: ImageTexts, most: int | None = None) -> set[str]:
    """Returns all texts that `sentence_scores` encodes."""
    counted = counted_texts(texts, most).texts
    if len(counted) < 2:
        return set()
    changed = {change(text) for change in CHANGES.values() for text in counted}
    return changed | {cut for text in counted for number in (*GROWING, *CORRELATED) for cut in prefixes(text, number)}


def himo(similarities: Tensor) -> Tensor:
    """Scores growing prefixes: HiMo@K for K = 2 and 3, and its generalization for larger K.

    Args:
        similarities: similarity of each image and its K prefixes, from the shortest to the whole text, [T, K].

    Returns:
        [T]. For K ≤ 3, 1 if each similarity exceeds the one before, else 0. For larger K, Pearson's correlation of
        the number of the prefix and its similarity, −1 … 1; 0 if all similarities are equal.
    """
    number = similarities.shape[1]
    if number <= max(GROWING):
        return (similarities.diff(dim=1) > TOLERANCE).all(dim=1).double()
    similarities = similarities.double()
    constant = similarities.amax(dim=1) - similarities.amin(dim=1) <= TOLERANCE
    places = torch.arange(number, dtype=torch.float64) - (number - 1) / 2
    centred = similarities - similarities.mean(dim=1, keepdim=True)
    correlation = (centred @ places) / (centred.norm(dim=1) * places.norm())
    return correlation.masked_fill(constant, 0)


def prefixes(text: str, number: int) -> list[str]:
    """Returns growing prefixes of a text; prefix k has k/`number` of its n sentences, rounded down.

    >>> prefixes("A dog. It runs. It is wet.", 2)
    ['A dog.', 'A dog. It runs. It is wet.']

    Args:
        text: a text with at least `number` sentences.
        number: number of prefixes, K; the last is the whole text.
    """
    sentences = _sentences(text)
    ends = [k * len(sentences) // number for k in range(1, number)]
    return [*(text[: sentences[end][0]].rstrip() for end in ends), text]


def swap_sentences(text: str, one: int = 0, other: int = SENTENCES - 1) -> str:
    """Swaps two sentences, by their numbers from 0; punctuation and spaces keep their places.

    >>> swap_sentences("A dog! It runs. It is wet. It barks.")
    'It barks! It runs. It is wet. A dog.'
    """
    sentences = _sentences(text)
    (start, end), (other_start, other_end) = sentences[one], sentences[other]
    between = text[end:other_start]
    return text[:start] + text[other_start:other_end] + between + text[start:end] + text[other_end:]


def delete_first_sentence(text: str) -> str:
    """Deletes the first of several sentences.

    >>> delete_first_sentence("A dog. It runs. It is wet.")
    'It runs. It is wet.'
    """
    return text[_sentences(text)[1][0] :]


@lru_cache(maxsize=2**14)  # each text is split several times for each model
def _sentences(text: str) -> tuple[tuple[int, int], ...]:
    """Start and end of each sentence, as `split_sub_captions` splits it: without its end and spaces around it."""
    starts, ends = [0], []
    for match in _END.finditer(text):
        ends.append(match.start())
        starts.append(match.end())
    stripped = []
    for start, end in zip(starts, [*ends, len(text)], strict=True):
        words = text[start:end].strip()
        if words:
            first = text.index(words, start)
            stripped.append((first, first + len(words)))
    return tuple(stripped)


def _himo_by_text(encoder: Encoder, texts: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """The outcome of each text, [T], by `himo<K>`; `images` has the image of each text."""
    similarities: dict[int, list[Tensor]] = {number: [] for number in (*GROWING, *CORRELATED)}
    for top in range(0, len(texts), _CHUNK):
        cuts = [{number: prefixes(text, number) for number in similarities} for text in texts[top : top + _CHUNK]]
        distinct = [list(dict.fromkeys(prefix for cut in by_k.values() for prefix in cut)) for by_k in cuts]
        features, mask = encoder.texts([prefix for own in distinct for prefix in own])
        compare = comparison(images[top : top + _CHUNK], features, mask, "text_features")
        start = 0
        for row, (by_k, own) in enumerate(zip(cuts, distinct, strict=True)):
            similarity = compare(slice(row, row + 1), slice(start, start + len(own)))[0][0].cpu()
            start += len(own)
            for number, cut in by_k.items():
                similarities[number].append(similarity[[own.index(prefix) for prefix in cut]])
    return {f"himo{number}": himo(torch.stack(rows)) for number, rows in similarities.items()}


UNCHANGED = "unchanged"
# Prefix of score names → the change to a text.
CHANGES: dict[str, Callable[[str], str]] = {
    UNCHANGED: lambda text: text,
    "swapped": swap_sentences,
    "deleted": delete_first_sentence,
}
