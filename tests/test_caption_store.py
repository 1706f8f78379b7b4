"""The caption store: captions by captioner and images, and no image is captioned twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lotlip.caption.config import CaptionConfig
from lotlip.caption.partition import Captioning
from lotlip.caption.store import CaptionStore, Partition
from lotlip.core.files import read_json
from lotlip.data.partitions import read_captions, read_table
from lotlip.data.records import Caption, Failure, ImageRecord, Unit
from lotlip.data.text import split_sub_captions
from tests.partitions import write_partition
from tests.test_validation import record

KEYS = ["k0", "k1", "k2", "k3"]


class ScriptedCaptioner:
    """Records the images it gets; captioning fails for some, and can succeed later."""

    revision, prompt = "r1", "Describe it."

    def __init__(self, failures: dict[str, str] | None = None, breaks_at: str = "") -> None:
        self.about: dict[str, Any] = {"revision": self.revision, "prompt": self.prompt}
        self.failures = failures or {}
        self.breaks_at = breaks_at
        self.asked: list[str] = []

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        for item in records:
            self.asked.append(item.key)
            if item.key == self.breaks_at:
                raise ConnectionError("the server is gone")
            if item.key in self.failures:
                yield Failure(item.key, item.key, "cannot", self.failures[item.key])
            else:
                text = f"Here is {item.short_caption}. It is \ud800seen."
                yield Caption(item.key, "llava", text, split_sub_captions(text), 5, "stop", self.revision, self.prompt)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_partition(Unit("train", 0, tuple(KEYS)), map(record, KEYS), tmp_path / "ingest")
    return tmp_path / "ingest"


def partition_of(source: Path) -> Partition:
    report = read_json(source / "train/part-00000.json")
    return Partition(report["name"], report["written"], report["sha256"])


def texts(store: CaptionStore, partition: Partition) -> dict[str, str]:
    return {caption.key: caption.text for caption in store.read(partition)}


def test_a_partition_is_captioned_once(source, tmp_path):
    store, author, partition = (
        CaptionStore(tmp_path / "store", "llava", {"a": 1}),
        ScriptedCaptioner(),
        partition_of(source),
    )
    store.describe()
    first = store.ensure_captioned(partition, source, author)
    assert author.asked == KEYS
    assert store.ensure_captioned(partition, source, author) == first
    assert author.asked == KEYS
    assert texts(store, partition)["k1"] == "Here is raw k1. It is \ufffdseen."
    assert json.loads((store.folder / "about.json").read_text()) == {"captioner": "llava", "a": 1}


def test_checkouts_that_share_a_store_describe_it_together(tmp_path):
    store = CaptionStore(tmp_path / "store", "llava", {"a": 1})
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            (store.folder / "about.json").unlink(missing_ok=True)
            list(pool.map(lambda _: store.describe(), range(8)))
    assert json.loads((store.folder / "about.json").read_text()) == {"captioner": "llava", "a": 1}
    (store.folder / "about.json").write_text("{}")
    store.describe()
    assert json.loads((store.folder / "about.json").read_text()) == {"captioner": "llava", "a": 1}


def test_each_prompt_has_its_own_captions_in_the_store(source, tmp_path):
    partition, author = partition_of(source), ScriptedCaptioner()
    stores = [CaptionStore(tmp_path / "store", "llava", {"prompt": prompt}) for prompt in ("one", "two", "one")]
    for store in stores:
        store.ensure_captioned(partition, source, author)
    assert author.asked == KEYS * 2
    assert stores[0].folder == stores[2].folder != stores[1].folder


def test_changed_images_are_captioned_again(source, tmp_path):
    store, author = CaptionStore(tmp_path / "store", "llava", {}), ScriptedCaptioner()
    store.ensure_captioned(partition_of(source), source, author)
    before = partition_of(source)
    write_partition(Unit("train", 0, ("k8", "k9")), map(record, ["k8", "k9"]), source)
    store.ensure_captioned(partition_of(source), source, author)
    assert author.asked == [*KEYS, "k8", "k9"]
    assert list(texts(store, before)) == KEYS


def test_an_exception_writes_nothing_and_the_next_run_starts_over(source, tmp_path):
    store, partition = CaptionStore(tmp_path / "store", "llava", {}), partition_of(source)
    with pytest.raises(ConnectionError):
        store.ensure_captioned(partition, source, ScriptedCaptioner(breaks_at="k2"))
    assert not [path for path in store.folder.rglob("*") if path.is_file()]
    author = ScriptedCaptioner()
    assert store.ensure_captioned(partition, source, author).written == 4
    assert author.asked == KEYS


def test_only_temporary_failures_are_retried(source, tmp_path):
    store, partition = CaptionStore(tmp_path / "store", "llava", {}), partition_of(source)
    first = store.ensure_captioned(partition, source, ScriptedCaptioner({"k0": "unreadable", "k2": "server"}))
    assert [failure.kind for failure in first.failures] == ["unreadable", "server"]
    author = ScriptedCaptioner()
    second = store.ensure_captioned(partition, source, author)
    assert author.asked == ["k2"]
    assert (second.read, second.written) == (4, 3)
    assert [failure.key for failure in second.failures] == ["k0"]
    assert list(texts(store, partition)) == ["k1", "k2", "k3"]
    store.ensure_captioned(partition, source, author)
    assert author.asked == ["k2"]


def test_a_damaged_partition_is_captioned_again(source, tmp_path):
    store, author, partition = CaptionStore(tmp_path / "store", "llava", {}), ScriptedCaptioner(), partition_of(source)
    store.ensure_captioned(partition, source, author)
    (path,) = store.folder.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    store.ensure_captioned(partition, source, author)
    assert author.asked == KEYS * 2
    assert list(texts(store, partition)) == KEYS


@pytest.mark.parametrize("change", [lambda items: items[:-1], lambda items: [*items, items[0]]])
def test_a_captioner_that_skips_or_repeats_an_image_is_an_error(source, tmp_path, change):
    class Wrong(ScriptedCaptioner):
        def caption(self, records):
            return iter(change(list(super().caption(records))))

    with pytest.raises(AssertionError, match="lost without a reason"):
        CaptionStore(tmp_path / "store", "llava", {}).ensure_captioned(partition_of(source), source, Wrong())


# --- publishing ---------------------------------------------------------------------------------------------------


def captioning(tmp_path: Path, out: str, **changes: Any) -> Captioning:
    """Captions from a table for `k0` to `k2`; the last one is short."""
    table = tmp_path / "captions.csv"
    if not table.exists():
        rows = ["k0,llava,Here is raw k0. It runs.", "k1,llava,A raw thing that runs on", "k2,llava,Two words."]
        table.write_text("\n".join(["key,captioner,text", *rows]) + "\n")
    settings = {"captioners": {"llava": {"kind": "table", "path": str(table)}}, **changes}
    stage = CaptionConfig.model_validate(settings)
    return Captioning("llava", stage, tmp_path / "ingest", tmp_path / "store", tmp_path / out)


def test_a_partition_is_published_with_measures_and_failures(source, tmp_path):
    (report,) = captioning(tmp_path, "out")(partition_of(source))
    assert (report.name, report.read, report.written) == ("train/part-00000", 4, 2)
    assert {failure.key: failure.kind for failure in report.failures} == {"k2": "short", "k3": "missing"}
    rows = read_captions(tmp_path / "out", "train/part-00000").set_index("key")
    assert rows.loc["k0", "sub_captions"] == ["Here is raw k0", "It runs"]
    assert rows["words"].tolist() == [6, 6]
    assert rows["truncated"].tolist() == [False, True]
    assert rows["agreement"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("stored_before", [False, True])
def test_a_caption_without_words_is_never_published(source, tmp_path, monkeypatch, stored_before):
    (tmp_path / "captions.csv").write_text("key,captioner,text\nk0,llava,!!! ???\nk1,llava,A dog\n")
    if stored_before:
        monkeypatch.setattr("lotlip.caption.captioners.table.has_words", lambda text: True)
    (report,) = captioning(tmp_path, "out", quality={"short": None})(partition_of(source))
    assert report.written == 1
    assert {failure.key: failure.kind for failure in report.failures}["k0"] == "empty"


def test_changed_rules_and_tokenizer_do_not_recaption(source, tmp_path):
    captioning(tmp_path, "out")(partition_of(source))
    (stored,) = (tmp_path / "store").rglob("*.parquet")
    before = stored.stat().st_mtime_ns
    (report,) = captioning(tmp_path, "other", quality={"short": None, "truncated": True})(partition_of(source))
    assert {failure.key: failure.kind for failure in report.failures} == {"k1": "truncated", "k3": "missing"}
    assert [path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.parquet")] == [before]
    assert list(read_table(tmp_path / "other", "train/part-00000")["key"]) == ["k0", "k2"]


def test_a_changed_sentence_rule_does_not_recaption(source, tmp_path):
    text = "一只狗在草地上。它在跑！天空是蓝色的？"
    (tmp_path / "captions.csv").write_text(f"key,captioner,text\nk0,llava,{text}\n", encoding="utf-8")
    sub_captions, store_files = {}, set()
    for rule in ("released", "unicode"):
        captioning(tmp_path, rule, sentence_ends=rule)(partition_of(source))
        store_files |= {path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.parquet")}
        sub_captions[rule] = (
            read_captions(tmp_path / rule, "train/part-00000").set_index("key").loc["k0", "sub_captions"]
        )
    assert sub_captions == {"released": [text], "unicode": ["一只狗在草地上", "它在跑", "天空是蓝色的"]}
    assert len(store_files) == 1


def test_a_published_partition_is_not_repeated(source, tmp_path):
    work, partition = captioning(tmp_path, "out"), partition_of(source)
    first = work(partition)
    before = (tmp_path / "out/train/part-00000.parquet").stat().st_mtime_ns
    assert work(partition) == first
    assert (tmp_path / "out/train/part-00000.parquet").stat().st_mtime_ns == before


def test_a_partition_with_changed_images_is_published_again(source, tmp_path):
    work, partition = captioning(tmp_path, "out"), partition_of(source)
    work(partition)
    before = (tmp_path / "out/train/part-00000.parquet").stat().st_mtime_ns
    work(replace(partition, sha256="0" * 64))
    assert (tmp_path / "out/train/part-00000.parquet").stat().st_mtime_ns > before


def test_an_image_that_failed_on_the_server_is_retried(source, tmp_path, monkeypatch):
    from lotlip.caption.captioners import table

    lookup = table.TableCaptioner._caption
    with monkeypatch.context() as patch:
        patch.setattr(table.TableCaptioner, "_caption", lambda self, key: Failure(key, "there", "status 500", "server"))
        (failed,) = captioning(tmp_path, "out")(partition_of(source))
    assert table.TableCaptioner._caption is lookup
    (report,) = captioning(tmp_path, "out")(partition_of(source))
    assert (failed.written, report.written) == (0, 2)


def test_a_captioner_is_opened_once_per_process(source, tmp_path):
    assert captioning(tmp_path, "out").author() is captioning(tmp_path, "other").author()


def test_captioning_can_be_pickled(source, tmp_path):
    import pickle

    work = captioning(tmp_path, "out")
    assert pickle.loads(pickle.dumps(work))(partition_of(source)) == work(partition_of(source))
