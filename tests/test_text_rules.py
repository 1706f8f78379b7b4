"""Rules that drop samples by their texts, as ALIGN does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from lotlip.data.duplicates import unique_partitions
from lotlip.data.partitions import read_table, write_partitions
from lotlip.data.records import ImageRecord, Unit, UnitReport
from lotlip.ingest.config import IngestConfig, TextsConfig
from lotlip.ingest.gate import LEFT_OUT
from lotlip.ingest.text_rules import KINDS, left_out_by_texts
from tests.test_webdataset_source import image_bytes


def write(folder: Path, *partitions: list[tuple[str, str]], split: str = "train") -> list[UnitReport]:
    """Writes a partition per list of image names and texts; equal names are the same image."""
    reports: list[UnitReport] = []
    for number, samples in enumerate(partitions):
        records = [
            ImageRecord(f"{split}{number}-{place}", image_bytes(), "jpg", text, 1, 1, name)
            for place, (name, text) in enumerate(samples)
        ]
        unit = Unit(split, number, tuple(record.key for record in records))
        reports += write_partitions(unit, records, folder, lambda key: split)
    return reports


def kept_texts(folder: Path, reports: list[UnitReport], **rules: int) -> tuple[list[str], Counter[str]]:
    """Texts that are kept in the training split, and the kinds of failures."""
    settings = TextsConfig(**rules)

    def by_texts(names, dropped):
        return left_out_by_texts(folder, settings, names, dropped)

    reports_out = unique_partitions(folder, reports, folder / "out", {}, None, by_texts)
    texts = [
        text
        for report in reports_out
        if report.name.startswith("train/")
        for text in read_table(folder / "out", report.name, ["short_caption"])["short_caption"]
    ]
    return texts, Counter(failure.kind for report in reports_out for failure in report.failures)


def test_texts_of_other_lengths_are_dropped(tmp_path):
    reports = write(tmp_path, [("a", "dog"), ("b", "a dog runs"), ("c", "a dog runs fast now")])
    texts, kinds = kept_texts(tmp_path, reports, min_words=3, max_words=4)
    assert texts == ["a dog runs"] and kinds == {"text-length": 2}


@pytest.mark.slow
def test_texts_shared_by_many_images_are_dropped_in_all_partitions(tmp_path):
    reports = write(tmp_path, [("a", "img 1"), ("b", "img 1"), ("c", "two")], [("d", "img 1"), ("e", "two")])
    texts, kinds = kept_texts(tmp_path, reports, max_images_per_text=2)
    assert texts == ["two", "two"] and kinds == {"shared-text": 3}


@pytest.mark.slow
def test_copies_of_an_image_do_not_count_as_sharing_a_text(tmp_path):
    reports = write(tmp_path, [("a", "two"), ("b", "two")], [("a", "two"), ("b", "two")])
    texts, kinds = kept_texts(tmp_path, reports, max_images_per_text=2)
    assert texts == ["two", "two"] and kinds == {"duplicate-image": 2}


@pytest.mark.slow
def test_images_with_many_texts_are_dropped(tmp_path):
    reports = write(tmp_path, [("logo", "one"), ("b", "two"), ("logo", "three")], [("logo", "four"), ("b", "five")])
    texts, kinds = kept_texts(tmp_path, reports, max_texts_per_image=2)
    assert texts == ["two"]
    assert kinds == {"many-texts": 1, "duplicate-image": 3}  # without the rule, the first text of each image is kept


@pytest.mark.slow
def test_texts_with_a_rare_word_or_pair_are_dropped(tmp_path):
    common = [(f"{number}", "a red dog") for number in range(3)] + [("d", "A Red Dog"), ("e", "dog red a")]
    reports = write(tmp_path, common, [("f", "a red okapi"), ("g", "red dog")])
    texts, kinds = kept_texts(tmp_path, reports, min_token_count=3)
    assert texts == ["a red dog"] * 3 + ["A Red Dog", "red dog"]
    assert kinds == {"rare-word": 2}


@pytest.mark.slow
def test_held_out_splits_are_unchanged_and_not_counted(tmp_path):
    reports = write(tmp_path, [("a", "dog"), ("b", "cat")]) + write(tmp_path, [("c", "dog"), ("d", "x")], split="test")
    texts, kinds = kept_texts(tmp_path, reports, max_images_per_text=1, max_words=1)
    assert texts == ["dog", "cat"] and not kinds


@pytest.mark.slow
def test_a_sample_that_breaks_several_rules_is_counted_once(tmp_path):
    reports = write(tmp_path, [("a", "x"), ("b", "x"), ("c", "a dog runs"), ("d", "a dog runs")])
    texts, kinds = kept_texts(tmp_path, reports, min_words=2, max_images_per_text=1, min_token_count=2)
    assert texts == [] and kinds == {"text-length": 2, "shared-text": 2}
    assert set(KINDS) <= set(LEFT_OUT)


def test_rules_are_off_by_default_and_must_allow_some_length():
    source = {"kind": "folder", "path": "images"}
    assert IngestConfig(source=source).texts.rules == {}
    with pytest.raises(ValidationError, match="min_words 5 is above max_words 3"):
        TextsConfig(min_words=5, max_words=3)
