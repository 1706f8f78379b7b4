"""Token ids of a tar's texts, in a file beside it, so that training neither parses nor tokenizes them.

`train-000000.token-ids.arrow` has a row for each sample: the short caption, then each captioner's, as lists of
sub-captions, as lists of token ids. Each sub-caption's ids end in [SEP], so that those of sub-captions that follow one
another are a text. The file is mapped into memory. It names the tokenizer, and no other tokenizer uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers.normalizers import BertNormalizer

from lotlip.core.files import remove
from lotlip.data.plain_tokenizer import tokenizer_family
from lotlip.data.tars import IDS, TarSamples, is_sidecar, read_sidecar, write_sidecar
from lotlip.data.text import SentenceEnds, as_sentence_ends, join_sub_captions, sample_texts, split_sub_captions
from lotlip.data.tokenizer import TextTokenizer, used_tokens, word_pieces

COLUMN = "token_ids"
_COMPARED = 32  # samples of a tar


def token_ids_path(tar: Path) -> Path:
    """Where the token ids of a tar's texts are, or would be."""
    return tar.with_suffix(IDS)


class TokenIds:
    """The texts of a tar by the number of the sample in it; sub-captions are numbered through the tar.

    Attributes:
        ids: of all sub-captions in a row, with [SEP] after each.
        ends: where each sub-caption begins in `ids`, and where the last one ends.
        bounds: likewise of captions in the row of sub-captions: each sample's short caption, then the captioners'.
        captioners: names, in the order of the captions.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        captions = batch.column(COLUMN).values
        self.bounds = captions.offsets.to_numpy()
        self.ends = captions.values.offsets.to_numpy()
        self.ids = captions.values.values.to_numpy()
        self._metadata = batch.schema.metadata
        self.captioners: list[str] = json.loads(self._metadata[b"captioners"])
        self._samples = len(batch)

    def __len__(self) -> int:
        return self._samples

    @property
    def words_hash(self) -> str:
        """Of the tokenizer (`TextTokenizer.words_hash`)."""
        return self._metadata[b"tokenizer"].decode()

    @property
    def sentence_ends(self) -> SentenceEnds:
        """What splits the short captions."""
        return as_sentence_ends(self._metadata[b"sentence_ends"].decode(), "token ids")

    @property
    def vocabulary(self) -> list[int]:
        """The ids that occur, sorted."""
        return json.loads(self._metadata[b"vocabulary"])

    def intact(self) -> bool:
        """Whether the arrays are those that were written; reads all of them."""
        return self._metadata[b"sha256"].decode() == _sha256(self.bounds, self.ends, self.ids)

    def captions(self, row: int) -> tuple[range, dict[str, range]]:
        """Numbers of the sub-captions of a sample's short caption, and of its long captions by captioner."""
        first = row * (1 + len(self.captioners))
        bounds = self.bounds[first : first + 2 + len(self.captioners)].tolist()
        short, *long = (range(start, stop) for start, stop in pairwise(bounds))
        return short, dict(zip(self.captioners, long, strict=True))

    def words(self, sub_captions: Sequence[int]) -> np.ndarray:
        """The ids of a text that is made of some sub-captions, as `TextTokenizer.encode_words` takes them."""
        return np.concatenate([self.ids[self.ends[number] : self.ends[number + 1]] for number in sub_captions])


def read_token_ids(tar: TarSamples, words_hash: str | None = None) -> TokenIds | None:
    """The token ids of a tar's texts; None where there is no such file, or it is another tokenizer's.

    Args:
        tar: whose texts they are.
        words_hash: of the tokenizer (`TextTokenizer.words_hash`); None: any.

    Raises:
        ValueError: the file is damaged, or of another tar.
    """
    path = token_ids_path(tar.path)
    if not path.is_file():
        return None
    batch = read_sidecar(path, tar.path, tar.size, "a file with the token ids of a tar")
    try:
        found = TokenIds(batch)
        foreign = words_hash not in (None, found.words_hash)
        whole = len(found.bounds) == len(found) * (1 + len(found.captioners)) + 1
        stale = batch.schema.metadata[b"layout"].decode() != tar.layout()
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not a file with the token ids of a tar ({error}); remove it") from error
    if stale or not whole or len(found) != len(tar):
        raise ValueError(f"{path} is stale: {tar.path.name} has other samples; remove it, or rerun the shard stage")
    return None if foreign else found


def write_token_ids(tar: Path, tokenizer: str, sentence_ends: SentenceEnds = "released") -> Path | None:
    """Writes the token ids of a tar's texts beside it, unless they are there.

    Sub-captions are encoded one by one. That stands for the texts made of them only if it gives the ids of these texts,
    so it is compared with the ids of all sub-captions of a sample together: of some samples, or of all where the word
    pieces' normaliser may look at several characters. Where ids differ, no file is written and training tokenizes by
    itself; so it does where something that a captioner's list has as one sub-caption is several, and for tokenizers of
    CLIP and SigLIP, which do not mark the ends of sub-captions.

    Args:
        tar: samples as `lotlip.data.tars` reads them.
        tokenizer: name of the word pieces.
        sentence_ends: what ends a sentence.

    Returns:
        The file; None if there is none.

    Raises:
        ValueError: the tar is broken, or a sample's text is missing, is not text or has no words.
    """
    if tokenizer_family(tokenizer) != "bert":
        return None  # ids of a text of CLIP are not those of its sub-captions, one after another
    path, words = token_ids_path(tar), _uncut(tokenizer, sentence_ends)
    samples = TarSamples(tar)
    with suppress(ValueError):  # a damaged or stale one is written again
        if read_token_ids(samples, words.words_hash) is not None:
            return path
    remove(path, ours=is_sidecar)
    texts = list(_texts(samples, sentence_ends))
    captioners = sorted({name for _, long in texts for name in long})
    captions = [parts for short, long in texts for parts in (short, *(long.get(name, []) for name in captioners))]
    each = 1 + len(captioners)
    joined = [list(chain.from_iterable(captions[first : first + each])) for first in range(0, len(captions), each)]
    if any(len(split_sub_captions(join_sub_captions(parts), sentence_ends)) > len(parts) for parts in joined):
        return None
    rows = [row[1:] for row in words.encode([part for parts in joined for part in parts])]  # without [CLS]
    bounds, ends = _ends(captions), _ends(rows)
    kind = np.uint16 if words.vocabulary_size <= 2**16 else np.uint32
    ids = np.fromiter(chain.from_iterable(rows), kind, count=ends[-1])
    plain = isinstance(word_pieces(tokenizer).normalizer, BertNormalizer | None)
    some = range(0, len(joined), max(len(joined) // _COMPARED, 1) if plain else 1)
    starts = ends[bounds[::each]]
    if any(
        ids[starts[number] : starts[number + 1]].tolist() != row[1:]
        for number, row in zip(some, words.encode([joined[number] for number in some]), strict=True)
    ):
        return None
    column = pa.FixedSizeListArray.from_arrays(
        pa.ListArray.from_arrays(bounds, pa.ListArray.from_arrays(ends, ids)), each
    )
    return write_sidecar(
        path,
        tar,
        pa.record_batch({COLUMN: column}),
        layout=samples.layout(),
        tokenizer=words.words_hash,
        sentence_ends=sentence_ends,
        captioners=json.dumps(captioners, ensure_ascii=False, allow_nan=False),
        vocabulary=json.dumps(np.unique(ids).tolist(), allow_nan=False),
        sha256=_sha256(bounds, ends, ids),
    )


def vocabulary(tars: Iterable[Path], tokenizer: str, sentence_ends: SentenceEnds = "released") -> list[int]:
    """Ids of the word pieces in the texts of some tars, sorted.

    Evaluation texts should be made of them, and training needs the embeddings of no others (`lotlip.pretrain`).

    Args:
        tars: samples as `lotlip.data.tars` reads them; the texts of those without a file of token ids are tokenized.
        tokenizer: name of the word pieces.
        sentence_ends: what ends a sentence.

    Raises:
        ValueError: a tar or its file is damaged.
    """
    words = _uncut(tokenizer, sentence_ends) if tokenizer_family(tokenizer) == "bert" else None
    used = set[int]()
    for path in tars:
        tar = TarSamples(path)
        if words and (found := read_token_ids(tar, words.words_hash)):
            used.update(found.vocabulary)
        else:
            captions = (caption for short, long in _texts(tar, sentence_ends) for caption in (short, *long.values()))
            used |= used_tokens(tokenizer, map(join_sub_captions, captions), sentence_ends)
    return sorted(used - {words.sep_id} if words else used)


def _texts(tar: TarSamples, sentence_ends: SentenceEnds) -> Iterator[tuple[list[str], dict[str, list[str]]]]:
    """Each sample's sub-captions: of its short caption, and of its long ones by captioner."""
    for row in range(len(tar)):
        raw = tar.read(row, ["json"])
        yield sample_texts(raw["json"], f"sample {raw['__key__']} in {tar.path}", sentence_ends)


@lru_cache(maxsize=2)
def _uncut(tokenizer: str, sentence_ends: SentenceEnds) -> TextTokenizer:
    """A tokenizer that cuts no text; a stage has one for all its tars."""
    return TextTokenizer(tokenizer, 2**30, sentence_ends=sentence_ends)


def forget_word_pieces() -> None:
    """Lets the next call read tokenizers again, whose files may have changed."""
    word_pieces.cache_clear()
    _uncut.cache_clear()


def _ends(rows: Sequence[Sequence[object]]) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)], dtype=np.int32)


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()
