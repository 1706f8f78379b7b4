"""Measures of captions, the rules that drop some, and the detection of swapped captions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lotlip.caption.config import CaptionConfig, QualityConfig
from lotlip.caption.gate import gate_caption
from lotlip.caption.quality import (
    RULES,
    Agreement,
    assess,
    broken_rule,
    content_words,
    is_truncated,
    measure,
    measured,
    mojibake,
    refusal,
    repetition,
    summarise,
    words_of,
)
from lotlip.core.checks import Check, GateFailed
from lotlip.data.partitions import read_captions, write_captions
from lotlip.data.records import Caption, Failure, MeasuredCaption, UnitReport
from tests.test_scene_captioner import RATES, captioner, records

pytestmark = pytest.mark.usefixtures("without_pages")


def caption(text: str, key: str = "k", finish_reason: str = "stop") -> Caption:
    return Caption(key, "llava", text, [text], 1, finish_reason, "r", "")


def measured_text(text: str, short: str = "", neighbours: Sequence[str] = (), **changes: str) -> MeasuredCaption:
    return measure(caption(text, **changes), content_words(short), [content_words(other) for other in neighbours])


# --- measures -----------------------------------------------------------------------------------------------------


def test_repetition_is_the_fraction_of_repeated_four_word_sequences():
    assert repetition(["a", "b", "c", "d"]) == 0
    assert repetition(["a", "b", "c"]) == repetition([]) == 0
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repetition(["the"] * 103) == pytest.approx(0.99)


@pytest.mark.parametrize("text", ["A dog.", "A dog!", 'He says "go."', "A dog (and a cat.) ", "It **ends.**\n", "So…"])
def test_a_sentence_with_an_end_is_not_truncated(text):
    assert not is_truncated(text, "stop")
    assert is_truncated(text, "length")


@pytest.mark.parametrize("text", ["A dog runs on the", "A dog,", ""])
def test_a_sentence_without_an_end_is_truncated(text):
    assert is_truncated(text, "stop")


def test_control_characters_exclude_line_ends():
    assert measured_text("A dog.\n\tIt runs.\r\n").control == 0
    assert measured_text("A\x00 dog\x1b[0m \x85.").control == 3


@pytest.mark.parametrize("text", ["A café – “naïve” … 20 °C, ½ £5, 5 €, Ærø, ÅÄÖ, São Paulo, 東京, Привет.", "A dog’s"])
def test_text_of_any_language_is_not_mojibake(text):
    assert mojibake(text) == 0


@pytest.mark.parametrize("text", ["A cafÃ© in the sun", "The dogâ€™s nose", "a lost \ufffd letter"])
def test_wrongly_decoded_text_is_mojibake(text):
    assert mojibake(text) >= 1


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("As an AI language\nmodel, I describe only text.", "as an ai language model"),
        ("I’m sorry, but I can't help with that.", "i'm sorry, but i"),
        ("Unfortunately I cannot see the image you mention.", "i cannot see the image"),
        ("A sign reads: sorry, but I love you. A man cannot see the image behind him.", ""),
        ("A dog asks for help.", ""),
    ],
)
def test_refusals_are_found_by_their_phrases(text, phrase):
    assert refusal(text) == phrase


def test_forms_of_a_content_word_are_equal():
    words = content_words("Two smiling women's houses, running dogs; babies & CAFÉS in 2019")
    assert words == content_words("a smiles woman house run dog baby cafe two") - {"woman"} | content_words("women")
    assert content_words("the image of a photo on 12 12 2019, with all of it") == frozenset()
    assert content_words("glasses boxes churches dishes") == content_words("glass box church dish")
    assert content_words("grass bus tennis") == {"gras" + "s", "bus", "tennis"}


def test_agreement_is_the_fraction_of_the_short_captions_words():
    assert measured_text(
        "A brown dog is running on the beach.", "dog runs on beach at sunset"
    ).agreement == pytest.approx(3 / 4)
    assert measured_text("A dog.", "IMG_2019 of the").agreement == pytest.approx(0.0)
    assert measured_text("A dog.", "12 of the 2019").agreement is None


def test_neighbours_are_compared_by_the_words_that_differ():
    differing = measured_text(
        "A red house and a tree.", "a red house", ["a red boat", "a green house", "a red house", "12"]
    )
    assert (differing.agreement, differing.own_agreement, differing.next_agreement) == (1, 1, 0)
    equal = measured_text("A red house.", "a red house", ["the red house", "red house 7"])
    assert (equal.agreement, equal.own_agreement, equal.next_agreement) == (1, None, None)


# --- rules --------------------------------------------------------------------------------------------------------

BAD = {
    "refusal": (measured_text("As an AI language model, I cannot."), 'refuses: "as an ai language model"'),
    "reasoning": (measured_text("Okay, let's see. There is a dog."), 'shows reasoning: "okay, let\'s"'),
    "control": (measured_text("A\x07 dog runs here."), "1 control characters, more than 0"),
    "mojibake": (measured_text("A cafÃ© stands here."), "1 places of mojibake, more than 0"),
    "repetition": (measured_text("a b c d " * 20), "0.948 of its 4-grams are repeated, more than 0.5"),
    "short": (measured_text("A dog."), "2 words, fewer than 3"),
    "long": (measured_text("word. " * 21), "21 words, more than 20"),
    "truncated": (
        measured_text("A dog runs on", finish_reason="length"),
        "is cut off after 4 words, finish reason 'length'",
    ),
    "disagreement": (measured_text("A dog runs.", "a cat"), "has 0 of the short caption's words, less than 0.1"),
}
ALL = {"refusal": True, "reasoning": True, "control": 0, "mojibake": 0, "repetition": 0.5, "short": 3, "long": 20}
ALL |= {"truncated": True, "disagreement": 0.1}
OFF: dict = {rule: False if rule in ("refusal", "reasoning", "truncated") else None for rule in ALL}


def test_every_rule_has_a_bad_caption():
    assert set(BAD) == set(RULES) == set(ALL)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_drops_bad_captions_and_states_value_and_limit(rule):
    bad, reason = BAD[rule]
    only = QualityConfig(**{**OFF, rule: ALL[rule]})
    assert broken_rule(bad, only) == Failure("k", "llava", reason, rule)
    assert broken_rule(measured_text("A dog runs here.", "a dog"), QualityConfig(**ALL)) is None


@pytest.mark.parametrize("rule", RULES)
def test_a_disabled_rule_drops_nothing(rule):
    assert broken_rule(BAD[rule][0], QualityConfig(**OFF)) is None


def test_a_caption_that_breaks_several_rules_is_dropped_once():
    bad = measured_text("As an AI model \x07 cafÃ©")
    assert [item.kind for item in assess([bad], QualityConfig(**ALL)) if isinstance(item, Failure)] == ["refusal"]


def test_a_short_caption_without_words_causes_no_disagreement():
    assert broken_rule(measured_text("A dog runs here.", "12"), QualityConfig(disagreement=1.0)) is None


@pytest.mark.slow
@pytest.mark.parametrize("style", RATES)
def test_the_default_rules_keep_all_captions_of_the_demo(style):
    short_captions = {record.key: record.short_caption for record in records(1000)}
    captions = list(measured(captioner(style).caption(records(1000)), short_captions))  # type: ignore[arg-type]
    assert Counter(type(item) for item in assess(captions, QualityConfig())) == {MeasuredCaption: 1000}
    assert not any(item.truncated for item in captions)
    assert max(item.repetition for item in captions) < 0.25  # far below the limit


# --- summary ------------------------------------------------------------------------------------------------------


def table(captions: Sequence[MeasuredCaption]) -> pd.DataFrame:
    return pd.DataFrame([vars(item) for item in captions])


def test_a_summary_does_not_depend_on_the_parts():
    rng = random.Random(0)
    captions = [
        measured_text("word " * rng.randrange(4, 40) + ".", rng.choice(["word", "else", "12"])) for _ in range(500)
    ]
    full_table = table(captions)
    summary = summarise([full_table[:1], full_table[1:300], full_table[300:]], {"short": 3, "unreadable": 9})
    assert summary == summarise([full_table], {"short": 3, "unreadable": 9})
    assert summary["captions"] == 503
    assert summary["filtered"]["short"] == 3
    for name in ("words", "repetition", "agreement"):
        values = full_table[name].dropna().astype(float).round(3)
        assert summary[name]["mean"] == pytest.approx(values.mean(), abs=1e-3)
        for quantile, share in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
            assert summary[name][quantile] == values.quantile(share, interpolation="lower")


def test_a_summary_of_no_captions_is_empty():
    summary = summarise([], {})
    assert (summary["captions"], summary["truncated_share"], summary["words"]["mean"]) == (0, 0.0, None)


# --- swapped captions ---------------------------------------------------------------------------------------------

NOUNS = (
    "dog cat horse bridge river lamp street market boat harbour mountain forest snow field tractor farmer child kite "
    "beach umbrella chair table kitchen window cup coffee cake plate fork garden flower bee butterfly fence gate "
    "tower clock train station platform luggage airport plane pilot cloud sunset lake swan duck bicycle helmet road "
    "truck crane building worker hammer shelf book library student desk laptop keyboard guitar singer stage crowd "
    "stadium player ball goal referee net racket court pool swimmer towel elephant zoo lion giraffe rock cliff wave"
)
ADJECTIVES = "red old small large wooden bright dark green blue white empty busy quiet wet young modern"


def web_pair(rng: random.Random, worth: float) -> tuple[str, str]:
    """A short caption like those of the web, and a long one that contains the fraction `worth` of its things."""
    things = [f"{rng.choice(ADJECTIVES.split())} {noun}" for noun in rng.sample(NOUNS.split(), 9)]
    mentioned = [
        thing if rng.random() < worth else f"{rng.choice(ADJECTIVES.split())} {rng.choice(NOUNS.split())}"
        for thing in things[:3]
    ]
    long = f"The image shows a {things[0]} near a {things[1]}. There is a {things[2]} behind the {things[3]}. "
    long += f"In the background, a {things[4]} and a {things[5]} can be seen. The {things[6]} adds to the scene."
    return f"{mentioned[0]} with {mentioned[1]} and {mentioned[2]}, {rng.randrange(1990, 2024)}", long


def nearly_equal_pair(rng: random.Random) -> tuple[str, str]:
    """A short caption that differs from others only in a number."""
    return f"Wedding of Ann and Carl, {rng.randrange(9999)}", web_pair(rng, 1)[1] + " It may be a wedding."


def wordless_pair(rng: random.Random) -> tuple[str, str]:
    return f"IMG {rng.randrange(9999)}".replace("IMG", ""), web_pair(rng, 1)[1]


def partition(pair: Callable[[random.Random], tuple[str, str]], size: int, seed: int, shift: int) -> pd.DataFrame:
    """A partition's measured captions, each taken from the image `shift` places later."""
    rng = random.Random(seed)
    pairs = [pair(rng) for _ in range(size)]
    texts = [long for _, long in pairs[shift:] + pairs[:shift]]
    captions = [caption(text, str(number)) for number, text in enumerate(texts)]
    return table(list(measured(captions, {str(number): short for number, (short, _) in enumerate(pairs)})))


@pytest.mark.slow
@pytest.mark.parametrize("worth", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_agreement_tells_swapped_web_captions_from_correct_ones(worth, seed):
    for shift, expected in ((0, True), (1, False), (500, False)):
        agreement = Agreement.of(partition(lambda rng: web_pair(rng, worth), 1000, seed, shift))
        assert agreement.is_own(1.5) is expected, f"{shift}: {agreement}"


@pytest.mark.slow
@pytest.mark.parametrize("style", RATES)
@pytest.mark.parametrize("shift", [1, 50])
def test_agreement_tells_swapped_captions_of_the_demo_from_correct_ones(style, shift):
    short_captions = {record.key: record.short_caption for record in records(100)}
    texts = list(captioner(style).caption(records(100)))
    swapped = [replace(texts[(place + shift) % 100], key=key) for place, key in enumerate(short_captions)]  # type: ignore[type-var]
    assert Agreement.of(table(list(measured(swapped, short_captions)))).is_own(1.5) is False  # type: ignore[arg-type]
    assert Agreement.of(table(list(measured(texts, short_captions)))).is_own(1.5) is True  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", [nearly_equal_pair, wordless_pair])
@pytest.mark.parametrize("shift", [0, 1])
def test_uninformative_short_captions_leave_agreement_undecided(pair, shift):
    agreement = Agreement.of(partition(pair, 300, 0, shift))
    assert agreement.is_own(1.5) is None
    assert str(agreement) == "no short captions that differ in their words"


@pytest.mark.slow
def test_a_few_captions_are_never_judged_as_swapped():
    for seed in range(50):
        assert Agreement.of(partition(lambda rng: web_pair(rng, 0.3), 12, seed, 0)).is_own(1.5) is not False


def test_agreements_of_parts_can_be_added():
    parts = [partition(lambda rng: web_pair(rng, 0.5), size, size, 0) for size in (30, 200)]
    added = Agreement.of(parts[0]) + Agreement.of(parts[1])
    full = Agreement.of(pd.concat(parts))
    assert vars(added) == pytest.approx(vars(full))


# --- the gate -----------------------------------------------------------------------------------------------------

STAGE = CaptionConfig(max_filtered_share=0.1, max_truncated_share=0.2)


def write_partitions(
    folder: Path, shifts: Sequence[int] = (0, 0, 0), size: int = 200, worth: float = 0.6
) -> list[UnitReport]:
    """Writes partitions of web captions, shifted by `shifts`."""
    reports = []
    for number, shift in enumerate(shifts):
        name = f"train/part-{number:05d}"
        rows = partition(lambda rng: web_pair(rng, worth), size, number, shift).to_dict("records")
        items = [MeasuredCaption(**{**row, "key": f"{number}-{row['key']}"}) for row in rows]  # type: ignore[misc]
        reports.append(write_captions(name, items, size, folder))
    return reports


def failed_checks(settings: CaptionConfig, folder: Path, reports: Sequence[UnitReport]) -> list[str]:
    with pytest.raises(GateFailed) as raised:
        gate_caption(settings, folder, reports, folder / "report")
    return [line for line in str(raised.value).splitlines() if line.startswith("  - ")]


def find_check(checks: Sequence[Check], words: str) -> Check:
    (check,) = [check for check in checks if words in check.what]
    return check


@pytest.mark.slow
def test_good_captions_pass_the_gate_with_their_agreement(tmp_path):
    checks = gate_caption(STAGE, tmp_path, write_partitions(tmp_path), tmp_path / "report")
    assert "of the next ones' (600 captions)" in find_check(checks, "own images'").observed


@pytest.mark.slow
def test_one_swapped_partition_of_three_fails(tmp_path):
    (line,) = failed_checks(STAGE, tmp_path, write_partitions(tmp_path, (0, 7, 0)))
    assert "captions are their own images'" in line
    assert "train/part-00001" in line and "train/part-00000" not in line


@pytest.mark.slow
def test_small_swapped_partitions_fail_together(tmp_path):
    reports = write_partitions(tmp_path, [3] * 30, size=9, worth=1.0)
    (line,) = failed_checks(STAGE, tmp_path, reports)
    assert "all together" in line and "undecided for" in line


@pytest.mark.slow
def test_too_few_captions_to_compare_pass_as_undecided(tmp_path):
    checks = gate_caption(STAGE, tmp_path, write_partitions(tmp_path, (1, 1), size=4), tmp_path / "report")
    assert "undecided for 2 of 2 partitions: too few captions to compare" in find_check(checks, "own images'").observed


@pytest.mark.slow
def test_a_partition_with_deviating_lengths_fails(tmp_path):
    reports = write_partitions(tmp_path)
    long = table([measured_text("word " * 90 + ".", key=str(number)) for number in range(40)]).to_dict("records")
    reports.append(write_captions("val/part-00000", [MeasuredCaption(**row) for row in long], 40, tmp_path))  # type: ignore[misc]
    lines = failed_checks(STAGE.model_copy(update={"max_repeated_share": 1.0}), tmp_path, reports)
    assert len(lines) == 1 and "mean length is within 1.5 times" in lines[0] and "val/part-00000" in lines[0]


@pytest.mark.slow
def test_the_fraction_of_dropped_captions_is_limited(tmp_path):
    reports = write_partitions(tmp_path)
    dropped = [Failure(f"d{number}", "llava", "2 words, fewer than 3", "short") for number in range(60)]
    few = replace(reports[0], read=260, failures=dropped)
    checks = gate_caption(STAGE, tmp_path, [few, *reports[1:]], tmp_path / "report")
    assert find_check(checks, "rules drop").observed == "9.09 % (60 short)"
    assert checks[0].observed == "0 %"
    many = replace(reports[0], read=320, failures=dropped * 2)
    (line,) = failed_checks(STAGE, tmp_path, [many, *reports[1:]])
    assert "the quality rules drop is at most 10 %: found 16.7 % (120 short)" in line


@pytest.mark.slow
def test_too_many_truncated_captions_fail(tmp_path):
    reports = write_partitions(tmp_path)
    rows = read_captions(tmp_path, "train/part-00000").assign(truncated=True).to_dict("records")
    reports[0] = write_captions("train/part-00000", [MeasuredCaption(**row) for row in rows], 200, tmp_path)  # type: ignore[misc]
    (line,) = failed_checks(STAGE, tmp_path, reports)
    assert "captions that are cut off is at most 20 %: found 33.3 %" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A well-kept dog's house, no. 7.", 6),
        ("Ein Käse für Ödön", 4),
        ("Собака бежит по траве.", 4),
        ("개가 잔디밭에서 달린다.", 3),
        ("一只狗在草地上奔跑。", 9),
        ("犬が芝生の上を走っている。", 12),
        ("สุนัขวิ่งอยู่บนสนามหญ้า", 6),
        ("狗 dog 狗", 3),
    ],
)
def test_words_are_counted_in_scripts_without_spaces(text, words):
    assert len(words_of(text)) == words


@pytest.mark.parametrize("text", ["一只狗在草地上奔跑。", "犬が走っている。", "สุนัขวิ่งอยู่บนสนามหญ้า"])
def test_the_default_rules_keep_captions_of_any_script(text):
    (measured_caption,) = measured([caption(text)], {"k": "raw"})
    assert broken_rule(measured_caption, QualityConfig()) is None
    assert not measured_caption.truncated
