"""Published benchmarks: a tiny folder in the exact format of each, and errors about missing parts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from timm.data import ImageNetInfo

from lotlip.core.paths import Paths
from lotlip.data.tokenizer import TextTokenizer
from lotlip.evaluate import published
from lotlip.evaluate.benchmarks import Benchmark, ImageTexts, open_benchmark
from lotlip.evaluate.config import EvaluateConfig, PublishedBenchmarkConfig
from lotlip.evaluate.encoders import LotlipEncoder
from lotlip.evaluate.evaluate import chances, encoded_images, evaluate, protocol
from lotlip.evaluate.metrics import retrieval
from lotlip.evaluate.published import FORMATS, published_benchmark
from lotlip.evaluate.reference import REFERENCE, Reference, sources
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.initialisation import build_for_pretraining
from tests.conftest import TEXT

SIZE = 3  # images of a tiny benchmark
LONG = ["A dog runs. It is brown.", "A cat sits.\nOn a mat.", "Two houses. A tree."]
CAPTIONS = [[f"caption {caption} of image {image}" for caption in range(5)] for image in range(SIZE)]
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def write(path: Path, content: Any) -> Path:
    """Writes bytes and text unchanged, a list for a file of lines as JSON lines, and anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    return path


def image(path: Path) -> Path:
    """Writes a file that contains its name, which identifies the image."""
    return write(path, path.name.encode())


# --- tiny folders in the exact formats ----------------------------------------------------------------------------


def sharegpt4v(folder: Path) -> None:
    records = [
        {
            "id": str(number),
            "image": f"sa_000000/images/sa_{number}.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}],
        }
        for number, text in enumerate(LONG)
    ]
    write(folder / "share4v_sam_10k.json", records)
    for number in range(SIZE):
        image(folder / f"sa_000000/images/sa_{number}.jpg")


def dci(folder: Path) -> None:
    inner = folder / "densely_captioned_images"
    write(inner / "splits.json", {"train": ["2.json"], "valid": [], "test": ["0.json", "1.json"]})
    for number, text in enumerate(LONG):
        short, _, extra = text.partition("\n")
        annotation = {"image": f"sa_{number}.jpg", "short_caption": short, "extra_caption": extra, "mask_data": {}}
        write(inner / f"annotations/{number}.json", annotation)
        image(inner / f"photos/sa_{number}.jpg")


def iiw(folder: Path) -> None:
    rest = {"IIW-P5B": "By a machine.", "metrics/Human Like": "Neutral"}
    write(folder / "DOCCI_Test/data.jsonl", [{"image": "test_0", "IIW": LONG[0], "DOCCI": "Another.", **rest}])
    write(folder / "IIW-400/data.jsonl", [{"image/key": "aar_test_1", "IIW": LONG[1], "objects": [], **rest}])
    write(folder / "DCI_Test/data.jsonl", [{"image": "sa_2.jpg", "ex_id": "2-data.json", "IIW": LONG[2], **rest}])
    for path in ("docci/test_0.jpg", "docci_aar/aar_test_1.jpg", "dci/sa_2.jpg"):
        image(folder / path)


def urban(folder: Path) -> None:
    for number, text in enumerate(LONG):
        write(folder / f"caption/{number}.txt", text.replace("\n", " ") + "\nA line that nobody's evaluation reads.")
        image(folder / f"image/{number}.jpg")


def docci(folder: Path) -> None:
    records = [
        {"example_id": f"test_{number}", "split": "test", "image_file": f"test_{number}.jpg", "description": text}
        for number, text in enumerate(LONG)
    ]
    other = {"example_id": "train_0", "split": "train", "image_file": "train_0.jpg", "description": "Not used."}
    write(folder / "docci_descriptions.jsonlines", [other, *records])
    for number in range(SIZE):
        image(folder / f"images/test_{number}.jpg")


def karpathy(folder: Path, name: str, below: str, filepath: dict[str, str]) -> None:
    def record(number: int, split: str, sentences: list[str]) -> dict[str, Any]:
        captions = [{"raw": sentence, "tokens": sentence.split(), "imgid": number} for sentence in sentences]
        return {"filename": f"{number}.jpg", "split": split, "sentences": captions, "imgid": number, **filepath}

    records = [record(number, "test", [*captions, "a sixth"]) for number, captions in enumerate(CAPTIONS)]
    other_splits = [record(9, "restval", ["not used"] * 5), record(8, "val", ["not used"] * 5)]
    write(folder / f"dataset_{name}.json", {"images": [*other_splits, *records], "dataset": name})
    for number in range(SIZE):
        image(folder / below / f"{number}.jpg")


def imagenet(folder: Path) -> None:
    for synset in SYNSETS:
        (folder / "val" / synset).mkdir(parents=True)
    for number, synset in enumerate(SYNSETS[:SIZE]):
        image(folder / f"val/{synset}/ILSVRC2012_val_0000000{number}.JPEG")


def long_dci(folder: Path) -> None:
    with (folder / "dci_long.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([("filepath", "title"), *((f"sa_{number}.jpg", text) for number, text in enumerate(LONG))])
    for number in range(SIZE):
        image(folder / f"photos/sa_{number}.jpg")


def coco_val2017(folder: Path) -> None:
    """COCO's own file lists captions in another order than images."""
    images = [{"id": 100 + number, "file_name": f"{number:012}.jpg"} for number in range(SIZE)]
    captions = [
        {"id": place, "image_id": 100 + number, "caption": text}
        for place in range(6)
        for number, texts in reversed(list(enumerate(CAPTIONS)))
        for text in [[*texts, "a sixth"][place]]
    ]
    write(folder / "annotations/captions_val2017.json", {"info": {}, "images": images, "annotations": captions})
    for one in images:
        image(folder / "val2017" / one["file_name"])


def flickr30k_all(folder: Path) -> None:
    lines = [f"{n}.jpg#{place}\t{text}\n" for n, texts in enumerate(CAPTIONS) for place, text in enumerate(texts)]
    write(folder / "results_20130124.token", "".join(lines))
    for number in range(SIZE):
        image(folder / f"flickr30k-images/{number}.jpg")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "sharegpt4v-1k": sharegpt4v,
    "sharegpt4v-10k": sharegpt4v,
    "dci": dci,
    "iiw": iiw,
    "urban-1k": urban,
    "docci": docci,
    "coco": lambda folder: karpathy(folder, "coco", "val2014", {"filepath": "val2014"}),
    "flickr30k": lambda folder: karpathy(folder, "flickr30k", "flickr30k-images", {}),
    "imagenet": imagenet,
    "dci-no-separator": dci,
    "long-dci": long_dci,
    "coco-all-captions": lambda folder: karpathy(folder, "coco", "val2014", {"filepath": "val2014"}),
    "coco-val2017": coco_val2017,
    "coco-val2017-all-captions": coco_val2017,
    "flickr30k-all": flickr30k_all,
}
# Formats with a JSON record per image, which `change_record` changes.
JSON_RECORDS = [kind for kind in FORMATS if kind not in ("long-dci", "flickr30k-all") and "val2017" not in kind]
LONG_KINDS = [kind for kind, form in FORMATS.items() if form.kind == "long"]
every_kind = pytest.mark.parametrize("kind", LAYOUTS)
every_retrieval = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture
def folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny benchmark that is complete, because its published size is reduced."""
    LAYOUTS[kind](tmp_path)
    if kind in FORMATS:
        form = FORMATS[kind]
        monkeypatch.setitem(FORMATS, kind, replace(form, size=SIZE, total=None if form.total is None else 6 * SIZE))
    monkeypatch.setattr(published, "IMAGENET_SIZE", SIZE)
    monkeypatch.setattr(published, "_IMAGENET_PER_CLASS", 0)
    return tmp_path


def files(folder: Path) -> list[Path]:
    """The images in their order."""
    return sorted((path for path in folder.rglob("*") if path.suffix in (".jpg", ".JPEG")), key=lambda p: p.stem[-1])


# --- contents of each benchmark -----------------------------------------------------------------------------------


def test_every_kind_of_the_configuration_has_a_layout():
    assert list(get_args(PublishedBenchmarkConfig.model_fields["kind"].annotation)) == list(LAYOUTS)


@pytest.mark.slow
@every_kind
def test_files_of_macos_are_ignored(kind, folder):
    before = published_benchmark(kind, folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07")
        path.with_name(".DS_Store").write_bytes(b"\0")
        image(folder / "__MACOSX" / path.relative_to(folder))
    after = published_benchmark(kind, folder)
    assert (after.images, after.about) == (before.images, before.about)


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_long_texts_belong_to_their_images(kind, folder):
    bench = published_benchmark(kind, folder)
    numbers = [int(data.decode().removesuffix(".jpg")[-1]) for data in encoded_images(bench)]
    assert sorted(numbers) == list(range(SIZE))
    texts = [LONG[number].replace("\n", " ") if kind == "urban-1k" else LONG[number] for number in numbers]
    if kind == "dci":  # its parts are lines, even an empty second one
        texts = [text if "\n" in text else text + "\n" for text in texts]
    elif kind == "dci-no-separator":
        texts = [text.replace("\n", "") for text in texts]
    assert bench.retrieval == {"long": ImageTexts(texts, [0, 1, 2])}
    assert bench.name == kind and bench.prompts is None and bench.max_unseen_tokens is None


@pytest.mark.parametrize("kind", ["iiw"])
def test_images_of_imageinwords_may_be_beside_their_texts(kind, folder):
    original = published_benchmark(kind, folder)
    for below, part in (("docci", "DOCCI_Test"), ("docci_aar", "IIW-400"), ("dci", "DCI_Test")):
        for path in list((folder / below).iterdir()):
            path.rename(folder / part / path.name)
    bench = published_benchmark(kind, folder)
    assert bench.about == original.about
    assert list(encoded_images(bench)) == [b"test_0.jpg", b"aar_test_1.jpg", b"sa_2.jpg"]


@pytest.mark.parametrize("kind", ["coco", "flickr30k", "coco-val2017", "flickr30k-all"])
def test_each_image_has_its_first_five_captions(kind, folder):
    bench = published_benchmark(kind, folder)
    assert [data[-5:] for data in encoded_images(bench)] == [b"0.jpg", b"1.jpg", b"2.jpg"]
    texts = [caption for captions in CAPTIONS for caption in captions]
    assert bench.retrieval == {"short": ImageTexts(texts, [0] * 5 + [1] * 5 + [2] * 5)}


@pytest.mark.parametrize("kind", ["coco-all-captions", "coco-val2017-all-captions"])
def test_all_captions_are_candidates(kind, folder):
    bench = published_benchmark(kind, folder)
    texts = [caption for captions in CAPTIONS for caption in [*captions, "a sixth"]]
    assert bench.retrieval == {"short": ImageTexts(texts, [0] * 6 + [1] * 6 + [2] * 6)}
    assert bench.about["captions"] == "all of each image"


def test_the_number_of_captions_changes_the_scores(tmp_path, monkeypatch):
    """The sixth captions are equal, so two of three retrieve the wrong image."""
    recall = {}
    for kind in ("coco", "coco-all-captions"):
        LAYOUTS[kind](tmp_path / kind)
        total = None if FORMATS[kind].total is None else 6 * SIZE
        monkeypatch.setitem(FORMATS, kind, replace(FORMATS[kind], size=SIZE, total=total))
        texts = published_benchmark(kind, tmp_path / kind).retrieval["short"]
        features = torch.stack([torch.eye(SIZE)[0 if text == "a sixth" else int(text[-1])] for text in texts.texts])
        recall[kind] = retrieval(torch.eye(SIZE), features, torch.tensor(texts.image)).values["text_to_image.r1"]
    assert recall == pytest.approx({"coco": 1, "coco-all-captions": 16 / 18})


def test_an_entry_with_the_name_of_another_benchmark_is_an_error():
    """Otherwise the published scores of that benchmark would be shown."""
    benchmarks = {"coco": {"kind": "coco-all-captions", "folder": "data/coco"}}
    with pytest.raises(
        ValueError, match=r"benchmarks\.coco: coco is the name of another benchmark than its kind, coco-all"
    ):
        EvaluateConfig.model_validate({"benchmarks": benchmarks})
    named = EvaluateConfig.model_validate({"benchmarks": {"coco-all-captions": {"folder": "data/coco"}}})
    assert named.benchmarks["coco-all-captions"].kind == "coco-all-captions"


@pytest.mark.parametrize("kind", ["imagenet"])
def test_labels_of_imagenet_are_the_positions_of_its_classes(kind, folder, monkeypatch):
    monkeypatch.setattr(published, "IMAGENET_SIZE", 50_000)
    late = image(folder / f"val/{SYNSETS[-1]}/ILSVRC2012_val_00000009.JPEG")
    bench = published_benchmark(kind, folder, partial=True)
    assert bench.prompts is not None
    assert bench.prompts.labels == [0, 1, 2, 999]
    assert list(encoded_images(bench))[-1] == late.name.encode()
    assert bench.retrieval == {}
    assert len(bench.prompts.classes) == 1000
    assert {len(prompts) for prompts in bench.prompts.classes} == {80}
    named = [bench.prompts.classes[label][0] for label in (0, 1, 999)]
    assert named == ["a bad photo of a tench.", "a bad photo of a goldfish.", "a bad photo of a toilet paper."]
    assert chances(bench)["classification.top5"] == 5 / 1000


@pytest.mark.parametrize("kind", ["imagenet"])
def test_a_partial_run_of_imagenet_covers_many_classes(kind, folder, monkeypatch):
    monkeypatch.setattr(published, "IMAGENET_SIZE", 50_000)
    for synset in SYNSETS[:SIZE]:
        image(folder / f"val/{synset}/ILSVRC2012_val_00009999.JPEG")
    bench = published_benchmark(kind, folder, partial=4)
    assert bench.prompts is not None
    assert bench.prompts.labels == [0, 1, 2, 0]


def test_the_smaller_set_of_sharegpt4v_is_the_start_of_the_larger_one(tmp_path):
    turns = [{"value": "?"}, {"value": "A dog."}]
    write(tmp_path / "all.json", [{"image": f"{number}.jpg", "conversations": turns} for number in range(1200)])
    for number in range(1200):
        image(tmp_path / f"{number}.jpg")
    bench = published_benchmark("sharegpt4v-1k", tmp_path)
    assert list(bench.images) == [f"{number}.jpg" for number in range(1000)]
    with pytest.raises(
        ValueError,
        match=r"there are 1,200 images with 1,200 texts, but .* has 10,000 .* 10,000 texts",
    ):
        published_benchmark("sharegpt4v-10k", tmp_path)


@every_retrieval
def test_images_may_be_in_a_separate_folder(kind, folder, tmp_path_factory):
    image_folder = tmp_path_factory.mktemp("images")
    original = published_benchmark(kind, folder)
    names = [Path(path) for path in original.images]
    for path in files(folder):
        below = next((name for name in names if path.as_posix().endswith(name.as_posix())), Path(path.name))
        if kind == "iiw":
            below = Path(path.parent.name, path.name)
        (image_folder / below).parent.mkdir(parents=True, exist_ok=True)
        path.rename(image_folder / below)
    with pytest.raises(ValueError, match="3 images missing"):
        published_benchmark(kind, folder, partial=False)
    bench = published_benchmark(kind, folder, image_folder)
    assert bench.about == original.about
    assert list(encoded_images(bench)) == [path.name.encode() for path in files(image_folder)] or "dci" in kind


@pytest.mark.slow
@every_kind
def test_the_version_depends_on_the_contents_only(kind, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    LAYOUTS[kind](elsewhere)
    bench = published_benchmark(kind, folder)
    assert published_benchmark(kind, elsewhere).about == bench.about
    assert published_benchmark(kind, folder, partial=2).about["version"] != bench.about["version"]
    assert set(bench.about) == {"split", "version"} | set(FORMATS[kind].about if kind in FORMATS else ())


# --- missing, duplicate and unsafe parts --------------------------------------------------------------------------


@every_kind
def test_the_published_size_is_required(kind, tmp_path):
    LAYOUTS[kind](tmp_path)
    sizes = {"coco": "5,000 images with 25,000 texts", "flickr30k": "1,000 images with 5,000 texts"}
    sizes |= {"sharegpt4v-1k": "1,000 images", "sharegpt4v-10k": "10,000", "dci": "7,805", "iiw": "612"}
    sizes |= {"urban-1k": "1,000", "docci": "5,000"}
    sizes |= {"dci-no-separator": "7,805", "long-dci": "7,602 images with 7,602 texts"}
    sizes |= {"coco-all-captions": "5,000 images with 25,010 texts"}
    sizes |= {"coco-val2017": "5,000 images with 25,000 texts"}
    sizes |= {"coco-val2017-all-captions": "5,000 images with 25,014 texts"}
    sizes |= {"flickr30k-all": "31,783 images with 158,915 texts"}
    message = (
        f"but the published benchmark has {sizes[kind]}"
        if kind in sizes
        else r"1,000 classes incomplete: .*n01440764 has 1 of 50 images; .*"
    )
    with pytest.raises(ValueError, match=rf"^benchmark {kind}: .*{message}.* or use a partial run"):
        published_benchmark(kind, tmp_path)


@every_kind
@pytest.mark.parametrize("partial", [False, True, 1])
def test_more_images_than_published_are_an_error(kind, folder, monkeypatch, partial):
    if kind in FORMATS:
        monkeypatch.setitem(FORMATS, kind, replace(FORMATS[kind], size=SIZE - 1))
    monkeypatch.setattr(published, "IMAGENET_SIZE", SIZE - 1)
    with pytest.raises(ValueError, match=r"there are 3 images.* more than the published 2 images.*: this is another"):
        published_benchmark(kind, folder, partial=partial)


@every_retrieval
def test_a_missing_image_is_an_error_naming_its_annotation(kind, folder):
    missing = files(folder)[1]
    missing.unlink()
    with pytest.raises(
        ValueError, match=rf"^benchmark mine: 1 images missing: .*{missing.name}, named in .*; complete it"
    ):
        published_benchmark(kind, folder, name="mine")


def change_record(folder: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the record of image 1."""
    for path in folder.rglob("*.json*"):
        text = path.read_text()
        if path.suffix == ".json":
            data = json.loads(text)
            records = data.get("images", [data]) if isinstance(data, dict) else data
        else:
            records = data = [json.loads(line) for line in text.splitlines()]
        for record in records:
            if "1" in str(
                record.get("filename", record.get("image_file", record.get("image", record.get("image/key"))))
            ):
                change(record)
        write(path, data)


def remove_text(record: dict[str, Any]) -> None:
    """Removes the text in the format's own way."""
    if "conversations" in record:
        record["conversations"].pop()
    elif "sentences" in record:
        record["sentences"] = [*record["sentences"][:2], {"raw": " "}]
    elif "short_caption" in record:
        record["extra_caption"] = None
    elif "IIW" in record:
        record["IIW"] = None
    else:
        del record["description"]


@pytest.mark.parametrize("kind", JSON_RECORDS)
def test_a_missing_text_is_an_error(kind, folder):
    change_record(folder, kind, remove_text)
    (folder / "caption/1.txt").unlink(missing_ok=True)
    have = "2 of 5" if FORMATS[kind].captions == 5 else "0 of 1"
    message = rf"^benchmark {kind}: 1 annotations missing: .* has {have} texts of .*1\.jpg; complete it, or use"
    with pytest.raises(ValueError, match=message):
        published_benchmark(kind, folder)
    bench = published_benchmark(kind, folder, partial=True)
    assert bench.about["partial"] == "2 of 3 images, 1 annotations missing"


def set_image(name: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record[next(field for field in ("filename", "image_file", "image/key", "image") if field in record)] = name

    return change


FROM_ANNOTATIONS = [kind for kind in JSON_RECORDS if kind != "urban-1k"]

# Kind → its file, image 1 as written there, and one of its texts.
OTHER_FILES = {
    "long-dci": ("dci_long.csv", "sa_1.jpg", LONG[1]),
    "coco-val2017": ("annotations/captions_val2017.json", "000000000001.jpg", CAPTIONS[1][2]),
    "flickr30k-all": ("results_20130124.token", "1.jpg#", CAPTIONS[1][2]),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_missing_text_in_other_formats_is_an_error(kind, folder):
    file, _, text = OTHER_FILES[kind]
    (folder / file).write_text((folder / file).read_text().replace(text, " "))
    have = "4 of 5" if FORMATS[kind].captions == 5 else "0 of 1"
    with pytest.raises(
        ValueError, match=rf"^benchmark {kind}: 1 annotations missing: .* has {have} texts of .*1\.jpg; "
    ):
        published_benchmark(kind, folder)
    bench = published_benchmark(kind, folder, partial=True)
    assert bench.about["partial"] == "2 of 3 images, 1 annotations missing"


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg"])
def test_a_path_outside_the_folder_in_other_formats_is_an_error(kind, folder, name):
    file, image_1, _ = OTHER_FILES[kind]
    renamed = name + "#" * image_1.endswith("#")
    (folder / file).write_text((folder / file).read_text().replace(image_1, renamed))
    with pytest.raises(ValueError, match="leads out of its folder"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_missing_file_is_an_error(kind, folder):
    file = folder / OTHER_FILES[kind][0]
    file.unlink()
    with pytest.raises(ValueError, match=rf"^benchmark {kind}: .*{file.name} does not exist; see docs/benchmarks"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", ["coco-val2017"])
def test_a_file_that_is_not_json_is_an_error(kind, folder):
    (folder / OTHER_FILES[kind][0]).write_text("{")
    with pytest.raises(ValueError, match=r"captions_val2017\.json is not JSON \(.*\); download it again"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", FROM_ANNOTATIONS)
@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg", "..\\secret.jpg"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_path_outside_the_folder_is_an_error(kind, folder, name, partial):
    if kind in ("iiw", "coco", "coco-all-captions"):  # they prefix paths with a folder
        name = name.replace("/etc", "../../etc")
    change_record(folder, kind, set_image(name))
    with pytest.raises(ValueError, match="leads out of its folder"):
        published_benchmark(kind, folder, partial=partial)


@pytest.mark.parametrize("kind", ["dci"])
def test_an_annotation_path_of_dci_outside_the_folder_is_an_error(kind, folder):
    write(folder / "densely_captioned_images/splits.json", {"test": ["../../other.json"]})
    with pytest.raises(ValueError, match=r"'\.\./\.\./other\.json', which leads out of its folder"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", ["dci"])
def test_a_missing_annotation_of_dci_is_an_error(kind, folder):
    (folder / "densely_captioned_images/annotations/1.json").unlink()
    with pytest.raises(ValueError, match=r"1 annotations missing: .*annotations/1\.json has 0 of 1 texts of 1\.json"):
        published_benchmark(kind, folder)
    assert len(published_benchmark(kind, folder, partial=True).images) == 2


@pytest.mark.parametrize("kind", ["docci", "coco", "sharegpt4v-1k", "dci"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_duplicate_image_is_an_error(kind, folder, partial):
    name = next(name for name in published_benchmark(kind, folder).images if name.endswith("0.jpg"))
    change_record(folder, kind, set_image(name.removeprefix("val2014/")))
    with pytest.raises(ValueError, match=r"names .*0\.jpg, which .* also names; remove one of them"):
        published_benchmark(kind, folder, partial=partial)


@pytest.mark.parametrize("kind", FROM_ANNOTATIONS)
@pytest.mark.parametrize("name", [None, ""])
def test_a_record_without_an_image_is_an_error(kind, folder, name):
    change_record(folder, kind, set_image(name))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no image; correct or remove it"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", ["docci"])
@pytest.mark.parametrize("name", ["\0.jpg", "x" * 5000])
def test_an_impossible_file_name_is_a_missing_image(kind, folder, name):
    change_record(folder, kind, set_image(name))
    with pytest.raises(ValueError, match="1 images missing"):
        published_benchmark(kind, folder)


@pytest.mark.parametrize("kind", ["imagenet"])
def test_a_folder_that_is_not_a_class_of_imagenet_is_an_error(kind, folder):
    image(folder / "val/n00000001/x.JPEG")
    with pytest.raises(ValueError, match=r"n00000001/x\.JPEG is not in the folder of an ImageNet-1k class"):
        published_benchmark(kind, folder, partial=True)


@every_kind
def test_a_missing_folder_is_an_error(kind, tmp_path):
    with pytest.raises(ValueError, match=f"^benchmark {kind}: the folder .*nowhere does not exist; see docs/bench"):
        published_benchmark(kind, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"^benchmark {kind}: the folder .*nowhere does not exist"):
        published_benchmark(kind, tmp_path, tmp_path / "nowhere")


@every_kind
def test_an_empty_folder_is_an_error_even_in_a_partial_run(kind, tmp_path):
    with pytest.raises(ValueError, match=f"^benchmark {kind}: "):
        published_benchmark(kind, tmp_path, partial=True)


@every_retrieval
def test_a_partial_run_needs_one_image(kind, folder):
    for path in files(folder):
        path.unlink()
    with pytest.raises(ValueError, match="no image has all its texts; a partial run needs at least one"):
        published_benchmark(kind, folder, partial=True)


def test_the_json_file_with_the_published_name_is_read(tmp_path):
    LAYOUTS["coco"](tmp_path)
    write(tmp_path / "instances.json", {})
    assert len(published_benchmark("coco", tmp_path, partial=True).images) == SIZE
    (tmp_path / "dataset_coco.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"has 2 \.json files, instances\.json, other\.json; it must have one"):
        published_benchmark("coco", tmp_path, partial=True)


@pytest.mark.parametrize("kind", ["urban-1k"])
def test_a_caption_in_another_encoding_is_an_error(kind, folder):
    write(folder / "caption/1.txt", "Ein Hund läuft.".encode("latin-1"))
    with pytest.raises(ValueError, match=r"caption/1\.txt is not UTF-8"):
        published_benchmark(kind, folder, partial=True)


@pytest.mark.parametrize("kind", ["urban-1k"])
def test_a_lone_surrogate_is_replaced(kind, folder):
    sharegpt4v(folder)
    change_record(folder, kind, lambda record: record["conversations"][1].update(value="A dog \ud83d"))
    texts = published_benchmark("sharegpt4v-1k", folder, partial=True).retrieval["long"].texts
    assert texts[1] == "A dog \ufffd"


@pytest.mark.parametrize("kind", ["urban-1k"])
def test_an_image_deleted_before_it_is_read_is_an_error(kind, folder):
    bench = published_benchmark(kind, folder)
    files(folder)[0].unlink()
    with pytest.raises(ValueError, match=r"benchmark urban-1k: cannot read .*0\.jpg"):
        list(encoded_images(bench))


# --- partial runs -------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(("partial", "number"), [(True, 3), (2, 2), (99, 3)])
def test_a_partial_run_is_marked_in_name_and_protocol(kind, folder, partial, number):
    bench = published_benchmark(kind, folder, partial=partial)
    assert bench.name == f"{kind}-partial"
    assert len(bench.images) == len(list(encoded_images(bench))) == number
    assert bench.about["partial"] == f"{number} of 3 images"
    texts = [text for image_texts in bench.retrieval.values() for text in image_texts.texts]
    assert len(texts) == (number * FORMATS[kind].texts // SIZE if kind in FORMATS else 0)


@every_retrieval
def test_a_partial_run_counts_missing_images(kind, folder):
    files(folder)[0].unlink()
    bench = published_benchmark(kind, folder, partial=True)
    assert bench.about["partial"] == "2 of 3 images, 1 images missing"
    assert b"0.jpg" not in [data[-5:] for data in encoded_images(bench)]


# --- end to end ---------------------------------------------------------------------------------------------------


def score_and_protocol(bench: Benchmark, tower: Path) -> tuple[dict[str, float], dict[str, Any]]:
    torch.manual_seed(0)
    settings = {"text": {"config": TEXT, "context_length": 32}, "image_tower": {"frozen": False}}
    model = build_for_pretraining(PretrainConfig.model_validate(settings), tower).eval()
    encoder = LotlipEncoder(model, TextTokenizer("bert-base-uncased", 32, model.config.corner_tokens), 2)
    scores = evaluate(encoder, bench, encoder.images(encoded_images(bench)))
    return dict(scores.values), protocol(encoder, bench)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coco", "imagenet", "dci"])
def test_a_model_can_be_scored(kind, folder, tiny_tower, tiny_samples):
    for path, sample in zip(files(folder), tiny_samples, strict=False):
        path.write_bytes(sample.image)
    settings = PublishedBenchmarkConfig(kind=kind, folder=folder, partial=True)
    bench = open_benchmark("mine", settings, Paths(), [])
    assert bench.name == "mine-partial"
    if bench.prompts:  # few classes and prompts, to save time
        classes = [prompts[:2] for prompts in bench.prompts.classes[:10]]
        bench = replace(bench, prompts=replace(bench.prompts, classes=classes))
    values, about = score_and_protocol(bench, tiny_tower)
    assert set(chances(bench)) <= set(values)
    assert about["images"] == SIZE
    assert about["partial"] == "3 of 3 images"
    assert about.get("short_texts") == (15 if kind == "coco" else None)


# --- published scores ---------------------------------------------------------------------------------------------


def test_published_scores_have_known_benchmarks_and_metrics():
    for reference in REFERENCE:
        assert reference.source
        assert set(reference.scores) <= set(FORMATS)
        for benchmark, scores in reference.scores.items():
            kind = FORMATS[benchmark].kind
            assert set(scores) <= {f"{kind}.image_to_text.r1", f"{kind}.text_to_image.r1"}
            assert scores and all(0.35 < share < 0.95 for share in scores.values())
    by_model = {one.model: one for one in REFERENCE}
    assert len(by_model) == len(REFERENCE)
    lotlip = by_model["LoTLIP B/16, 100M"]
    assert lotlip.scores["iiw"] == {"long.image_to_text.r1": 0.9428, "long.text_to_image.r1": 0.9265}
    assert by_model["DeBias-CLIP B/16"].scores["urban-1k"] == {
        "long.image_to_text.r1": 0.931,
        "long.text_to_image.r1": 0.93,
    }
    assert by_model["FIX-CLIP B/16, 30M"].scores["urban-1k"] == {"long.image_to_text.r1": 0.908}
    assert by_model["FLAIR B/16, 30M"].scores == {
        "coco": {"short.image_to_text.r1": 0.68, "short.text_to_image.r1": 0.533}
    }


def test_sources_are_listed_once_with_their_models():
    few = [Reference("A", {}, "x"), Reference("B", {}, "y"), Reference("C", {}, "x")]
    assert sources(few) == "zero-shot scores that were not measured here: x (A, C); y (B)"
