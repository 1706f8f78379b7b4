"""Tars as img2dataset leaves them, whole and broken, on disk and on an S3 server of this machine."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
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


def picture(form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, form)
    return file.getvalue()


def sample(number: int, caption: str | None = "a red dot") -> dict[str, bytes]:
    """The members of a sample as img2dataset writes them; without a caption its txt is empty and its json has null."""
    name = f"{number:09d}"
    info = {"caption": caption, "url": URL.format(number), "key": name, "status": "success", "exif": "{}"}
    txt = (caption or "").encode()
    return {f"{name}.jpg": picture(), f"{name}.txt": txt, f"{name}.json": json.dumps(info, indent=4).encode()}


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
    found = open_source(Settings(kind="webdataset", path=path, **settings), images)
    assert isinstance(found, WebDatasetSource)
    return found


def read_all(path: Path, images: ImagesConfig | None = None, **settings: object) -> list[ImageRecord | Failure]:
    opened = source(path, images, **settings)
    return [item for unit in opened.units(2) for item in opened.read(unit)]


def kinds(items: list[ImageRecord | Failure]) -> list[tuple[str, str]]:
    """Key and kind of failure of each item, none for a record."""
    return [(item.key, item.kind if isinstance(item, Failure) else "") for item in items]


def test_what_img2dataset_leaves_comes_in(tmp_path):
    write_tar(tmp_path / "00000.tar", samples(3))
    write_tar(tmp_path / "00001.tar", sample(10003))
    (tmp_path / "00000.parquet").write_bytes(b"its log")
    (tmp_path / "00000_stats.json").write_text("{}")
    records = read_all(tmp_path)
    assert kinds(records) == [(f"{number:09d}", "") for number in (0, 1, 2, 10003)]
    first = records[0]
    assert isinstance(first, ImageRecord)
    assert (first.image, first.extension, first.short_caption) == (picture(), "jpg", "a red dot")
    assert [unit.name for unit in source(tmp_path).units(1)] == ["part-00000", "part-00001"]  # of no split


def test_folders_come_before_the_keys(tmp_path):
    for place in ("cc3m/00000.tar", "cc12m/extra/00000.tar", ".hidden/00000.tar"):
        write_tar(tmp_path / place, sample(7))
    assert kinds(read_all(tmp_path)) == [("cc12m_extra_000000007", ""), ("cc3m_000000007", "")]


def test_a_tar_by_itself_and_packed_ones(tmp_path):
    assert len(read_all(write_tar(tmp_path / "a.tar", samples(2)))) == 2
    for ending, mode in ((".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")):
        path = write_tar(tmp_path / f"b{ending}", samples(2), mode)
        assert kinds(read_all(path)) == [("000000000", ""), ("000000001", "")]


def test_a_text_file_has_paths_patterns_ranges_and_prefixes(tmp_path):
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
def test_a_line_that_leads_nowhere_is_named(tmp_path, line, message):
    (tmp_path / "list.txt").write_text(f"# tars\n{line}\n")
    with pytest.raises(ValueError, match=message):
        source(tmp_path / "list.txt")


def test_a_path_without_tars_says_what_to_do(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "photo.jpg").write_bytes(picture())
    for name, words in (("nowhere", "does not exist"), (".", "has no tar"), ("empty.txt", "has no tar")):
        with pytest.raises(ValueError, match=rf"{words}; set ingest\.source\.path in params\.yaml"):
            source(tmp_path / name)
    with pytest.raises(ValueError, match=r"photo\.jpg is neither a tar nor a text file"):
        source(tmp_path / "photo.jpg")


def test_captions_are_in_txt_else_in_the_json(tmp_path):
    members = [
        ("a.jpg", picture()), ("a.txt", b"from txt"), ("a.json", b'{"caption": "from json", "alt": "alt"}'),
        ("b.jpg", picture()), ("b.json", b'{"caption": "from json", "alt": "alt"}'),
        ("c.jpg", picture()), ("c.txt", b"  "), ("c.json", b'{"caption": "from json"}'),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert [item.short_caption for item in read_all(path)] == ["from txt", "from json", "from json"]
    found = read_all(path, caption=None, caption_field="alt")
    assert [getattr(item, "short_caption", None) for item in found] == ["alt", "alt", None]


def test_what_is_missing_or_wrong_in_a_sample_is_told(tmp_path):
    members = [
        *sample(0, caption=None).items(),
        ("no-image.txt", b"a"),
        ("no-caption.jpg", picture()),
        ("empty.jpg", picture()), ("empty.txt", b" "),
        ("number.jpg", picture()), ("number.json", b'{"caption": 7}'),
        ("bad-json.jpg", picture()), ("bad-json.json", b"{"),
        ("deep-json.jpg", picture()), ("deep-json.json", b"[" * 100_000),
        ("list-json.jpg", picture()), ("list-json.json", b"[]"),
        ("latin.jpg", picture()), ("latin.txt", b"K\xe4se"),
        ("half.jpg", picture()), ("half.json", b'{"caption": "\\ud83d"}'),
        ("cut.jpg", picture()[:99]), ("cut.txt", b"a"),
        ("My.photo.jpg", picture()), ("My.photo.txt", b"a"),
        ("fine.jpg", picture()), ("fine.txt", b"a"),
    ]  # fmt: skip
    found = read_all(write_tar(tmp_path / "a.tar", members))
    assert kinds(found) == [
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
    assert found[1].where == f"{tmp_path}/a.tar: no-image"
    assert "only photo.jpg, photo.txt" in found[11].reason


def test_the_json_may_say_what_a_sample_is_called(tmp_path):
    write_tar(tmp_path / "cc3m/00000.tar", {**samples(2), "x.jpg": picture(), "x.txt": b"a"})
    found = read_all(tmp_path, key="url")
    assert kinds(found) == [
        (key_of(URL.format(0), "cc3m"), ""),
        (key_of(URL.format(1), "cc3m"), ""),
        ("cc3m_x", "missing"),
    ]
    assert found[0].key.startswith("cc3m_url-")


def test_a_key_that_comes_twice_is_a_duplicate(tmp_path):
    members = [*sample(0).items(), *sample(1).items(), *sample(0).items(), *sample(1).items(), *sample(1).items()]
    found = read_all(write_tar(tmp_path / "a.tar", members))
    again = [("000000000", "duplicate"), ("000000001", "duplicate"), ("000000001", "duplicate")]
    assert kinds(found) == [("000000000", ""), ("000000001", ""), *again]


def test_members_of_no_sample_are_left_alone(tmp_path):
    others = {"README": b"x", "._000000000.jpg": b"x", "000000000.npy": b"x", ".cache/a.jpg": b"x"}
    with tarfile.open(write_tar(tmp_path / "a.tar", {**samples(1), **others}), "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert kinds(read_all(tmp_path)) == [("000000000", "")]


def test_nothing_leads_out_of_a_tar_or_touches_the_disk(tmp_path, monkeypatch):
    names = ("/etc/a.jpg", "../b.jpg", "c/../../d.jpg", "C:\\e.jpg")
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("f.jpg", tarfile.SYMTYPE), ("g.jpg", tarfile.LNKTYPE), ("h.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        data = picture()
        member = tarfile.TarInfo("./i.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    found = read_all(path)
    assert [kind for _, kind in kinds(found)] == ["unsafe"] * 7 + ["missing"]
    assert found[-1].key == "i"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_above_the_limit_is_not_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"\0" * 5000, "a.txt": b"a", **sample(1)})
    found = read_all(path, ImagesConfig(max_bytes=4999))
    assert kinds(found) == [("a", "too-large"), ("000000001", "")]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_ten_terabytes_is_a_cut(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", samples(2))
    data = path.read_bytes().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    path.write_bytes(data + header("huge.jpg", 10 * 2**40, kind) + b"x" * 2**16)
    found = read_all(path)
    # of what stands last before a cut, nobody knows whether it is whole
    *whole, last = kinds(found)
    assert last[1] == "truncated" and {kind for _, kind in whole} == {""}


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_tar_that_is_cut_gives_what_is_before_the_cut_wherever_it_is(tmp_path, ending):
    path = write_tar(tmp_path / f"a.{ending}", samples(4), "w:gz" if ending == "tar.gz" else "w")
    whole, data = read_all(path), path.read_bytes()
    end = len(data) if ending == "tar.gz" else len(data.rstrip(b"\0")) // 512 * 512 + 512  # the mark of the end follows
    seen = set()
    for cut in range(600, end, 256) if ending == "tar" else range(end // 3, end - 30, 7):
        path.write_bytes(data[:cut])
        *before, last = read_all(path)
        assert isinstance(last, Failure) and last.kind == "truncated" and str(path) in last.where
        assert before == whole[: len(before)]
        assert f"after {before[-1].key}, its last complete" in last.reason if before else "in its first" in last.reason
        seen.add(len(before))
    assert seen == {0, 1, 2, 3} if ending == "tar" else len(seen) > 1


def test_rubbish_in_the_middle_of_a_tar_is_a_cut(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = path.read_bytes()
    place = data.index(b"000000001.txt")
    path.write_bytes(data[:place] + b"?" * 512 + data[place + 512 :])
    assert [kind for _, kind in kinds(read_all(path))] == ["", "truncated"]


JOINED = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}


@pytest.mark.parametrize("ending", JOINED)
@pytest.mark.parametrize("padding", [0, 512, 10240])
def test_joined_tars_are_read_to_the_end_of_the_last(tmp_path, ending, padding):
    parts = [
        write_tar(tmp_path / f"{number}.{ending}", sample(number), JOINED[ending]).read_bytes() for number in range(3)
    ]
    path = tmp_path / "all" / f"a.{ending}"
    path.parent.mkdir()
    path.write_bytes(b"".join(part + bytes(padding) for part in parts))
    assert kinds(read_all(path)) == [(f"{number:09d}", "") for number in range(3)]


def test_compressed_members_may_begin_anywhere_in_a_tar(tmp_path):
    data = write_tar(tmp_path / "a.tar", samples(3)).read_bytes()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"".join(gzip.compress(data[start : start + 777]) for start in range(0, len(data), 777)))
    assert len(read_all(path)) == 3


@pytest.mark.parametrize("ending", JOINED)
@pytest.mark.parametrize("rubbish", [b"\n", b"x" * 3000, bytes(5000) + b"PK" + bytes(5000)])
def test_what_follows_a_tar_and_is_none_is_a_failure(tmp_path, ending, rubbish):
    path = write_tar(tmp_path / f"a.{ending}", samples(2), JOINED[ending])
    path.write_bytes(path.read_bytes() + rubbish)
    *whole, last = read_all(path)
    assert kinds(whole) == [("000000000", ""), ("000000001", "")]
    assert isinstance(last, Failure) and last.kind == "truncated"
    assert any(words in last.reason for words in ("the archive is followed", "the data after"))


@pytest.mark.parametrize("ending", JOINED)
def test_a_joined_tar_that_is_cut_is_a_failure(tmp_path, ending):
    first = write_tar(tmp_path / f"a.{ending}", sample(0), JOINED[ending]).read_bytes()
    path = write_tar(tmp_path / f"b.{ending}", sample(1), JOINED[ending])
    data = path.read_bytes()
    path.write_bytes(first + data[: len(data) // 2 if ending != "tar" else 700])
    assert kinds(read_all(path))[0] == ("000000000", "")
    assert kinds(read_all(path))[-1] == ("000000000", "truncated")


def test_what_macos_adds_is_left_alone(tmp_path):
    members = {"._a.jpg": b"x", "__MACOSX/._a.jpg": b"x", "__MACOSX/b.jpg": b"x", ".DS_Store": b"x", **sample(0)}
    write_tar(tmp_path / "A.TAR", members)
    write_tar(tmp_path / "._A.TAR", {"a.jpg": b"x"})
    write_tar(tmp_path / "__MACOSX/a.tar", {"a.jpg": b"x"})
    assert kinds(read_all(tmp_path)) == [("000000000", "")]


def test_a_tar_that_cannot_be_read_at_all_is_one_failure_and_the_others_come_in(tmp_path):
    write_tar(tmp_path / "tars/0.tar", sample(0))
    (tmp_path / "tars/1.tar").write_bytes(b"<html>403</html>")
    (tmp_path / "tars/2.tar").write_bytes(b"")
    (tmp_path / "tars/3.tar").write_bytes(b"x" * 5000)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/tars/{{0..4}}.tar\n{tmp_path}/tars\n")
    found = read_all(tmp_path / "list.txt")
    assert [kind for _, kind in kinds(found)] == ["", *["unreadable-shard"] * 5]
    assert found[-1].where == f"{tmp_path}/tars"


def test_a_unit_becomes_a_partition_in_each_split_by_its_keys(tmp_path):
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


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server on loopback, found and entered by what the environment says; gives its address."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        yield f"http://{host}:{port}"
        S3FileSystem.clear_instance_cache()
    server.stop()


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
    found = read_all(tmp_path / "list.txt")
    assert kinds(found) == [
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


def test_a_store_that_does_not_answer_is_worth_another_try(tmp_path, monkeypatch):
    """Nobody listens there; a unit that raises OSError is run again."""
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
