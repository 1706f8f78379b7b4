"""Features of texts and images are the model's own, in memory and in files; a search finds what a plain sort finds."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lotlip import cli
from lotlip.core.device import choose_device
from lotlip.data.batches import prefetch
from lotlip.models.saving import load_model
from lotlip.retrieval import embedding
from lotlip.retrieval.embedding import Embedder, Match, embed, search
from lotlip.retrieval.index import open_index
from tests.conftest import COLOURS, THINGS, TinySample
from tests.partitions import ingested
from tests.tiny_model import save_tiny_model

TEXTS = [
    " ".join(f"The {colour} {thing} is here." for thing in THINGS[: 1 + number])
    for number, colour in enumerate(COLOURS)
    for _ in range(4)
]
TEXTS = [f"Number {number}. {text}" for number, text in enumerate(TEXTS)]
ENDINGS = (".parquet", ".npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("embedding") / "model", tiny_tower)


@pytest.fixture(scope="module")
def embedder(model: Path) -> Embedder:
    return Embedder(model, batch_size=3)


@pytest.fixture(scope="module")
def text_features(model: Path) -> np.ndarray:
    """Of TEXTS, each encoded by itself as users of CLIP models do it."""
    loaded, tokenizer = load_model(model)
    with torch.inference_mode():
        ids = [torch.from_numpy(tokenizer([text])[0]) for text in TEXTS]
        return torch.cat([loaded.get_text_features(row).pooler_output for row in ids]).numpy()


@pytest.fixture(scope="module")
def image_features(tiny_samples: list[TinySample]) -> dict[str, np.ndarray]:
    """Of the tiny world's images, by the frozen tower alone."""
    return {sample.key: sample.feature / np.linalg.norm(sample.feature) for sample in tiny_samples}


@pytest.fixture
def pictures(tmp_path: Path, tiny_samples: list[TinySample]) -> Path:
    """A folder with seven images, and with what must not trouble anyone."""
    root = tmp_path / "pictures"
    for folder in (root / "more" / "still more", root / ".hidden", root / "folder.png"):
        folder.mkdir(parents=True)
    places = ["b.png", "a.png", "more/c.PNG", "more/a.png", "more/still more/d.png", "more/é.png", "z.png"]
    for place, sample in zip(places, tiny_samples, strict=False):
        (root / place).write_bytes(sample.image)
    (root / ".hidden" / "x.png").write_bytes(b"hidden")
    (root / ".x.png").write_bytes(b"hidden, too")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def overflowing(model: Path, tmp_path: Path) -> Path:
    """A model whose weights are finite and whose features are not."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "overflowing")
    weights = load_file(folder / "model.safetensors")
    for name in ("text.proj.weight", "image.trunk.norm.weight"):
        weights[name].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_features_that_are_not_finite_are_an_error_that_names_the_model_and_the_item(overflowing, pictures, tmp_path):
    texts = lines(tmp_path / "texts.txt", TEXTS[:3])
    for source, item in ((pictures, "a.png"), (texts, f"{texts}:1")):
        with pytest.raises(ValueError, match=rf"{overflowing}.*{item}"):
            embed(overflowing, source, tmp_path / "index.parquet")
        assert not (tmp_path / "index.parquet").exists()
    for broken in (
        Embedder(overflowing).texts,
        lambda _: Embedder(overflowing).images([(pictures / "a.png").read_bytes()]),
    ):
        with pytest.raises(ValueError, match=str(overflowing)):
            broken(TEXTS[:1])


@pytest.mark.parametrize("arguments", [["search"], ["search", "--json"]])
def test_a_search_with_a_model_that_is_not_finite_prints_no_scores(
    model, overflowing, pictures, tmp_path, monkeypatch, capsys, arguments
):
    embed(model, pictures, tmp_path / "index.parquet")
    monkeypatch.setattr(embedding, "weights_hash", lambda folder: "the same")
    opened = open_index(tmp_path / "index.parquet")
    same = opened._replace(about={**opened.about, "weights_sha256": "the same"})
    monkeypatch.setattr(embedding, "open_searchable", lambda path, exact: same)
    command = ["lotlip", arguments[0], str(tmp_path / "index.parquet"), "a dog", "--model", str(overflowing)]
    monkeypatch.setattr(sys, "argv", [*command, *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert str(overflowing) in str(ended.value)
    assert capsys.readouterr().out == ""


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> tuple[list[str], list[str] | None, np.ndarray, dict[str, object]]:
    """Names, texts, features and what the file says of itself; not by the project's reader."""
    if path.suffix == ".npy":
        about, *rows = [json.loads(line) for line in path.with_suffix(".names.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in rows] if "text" in rows[0] else None
        return [row["name"] for row in rows], texts, np.load(path), about["lotlip"]
    table = pq.read_table(path)
    texts = table["text"].to_pylist() if "text" in table.schema.names else None
    features = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    return table["name"].to_pylist(), texts, features, json.loads(table.schema.metadata[b"lotlip"])


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_text_features_are_the_models_own_in_the_order_given(model, text_features, batch_size):
    found = Embedder(model, "cpu", batch_size).texts(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, text_features, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(np.diff(found, axis=0)).max(axis=1).min() > 1e-3  # no two of them are one


def test_texts_of_like_length_are_encoded_together(embedder, monkeypatch):
    seen = []
    encode = embedder.encoder.model.encode_text

    def watch(ids: torch.Tensor, lengths: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        seen.append((ids.shape, lengths.tolist()))
        return encode(ids, lengths, cls_only)

    monkeypatch.setattr(embedder.encoder.model, "encode_text", watch)
    embedder.texts(["a " * length for length in (9, 1, 8, 2, 7, 3, 6, 4, 5, 1, 9, 2, 1)])
    assert [shape[0] for shape, _ in seen] == [3, 3, 3, 3, 1]
    window = [length for _, lengths in seen[:4] for length in lengths]
    assert window == sorted(window)
    assert [shape[1] for shape, _ in seen] == [max(lengths) for _, lengths in seen]


def test_special_tokens_in_a_text_are_no_padding(embedder):
    alone, between = embedder.texts(["[PAD] a dog [PAD]"]), embedder.texts(["a cat", "[PAD] a dog [PAD]", "a bird"])
    np.testing.assert_allclose(alone[0], between[1], atol=1e-6)


def test_image_features_are_the_image_towers(embedder, tiny_samples, image_features):
    images = [sample.image for sample in tiny_samples[:7]]
    expected = np.stack([image_features[sample.key] for sample in tiny_samples[:7]])
    np.testing.assert_allclose(embedder.images(images), expected, atol=1e-5)
    decoded = [Image.open(io.BytesIO(image)) for image in images]
    np.testing.assert_allclose(embedder.images(decoded), expected, atol=1e-5)
    assert embedder.images(iter(images)).dtype == np.float32


def test_a_transparent_image_is_seen_on_white_decoded_or_not(embedder):
    image, file = Image.new("RGBA", (20, 30), (255, 0, 0, 0)), io.BytesIO()
    image.save(file, "png")
    white = embedder.images([Image.new("RGB", (20, 30), "white")])
    for clear in (image, file.getvalue()):
        np.testing.assert_allclose(embedder.images([clear]), white, atol=1e-6)


def test_nothing_has_no_features(embedder):
    assert embedder.texts([]).shape == embedder.images([]).shape == (0, 32)


def test_a_broken_image_is_an_error(embedder, tiny_samples):
    with pytest.raises(ValueError, match=r"not a readable image \(5 bytes\)"):
        embedder.images([tiny_samples[0].image, b"wrong"])


def test_late_interaction_has_no_single_features(tmp_path, tiny_tower):
    folder = save_tiny_model(tmp_path / "model", tiny_tower, similarity="late-interaction")
    with pytest.raises(ValueError, match=r"the model in .* compares token by token \(similarity late-interaction\)"):
        Embedder(folder)


def test_the_device(model, monkeypatch):
    with pytest.raises(ValueError, match="no device 'tpu'; choose auto, cpu, cuda or cuda:N"):
        Embedder(model, "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        Embedder(model, "cuda")
    assert choose_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="no GPU for the device cuda:2"):
        choose_device("cuda:2")
    assert choose_device("cpu") == "cpu"


# --- into a file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_images_of_a_folder(tmp_path, model, pictures, tiny_samples, image_features, ending):
    keys = [sample.key for sample in tiny_samples]
    (pictures / "more" / "broken.jpg").write_bytes(b"not an image")
    (pictures / "more" / "gone.webp").symlink_to("nowhere")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "new" / f"index{ending}"
    found = embed(model, pictures, out, batch_size=2, on_progress=lambda done, of: seen.append((done, of)))
    names, texts, features, about = read(out)
    expected = {
        "a.png": 1,
        "b.png": 0,
        "more/a.png": 3,
        "more/c.PNG": 2,
        "more/still more/d.png": 4,
        "more/é.png": 5,
        "z.png": 6,
    }
    assert names == list(expected)
    assert texts is None
    np.testing.assert_allclose(features, [image_features[keys[number]] for number in expected.values()], atol=1e-5)
    assert (found.rows, found.width) == (7, 32)
    assert [name for name, _ in found.left_out] == ["more/broken.jpg", "more/gone.webp"]
    assert found.left_out[0][1].startswith("not a readable image (12 bytes)")
    assert found.left_out[1][1] == "cannot be read: No such file or directory"
    assert about.pop("weights_sha256") == embedding.weights_hash(model)
    source = {"source": str(pictures.resolve()), "split": None}
    assert about == {"model": str(model.resolve()), "kind": "images", "width": 32, **source}
    assert seen == [(0, 9), (2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize("split", [None, "test"])
def test_pictures_and_texts_that_ingest_left(tmp_path, model, tiny_samples, image_features, split):
    """Pictures are named by their keys; a split is embedded alone where one is asked for."""
    source = ingested(tmp_path / "ingest", {sample.key: sample.image for sample in tiny_samples[:9]})
    keys = [sample.key for sample in tiny_samples[(6 if split else 0) : 9]]
    embed(model, source, tmp_path / "images.parquet", split=split)
    names, _, features, about = read(tmp_path / "images.parquet")
    assert sorted(names) == sorted(keys)
    np.testing.assert_allclose(features, [image_features[name] for name in names], atol=1e-5)
    assert (about["source"], about["split"]) == (str(source), split)
    embed(model, source, tmp_path / "texts.parquet", kind="texts", split=split)
    found = read(tmp_path / "texts.parquet")
    assert (found[0], found[1]) == (names, [f"short caption of {name}" for name in names])


def test_the_name_of_a_file_may_be_any_bytes(tmp_path, model, tiny_samples):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / os.fsdecode(b"\xff.png")).write_bytes(tiny_samples[0].image)
    embed(model, tmp_path / "pictures", tmp_path / "index.parquet")
    assert read(tmp_path / "index.parquet")[0] == ["\\udcff.png"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_lines_of_a_text_file(tmp_path, model, text_features, ending):
    source = lines(tmp_path / "texts.txt", [*TEXTS[:5], "", "  ", *TEXTS[5:]])
    out = tmp_path / f"index{ending}"
    seen: list[tuple[int, int]] = []
    found = embed(model, source, out, batch_size=2, on_progress=lambda done, of: seen.append((done, of)))
    names, texts, features, about = read(out)
    assert texts == TEXTS
    assert names == [f"{source.as_posix()}:{number}" for number in (*range(1, 6), *range(8, 3 + len(TEXTS)))]
    np.testing.assert_allclose(features, text_features, atol=1e-6)
    assert (found.rows, found.width) == (len(TEXTS), 32)
    assert found.left_out == [(f"{source.as_posix()}:{number}", "the text is empty") for number in (6, 7)]
    assert about["kind"] == "texts"
    assert seen == [(0, 26), (8, 26), (16, 26), (24, 26), (26, 26)]


def test_texts_out_of_annotations(tmp_path, model, text_features):
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "raw", "long"])
        rows.writerows([["k0", "a dog", TEXTS[0]], ["k1", "a cat", ""], ["k2", "a bird", TEXTS[2]]])
    found = embed(model, tmp_path / "texts.csv", tmp_path / "index.parquet", fields=["long"])
    names, texts, features, _ = read(tmp_path / "index.parquet")
    assert (names, texts) == (["k0", "k2"], [TEXTS[0], TEXTS[2]])
    assert found.left_out == [("k1", "the text is empty")]
    np.testing.assert_allclose(features, text_features[[0, 2]], atol=1e-6)


def test_a_folder_of_texts(tmp_path, model):
    (tmp_path / "captions").mkdir()
    for number in range(2):
        (tmp_path / "captions" / f"{number}.txt").write_text(TEXTS[number])
    embed(model, tmp_path / "captions", tmp_path / "index.parquet", kind="texts")
    assert read(tmp_path / "index.parquet")[:2] == (["0", "1"], TEXTS[:2])


def test_what_is_broken_is_known_before_anything_is_encoded(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n' * 9 + "{")
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 10: broken JSON"):
        embed(tmp_path / "no model", source, tmp_path / "index.parquet")


def test_when_nothing_can_be_embedded_there_is_no_index(tmp_path, model):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"wrong")
    out = tmp_path / "out" / "index.npy"
    with pytest.raises(ValueError, match=r"none of the 1 images .*; first problem: broken\.png: not a readable image"):
        embed(model, tmp_path / "pictures", out)
    with pytest.raises(ValueError, match=r"none of the 0 texts in .*texts\.txt can be embedded$"):
        embed(model, lines(tmp_path / "texts.txt", []), out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("texts.txt", {"kind": "sounds"}, "unknown kind 'sounds'; choose images or texts"),
        ("texts.txt", {"batch_size": 0}, "batch_size is 0"),
        ("texts.txt", {"out": "index.csv"}, r"index\.csv has an unknown suffix"),
        ("texts.txt", {"fields": ["text"]}, "no fields or splits"),
        ("texts.txt", {"kind": "images"}, "is not a folder of images"),
        ("latin.txt", {}, r"latin\.txt is not UTF-8"),
        ("nothing.txt", {}, r"nothing\.txt"),
        ("pictures", {"fields": ["text"]}, "images have no fields"),
        ("pictures", {"split": "test"}, "only that has splits; remove --split"),
        ("texts.txt", {"split": "test"}, "no fields or splits"),
        ("empty", {}, "empty has no image"),
    ],
)
def test_a_wrong_argument_is_an_error(tmp_path, model, pictures, source, changes, message):
    lines(tmp_path / "texts.txt", TEXTS[:1])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    out = tmp_path / changes.pop("out", "index.parquet")
    with pytest.raises((ValueError, OSError), match=message):
        embed(model, tmp_path / source, out, **changes)
    assert not out.exists()


def test_threads_are_ahead_but_not_far():
    """Results come in order, and who asks for few has few made."""
    asked = []

    def items() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    found = prefetch(lambda number: number * number, items(), 5)
    assert next(found) == 0
    assert len(asked) == 6
    assert [next(found), next(found)] == [1, 4]
    assert len(asked) == 8
    assert list(found) == [number * number for number in range(3, 100)]


def test_an_error_in_a_thread_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda number: 1 // number, iter([3, 2, 1, 0, 1]), 2))


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with indexes of the texts."""
    folder = tmp_path_factory.mktemp("indexes")
    for ending in ENDINGS:
        embed(model, lines(folder / "texts.txt", TEXTS), folder / f"texts{ending}")
    return folder


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_search_finds_what_a_plain_sort_finds(indexes, model, text_features, ending):
    for number in (0, 11):
        found = search(indexes / f"texts{ending}", TEXTS[number], top=6)
        scores = text_features @ text_features[number]
        order = np.argsort(-scores)[:6]
        assert order[0] == number
        assert [match.text for match in found] == [TEXTS[row] for row in order]
        assert [match.name for match in found] == [f"{indexes.as_posix()}/texts.txt:{row + 1}" for row in order]
        np.testing.assert_allclose([match.score for match in found], scores[order], atol=1e-5)
    assert len(search(indexes / f"texts{ending}", TEXTS[0], top=99)) == len(TEXTS)


def test_images_are_found_by_an_image_and_by_a_text(tmp_path, model, pictures, embedder):
    index = tmp_path / "index.parquet"
    embed(model, pictures, index)
    names, _, features, _ = read(index)
    first = search(index, image=pictures / "more" / "a.png", top=1)
    assert first == [Match(pytest.approx(1, abs=1e-5), "more/a.png", None, str(pictures))]
    found = search(index, "A red dog.", top=3)
    order = np.argsort(-(features @ embedder.texts(["A red dog."])[0]))[:3]
    assert [match.name for match in found] == [names[row] for row in order]


def test_equal_ones_come_in_the_indexs_order(tmp_path, model):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    embed(model, lines(tmp_path / "texts.txt", texts), tmp_path / "index.npy", batch_size=1)
    found = search(tmp_path / "index.npy", TEXTS[0])
    assert [match.name.rpartition(":")[2] for match in found] == ["1", "3", "4", "2"]


def test_the_model_is_remembered_and_may_move(tmp_path, model):
    copy = shutil.copytree(model, tmp_path / "copy")
    index = tmp_path / "index.parquet"
    embed(copy, lines(tmp_path / "texts.txt", TEXTS), index)
    expected = search(index, TEXTS[3])
    copy.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"made by a model in .*copy, which does not exist; give its"):
        search(index, TEXTS[3])
    assert search(index, TEXTS[3], model=tmp_path / "moved") == expected
    with pytest.raises(ValueError, match=r"made by a model in .*else, which does not exist"):
        search(index, TEXTS[3], model=tmp_path / "else")


def test_other_weights_are_an_error(tmp_path, model, tiny_tower):
    other = save_tiny_model(tmp_path / "model", tiny_tower, seed=2)
    index = tmp_path / "index.parquet"
    embed(other, lines(tmp_path / "texts.txt", TEXTS[:2]), index)
    with pytest.raises(ValueError, match=r"weights in .* are not those that made .*index\.parquet; give the model"):
        search(index, TEXTS[0], model=model)
    shutil.copyfile(model / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ValueError, match="are not those that made"):
        search(index, TEXTS[0])
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model: it contains no weights \(\*\.safetensors\)"):
        search(index, TEXTS[0])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "either a text or an image"),
        ({"text": "a", "image": Path("a.png")}, "either a text or an image"),
        ({"text": " \n"}, "the text to search for is empty"),
        ({"text": "a", "top": 0}, "top is 0"),
        ({"image": Path(__file__)}, r"test_embedding\.py: not a readable image"),
    ],
)
def test_a_wrong_query_is_an_error(indexes, query, message):
    with pytest.raises(ValueError, match=message):
        search(indexes / "texts.parquet", **query)


# --- the program ------------------------------------------------------------------------------------------------------


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Runs the program in this process; gives its status, or the message it ends with."""
    monkeypatch.setattr(sys, "argv", ["lotlip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code


def test_the_program_embeds_and_searches(monkeypatch, capsys, tmp_path, model, pictures):
    index = tmp_path / "index.parquet"
    (pictures / "broken.png").write_bytes(b"wrong")
    assert program(monkeypatch, "embed", model, pictures, "--out", index, "--batch-size", "3") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err
    left, last = err.splitlines()[-2:]
    assert left.startswith("broken.png left out: not a readable image")
    assert last == f"{index}: 7 features of size 32, 1 left out"

    assert program(monkeypatch, "search", index, "--image", pictures / "z.png", "--top", "2") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "   1  1.0000  z.png"
    assert second.startswith("   2  ")

    assert program(monkeypatch, "search", index, "A red dog.", "--json", "--top", "3", "--model", model) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [vars(match) for match in search(index, "A red dog.", top=3)]


def test_the_program_shows_the_beginning_of_a_text(monkeypatch, capsys, tmp_path, model):
    text = "word " * 80
    source, index = lines(tmp_path / "texts.txt", [text, "short"]), tmp_path / "index.npy"
    assert program(monkeypatch, "embed", model, source, "--out", index, "--kind", "texts") == 0
    capsys.readouterr()
    assert program(monkeypatch, "search", index, text, "--top", "1") == 0
    assert capsys.readouterr().out == f"   1  1.0000  {source.as_posix()}:1  {'word ' * 19}…\n"


def test_the_program_says_what_is_wrong_in_one_line(monkeypatch, tmp_path):
    message = f"error: the index {tmp_path}/index.npy does not exist; write it with `lotlip embed`"
    assert program(monkeypatch, "search", tmp_path / "index.npy", "a dog") == message
