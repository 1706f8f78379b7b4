"""`lotlip init` detects how the user's data is stored, and writes a matching params.yaml."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from lotlip.config.params import Params, load_params
from lotlip.ingest.config import SourceConfig
from lotlip.init.captioner import TRIAL, TRIED, captioner_section
from lotlip.init.init import init
from lotlip.init.inspection import inspect, read_sample
from lotlip.init.source import Columns, DataSource, find_source, relative_to
from tests.captioning_server import MODEL, CaptioningServer, caption_text
from tests.tiny_baselines import CLIP_LENGTH, save_clip

WORDS = (
    "red",
    "dog",
    "tree",
    "house",
    "blue",
    "cat",
    "boat",
    "white",
    "bird",
    "green",
    "car",
    "horse",
    "river",
    "stone",
)


def image_bytes(number: int) -> bytes:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def sentence(number: int, words: int) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, words))


def rows(number: int = 30) -> list[dict[str, Any]]:
    """Rows with columns that a table of captions may have."""
    return [
        {
            "id": n,
            "url": f"https://example.org/{n} {n}.png",
            "file_name": f"sub/{n:03}.png",
            "split": "train",
            "caption": sentence(n, 4),
            "detailed": ". ".join(sentence(100 * n + k, 9) for k in range(4)),
        }
        for n in range(number)
    ]


def write_images(folder: Path, number: int = 30) -> Path:
    (folder / "sub").mkdir(parents=True)
    for n in range(number):
        (folder / "sub" / f"{n:03}.png").write_bytes(image_bytes(n))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the table captions.csv and its images."""
    write_images(tmp_path / "images")
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows(1)[0]))
        table.writeheader()
        table.writerows(rows())
    return tmp_path


def run(data: Path, out: Path, **options: Any) -> tuple[Params, list[str]]:
    """Runs the command; returns the parsed file and the printed lines."""
    lines: list[str] = []
    columns = options.pop("columns", (None, None, ()))
    init(data, options.pop("images", None), options.pop("start", None), columns, out, options.pop("force", False),
         lines.append, options.pop("captioner", None))  # fmt: skip
    assert not options
    return load_params(out), lines


# --- detecting the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_find_source_detects_and_lists_the_columns_of_a_table(data: Path, ending: str) -> None:
    table = data / f"captions.{ending}"
    frame = pd.DataFrame(rows())
    if ending == "tsv":
        frame.to_csv(table, index=False, sep="\t")
    elif ending in ("json", "jsonl"):
        frame.to_json(table, orient="records", lines=ending == "jsonl")
    elif ending == "parquet":
        frame.to_parquet(table)
    source = find_source(table, None)
    assert source.source == {
        "kind": {"tsv": "csv"}.get(ending, ending),
        "path": str(table),
        "image": "file_name",
        "images": str(data / "images"),
        "caption": "caption",
    }
    assert {name: section["text"] for name, section in source.captioners.items()} == {"detailed": "detailed"}
    output = "\n".join(source.found)
    assert all(name in output for name in ("file_name", "caption", "detailed", str(data / "images")))


def test_a_table_without_a_header_is_an_error(data: Path) -> None:
    table = data / "captions.tsv"
    pd.DataFrame(rows())[["file_name", "caption"]].to_csv(table, index=False, header=False, sep="\t")
    with pytest.raises(ValueError, match=r"captions\.tsv has no header: its first line names the image sub/000\.png"):
        find_source(table, None)


def conversation(number: int, prompt: str) -> dict[str, Any]:
    """An object as ShareGPT4V writes it."""
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"{sentence(number, 20)}. It is {number}."}]
    return {"id": f"{number:012}", "image": f"sub/{number:03}.png", "conversations": turns}


@pytest.mark.parametrize(
    "prompts",
    [
        ["<image>\nWhat is in the picture?"],
        ["Describe the picture.", "Please tell me what you see.", "What is in it?"],
        [f"{sentence(n, 5)}?\n<image>" for n in range(30)],
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_captions_may_be_the_answers_of_conversations(data: Path, prompts: list[str], ending: str) -> None:
    (data / "captions.csv").unlink()
    objects = [conversation(n, prompts[n % len(prompts)]) for n in range(30)]
    lines = [json.dumps(each) for each in objects]
    (data / f"share.{ending}").write_text(json.dumps(objects) if ending == "json" else "\n".join(lines))
    for path in (data / f"share.{ending}", data):
        source = find_source(path, data / "images")
        assert source.source == {
            "kind": ending,
            "path": str(path),
            "image": "image",
            "images": str(data / "images"),
            "caption": "conversations.1.value",
        }
        assert source.captioners == {} and "conversations.0.from, conversations.0.value" in source.found[0]
    found = inspect(source, lambda texts: [len(text) for text in texts])
    assert found.images == 30 and found.texts["short"].sub_captions.tolist() == [2] * 30
    long = find_source(data, None, Columns(caption="id", long=["conversations.1.value"]))
    assert list(long.captioners) == ["conversations-1-value"]


def test_captions_may_be_in_llavas_metadata(data: Path) -> None:
    objects = [
        {"id": f"{n:09}", "image": f"sub/{n:03}.png", "caption": sentence(n, 12), "blip_caption": sentence(n + 50, 5)}
        for n in range(30)
    ]
    (data / "meta.json").write_text(json.dumps(objects))
    source = find_source(data / "meta.json", None)
    assert (source.source["image"], source.source["caption"]) == ("image", "blip_caption")
    assert [section["text"] for section in source.captioners.values()] == ["caption"] or source.captioners["own"]
    # a folder's JSON files are metadata if there are other tables
    assert find_source(data, None).source["kind"] == "csv"


def test_find_source_detects_images_inside_a_table(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows()).drop(columns="file_name")
    frame["picture"] = [{"bytes": image_bytes(n), "path": None} for n in range(len(frame))]
    frame.to_parquet(tmp_path / "t.parquet")
    source = find_source(tmp_path / "t.parquet", None)
    assert source.source == {
        "kind": "parquet",
        "path": str(tmp_path / "t.parquet"),
        "image": "picture",
        "caption": "caption",
        "key": "id",
    }
    assert source.captioners["detailed"]["key"] == "id"


def test_columns_of_hashes_and_metadata_are_not_images_or_texts(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows())
    frame.insert(0, "exif", [{"iso": n} for n in range(len(frame))])
    frame.insert(0, "sha", [np.random.default_rng(n).bytes(2000) for n in range(len(frame))])
    write_images(tmp_path)
    frame.to_parquet(tmp_path / "t.parquet")
    source = find_source(tmp_path / "t.parquet", None)
    assert source.source["image"] == "file_name" and list(source.captioners) == ["detailed"]
    frame["picture"] = [image_bytes(n) for n in range(len(frame))]
    frame.to_parquet(tmp_path / "t.parquet")
    assert find_source(tmp_path / "t.parquet", None).source["image"] == "picture"
    for columns in (Columns("exif"), Columns(caption="sha"), Columns(caption="picture"), Columns(long=["exif"])):
        with pytest.raises(ValueError, match=r"column \w+ of .*t\.parquet has nested values or binary data"):
            find_source(tmp_path / "t.parquet", None, columns)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_caption_that_is_an_object_is_one_unreadable_row(data: Path, ending: str) -> None:
    objects = rows()
    readable = find_source(data / "captions.csv", None)
    objects[3]["caption"] = {"en": sentence(3, 40)}
    objects[4]["detailed"] = {"en": sentence(4, 40)}
    table = data / f"captions.{ending}"
    pd.DataFrame(objects).to_json(table, orient="records", lines=ending == "jsonl")
    source = find_source(table, None)
    same = {"kind": ending, "path": str(table)}
    assert source.source == readable.source | same
    assert source.captioners == {"detailed": readable.captioners["detailed"] | {"path": str(table)}}
    assert find_source(table, None, Columns(caption="caption.en")).source["caption"] == "caption.en"
    records, failures, *_ = read_sample(TypeAdapter(SourceConfig).validate_python(source.source))
    assert len(records) == len(objects) - 1
    assert [(failure.key, failure.kind) for failure in failures] == [("sub_003", "missing")]


def test_columns_of_one_name_are_not_used(tmp_path: Path) -> None:
    write_images(tmp_path)
    table = pa.Table.from_pandas(pd.DataFrame(rows()))
    pq.write_table(table.append_column("id", table["id"]), tmp_path / "t.parquet")
    source = find_source(tmp_path / "t.parquet", None)
    assert (
        source.source["image"] == "file_name" and "not used: column id, of which there are several" in source.found[1]
    )


@pytest.mark.parametrize("given", [True, False])
def test_paths_may_be_absolute(data: Path, tmp_path: Path, given: bool) -> None:
    frame = pd.read_csv(data / "captions.csv")
    frame["file_name"] = [str(data / "images" / name) for name in frame["file_name"]]
    (tmp_path / "elsewhere").mkdir()
    table = tmp_path / "elsewhere" / "captions.csv"
    frame.to_csv(table, index=False)
    source = find_source(table, data / "images" if given else None)
    assert Path(source.source["images"]) == data / "images" / ("" if given else "sub")
    found = inspect(source, lambda texts: [len(text) for text in texts])
    assert found.images == 30 and len(found.texts["detailed"].tokens) == 30


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("一只红色的狗在河边跑步{}", "一只红色的狗在河边跑步{}。旁边有一棵绿色的树和一座白色的房子。天空是蓝色的。"),
        ("สุนัขวิ่งอยู่ริมแม่น้ำ{}", "สุนัขสีแดงวิ่งอยู่ริมแม่น้ำ{}\nข้างๆมีต้นไม้สีเขียวและบ้านสีขาว\nท้องฟ้าเป็นสีฟ้ามีเมฆมาก"),
    ],
)
def test_captions_may_be_in_scripts_without_spaces(data: Path, short: str, long: str) -> None:
    frame = pd.read_csv(data / "captions.csv").drop(columns="id")
    frame["caption"] = [short.format(n) for n in range(len(frame))]
    frame["detailed"] = [long.format(n) for n in range(len(frame))]
    frame.to_csv(data / "captions.csv", index=False)
    source = find_source(data / "captions.csv", None)
    assert source.source["caption"] == "caption" and list(source.captioners) == ["detailed"]


def test_named_columns_are_used(data: Path) -> None:
    source = find_source(data / "captions.csv", data / "images", Columns("file_name", "detailed", ["caption"]))
    assert source.source["caption"] == "detailed"
    assert source.captioners["own"]["text"] == ["caption"]
    with pytest.raises(ValueError, match=r"has no column nothing \(it has id, url, file_name"):
        find_source(data / "captions.csv", None, Columns(caption="nothing"))


@pytest.mark.slow
def test_columns_of_sentences_become_one_long_caption(data: Path) -> None:
    frame = pd.read_csv(data / "captions.csv")
    frame["more"] = [sentence(900 + n, 9) if n % 2 else "" for n in range(len(frame))]
    frame.to_csv(data / "captions.csv", index=False)
    params, _ = run(data / "captions.csv", data / "params.yaml")
    (captioner,) = params.caption.captioners.values()
    assert captioner.text == ["detailed", "more"]
    assert params.caption.max_failure_share == 0.02
    params, _ = run(data / "captions.csv", data / "params.yaml", columns=(None, None, ["more"]), force=True)
    assert params.caption.max_failure_share == 0.75  # half of the images have a long caption


def test_find_source_recognises_folders_and_tars(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "folder" / "a.txt").write_text("a dog")
    assert find_source(tmp_path / "folder", None).source["kind"] == "folder"
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w"):
        pass
    pd.DataFrame(rows()).to_parquet(tmp_path / "tars" / "00000.parquet")  # img2dataset's metadata
    assert find_source(tmp_path / "tars", None).source["kind"] == "webdataset"
    with pytest.raises(ValueError, match="--images and columns are for tables"):
        find_source(tmp_path / "tars", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "limit"), [(5, 0.9), (2, 0.75)])
def test_several_rows_per_image_do_not_turn_the_gate_off(data: Path, times: int, limit: float) -> None:
    """As Flickr30k has its captions."""
    header, *lines = (data / "captions.csv").read_text().splitlines()
    (data / "captions.csv").write_text("\n".join([header, *(line for line in lines for _ in range(times))]))
    params, shown = run(data / "captions.csv", data / "params.yaml")
    assert params.ingest.max_failure_share == limit
    assert any("of several samples with one key, the first is used; put all captions" in line for line in shown)


def test_unrelated_files_do_not_decide_the_kind(data: Path) -> None:
    """As data sets of the datasets library, archives and notes have them."""
    for name in ("README.txt", "images/LICENSE.txt", "raw.tar.zst"):
        (data / name).touch()
    (data / "images/sub/000.txt").write_text("a note on one image")
    found = find_source(data, None).source
    assert (found["kind"], found["path"], found["images"]) == ("csv", data.as_posix(), f"{data}/images")
    (data / "images.tar.gz").touch()
    with pytest.raises(
        ValueError, match=r"has tars, and images with a table \(.*captions\.csv\); name the table, or move"
    ):
        find_source(data, None)
    assert find_source(data / "captions.csv", None).source["kind"] == "csv"
    assert find_source(data, data / "images").source["kind"] == "csv"
    for n in range(30):
        (data / f"images/sub/{n:03}.txt").write_text(sentence(n, 4))
    assert find_source(data, None).source["kind"] == "folder"
    for file in data.glob("images/sub/*"):
        file.unlink()
    assert find_source(data, None).source["kind"] == "webdataset"


def test_a_folder_of_compressed_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.tar.zst").touch()
    (tmp_path / "README.txt").touch()
    with pytest.raises(ValueError, match=r"0\.tar\.zst cannot be read"):
        find_source(tmp_path, None)
    (tmp_path / "0.tar.zst").rename(tmp_path / "README.zst")
    with pytest.raises(ValueError, match=r"has none of \.csv, .* each with a \.txt of the same stem; name the file"):
        find_source(tmp_path, None)


def test_paths_may_start_from_the_folder_of_the_table(data: Path) -> None:
    (data / "train").mkdir()
    for name in ("captions.csv", "images"):
        (data / name).rename(data / "train" / name)
    (data / "train/images/sub").rename(data / "train/sub")
    found = find_source(data, None).source
    assert (found["path"], found["images"]) == (f"{data}/train", f"{data}/train")
    records, failures, _, _ = read_sample(TypeAdapter(SourceConfig).validate_python(found))
    assert len(records) == 30 and not failures


def test_paths_that_lead_out_through_a_link_are_an_error_with_a_remedy(data: Path, tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "set"
    folder.mkdir()
    (data / "images").rename(disk)
    (folder / "images").symlink_to(disk)
    table = (data / "captions.csv").rename(folder / "captions.csv")
    table.write_text(table.read_text().replace(",sub/", ",images/sub/"))
    for images in (None, folder, folder / "images"):
        with pytest.raises(
            ValueError, match=rf"through the link {folder}/images → {disk}; .*remove images/ from the paths"
        ):
            find_source(folder, images)
    table.write_text(table.read_text().replace(",images/sub/", ",sub/"))
    records, failures, _, _ = read_sample(
        TypeAdapter(SourceConfig).validate_python(find_source(folder, folder / "images").source)
    )
    assert len(records) == 30 and not failures
    (folder / "images").unlink()
    (folder / "sub").mkdir()
    for file in (disk / "sub").iterdir():
        (folder / "sub" / file.name).symlink_to(file)
    with pytest.raises(
        ValueError, match=rf"through the link {folder}/sub/000.png → .*; replace the link by what it leads to$"
    ):
        find_source(table, None)


def test_tables_among_the_images_are_not_read(data: Path) -> None:
    """Many downloads have a JSON file with metadata beside each image."""
    (data / "captions.csv").unlink()
    (data / "captions.json").write_text(json.dumps(rows()))
    (data / "more.json").write_text(json.dumps([{**row, "file_name": f"gone/{row['id']}.png"} for row in rows()]))
    for n in range(30):
        (data / f"images/sub/{n:03}.json").write_text(json.dumps({"width": 60}))
    source = find_source(data, data / "images")
    found = inspect(source, lambda texts: [len(text.split()) for text in texts])
    assert found.images == 30 and len(found.texts["detailed"].tokens) == 30
    assert source.captioners["detailed"]["images"] == f"{data}/images"


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        (lambda data: (data / "images").rename(data / "elsewhere"), {}, "no column of .* has paths of images below"),
        (lambda data: None, {"images": "images/sub"}, "file_name has sub/000.png, which is not there"),
        (lambda data: None, {"images": "nowhere"}, "--images .*nowhere is not a folder"),
        (lambda data: (data / "captions.csv").write_text("file_name,n\nsub/000.png,1\n"), {}, "no column of captions"),
        (lambda data: (data / "captions.csv").write_text("a,b\none,two\n"), {}, r"paths of images .* \(it has: a, b\)"),
        (lambda data: (data / "captions.csv").write_text("file_name,n\n"), {}, "has no rows"),
        (
            lambda data: (data / "captions.csv").write_text("a,b\nx,y,z\n"),
            {},
            r"no rows .*\(line 2: it has 3 fields, but",
        ),
        (lambda data: (data / "captions.csv").unlink(), {}, "does not exist"),
        (lambda data: (data / "captions.csv").rename(data / "captions.xls"), {"data": "captions.xls"}, "another form"),
        (lambda data: None, {"columns": Columns(image="url")}, "column url of .* does not have paths .* has addresses"),
    ],
)
def test_undetected_columns_and_folders_are_errors(data: Path, change: Any, options: Any, problem: str) -> None:
    change(data)
    file = options.pop("data", "captions.csv")
    with pytest.raises(ValueError, match=problem):
        find_source(data / file, data / images if (images := options.pop("images", None)) else None, **options)


# --- params.yaml ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_init_writes_a_valid_file_and_describes_the_data(data: Path) -> None:
    (data / "images" / "sub" / "003.png").write_bytes(b"broken")
    (data / "images" / "sub" / "004.png").write_bytes(image_bytes(5))
    params, lines = run(data / "captions.csv", data / "params.yaml")
    output = "\n".join(lines)
    assert params.image_tower.kind == "packaged" and params.pretrain.start is None
    assert params.ingest.max_failure_share == pytest.approx(0.05)  # one of 30 images is unreadable
    config = params.ablation("lotlip")
    assert config.batch_size == 4 and config.steps == 105  # 20 passes over 75 % of 29 images
    assert config.text.context_length == 48  # 40 word pieces and the special tokens
    parts = ("29 (30 looked at)", "60 × 40 pixels", "cannot be used: unreadable", "images that equal another")
    for part in (*parts, "29 of 29, 4.0 sub-captions"):
        assert part in output, part
    assert lines[-1].endswith(f": cd {data} && lotlip run")


@pytest.mark.slow
def test_paths_are_relative_to_the_file_and_the_command_runs_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    shutil.copytree("images", "lotlip/images")
    (data / "link").symlink_to(data / "elsewhere" / "deep")
    (data / "elsewhere" / "deep").mkdir(parents=True)
    for out, end in {
        "own.yaml": ", name it params.yaml and, in this folder: lotlip run",
        "params.yaml": ": lotlip run",
        "my runs/params.yaml": ": cd 'my runs' && lotlip run",
        "link/params.yaml": ": cd link && lotlip run",
    }.items():
        params, lines = run(Path("captions.csv"), Path(out), images=Path("lotlip/images"))
        assert lines[-1] == f"written to {out}; to train and score on held-out images{end}"
        folder = Path(out).parent
        assert [(folder / path).resolve() for _, path in params.inputs()] == [
            data / "captions.csv",
            data / "lotlip" / "images",
            data / "captions.csv",
        ]


def test_only_paths_of_local_files_are_relative_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip", "lotlip/caption/captioners/endpoint.py"):
        (tmp_path / name).mkdir(parents=True)
    place = relative_to(Path("runs/mine"))
    assert place("clip") == "../../clip"
    assert place("open_clip:ViT-B-32:clip") == "open_clip:ViT-B-32:../../clip"
    for name in (
        "openai/clip",
        "open_clip:ViT-B-32:openai",
        str(tmp_path / "clip"),
        "lotlip/caption/captioners/endpoint.py",
    ):
        assert place(name) == name
    folder = {"kind": "transformers", "path": "clip", "model": "clip"}
    moved = DataSource({"kind": "csv", "path": "clip", "image": "clip"}, {"clip": folder}).in_terms_of(place)
    assert moved.source == {"kind": "csv", "path": "../../clip", "image": "clip"}
    assert moved.captioners == {"clip": {"kind": "transformers", "path": "../../clip", "model": "../../clip"}}


@pytest.mark.slow
def test_a_starting_model_decides_context_and_learning_rates(data: Path) -> None:
    clip = save_clip(data / "clip")
    params, lines = run(data / "captions.csv", data / "params.yaml", start=str(clip))
    text = params.pretrain.text
    assert params.image_tower.kind == "start" and params.evaluate.baselines == ["start"]
    assert text.position_interpolation is not None
    assert text.position_interpolation.positions == CLIP_LENGTH
    assert text.context_length == text.position_interpolation.interpolated > CLIP_LENGTH
    assert any("no better than chance" in line for line in lines)  # the starting model has random weights
    assert not params.pretrain.image_tower.frozen


@pytest.mark.slow
def test_an_unreachable_hub_model_is_assumed_to_be_a_clip(data: Path) -> None:
    params, lines = run(data / "captions.csv", data / "params.yaml", start="nobody/no-such-clip")
    assert params.pretrain.start == "nobody/no-such-clip" and params.pretrain.text.context_length == 77
    assert params.pretrain.text.learning_rate == 1e-5 and params.pretrain.image_tower.frozen
    assert any(line.startswith("warning: nobody/no-such-clip cannot be read now") for line in lines)


@pytest.mark.slow
def test_short_captions_serve_as_long_ones_where_there_are_none(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{n}.png").write_bytes(image_bytes(n))
        (tmp_path / "in" / f"{n}.txt").write_text(f"狗{n}在跑。猫在睡。树很高。")
    params, _ = run(tmp_path / "in", tmp_path / "params.yaml")
    assert params.ablation("lotlip").long_texts.captioners == ["raw"]
    assert params.caption.sentence_ends == "unicode"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ((700, 90), "21,000 tokens of images and prompts, and 2,700 tokens of answers"),
        (None, "tokens of captions, besides those of images and prompts"),
    ],
)
def test_a_captioner_is_tried_on_a_few_images(data: Path, usage: tuple[int, int] | None, tokens: str) -> None:
    frame = pd.read_csv(data / "captions.csv").drop(columns="detailed")
    frame.to_csv(data / "captions.csv", index=False)

    def plan(image: bytes, number: int) -> Any:
        return caption_text("A dog. <script>alert(1)</script>") if image == image_bytes(3) else None

    with CaptioningServer(plan) as server:
        server.usage = usage
        params, lines = run(data / "captions.csv", data / "params.yaml", captioner=(server.url, None))
        assert len(server.requests) == 1 + TRIED  # the client tries a white square first
    captioner = params.caption.captioners["llava"]
    assert (captioner.kind, captioner.url, captioner.model) == ("endpoint", server.url, MODEL)
    assert params.ablation("lotlip").long_texts.captioners == []
    output = "\n".join(lines)
    (estimate,) = [line for line in lines if "all 30 images take about" in line]
    assert "8 of 8 captioned" in estimate and tokens in estimate
    assert "the short captions' own" not in output
    assert "revision of the server's weights" in (data / "params.yaml").read_text()
    page = (data / TRIAL / "index.html").read_text(encoding="utf-8")
    assert page.count('class="seen"') == TRIED and "<script" not in page and "&lt;script&gt;" in page
    assert frame["caption"][3] in page and "<h4>llava</h4>" in page


@pytest.mark.parametrize(
    ("named", "model", "section"),
    [
        ("llava-1.5-13b", None, {"preset": "llava-1.5-13b"}),
        ("me/mllm@" + "0" * 40, None, {"model": "me/mllm", "revision": "0" * 40}),
        ("http://127.0.0.1:1/v1", "a/b", {"kind": "endpoint", "model": "a/b"}),
    ],
)
def test_a_captioner_can_be_given_in_several_ways(named: str, model: str | None, section: dict[str, str]) -> None:
    assert section.items() <= captioner_section(named, model)[1].items()


@pytest.mark.slow
def test_an_unusable_captioner_is_an_error(data: Path) -> None:
    with pytest.raises(ValueError, match=r"me/mllm is not the address of a server .*OWNER/NAME@COMMIT"):
        captioner_section("me/mllm", None)
    with pytest.raises(ValueError, match="is not an address; remove it"):
        captioner_section("llava-1.5-13b", "a/b")
    with CaptioningServer(models=["a", "b"]) as server, pytest.raises(ValueError, match="lists a, b; name one"):
        captioner_section(server.url, None)
    with pytest.raises(ConnectionError, match="does not respond"):
        captioner_section(server.url, None)
    nothing = r"llava captions none of 8 images, such as .* without words"
    with CaptioningServer(lambda *_: caption_text("...")) as server, pytest.raises(ValueError, match=nothing):
        run(data / "captions.csv", data / "params.yaml", captioner=(server.url, None))
    assert not (data / "params.yaml").exists() and not (data / TRIAL).exists()


@pytest.mark.slow
def test_nothing_is_overwritten_without_force(data: Path) -> None:
    out = data / "params.yaml"
    out.write_text("mine")
    with pytest.raises(ValueError, match="use --force"):
        run(data / "captions.csv", out)
    assert out.read_text() == "mine"
    run(data / "captions.csv", out, force=True)
    assert (data / "params.yaml.old-1").read_text() == "mine"


def test_too_few_images_are_an_error(data: Path) -> None:
    table = data / "captions.csv"
    pd.read_csv(table).head(19).to_csv(table, index=False)
    with pytest.raises(ValueError, match=r"captions\.csv has 19 images that can be used, but .* at least 20"):
        run(table, data / "params.yaml")
    assert not (data / "params.yaml").exists()
    with table.open("a") as file:
        file.write('"never closed')
    with pytest.raises(ValueError, match=r"has 19 images that can be used \(1 cannot: .*line 21: .* not closed"):
        run(table, data / "params.yaml")


def test_long_captions_of_other_images_are_an_error(data: Path) -> None:
    table = data / "captions.csv"
    frame = pd.read_csv(table)
    frame["detailed"] = ""
    frame.to_csv(table, index=False)
    with pytest.raises(ValueError, match="name another column with --long-column"):
        run(table, data / "params.yaml", columns=(None, None, ["detailed"]))
    assert not (data / "params.yaml").exists()


@pytest.mark.slow
def test_names_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's: #1 {x}"
    write_images(folder / "images")
    lines = [json.dumps(row) for row in rows()]
    (folder / "t.jsonl").write_text("\n".join(lines))
    params, _ = run(folder / "t.jsonl", tmp_path / "params.yaml")
    assert Path(params.ingest.source.path) == folder / "t.jsonl"
    assert yaml.safe_load((tmp_path / "params.yaml").read_text())["report"]["title"] == "LoTLIP on t.jsonl"
