"""Tars of img2dataset, complete and broken, on disk and on an S3 server on loopback."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lotlip.data.keys import key_of
from lotlip.data.partitions import read_table, write_partitions
from lotlip.data.records import Failure, ImageRecord
from lotlip.ingest.config import ImagesConfig
from lotlip.ingest.config import WebDatasetSourceConfig as Settings
from lotlip.ingest.sources import open_source
from lotlip.ingest.sources.webdataset import WebDatasetSource
from lotlip.ingest.split import split_of

URL = "https://example.org/a/{}.jpg?x=1&y=2"


def image_bytes(form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, form)
    return file.getvalue()


def sample(number: int, caption: str | None = "a red dot") -> dict[str, bytes]:
    """The members of a sample of img2dataset. Without a caption, the txt is empty and the json has null."""
    name = f"{number:09d}"
    info = {"caption": caption, "url": URL.format(number), "key": name, "status": "success", "exif": "{}"}
    txt = (caption or "").encode()
    return {f"{name}.jpg": image_bytes(), f"{name}.txt": txt, f"{name}.json": json.dumps(info, indent=4).encode()}


def samples(count: int) -> dict[str, bytes]:
    return {name: data for number in range(count) for name, data in sample(number).items()}


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def source(path: Path, images: ImagesConfig | None = None, **settings: object) -> WebDatasetSource:
    opened = open_source(Settings(kind="webdataset", path=path, **settings), images)
    assert isinstance(opened, WebDatasetSource)
    return opened


def read_all(path: Path, images: ImagesConfig | None = None, **settings: object) -> list[ImageRecord | Failure]:
    opened = source(path, images, **settings)
    return [item for unit in opened.units(2) for item in opened.read(unit)]


def kinds(items: list[ImageRecord | Failure]) -> list[tuple[str, str]]:
    """Key and failure kind of each item; the kind of a record is empty."""
    return [(item.key, item.kind if isinstance(item, Failure) else "") for item in items]


def test_tars_of_img2dataset_are_read(tmp_path):
    write_tar(tmp_path / "00000.tar", samples(3))
    write_tar(tmp_path / "00001.tar", sample(10003))
    (tmp_path / "00000.parquet").write_bytes(b"its log")
    (tmp_path / "00000_stats.json").write_text("{}")
    records = read_all(tmp_path)
    assert kinds(records) == [(f"{number:09d}", "") for number in (0, 1, 2, 10003)]
    first = records[0]
    assert isinstance(first, ImageRecord)
    assert (first.image, first.extension, first.short_caption) == (image_bytes(), "jpg", "a red dot")
    assert [unit.name for unit in source(tmp_path).units(1)] == ["part-00000", "part-00001"]  # without splits


def test_keys_begin_with_their_folders(tmp_path):
    for place in ("cc3m/00000.tar", "cc12m/extra/00000.tar", ".hidden/00000.tar"):
        write_tar(tmp_path / place, sample(7))
    assert kinds(read_all(tmp_path)) == [("cc12m_extra_000000007", ""), ("cc3m_000000007", "")]


def test_single_and_compressed_tars_are_read(tmp_path):
    assert len(read_all(write_tar(tmp_path / "a.tar", samples(2)))) == 2
    endings = {"tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tbz2": "w:bz2", "tar.xz": "w:xz", "txz": "w:xz"}
    for ending, mode in endings.items():
        for path in (write_tar(tmp_path / f"{ending}/b.{ending}", samples(2), mode), tmp_path / ending):
            assert [kind for _, kind in kinds(read_all(path))] == ["", ""]


def test_a_failure_without_a_caption_names_what_the_sample_has(tmp_path):
    members = {"a.jpg": image_bytes(), "a.0.txt": b"a dog", "a.json": b'{"text": "a dog", "width": 7}'}
    path = write_tar(tmp_path / "0.tar", members)
    (item,) = read_all(path)
    has = "it has jpg, 0.txt, json, and in its json text, width; set ingest.source.caption or caption_field if"
    assert isinstance(item, Failure) and item.kind == "missing" and has in item.reason
    for settings in ({"caption": "0.txt"}, {"caption_field": "text"}):
        (item,) = read_all(path, **settings)
        assert isinstance(item, ImageRecord) and item.short_caption == "a dog"


@pytest.mark.parametrize("name", ["1.tar.zst", "more/1.TAR.LZ4", "1.tgz.part", "1.tar.gz.zip"])
def test_a_tar_of_an_unsupported_compression_is_an_error(tmp_path, name):
    write_tar(tmp_path / "0.tar", samples(2))
    (tmp_path / "0.tar.zst").touch()  # is there decompressed, too
    assert len(read_all(tmp_path)) == 2
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} cannot be read, .* decompress or download them, or move them out"):
        source(tmp_path)


def test_a_list_may_hold_paths_patterns_ranges_and_prefixes(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"data/cc3m/{number:05d}.tar", sample(number))
    write_tar(tmp_path / "data/more/x y=1.tar", sample(9))
    lines = f"# data\n\ncc3m = {tmp_path}/data/cc3m/{{00000..00001}}.tar\n{tmp_path}/data/cc3m/*2.tar\n"
    (tmp_path / "list.txt").write_text(lines + f"  {tmp_path}/data/more/x y=1.tar  \n")
    assert kinds(read_all(tmp_path / "list.txt")) == [
        ("cc3m_000000000", ""),
        ("cc3m_000000001", ""),
        ("000000002", ""),
        ("000000009", ""),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nowhere/*.tar", r"list\.txt, line 2: nothing matches /nowhere/\*\.tar"),
        ("nostore://bucket/a.tar", r"line 2: nostore://bucket/a\.tar cannot be used: Protocol not known: nostore"),
        ("a.tar\nb.tar\na.tar", r"line 4: a\.tar is already on line 2"),
    ],
)
def test_an_invalid_line_of_a_list_is_an_error(tmp_path, line, message):
    (tmp_path / "list.txt").write_text(f"# tars\n{line}\n")
    with pytest.raises(ValueError, match=message):
        source(tmp_path / "list.txt")


def test_a_path_without_tars_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "photo.jpg").write_bytes(image_bytes())
    for name, words in (("nowhere", "does not exist"), (".", "has no tar"), ("empty.txt", "has no tar")):
        with pytest.raises(ValueError, match=rf"{words}; set ingest\.source\.path in params\.yaml"):
            source(tmp_path / name)
    with pytest.raises(ValueError, match=r"photo\.jpg is neither a tar nor a text file"):
        source(tmp_path / "photo.jpg")


def test_captions_come_from_txt_or_else_from_json(tmp_path):
    members = [
        ("a.jpg", image_bytes()), ("a.txt", b"from txt"), ("a.json", b'{"caption": "from json", "alt": "alt"}'),
        ("b.jpg", image_bytes()), ("b.json", b'{"caption": "from json", "alt": "alt"}'),
        ("c.jpg", image_bytes()), ("c.txt", b"  "), ("c.json", b'{"caption": "from json"}'),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert [item.short_caption for item in read_all(path)] == ["from txt", "from json", "from json"]
    items = read_all(path, caption=None, caption_field="alt")
    assert [getattr(item, "short_caption", None) for item in items] == ["alt", "alt", None]


def test_incomplete_and_broken_samples_are_failures(tmp_path):
    members = [
        *sample(0, caption=None).items(),
        ("no-image.txt", b"a"),
        ("no-caption.jpg", image_bytes()),
        ("empty.jpg", image_bytes()), ("empty.txt", b" "),
        ("number.jpg", image_bytes()), ("number.json", b'{"caption": 7}'),
        ("bad-json.jpg", image_bytes()), ("bad-json.json", b"{"),
        ("deep-json.jpg", image_bytes()), ("deep-json.json", b"[" * 100_000),
        ("list-json.jpg", image_bytes()), ("list-json.json", b"[]"),
        ("latin.jpg", image_bytes()), ("latin.txt", b"K\xe4se"),
        ("half.jpg", image_bytes()), ("half.json", b'{"caption": "\\ud83d"}'),
        ("cut.jpg", image_bytes()[:99]), ("cut.txt", b"a"),
        ("My.photo.jpg", image_bytes()), ("My.photo.txt", b"a"),
        ("fine.jpg", image_bytes()), ("fine.txt", b"a"),
    ]  # fmt: skip
    items = read_all(write_tar(tmp_path / "a.tar", members))
    assert kinds(items) == [
        ("000000000", "missing"),
        ("no-image", "missing"),
        ("no-caption", "missing"),
        ("empty", "empty"),
        ("number", "missing"),
        ("bad-json", "encoding"),
        ("deep-json", "encoding"),
        ("list-json", "encoding"),
        ("latin", "encoding"),
        ("half", "encoding"),
        ("cut", "unreadable"),
        ("My", "missing"),
        ("fine", ""),
    ]
    assert items[1].where == f"{tmp_path}/a.tar: no-image"
    assert "only photo.jpg, photo.txt" in items[11].reason


def test_keys_may_come_from_a_field_of_the_json(tmp_path):
    write_tar(tmp_path / "cc3m/00000.tar", {**samples(2), "x.jpg": image_bytes(), "x.txt": b"a"})
    items = read_all(tmp_path, key="url")
    assert kinds(items) == [
        (key_of(URL.format(0), "cc3m"), ""),
        (key_of(URL.format(1), "cc3m"), ""),
        ("cc3m_x", "missing"),
    ]
    assert items[0].key.startswith("cc3m_url-")


def test_a_repeated_key_is_a_duplicate(tmp_path):
    members = [*sample(0).items(), *sample(1).items(), *sample(0).items(), *sample(1).items(), *sample(1).items()]
    items = read_all(write_tar(tmp_path / "a.tar", members))
    duplicates = [("000000000", "duplicate"), ("000000001", "duplicate"), ("000000001", "duplicate")]
    assert kinds(items) == [("000000000", ""), ("000000001", ""), *duplicates]


def test_members_outside_samples_are_ignored(tmp_path):
    ignored = {"README": b"x", "._000000000.jpg": b"x", "000000000.npy": b"x", ".cache/a.jpg": b"x"}
    with tarfile.open(write_tar(tmp_path / "a.tar", {**samples(1), **ignored}), "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert kinds(read_all(tmp_path)) == [("000000000", "")]


def test_unsafe_members_are_failures_and_write_no_file(tmp_path, monkeypatch):
    names = ("/etc/a.jpg", "../b.jpg", "c/../../d.jpg", "C:\\e.jpg")
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("f.jpg", tarfile.SYMTYPE), ("g.jpg", tarfile.LNKTYPE), ("h.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        data = image_bytes()
        member = tarfile.TarInfo("./i.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    items = read_all(path)
    assert [kind for _, kind in kinds(items)] == ["unsafe"] * 7 + ["missing"]
    assert items[-1].key == "i"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_above_the_size_limit_is_a_failure(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"\0" * 5000, "a.txt": b"a", **sample(1)})
    items = read_all(path, ImagesConfig(max_bytes=4999))
    assert kinds(items) == [("a", "too-large"), ("000000001", "")]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_member_larger_than_the_tar_is_a_truncation(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", samples(2))
    data = path.read_bytes().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    path.write_bytes(data + header("huge.jpg", 10 * 2**40, kind) + b"x" * 2**16)
    items = read_all(path)
    # the last sample before a truncation may be incomplete
    *complete, last = kinds(items)
    assert last[1] == "truncated" and {kind for _, kind in complete} == {""}


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_truncated_tar_yields_the_samples_before_the_cut(tmp_path, ending):
    path = write_tar(tmp_path / f"a.{ending}", samples(4), "w:gz" if ending == "tar.gz" else "w")
    items, data = read_all(path), path.read_bytes()
    end = (
        len(data) if ending == "tar.gz" else len(data.rstrip(b"\0")) // 512 * 512 + 512
    )  # without the end-of-archive blocks
    counts = set()
    for cut in range(600, end, 256) if ending == "tar" else range(end // 3, end - 30, 7):
        path.write_bytes(data[:cut])
        *before, last = read_all(path)
        assert isinstance(last, Failure) and last.kind == "truncated" and str(path) in last.where
        assert before == items[: len(before)]
        assert f"after {before[-1].key}, its last complete" in last.reason if before else "in its first" in last.reason
        counts.add(len(before))
    assert counts == {0, 1, 2, 3} if ending == "tar" else len(counts) > 1


def test_garbage_inside_a_tar_is_a_truncation(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = path.read_bytes()
    place = data.index(b"000000001.txt")
    path.write_bytes(data[:place] + b"?" * 512 + data[place + 512 :])
    assert [kind for _, kind in kinds(read_all(path))] == ["", "truncated"]


JOINED = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}


@pytest.mark.parametrize("ending", JOINED)
@pytest.mark.parametrize("padding", [0, 512, 10240])
def test_concatenated_tars_are_read_to_the_end(tmp_path, ending, padding):
    parts = [
        write_tar(tmp_path / f"{number}.{ending}", sample(number), JOINED[ending]).read_bytes() for number in range(3)
    ]
    path = tmp_path / "all" / f"a.{ending}"
    path.parent.mkdir()
    path.write_bytes(b"".join(part + bytes(padding) for part in parts))
    assert kinds(read_all(path)) == [(f"{number:09d}", "") for number in range(3)]


def test_gzip_members_may_begin_anywhere_in_a_tar(tmp_path):
    data = write_tar(tmp_path / "a.tar", samples(3)).read_bytes()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"".join(gzip.compress(data[start : start + 777]) for start in range(0, len(data), 777)))
    assert len(read_all(path)) == 3


@pytest.mark.parametrize("ending", JOINED)
@pytest.mark.parametrize("rubbish", [b"\n", b"x" * 3000, bytes(5000) + b"PK" + bytes(5000)])
def test_garbage_after_a_tar_is_a_failure(tmp_path, ending, rubbish):
    path = write_tar(tmp_path / f"a.{ending}", samples(2), JOINED[ending])
    path.write_bytes(path.read_bytes() + rubbish)
    *complete, last = read_all(path)
    assert kinds(complete) == [("000000000", ""), ("000000001", "")]
    assert isinstance(last, Failure) and last.kind == "truncated"
    assert any(words in last.reason for words in ("the archive is followed", "the data after"))


@pytest.mark.parametrize("ending", JOINED)
def test_a_truncated_concatenated_tar_is_a_failure(tmp_path, ending):
    first = write_tar(tmp_path / f"a.{ending}", sample(0), JOINED[ending]).read_bytes()
    path = write_tar(tmp_path / f"b.{ending}", sample(1), JOINED[ending])
    data = path.read_bytes()
    path.write_bytes(first + data[: len(data) // 2 if ending != "tar" else 700])
    assert kinds(read_all(path))[0] == ("000000000", "")
    assert kinds(read_all(path))[-1] == ("000000000", "truncated")


def test_files_of_macos_are_ignored(tmp_path):
    members = {"._a.jpg": b"x", "__MACOSX/._a.jpg": b"x", "__MACOSX/b.jpg": b"x", ".DS_Store": b"x", **sample(0)}
    write_tar(tmp_path / "A.TAR", members)
    write_tar(tmp_path / "._A.TAR", {"a.jpg": b"x"})
    write_tar(tmp_path / "__MACOSX/a.tar", {"a.jpg": b"x"})
    assert kinds(read_all(tmp_path)) == [("000000000", "")]


def test_each_unreadable_tar_is_one_failure(tmp_path):
    write_tar(tmp_path / "tars/0.tar", sample(0))
    (tmp_path / "tars/1.tar").write_bytes(b"<html>403</html>")
    (tmp_path / "tars/2.tar").write_bytes(b"")
    (tmp_path / "tars/3.tar").write_bytes(b"x" * 5000)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/tars/{{0..4}}.tar\n{tmp_path}/tars\n")
    items = read_all(tmp_path / "list.txt")
    assert [kind for _, kind in kinds(items)] == ["", *["unreadable-shard"] * 5]
    assert items[-1].where == f"{tmp_path}/tars"


def test_a_unit_is_split_into_partitions_by_its_keys(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(40))
    settings = Settings(kind="webdataset", path=path, val_share=0.2, test_share=0.3, split_seed=1)
    opened = open_source(settings)
    (unit,) = opened.units(10)
    reports = write_partitions(unit, opened.read(unit), tmp_path / "out", opened.split)
    assert [report.name.split("/")[0] for report in reports] == ["train", "val", "test"]
    assert sum(report.written for report in reports) == 40
    for report in reports:
        keys = read_table(tmp_path / "out", report.name)["key"]
        assert {split_of(key, settings) for key in keys} == {report.name.split("/")[0]}


# --- on S3 --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tars_are_read_from_s3(tmp_path, s3):
    from s3fs import S3FileSystem

    system = S3FileSystem()
    system.mkdir("bucket")
    for number in range(3):
        path = write_tar(tmp_path / "one.tar", sample(number))
        system.put_file(str(path), f"bucket/cc3m/{number:05d}.tar")
    cut = write_tar(tmp_path / "cut.tar", samples(2)).read_bytes()
    system.pipe_file("bucket/cut.tar", cut[: cut.index(b"000000001.json")])
    joined = [write_tar(tmp_path / "one.tar.gz", sample(number), "w:gz").read_bytes() for number in (3, 4)]
    system.pipe_file("bucket/joined.tar.gz", b"".join(joined))
    lines = ["cc3m = s3://bucket/cc3m/{00000..00001}.tar", "s3://bucket/cc3m/*2.tar", "s3://bucket/cut.tar"]
    lines.append("s3://bucket/joined.tar.gz")
    (tmp_path / "list.txt").write_text("\n".join([*lines, "s3://bucket/gone.tar", "s3://nobody/gone.tar"]))
    items = read_all(tmp_path / "list.txt")
    assert kinds(items) == [
        ("cc3m_000000000", ""),
        ("cc3m_000000001", ""),
        ("000000002", ""),
        ("000000000", ""),
        ("000000000", "truncated"),
        ("000000003", ""),
        ("000000004", ""),
        ("s3://bucket/gone.tar", "unreadable-shard"),
        ("s3://nobody/gone.tar", "unreadable-shard"),
    ]


def test_an_unreachable_store_raises_oserror(tmp_path, monkeypatch):
    """A unit that raises OSError is retried."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    (tmp_path / "list.txt").write_text("s3://bucket/a.tar")
    opened = source(tmp_path / "list.txt")
    (unit,) = opened.units(1)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        list(opened.read(unit))
    S3FileSystem.clear_instance_cache()
