"""Work units of an interrupted or failed run are reused only while their inputs are unchanged."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import lotlip.ingest.partition
import lotlip.shard.sharding
from flows.runtime import stage as stages
from flows.runtime.scratch import StageFailed
from flows.stages.caption import caption
from flows.stages.ingest import ingest
from flows.stages.shard import shard
from lotlip.caption.partition import Captioning
from lotlip.core.checks import GateFailed
from lotlip.data.index import UnitIndex, read_index
from lotlip.data.partitions import read_captions, read_records, read_table, unit_names
from tests.flows.test_stage import run_now

ROOT = Path(__file__).parents[2]


def image_bytes(number: int) -> bytes:
    """A small image that depends on the number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def add_image(folder: Path, name: str, number: int, text: str = "") -> Path:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(number))
    path.with_suffix(".txt").write_text(text or f"a picture of number {number}")
    return path


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_pages: None) -> Path:
    """A project whose flows run as plain functions, without Prefect."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "profiles" / "own-images.yaml", "params.yaml")
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(stages, "task_runner", lambda *_: nullcontext(run_now))
    monkeypatch.setattr(stages, "as_completed", list)
    change(lambda params: params.update(compute={"retries": 0, "retry_delay_seconds": 0}))
    change(lambda params: params["ingest"].update(partition_size=10))
    change(lambda params: params["ingest"]["source"].update(val_share=0, test_share=0))
    change(lambda params: params["evaluate"].update(benchmarks={"urban-1k": {"folder": "data/urban"}}))
    return tmp_path


def change(edit: Callable[[dict[str, Any]], Any]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    edit(params)
    Path("params.yaml").write_text(yaml.safe_dump(params))


def run_interrupted(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], module: Any, name: str, units: int = 1
) -> None:
    """Runs a stage that is stopped after some units."""
    write = getattr(module, name)
    done = 0

    def stop(*arguments: Any, **more: Any) -> Any:
        nonlocal done
        if done == units:
            raise KeyboardInterrupt
        done += 1
        return write(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run()


def interrupt_ingest(monkeypatch: pytest.MonkeyPatch, units: int = 1) -> None:
    run_interrupted(monkeypatch, ingest.fn, lotlip.ingest.partition, "write_partitions", units)


def captions(folder: str = "data/ingest") -> dict[str, str]:
    """Key → short caption of all published images."""
    texts = {}
    for name in unit_names(Path(folder)):
        table = read_table(Path(folder), name, ["key", "short_caption"])
        texts |= dict(zip(table["key"], table["short_caption"], strict=True))
    return texts


def files(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- ingest: a folder ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_added_after_an_interruption_is_read(project: Path, monkeypatch) -> None:
    for number in range(250):
        add_image(project / "my-images", f"{number:04d}", number)
    change(lambda params: params["ingest"].update(partition_size=100))
    interrupt_ingest(monkeypatch)
    add_image(project / "my-images", "0", 9999, "the new one")  # sorts first
    ingest.fn()
    captions_found = captions()
    assert len(captions_found) == 251
    assert captions_found["0"] == "the new one"


@pytest.mark.slow
def test_unchanged_units_are_not_read_again(project: Path, monkeypatch) -> None:
    for number in range(30):
        add_image(project / "my-images", f"{number:02d}", number)
    interrupt_ingest(monkeypatch, units=2)
    add_image(project / "my-images", "29", 77, "other")
    units_read: list[str] = []
    write = lotlip.ingest.partition.write_partitions

    def counted(unit: Any, *more: Any) -> Any:
        units_read.append(unit.name)
        return write(unit, *more)

    monkeypatch.setattr(lotlip.ingest.partition, "write_partitions", counted)
    ingest.fn()
    assert units_read == ["train/part-00002"]
    assert captions()["29"] == "other"


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["image", "caption", "deleted", "same size and time"])
def test_a_changed_item_is_read_again_after_an_interruption(project: Path, monkeypatch, changed) -> None:
    for number in range(20):
        path = add_image(project / "my-images", f"{number:02d}", number)
    path = project / "my-images" / "03.png"
    text = path.with_suffix(".txt")
    interrupt_ingest(monkeypatch)
    if changed == "image":
        path.write_bytes(image_bytes(500))
    elif changed == "caption":
        text.write_text("rewritten")
    elif changed == "deleted":
        path.unlink()
        text.unlink()
    else:
        before = text.stat()
        text.write_text("a picture of number X")
        os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    ingest.fn()
    records = {
        one.key: one for name in unit_names(Path("data/ingest")) for one in read_records(Path("data/ingest"), name)
    }
    if changed == "deleted":
        assert "03" not in records and len(records) == 19
    elif changed == "image":
        assert records["03"].image == image_bytes(500)
    else:
        assert records["03"].short_caption == text.read_text()


@pytest.mark.slow
def test_a_folder_repaired_after_its_gate_failed_passes(project: Path) -> None:
    for number in range(20):
        path = add_image(project / "my-images", f"{number:02d}", number)
        if number < 10:
            path.with_suffix(".txt").write_text("")
    with pytest.raises(GateFailed):
        ingest.fn()
    for number in range(10):
        path = project / "my-images" / f"{number:02d}.png"
        if number % 2:
            path.with_suffix(".txt").write_text(f"now it has caption {number}")
        else:
            path.unlink()
            path.with_suffix(".txt").unlink()
    ingest.fn()
    assert len(captions()) == 15


@pytest.mark.slow
def test_a_freed_key_is_used_after_an_interruption(project: Path, monkeypatch) -> None:
    """Whether an item is a duplicate depends on the items of other units."""
    change(lambda params: params["ingest"].update(partition_size=1))
    add_image(project / "my-images", "a/b", 1)
    add_image(project / "my-images", "a_b", 2, "the second")
    add_image(project / "my-images", "c", 3)
    interrupt_ingest(monkeypatch, units=2)
    (project / "my-images/a/b.png").rename(project / "my-images/a/z.png")
    (project / "my-images/a/b.txt").rename(project / "my-images/a/z.txt")
    ingest.fn()
    assert set(captions()) == {"a_z", "a_b", "c"}


@pytest.mark.slow
def test_published_files_do_not_depend_on_times_or_interruptions(project: Path, monkeypatch) -> None:
    for number in range(20):
        add_image(project / "my-images", f"{number:02d}", number)
    ingest.fn()
    first = files("data/ingest")
    for path in (project / "my-images").iterdir():
        os.utime(path, (1, 1))
    shutil.rmtree("data")
    interrupt_ingest(monkeypatch)
    ingest.fn()
    assert files("data/ingest") == first


@pytest.mark.slow
def test_a_source_that_changes_while_it_is_read_is_not_published(project: Path, monkeypatch) -> None:
    for number in range(20):
        add_image(project / "my-images", f"{number:02d}", number)
    write = lotlip.ingest.partition.write_partitions

    def touched(unit: Any, *more: Any) -> Any:
        reports = write(unit, *more)
        add_image(project / "my-images", "05", 5, "rewritten meanwhile")
        return reports

    with monkeypatch.context() as patch:
        patch.setattr(lotlip.ingest.partition, "write_partitions", touched)
        with pytest.raises(StageFailed, match="train/part-00000"):
            ingest.fn()
    assert not Path("data/ingest").exists()
    ingest.fn()
    assert captions()["05"] == "rewritten meanwhile"


# --- ingest: other sources ----------------------------------------------------------------------------------------


def tar_of(path: Path, numbers: range, text: str = "number") -> None:
    import tarfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for ending, data in (("png", image_bytes(number)), ("txt", f"{text} {number}".encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def use(**source: Any) -> None:
    change(lambda params: params["ingest"].update(source={**source, "val_share": 0, "test_share": 0}))


@pytest.mark.slow
def test_a_replaced_tar_is_read_again(project: Path, monkeypatch) -> None:
    use(kind="webdataset", path="raw", images=["png"])
    for number in range(3):
        tar_of(project / f"raw/{number}.tar", range(10 * number, 10 * number + 10))
    interrupt_ingest(monkeypatch, units=2)
    size = (project / "raw/0.tar").stat().st_size
    tar_of(project / "raw/0.tar", range(10), "NUMBER")
    assert (project / "raw/0.tar").stat().st_size == size
    ingest.fn()
    assert captions()["000"] == "NUMBER 0"
    assert captions()["010"] == "number 10"


@pytest.mark.slow
def test_a_changed_tar_of_a_store_is_read_again(project: Path, monkeypatch) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    use(kind="webdataset", path="list.txt", images=["png"])
    (project / "list.txt").write_text("memory://raw/{0..1}.tar\n")
    for number in range(2):
        tar_of(project / "one.tar", range(10 * number, 10 * number + 10))
        system.pipe_file(f"/raw/{number}.tar", (project / "one.tar").read_bytes())
    interrupt_ingest(monkeypatch)
    tar_of(project / "one.tar", range(10), "NUMBER")
    system.pipe_file("/raw/0.tar", (project / "one.tar").read_bytes())
    ingest.fn()
    assert captions()["000"] == "NUMBER 0"


@pytest.mark.slow
def test_a_tar_that_the_store_refused_is_requested_again(project: Path) -> None:
    use(kind="webdataset", path="list.txt", images=["png"])
    (project / "list.txt").write_text("raw/0.tar\nraw/1.tar\n")
    tar_of(project / "raw/0.tar", range(10))
    with pytest.raises(GateFailed):
        ingest.fn()
    tar_of(project / "raw/1.tar", range(10, 20))
    ingest.fn()
    assert len(captions()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "parquet of images"])
@pytest.mark.parametrize("changed", ["row", "image"])
def test_a_changed_row_or_image_of_a_table_is_read_again(project: Path, monkeypatch, kind, changed) -> None:
    import pandas as pd

    table = project / f"raw.{kind.split()[0]}"
    for number in range(20):
        add_image(project / "images", f"{number:02d}", number)

    def write(first: str, data: bytes) -> None:
        images: list[Any] = [f"{number:02d}.png" for number in range(20)]
        if kind == "parquet of images":
            images = [{"bytes": None, "path": images[0]}] + [
                {"bytes": image_bytes(n), "path": None} for n in range(1, 20)
            ]
        (project / "images/00.png").write_bytes(data)
        frame = pd.DataFrame({"image": images, "caption": [first] + [f"row {n}" for n in range(1, 20)]})
        frame["id"] = [f"k{number}" for number in range(20)]
        if kind == "csv":
            frame.to_csv(table, index=False)
        elif kind in ("json", "jsonl"):
            frame.to_json(table, orient="records", lines=kind == "jsonl")
        else:
            frame.to_parquet(table)

    write("row 0", image_bytes(0))
    use(kind=kind.split()[0], path=table.name, images="images", key="id")
    interrupt_ingest(monkeypatch)
    if changed == "row":
        write("ROW 0", image_bytes(0))
    else:
        (project / "images/00.png").write_bytes(image_bytes(300))
    ingest.fn()
    (first,) = (
        one
        for name in unit_names(Path("data/ingest"))
        for one in read_records(Path("data/ingest"), name)
        if one.key == "k0"
    )
    assert (first.short_caption, first.image) == (
        ("ROW 0", image_bytes(0)) if changed == "row" else ("row 0", image_bytes(300))
    )


# --- captions and shards ------------------------------------------------------------------------------------------


@pytest.fixture
def captioned_project(project: Path) -> Path:
    """A project with thirty ingested images and a table of captions."""
    for number in range(30):
        add_image(project / "my-images", f"{number:02d}", number)
    write_table(project, "It is")
    entry = {"kind": "table", "path": "captions.csv"}
    change(lambda params: params["caption"].update(captioners={"mine": entry}, max_repeated_share=1.0))
    change(lambda params: params["shard"].update(store_features=False, samples_per_shard=10))
    ingest.fn()
    return project


def write_table(project: Path, words: str) -> None:
    rows = [f"{number:02d},mine,{words} a picture of number {number}. It has dots." for number in range(30)]
    (project / "captions.csv").write_text("\n".join(["key,captioner,text", *rows]) + "\n")


def long_captions() -> dict[str, str]:
    folder = Path("data/captions/mine")
    texts = {}
    for name in unit_names(folder):
        table = read_captions(folder, name, ["key", "text"])
        texts |= dict(zip(table["key"], table["text"], strict=True))
    return texts


@pytest.mark.slow
def test_captions_of_a_changed_table_are_read_again_after_an_interruption(captioned_project: Path, monkeypatch) -> None:
    def run() -> None:
        caption.fn("mine")

    run_interrupted(monkeypatch, run, Captioning, "write")
    assert not Path("data/captions/mine").exists()
    write_table(captioned_project, "Now it is")
    caption.fn("mine")
    assert all(text.startswith("Now it is") for text in long_captions().values())


@pytest.mark.slow
def test_a_table_that_changes_while_it_is_read_is_not_published(captioned_project: Path, monkeypatch) -> None:
    write = Captioning.write

    def rewritten(self: Captioning, partition: Any) -> Any:
        report = write(self, partition)
        write_table(captioned_project, "Now it is")
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Captioning, "write", rewritten)
        with pytest.raises(StageFailed, match=r"captions\.csv"):
            caption.fn("mine")
    assert not Path("data/captions/mine").exists()
    caption.fn("mine")
    assert all(text.startswith("Now it is") for text in long_captions().values())


def test_a_changed_partition_is_captioned_again_under_an_unchanged_index(captioned_project: Path, monkeypatch) -> None:
    """A unit compares its own inputs, whatever the stage's fingerprint covers."""
    from dataclasses import replace

    from lotlip.caption.store import Partition
    from lotlip.config.params import load_params

    config = load_params().caption
    work = Captioning("mine", config, Path("data/ingest"), Path("store"), Path("work/out"))
    unit = read_index(Path("data/ingest"), UnitIndex).units[0]
    partition = Partition(unit.name, unit.written, unit.sha256)
    hashes: list[str] = []
    write = Captioning.write

    def counted(self: Captioning, partition: Partition) -> Any:
        hashes.append(partition.sha256)
        return write(self, partition)

    monkeypatch.setattr(Captioning, "write", counted)
    first = work(partition)
    assert work(partition) == first
    work(replace(partition, sha256="0" * 64))
    assert hashes == [partition.sha256, "0" * 64]


@pytest.mark.slow
def test_shards_are_rewritten_when_captions_changed_after_an_interruption(captioned_project: Path, monkeypatch) -> None:
    import tarfile

    caption.fn("mine")
    run_interrupted(monkeypatch, shard.fn, lotlip.shard.sharding, "write_shard")
    write_table(captioned_project, "Now it is")
    caption.fn("mine")
    shard.fn()
    texts = []
    for path in Path("data/shards").glob("*.tar"):
        assert path.with_suffix(".token-ids.arrow").is_file()
        with tarfile.open(path) as tar:
            texts += [tar.extractfile(member).read() for member in tar if member.name.endswith(".json")]
    assert len(texts) == 30
    assert all(b"Now it is" in text for text in texts)


@pytest.mark.slow
def test_inputs_of_units_are_not_published(captioned_project: Path) -> None:
    caption.fn("mine")
    shard.fn()
    for folder in ("data/ingest", "data/captions/mine", "data/shards"):
        assert not [name for name in files(folder) if "input" in name]
        assert not any(b'"input' in data for name, data in files(folder).items() if name.endswith(".json"))


# --- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_copies_are_counted_separately_and_pass_by_default(project: Path) -> None:
    for number in range(40):
        add_image(project / "my-images", f"{number:02d}", number % 20, f"caption {number}")
    ingest.fn()
    index = read_index(Path("data/ingest"), UnitIndex)
    assert (index.read, index.written) == (40, 20)
    assert index.failure_kinds == {"duplicate-image": 20}


@pytest.mark.slow
def test_copies_have_their_own_limit(project: Path) -> None:
    change(lambda params: params["ingest"].update(max_left_out_share=0.4))
    for number in range(40):
        add_image(project / "my-images", f"{number:02d}", number % 20, f"caption {number}")
    with pytest.raises(GateFailed, match=r"50 % \(20 duplicate-image\).*ingest\.max_left_out_share"):
        ingest.fn()


@pytest.mark.slow
def test_duplicate_keys_are_still_failures(project: Path) -> None:
    for number in range(10):
        add_image(project / "my-images", f"{number}/a", number)
        add_image(project / "my-images", f"{number}_a", 100 + number)
    with pytest.raises(GateFailed, match=r"50 % \(10 duplicate\).*ingest\.max_failure_share"):
        ingest.fn()


@pytest.mark.slow
def test_all_failed_limits_are_shown_with_their_keys(project: Path) -> None:
    change(lambda params: params["ingest"].update(max_left_out_share=0, max_repeated_caption_share=0.1))
    for number in range(20):
        path = add_image(project / "my-images", f"{number:02d}", number, "the same")
        if number < 5:
            path.with_suffix(".txt").unlink()
    add_image(project / "my-images", "copy", 19, "the same")
    with pytest.raises(GateFailed) as raised:
        ingest.fn()
    message = str(raised.value)
    for key in ("max_failure_share", "max_left_out_share", "max_repeated_caption_share"):
        assert f"ingest.{key}" in message
