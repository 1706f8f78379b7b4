"""Features of texts and images, in memory and in index files, and exact search in them."""

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
    """Features of TEXTS, encoded one by one with the API of CLIP models."""
    loaded, tokenizer = load_model(model)
    with torch.inference_mode():
        ids = [torch.from_numpy(tokenizer([text])[0]) for text in TEXTS]
        return torch.cat([loaded.get_text_features(row).pooler_output for row in ids]).numpy()


@pytest.fixture(scope="module")
def image_features(tiny_samples: list[TinySample]) -> dict[str, np.ndarray]:
    """Features of the tiny world's images, by the frozen tower alone."""
    return {sample.key: sample.feature / np.linalg.norm(sample.feature) for sample in tiny_samples}


@pytest.fixture
def image_folder(tmp_path: Path, tiny_samples: list[TinySample]) -> Path:
    """A folder with seven images, and with files and folders that are ignored."""
    root = tmp_path / "images"
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
    """A model with finite weights and non-finite features."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "overflowing")
    weights = load_file(folder / "model.safetensors")
    for name in ("text.proj.weight", "image.trunk.norm.weight"):
        weights[name].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_non_finite_features_are_an_error_naming_model_and_item(overflowing, image_folder, tmp_path):
    texts = write_lines(tmp_path / "texts.txt", TEXTS[:3])
    for source, item in ((image_folder, "a.png"), (texts, f"{texts}:1")):
        with pytest.raises(ValueError, match=rf"{overflowing}.*{item}"):
            embed(overflowing, source, tmp_path / "index.parquet")
        assert not (tmp_path / "index.parquet").exists()
    for embed_text in (
        Embedder(overflowing).texts,
        lambda _: Embedder(overflowing).images([(image_folder / "a.png").read_bytes()]),
    ):
        with pytest.raises(ValueError, match=str(overflowing)):
            embed_text(TEXTS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["search"], ["search", "--json"]])
def test_search_with_non_finite_features_prints_no_scores(
    model, overflowing, image_folder, tmp_path, monkeypatch, capsys, arguments
):
    embed(model, image_folder, tmp_path / "index.parquet")
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


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def read_index(path: Path) -> tuple[list[str], list[str] | None, np.ndarray, dict[str, object]]:
    """Names, texts, features and metadata of an index, without the project's reader."""
    if path.suffix == ".npy":
        about, *rows = [json.loads(line) for line in path.with_suffix(".names.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in rows] if "text" in rows[0] else None
        return [row["name"] for row in rows], texts, np.load(path), about["lotlip"]
    table = pq.read_table(path)
    texts = table["text"].to_pylist() if "text" in table.schema.names else None
    features = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    return table["name"].to_pylist(), texts, features, json.loads(table.schema.metadata[b"lotlip"])


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_text_features_equal_the_models_in_the_given_order(model, text_features, batch_size):
    features = Embedder(model, "cpu", batch_size).texts(TEXTS)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, text_features, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert np.abs(np.diff(features, axis=0)).max(axis=1).min() > 1e-3  # all are different


def test_texts_of_similar_length_are_encoded_together(embedder, monkeypatch):
    batches = []
    encode = embedder.encoder.model.encode_text

    def record(ids: torch.Tensor, lengths: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        batches.append((ids.shape, lengths.tolist()))
        return encode(ids, lengths, cls_only)

    monkeypatch.setattr(embedder.encoder.model, "encode_text", record)
    embedder.texts(["a " * length for length in (9, 1, 8, 2, 7, 3, 6, 4, 5, 1, 9, 2, 1)])
    assert [shape[0] for shape, _ in batches] == [3, 3, 3, 3, 1]
    window = [length for _, lengths in batches[:4] for length in lengths]
    assert window == sorted(window)
    assert [shape[1] for shape, _ in batches] == [max(lengths) for _, lengths in batches]


def test_special_tokens_in_a_text_are_not_padding(embedder):
    alone, between = embedder.texts(["[PAD] a dog [PAD]"]), embedder.texts(["a cat", "[PAD] a dog [PAD]", "a bird"])
    np.testing.assert_allclose(alone[0], between[1], atol=1e-6)


def test_image_features_equal_the_image_towers(embedder, tiny_samples, image_features):
    images = [sample.image for sample in tiny_samples[:7]]
    expected = np.stack([image_features[sample.key] for sample in tiny_samples[:7]])
    np.testing.assert_allclose(embedder.images(images), expected, atol=1e-5)
    decoded = [Image.open(io.BytesIO(image)) for image in images]
    np.testing.assert_allclose(embedder.images(decoded), expected, atol=1e-5)
    assert embedder.images(iter(images)).dtype == np.float32


def test_a_transparent_image_is_encoded_on_white(embedder):
    image, file = Image.new("RGBA", (20, 30), (255, 0, 0, 0)), io.BytesIO()
    image.save(file, "png")
    white = embedder.images([Image.new("RGB", (20, 30), "white")])
    for clear in (image, file.getvalue()):
        np.testing.assert_allclose(embedder.images([clear]), white, atol=1e-6)


def test_no_inputs_give_no_features(embedder):
    assert embedder.texts([]).shape == embedder.images([]).shape == (0, 32)


def test_a_broken_image_is_an_error(embedder, tiny_samples):
    with pytest.raises(ValueError, match=r"not a readable image \(5 bytes\)"):
        embedder.images([tiny_samples[0].image, b"wrong"])


@pytest.mark.slow
def test_a_late_interaction_model_is_rejected(tmp_path, tiny_tower):
    folder = save_tiny_model(tmp_path / "model", tiny_tower, similarity="late-interaction")
    with pytest.raises(ValueError, match=r"the model in .* compares token by token \(similarity late-interaction\)"):
        Embedder(folder)


def test_choose_device(model, monkeypatch):
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


# --- index files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_embed_writes_the_images_of_a_folder(tmp_path, model, image_folder, tiny_samples, image_features, ending):
    keys = [sample.key for sample in tiny_samples]
    (image_folder / "more" / "broken.jpg").write_bytes(b"not an image")
    (image_folder / "more" / "gone.webp").symlink_to("nowhere")
    progress: list[tuple[int, int]] = []
    out = tmp_path / "new" / f"index{ending}"
    summary = embed(model, image_folder, out, batch_size=2, on_progress=lambda done, of: progress.append((done, of)))
    names, texts, features, about = read_index(out)
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
    assert (summary.rows, summary.width) == (7, 32)
    assert [name for name, _ in summary.left_out] == ["more/broken.jpg", "more/gone.webp"]
    assert summary.left_out[0][1].startswith("not a readable image (12 bytes)")
    assert summary.left_out[1][1] == "cannot be read: No such file or directory"
    assert about.pop("weights_sha256") == embedding.weights_hash(model)
    source = {"source": str(image_folder.resolve()), "split": None}
    assert about == {"model": str(model.resolve()), "kind": "images", "width": 32, **source}
    assert progress == [(0, 9), (2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, "test"])
def test_embed_writes_ingested_images_and_texts(tmp_path, model, tiny_samples, image_features, split):
    """Images are named by their keys. `split` selects one split."""
    source = ingested(tmp_path / "ingest", {sample.key: sample.image for sample in tiny_samples[:9]})
    keys = [sample.key for sample in tiny_samples[(6 if split else 0) : 9]]
    embed(model, source, tmp_path / "images.parquet", split=split)
    names, _, features, about = read_index(tmp_path / "images.parquet")
    assert sorted(names) == sorted(keys)
    np.testing.assert_allclose(features, [image_features[name] for name in names], atol=1e-5)
    assert (about["source"], about["split"]) == (str(source), split)
    embed(model, source, tmp_path / "texts.parquet", kind="texts", split=split)
    texts = read_index(tmp_path / "texts.parquet")
    assert (texts[0], texts[1]) == (names, [f"short caption of {name}" for name in names])


def test_file_names_may_be_any_bytes(tmp_path, model, tiny_samples):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / os.fsdecode(b"\xff.png")).write_bytes(tiny_samples[0].image)
    embed(model, tmp_path / "images", tmp_path / "index.parquet")
    assert read_index(tmp_path / "index.parquet")[0] == ["\\udcff.png"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_embed_writes_the_lines_of_a_text_file(tmp_path, model, text_features, ending):
    source = write_lines(tmp_path / "texts.txt", [*TEXTS[:5], "", "  ", *TEXTS[5:]])
    out = tmp_path / f"index{ending}"
    progress: list[tuple[int, int]] = []
    summary = embed(model, source, out, batch_size=2, on_progress=lambda done, of: progress.append((done, of)))
    names, texts, features, about = read_index(out)
    assert texts == TEXTS
    assert names == [f"{source.as_posix()}:{number}" for number in (*range(1, 6), *range(8, 3 + len(TEXTS)))]
    np.testing.assert_allclose(features, text_features, atol=1e-6)
    assert (summary.rows, summary.width) == (len(TEXTS), 32)
    assert summary.left_out == [(f"{source.as_posix()}:{number}", "the text is empty") for number in (6, 7)]
    assert about["kind"] == "texts"
    assert progress == [(0, 26), (8, 26), (16, 26), (24, 26), (26, 26)]


@pytest.mark.slow
def test_embed_writes_texts_of_annotations(tmp_path, model, text_features):
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "raw", "long"])
        rows.writerows([["k0", "a dog", TEXTS[0]], ["k1", "a cat", ""], ["k2", "a bird", TEXTS[2]]])
    summary = embed(model, tmp_path / "texts.csv", tmp_path / "index.parquet", fields=["long"])
    names, texts, features, _ = read_index(tmp_path / "index.parquet")
    assert (names, texts) == (["k0", "k2"], [TEXTS[0], TEXTS[2]])
    assert summary.left_out == [("k1", "the text is empty")]
    np.testing.assert_allclose(features, text_features[[0, 2]], atol=1e-6)


@pytest.mark.slow
def test_embed_writes_a_folder_of_texts(tmp_path, model):
    (tmp_path / "captions").mkdir()
    for number in range(2):
        (tmp_path / "captions" / f"{number}.txt").write_text(TEXTS[number])
    embed(model, tmp_path / "captions", tmp_path / "index.parquet", kind="texts")
    assert read_index(tmp_path / "index.parquet")[:2] == (["0", "1"], TEXTS[:2])


def test_broken_sources_are_found_before_encoding(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n' * 9 + "{")
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 10: broken JSON"):
        embed(tmp_path / "no model", source, tmp_path / "index.parquet")


@pytest.mark.slow
def test_no_index_is_written_when_nothing_can_be_embedded(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"wrong")
    out = tmp_path / "out" / "index.npy"
    with pytest.raises(ValueError, match=r"none of the 1 images .*; first problem: broken\.png: not a readable image"):
        embed(model, tmp_path / "images", out)
    with pytest.raises(ValueError, match=r"none of the 0 texts in .*texts\.txt can be embedded$"):
        embed(model, write_lines(tmp_path / "texts.txt", []), out)
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
        ("images", {"fields": ["text"]}, "images have no fields"),
        ("images", {"split": "test"}, "only that has splits; remove --split"),
        ("texts.txt", {"split": "test"}, "no fields or splits"),
        ("empty", {}, "empty has no image"),
    ],
)
def test_invalid_arguments_are_errors(tmp_path, model, image_folder, source, changes, message):
    write_lines(tmp_path / "texts.txt", TEXTS[:1])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    out = tmp_path / changes.pop("out", "index.parquet")
    with pytest.raises((ValueError, OSError), match=message):
        embed(model, tmp_path / source, out, **changes)
    assert not out.exists()


def test_prefetch_limits_how_far_it_reads():
    """Results come in order, and few are computed before they are needed."""
    requested = []

    def items() -> Iterator[int]:
        for number in range(100):
            requested.append(number)
            yield number

    results = prefetch(lambda number: number * number, items(), 5)
    assert next(results) == 0
    assert len(requested) == 6
    assert [next(results), next(results)] == [1, 4]
    assert len(requested) == 8
    assert list(results) == [number * number for number in range(3, 100)]


def test_prefetch_raises_errors_of_its_threads():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda number: 1 // number, iter([3, 2, 1, 0, 1]), 2))


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with indexes of the texts."""
    folder = tmp_path_factory.mktemp("indexes")
    for ending in ENDINGS:
        embed(model, write_lines(folder / "texts.txt", TEXTS), folder / f"texts{ending}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_search_agrees_with_a_plain_sort(indexes, model, text_features, ending):
    for number in (0, 11):
        matches = search(indexes / f"texts{ending}", TEXTS[number], top=6)
        scores = text_features @ text_features[number]
        order = np.argsort(-scores)[:6]
        assert order[0] == number
        assert [match.text for match in matches] == [TEXTS[row] for row in order]
        assert [match.name for match in matches] == [f"{indexes.as_posix()}/texts.txt:{row + 1}" for row in order]
        np.testing.assert_allclose([match.score for match in matches], scores[order], atol=1e-5)
    assert len(search(indexes / f"texts{ending}", TEXTS[0], top=99)) == len(TEXTS)


@pytest.mark.slow
def test_search_accepts_an_image_or_a_text(tmp_path, model, image_folder, embedder):
    index = tmp_path / "index.parquet"
    embed(model, image_folder, index)
    names, _, features, _ = read_index(index)
    first = search(index, image=image_folder / "more" / "a.png", top=1)
    assert first == [Match(pytest.approx(1, abs=1e-5), "more/a.png", None, str(image_folder))]
    matches = search(index, "A red dog.", top=3)
    order = np.argsort(-(features @ embedder.texts(["A red dog."])[0]))[:3]
    assert [match.name for match in matches] == [names[row] for row in order]


@pytest.mark.slow
def test_ties_keep_the_order_of_the_index(tmp_path, model):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    embed(model, write_lines(tmp_path / "texts.txt", texts), tmp_path / "index.npy", batch_size=1)
    matches = search(tmp_path / "index.npy", TEXTS[0])
    assert [match.name.rpartition(":")[2] for match in matches] == ["1", "3", "4", "2"]


@pytest.mark.slow
def test_the_index_records_its_model_which_may_move(tmp_path, model):
    copy = shutil.copytree(model, tmp_path / "copy")
    index = tmp_path / "index.parquet"
    embed(copy, write_lines(tmp_path / "texts.txt", TEXTS), index)
    expected = search(index, TEXTS[3])
    copy.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"made by a model in .*copy, which does not exist; give its"):
        search(index, TEXTS[3])
    assert search(index, TEXTS[3], model=tmp_path / "moved") == expected
    with pytest.raises(ValueError, match=r"made by a model in .*else, which does not exist"):
        search(index, TEXTS[3], model=tmp_path / "else")


@pytest.mark.slow
def test_changed_weights_are_an_error(tmp_path, model, tiny_tower):
    other = save_tiny_model(tmp_path / "model", tiny_tower, seed=2)
    index = tmp_path / "index.parquet"
    embed(other, write_lines(tmp_path / "texts.txt", TEXTS[:2]), index)
    with pytest.raises(ValueError, match=r"weights in .* are not those that made .*index\.parquet; give the model"):
        search(index, TEXTS[0], model=model)
    shutil.copyfile(model / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ValueError, match="are not those that made"):
        search(index, TEXTS[0])
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model: it contains no weights \(\*\.safetensors\)"):
        search(index, TEXTS[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "either a text or an image"),
        ({"text": "a", "image": Path("a.png")}, "either a text or an image"),
        ({"text": " \n"}, "the text to search for is empty"),
        ({"text": "a \udcff"}, "is not valid Unicode"),
        ({"text": "a", "top": 0}, "top is 0"),
        ({"image": Path(__file__)}, r"test_embedding\.py: not a readable image"),
    ],
)
def test_invalid_queries_are_errors(indexes, query, message):
    with pytest.raises(ValueError, match=message):
        search(indexes / "texts.parquet", **query)


# --- the command ------------------------------------------------------------------------------------------------------


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Runs the command in this process; returns its status or its error message."""
    monkeypatch.setattr(sys, "argv", ["lotlip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code


@pytest.mark.slow
def test_the_command_embeds_and_searches(monkeypatch, capsys, tmp_path, model, image_folder):
    index = tmp_path / "index.parquet"
    (image_folder / "broken.png").write_bytes(b"wrong")
    assert program(monkeypatch, "embed", model, image_folder, "--out", index, "--batch-size", "3") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err
    warning, summary = err.splitlines()[-2:]
    assert warning.startswith("broken.png left out: not a readable image")
    assert summary == f"{index}: 7 features of size 32, 1 left out"

    assert program(monkeypatch, "search", index, "--image", image_folder / "z.png", "--top", "2") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "   1  1.0000  z.png"
    assert second.startswith("   2  ")

    assert program(monkeypatch, "search", index, "A red dog.", "--json", "--top", "3", "--model", model) == 0
    matches = json.loads(capsys.readouterr().out)
    assert matches == [vars(match) for match in search(index, "A red dog.", top=3)]


@pytest.mark.slow
def test_the_command_shows_the_beginning_of_a_text(monkeypatch, capsys, tmp_path, model):
    text = "word " * 80
    source, index = write_lines(tmp_path / "texts.txt", [text, "short"]), tmp_path / "index.npy"
    assert program(monkeypatch, "embed", model, source, "--out", index, "--kind", "texts") == 0
    capsys.readouterr()
    assert program(monkeypatch, "search", index, text, "--top", "1") == 0
    assert capsys.readouterr().out == f"   1  1.0000  {source.as_posix()}:1  {'word ' * 19}…\n"


def test_the_command_reports_an_error_in_one_line(monkeypatch, tmp_path):
    message = f"error: the index {tmp_path}/index.npy does not exist; write it with `lotlip embed`"
    assert program(monkeypatch, "search", tmp_path / "index.npy", "a dog") == message
