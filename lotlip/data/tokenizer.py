"""Turns captions into token ids with corner tokens, exactly as the method's release does.

The `tokenizers` library does all of it, so a saved `tokenizer.json` gives the model's ids without this package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.normalizers import Replace
from tokenizers.normalizers import Sequence as Steps
from tokenizers.processors import TemplateProcessing

from lotlip.core.files import read_json, sha256_json
from lotlip.data.text import SENTENCE_ENDS, SentenceEnds, join_sub_captions, split_sub_captions

# Shipped with the package, so that tokenizing works offline (Apache-2.0).
BUNDLED = ("bert-base-uncased",)
CLIP = "clip"  # CLIP's own, whose vocabulary open_clip ships

# Names of the special tokens in the BERT family: BERT's first, then RoBERTa's. The last two kinds may be missing.
_SPECIAL = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "mask": ("[MASK]", "<mask>"),
}

# White space as `split_sub_captions` strips it: str.strip also strips \x1c to \x1f.
# The look-behind keeps matching linear in texts with much white space.
_BLANK = r"[\s\x1c-\x1f]"
_OUTER = rf"\A{_BLANK}+|(?<!{_BLANK}){_BLANK}+\z"
_EXTRA = re.compile(r"\[(?:COR|REG)\.[0-9]+\]")


@lru_cache(maxsize=8)
def word_pieces(name: str) -> Tokenizer:
    """The word pieces of a model, without what `TextTokenizer` adds.

    Args:
        name: a bundled vocabulary ("bert-base-uncased", "clip"), a `tokenizer.json`, or a folder that contains one,
            including one that `TextTokenizer` saved.

    Raises:
        ValueError: there is no such tokenizer.
    """
    if name == CLIP:
        return _clip_word_pieces()
    file = tokenizer_file(name)
    if not file.is_file():
        raise ValueError(
            f"no tokenizer {name!r}: {file} does not exist; name a tokenizer.json, a folder with one, "
            f"or a bundled name ({', '.join((*BUNDLED, CLIP))})"
        )
    try:
        data = _without_ours(json.loads(file.read_text(encoding="utf-8")))
        tokenizer = Tokenizer.from_str(json.dumps(data, allow_nan=False))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"{file} is damaged or not a tokenizer ({error}); restore it") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@lru_cache(maxsize=8)
def _have_gap(pieces: Tokenizer) -> bool:
    """Whether the ids of word pieces are not 0, 1, 2, …."""
    ids = pieces.get_vocab(with_added_tokens=True).values()
    return max(ids) >= len(ids)


def copy_of(pieces: Tokenizer) -> Tokenizer:
    """A tokenizer whose steps may be replaced. It shares the model with `pieces`, because reading one takes long."""
    tokenizer = Tokenizer(pieces.model)
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(pieces, step)) is not None:
            setattr(tokenizer, step, value)
    tokenizer.add_tokens([token for _, token in sorted(pieces.get_added_tokens_decoder().items())])  # in order of ids
    return tokenizer


def tokenizer_file(name: str) -> Path:
    """The `tokenizer.json` of a name as `word_pieces` takes it, unless it is "clip"; it may not exist."""
    file = Path(str(files("lotlip.data"))) / name / "tokenizer.json" if name in BUNDLED else Path(name)
    return file / "tokenizer.json" if file.is_dir() else file


def tokenizer_paths(name: str) -> list[Path]:
    """The file or folder of a name as `word_pieces` takes it; none if it comes with a package."""
    return [] if name in (*BUNDLED, CLIP) else [Path(name)]


def _clip_word_pieces() -> Tokenizer:
    """CLIP's word pieces, from the merges that open_clip ships.

    The ids are those of CLIPTokenizer of transformers; open_clip also decodes HTML entities and repairs mojibake.
    """
    import gzip
    from importlib.util import find_spec

    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise ValueError("the tokenizer 'clip' needs open_clip's vocabulary; pip install open_clip_torch")
    text = gzip.decompress((Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = text.split("\n")[1 : 49152 - 256 - 2 + 1]  # the file has more than CLIP uses
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(f"{character}</w>" for character in characters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    pairs: Any = [tuple(merge.split()) for merge in merges]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=pairs)
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def count_tokens(name: str) -> Callable[[str], int]:
    """A function that counts one text's tokens as `token_counts` does."""
    word_pieces(name)  # raises here for a wrong name
    return lambda text: token_counts(name, [text])[0]


def token_counts(name: str, texts: Sequence[str]) -> list[int]:
    """The number of word pieces of each whole text, sentence ends included (paper, Table 1).

    An unknown word counts as a token; a special token spelled out in the text ("[SEP]") does not.
    """
    pieces = word_pieces(name)
    special = [token.content for token in pieces.get_added_tokens_decoder().values() if token.special]
    encodings = pieces.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
        len(encoding) - sum(text.count(token) for token in special)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def used_tokens(name: str, texts: Iterable[str], sentence_ends: SentenceEnds = "released") -> set[int]:
    """Ids of the word pieces that occur in texts, without sentence ends, as in `TextTokenizer`."""
    parts = {part for text in texts for part in split_sub_captions(text, sentence_ends)}  # generated texts share many
    encodings = word_pieces(name).encode_batch_fast(list(parts), add_special_tokens=False)
    return {index for encoding in encodings for index in encoding.ids}


class TextTokenizer:
    """Turns captions into `[CLS] [Cor 1] … [Cor m] words [SEP] words [SEP] …` (paper, section 3.2).

    The names of corner tokens are `[COR.1]`, `[COR.2]`, … and those of register tokens `[REG.1]`, `[REG.2]`, …. They
    contain a full stop, which ends a sentence, so that no words of a caption can be taken for one. (Only a text that
    consists of nothing but such a name is ambiguous.)

    Attributes:
        context_length: maximum number of tokens in a text, including special, corner and register tokens; longer texts
            are truncated, and their last token is still [SEP].
        corner_tokens: m. Their ids follow the last word piece's.
        register_tokens: number of register tokens after the corner tokens (Table 7); their ids follow those.
        vocabulary_size: number of word pieces and special tokens, without corner and register tokens.
        sentence_ends: which characters become [SEP], as in `split_sub_captions`. It overrides the rule of a saved
            tokenizer.
        pad_id: padding of shorter texts.

    Raises:
        ValueError: the tokenizer is missing or not of the BERT family, or the context has no room for words.
    """

    def __init__(
        self,
        name: str,
        context_length: int = 128,
        corner_tokens: int = 0,
        register_tokens: int = 0,
        sentence_ends: SentenceEnds = "released",
    ) -> None:
        self.name = name
        self.sentence_ends = sentence_ends
        self.context_length = context_length
        self.corner_tokens = corner_tokens
        self.register_tokens = register_tokens
        pieces = word_pieces(name)
        self.vocabulary_size = pieces.get_vocab_size(with_added_tokens=True)
        self._special = _special_tokens(name, pieces)
        self._extra = [f"[COR.{number + 1}]" for number in range(corner_tokens)]
        self._extra += [f"[REG.{number + 1}]" for number in range(register_tokens)]
        if context_length < len(self._extra) + 3:
            raise ValueError(
                f"context_length {context_length} has no room for words beside {self._special['cls']}, "
                f"{self._special['sep']} and {len(self._extra)} corner and register tokens; raise it"
            )
        taken = any(pieces.token_to_id(token) is not None for token in self._extra)
        if self._extra and (taken or _have_gap(pieces)):
            raise ValueError(
                f"tokenizer {name!r} has no place for {', '.join(self._extra)}: its ids must be 0, 1, 2, … "
                "without a gap, and none of its tokens may have one of these names"
            )
        self._tokenizer = _with_ours(pieces, self._special, self._extra, sentence_ends)
        self._tokenizer.enable_truncation(context_length)
        pad_id = self._tokenizer.token_to_id(self._special["pad"])
        assert pad_id is not None  # `_special_tokens` found it
        self.pad_id: int = pad_id
        self.sep_id = self._tokenizer.token_to_id(self._special["sep"])
        first = [self._special["cls"], *self._extra]
        self._first = np.array([self._tokenizer.token_to_id(token) for token in first], dtype=np.int64)

    def full_lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, special tokens included, before truncation."""
        self._tokenizer.no_truncation()
        try:
            return [len(ids) for ids in self.encode(texts)]
        finally:
            self._tokenizer.enable_truncation(self.context_length)

    def encode(self, texts: Sequence[str | Sequence[str]]) -> list[list[int]]:
        """Token ids of each text, without padding.

        Args:
            texts: captions, or captions already split into sub-captions.
        """
        whole = [text if isinstance(text, str) else join_sub_captions(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(whole)]

    @property
    def family(self) -> str:
        """Of models that read its texts: "bert", "clip" or "siglip"."""
        return "bert"

    @cached_property
    def words_hash(self) -> str:
        """Of what decides the ids of words: the word pieces and `sentence_ends`, but no length and no extra token."""
        return sha256_json([word_pieces(self.name).to_str(), self.sentence_ends])

    def encode_words(self, words: np.ndarray) -> np.ndarray:
        """Token ids of a text whose words are encoded, without padding: what `encode` gives of the text.

        Args:
            words: ids of each sub-caption's words with [SEP] after them (`lotlip.data.token_ids`).
        """
        ids = np.concatenate([self._first, words[: self.context_length - len(self._first)]])
        ids[-1] = self.sep_id  # also where the text is cut
        return ids

    def __call__(
        self, texts: Sequence[str | Sequence[str] | np.ndarray], pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids padded to the longest of these texts (or to `pad_to`), and the length of each.

        Args:
            texts: as of `encode`, or arrays as of `encode_words`.
            pad_to: at least the longest text's length.

        Returns:
            ids [B, L] int64 and lengths [B] int64.
        """
        encoded = iter(self.encode([text for text in texts if not isinstance(text, np.ndarray)]))
        rows = [self.encode_words(text) if isinstance(text, np.ndarray) else next(encoded) for text in texts]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.full((len(rows), pad_to or int(lengths.max(initial=1))), self.pad_id, dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids, lengths

    @property
    def special_ids(self) -> list[int]:
        """Ids of special, corner and register tokens."""
        ids = [self._tokenizer.token_to_id(name) for name in (*self._special.values(), *self._extra)]
        return [number for number in ids if number is not None]

    def token(self, number: int) -> str | None:
        """The token that has this id; None where none has."""
        return self._tokenizer.id_to_token(number)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`.

        `AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True)` then gives the same ids as
        `__call__`; without `truncation=True` transformers truncates nothing.
        """
        self._tokenizer.save(str(folder / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder().values()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            **{f"{kind}_token": token for kind, token in self._special.items()},
            "additional_special_tokens": [
                {"__type": "AddedToken", **token.__getstate__()} for token in added if token.content in self._extra
            ],
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def _special_tokens(name: str, pieces: Tokenizer) -> dict[str, str]:
    """Kind of each special token → its name in this tokenizer."""
    special = {}
    for kind, names in _SPECIAL.items():
        present = [token for token in names if pieces.token_to_id(token) is not None]
        if present:
            special[kind] = present[0]
        elif kind in ("cls", "sep", "pad"):
            raise ValueError(f"tokenizer {name!r} has none of {', '.join(names)}: it is not a BERT-family tokenizer")
    return special


def saved_sentence_ends(folder: Path) -> SentenceEnds | None:
    """The `sentence_ends` of the `tokenizer.json` that `TextTokenizer` saved in a folder; None for any other file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    steps = (read_json(folder / "tokenizer.json").get("normalizer") or {}).get("normalizers", [])
    if not _has_ours(steps):
        return None
    pattern = steps[0]["pattern"]["Regex"]
    return next((name for name, end in SENTENCE_ENDS.items() if pattern.startswith(_before(end))), None)


def _before(end: str) -> str:
    """The beginning of the pattern that replaces white space and sentence ends."""
    return rf"(?<!{_BLANK}){_BLANK}*{end}"


def _with_ours(pieces: Tokenizer, special: dict[str, str], extra: list[str], sentence_ends: SentenceEnds) -> Tokenizer:
    """Word pieces with all steps from a caption to the model's input, except truncation.

    By default, the tokenizer finds special tokens first and normalises the pieces between them one by one, so each
    piece would lose its outer sentence ends. Here special tokens are found in the normalised text instead, where
    sentence ends have become [SEP]. "[MASK]" still matches only that spelling, not "[mask]", however the word pieces'
    own normaliser treats capitals.

    Args:
        pieces: the word pieces.
        special: kind of each special token → its name.
        extra: names of corner and register tokens.
        sentence_ends: what becomes [SEP]. Each value includes the full stop, which the steps below rely on.
    """
    end = SENTENCE_ENDS[sentence_ends]
    tokenizer = copy_of(pieces)
    own, sep = pieces.normalizer, special["sep"]
    added = {token.content: token for token in pieces.get_added_tokens_decoder().values()}
    moved = sorted(
        {sep, *(name for name in special.values() if name not in added)}.union(
            name for name, token in added.items() if not token.normalized
        )
    )

    # A token is found where the text contains its normalised name, so a text that is only a name must be unchanged:
    # there, "</s>" and the dots of extra tokens end no sentence.
    names = [rf"(?<=\A{re.escape(name[:5])}){re.escape(name[5:])}\z" for name in extra]
    but_whole = "(?!" + "|".join([rf"(?<=\A{re.escape(sep)})\z", *names]) + ")"
    steps = [
        Replace(Regex(rf"{_before(end)}{but_whole}(?:{_BLANK}|{end}{but_whole})*"), "\n"),
        Replace(Regex(_OUTER), ""),
        Replace("\n", sep),
        # the only dots left are those of extra tokens' names: dots now mark special tokens while `own` normalises
        Replace(Regex(rf"(?={'|'.join(map(re.escape, moved))})[\s\S]"), "."),
        *([own] if own else []),
    ]
    for name, marked in [*((name, "." + name[1:]) for name in moved), *((name, name) for name in extra)]:
        steps.append(Replace(own.normalize_str(marked) if own else marked, name))
    tokenizer.normalizer = Steps(steps)

    tokenizer.add_tokens([_in_normalised(name, added.get(name)) for name in [*moved, *extra]])
    first = " ".join([special["cls"], *extra])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {sep}",
        pair=f"{first} $A {sep} $B {sep}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (special["cls"], sep, *extra)],
    )
    return tokenizer


def _in_normalised(name: str, token: AddedToken | None) -> AddedToken:
    """A token, or a new special one, that is found in normalised text."""
    flags = token.__getstate__() if token else {"special": True}
    return AddedToken(**{**flags, "content": name, "normalized": True})


def _has_ours(steps: Sequence[Any]) -> bool:
    """Whether a normaliser begins with the steps of `_with_ours`, for any value of `sentence_ends`."""
    return {"type": "Replace", "pattern": {"Regex": _OUTER}, "content": ""} in steps[1:2]


def _without_ours(data: dict[str, Any]) -> dict[str, Any]:
    """Removes what `_with_ours` added from a `tokenizer.json`; returns any other file's data unchanged."""
    steps = (data.get("normalizer") or {}).get("normalizers", [])
    if not _has_ours(steps):
        return data
    added = [token for token in data["added_tokens"] if not _EXTRA.fullmatch(token["content"])]
    moved = [token for token in added if re.escape(token["content"]) in steps[3]["pattern"]["Regex"]]
    for token in moved:
        token["normalized"] = False
    own = steps[4 : len(steps) - len(moved) - len(data["added_tokens"]) + len(added)]
    return {
        **data,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": own},
        "post_processor": None,
    }
