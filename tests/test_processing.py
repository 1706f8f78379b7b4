"""Texts and pictures prepared as in training, whichever of transformers' Auto classes prepares them."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from lotlip.data.images import MEAN, RESIZES, STD, TooManyPixels, decode_rgb, image_transform, training_transform
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.configuration import LotlipConfig
from lotlip.models.image_processing import LotlipImageProcessor
from lotlip.models.processing import LotlipProcessor

PARITY = Path(__file__).parent / "data" / "parity"
TEXTS = ["A dog. It runs.\nFar", "", "one", "a [MASK] b.. [SEP] </s>c", "unbelievable " * 40]
TOWER = {"timm_model": "vit_scenes", "image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def text_tokenizer() -> TextTokenizer:
    return TextTokenizer("bert-base-uncased", 24, 2, 1)


def picture(mode: str = "RGB", size: tuple[int, int] = (51, 40), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels if len(mode) > 1 else pixels[:, :, 0])


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def build() -> LotlipProcessor:
    return LotlipProcessor.build(text_tokenizer(), LotlipConfig(image_config=TOWER))


@pytest.fixture(scope="module")
def processor() -> LotlipProcessor:
    return build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The processor's files beside a model's config.json."""
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "lotlip"}')
    return folder


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["m0", "m2"])
def test_pixels_are_those_of_the_released_code(case):
    names = json.loads((PARITY / case / "case.json").read_text())["images"]
    images = [Image.open(PARITY / case / name) for name in names]
    pixels = LotlipImageProcessor(160)(images, return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, load_file(PARITY / case / "expected.safetensors")["pixel_values"], atol=1e-5)


def every_way(image: Image.Image, folder: Path) -> dict[str, Any]:
    """A picture without transparency as each thing that is taken for one."""
    data = encoded(image)
    (folder / "picture.png").write_bytes(data)
    return {
        "PIL": image,
        "array": np.asarray(image),
        "tensor": torch.from_numpy(np.asarray(image).copy()),
        "bytes": data,
        "path": folder / "picture.png",
        "name": str(folder / "picture.png"),
        "data URL": data_url(data),
    }


@pytest.mark.parametrize("size", [(51, 40), (40, 51), (32, 32), (33, 7), (1, 1)])
def test_pixels_are_those_of_training_whatever_a_picture_comes_as(processor, tmp_path, size):
    image = picture(size=size)
    expected = image_transform(32, TOWER["mean"], TOWER["std"])(image)
    for kind, given in every_way(image, tmp_path).items():
        for pixels in (
            processor.image_processor(given, return_tensors="np")["pixel_values"],
            processor(images=given, return_tensors="np")["pixel_values"],
            processor(images=[given], return_tensors="np")["pixel_values"],
        ):
            assert pixels.shape == (1, 3, 32, 32), kind
            assert np.array_equal(pixels[0], expected), kind


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(51, 40), (40, 90), (200, 33)])
def test_the_saved_processor_gives_the_pixels_of_training_in_every_resize_mode(tmp_path, resize, size):
    config = LotlipConfig(image_config={**TOWER, "resize": resize})
    LotlipProcessor.build(text_tokenizer(), config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lotlip"}')
    data = encoded(picture(size=size))
    training = training_transform(32, TOWER["mean"], TOWER["std"], resize=resize)(data, random.Random(0))
    for saved in (AutoImageProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert np.array_equal(saved(images=data, return_tensors="np")["pixel_values"][0], training)


def test_a_processor_that_was_saved_without_a_resize_mode_crops(tmp_path):
    LotlipImageProcessor(48).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in saved.items() if name != "resize"}))
    assert AutoImageProcessor.from_pretrained(tmp_path).resize == "crop"


def test_a_processor_with_an_unknown_resize_mode_is_refused():
    with pytest.raises(ValueError, match="unknown resize mode 'stretch'"):
        LotlipImageProcessor(48, resize="stretch")


def test_a_batch_is_its_pictures(processor):
    images = [picture(size=(40 + number, 50), seed=number) for number in range(3)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    alone = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(pixels, torch.cat(alone))
    assert list(processor(images=images, return_tensors="pt")) == ["pixel_values"]


def awkward() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    palette = Image.new("P", (40, 40))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    return {
        "transparent": encoded(picture("RGBA")),
        "palette": encoded(palette, transparency=0),
        "turned": encoded(picture(), "JPEG", exif=exif),
        "grey": encoded(picture("L")),
        "deep grey": encoded(Image.fromarray(np.full((40, 40), 0x8000, dtype=np.uint16))),
    }


@pytest.mark.parametrize("kind", awkward())
def test_awkward_pictures_are_decoded_as_in_training(processor, tmp_path, kind):
    data = awkward()[kind]
    expected = image_transform(32, TOWER["mean"], TOWER["std"])(decode_rgb(data))
    (tmp_path / "picture").write_bytes(data)
    ways = (data, Image.open(io.BytesIO(data)), tmp_path / "picture", str(tmp_path / "picture"), data_url(data))
    for given in ways:
        assert np.array_equal(processor(images=given, return_tensors="np")["pixel_values"][0], expected)
        assert np.array_equal(processor.image_processor(given)["pixel_values"][0], expected)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((1, 8, 8, 3))]
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(ValueError, match=r"an array of (uint8|float64) and shape \[.*\] is not an image; pass uint8"):
        LotlipImageProcessor()(array)


def test_what_cannot_be_read_is_refused(processor):
    with pytest.raises(ValueError, match="not a readable image"):
        processor(images=b"no picture")


def test_a_data_url_has_the_same_limit_of_pixels_as_a_file(processor):
    data = encoded(picture())
    header = b"IHDR" + struct.pack(">II", 2**15, 2**15) + data[24:29]  # the length is before, the checksum after it
    huge = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    for given in (huge, data_url(huge)):
        with pytest.raises(TooManyPixels):
            processor(images=given)


@pytest.mark.parametrize(
    "url", ["data:image/png,%89PNG", "data:image/png;base64,a", "data:image/png;base64,!!!!", "data:image/png;base64"]
)
def test_a_data_url_that_cannot_be_read_is_refused(processor, url):
    with pytest.raises(ValueError, match="base64"):
        processor(images=url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "https://example.org/a.png", "HTTPS://example.org/a.png"])
def test_a_web_address_is_refused_before_any_request(processor, monkeypatch, url):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr("httpx.get", fetch)
    for prepare in (processor, processor.image_processor):
        with pytest.raises(ValueError, match=f"{url}.*download"):
            prepare(images=url)


def test_options_are_refused_as_pictures_are_prepared_in_one_way(processor):
    with pytest.raises(ValueError, match="has no options do_resize; remove them, images are prepared as trained"):
        processor.image_processor(picture(), do_resize=False)
    with pytest.raises(ValueError, match="has no options do_center_crop"):
        processor(images=picture(), images_kwargs={"do_center_crop": False})


def test_the_image_processor_is_saved_by_itself(tmp_path):
    LotlipImageProcessor(48, TOWER["mean"], TOWER["std"]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "LotlipImageProcessor",
        "image_size": 48,
        "image_mean": TOWER["mean"],
        "image_std": TOWER["std"],
        "resize": "crop",
        "interpolation": "bicubic",
        "crop": 1.0,
    }
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LotlipImageProcessor)
    assert loaded.to_dict() == saved


def test_pictures_are_prepared_as_for_the_released_models_unless_told_otherwise():
    alone = LotlipImageProcessor()
    of_model = LotlipProcessor.build(text_tokenizer(), LotlipConfig()).image_processor
    assert alone.to_dict() == of_model.to_dict()
    assert (alone.image_size, alone.image_mean, alone.image_std) == (224, list(MEAN), list(STD))


# --- texts --------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_training_padded_and_cut(processor):
    ids, lengths = text_tokenizer()(TEXTS)
    given = processor(text=TEXTS, return_tensors="pt")
    assert list(given) == ["input_ids", "attention_mask"]
    assert np.array_equal(given["input_ids"].numpy(), ids)
    assert np.array_equal(given["attention_mask"].sum(dim=1).numpy(), lengths)
    assert ids.shape[1] == 24  # the last text was cut


def test_padding_and_cutting_can_be_changed(processor):
    rows = text_tokenizer().encode(TEXTS)
    assert processor(text=TEXTS, padding=False)["input_ids"] == rows
    assert processor(text=TEXTS[0])["input_ids"] == rows[0]
    wide = processor(text=TEXTS[:2], padding="max_length", return_tensors="np")
    assert wide["input_ids"].shape == (2, 24)
    short = processor(text=TEXTS, max_length=12, return_tensors="np")["input_ids"]
    assert np.array_equal(short, TextTokenizer("bert-base-uncased", 12, 2, 1)(TEXTS)[0])
    with pytest.warns(UserWarning, match="max_length"):
        whole = processor(text=TEXTS, truncation=False)["input_ids"]
    assert len(whole[-1]) == 1 + 3 + 40 + 1


def test_texts_and_pictures_together(processor):
    both = processor(text=TEXTS, images=[picture()] * 2, return_tensors="pt")
    assert {name: tuple(value.shape) for name, value in both.items()} == {
        "input_ids": (5, 24),
        "attention_mask": (5, 24),
        "pixel_values": (2, 3, 32, 32),
    }
    assert set(processor.model_input_names) == set(both)


# --- on disk ------------------------------------------------------------------------------------------------------


def test_auto_classes_read_the_folder(processor, folder):
    given = {"text": TEXTS, "images": [picture()], "return_tensors": "np"}
    expected = processor(**given)
    of_both = AutoProcessor.from_pretrained(folder)
    assert type(of_both) is LotlipProcessor
    assert type(LotlipProcessor.from_pretrained(folder)) is LotlipProcessor
    of_images = AutoImageProcessor.from_pretrained(folder)
    assert type(of_images) is LotlipImageProcessor
    of_texts = AutoTokenizer.from_pretrained(folder)
    for found in (
        of_both(**given),
        LotlipProcessor.from_pretrained(folder)(**given),
        {
            **of_images(given["images"], return_tensors="np"),
            **of_texts(TEXTS, padding=True, truncation=True, return_tensors="np"),
        },
    ):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name


def test_a_folder_without_the_name_of_the_processor_is_told_by_its_model_type(folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    LotlipImageProcessor(32).save_pretrained(tmp_path)
    text_tokenizer().save(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LotlipProcessor


def test_saving_again_changes_nothing(folder, tmp_path):
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text()), name
    again = TextTokenizer(str(tmp_path), 24, 2, 1)
    assert again.encode(TEXTS) == text_tokenizer().encode(TEXTS)
    assert again.vocabulary_size == text_tokenizer().vocabulary_size


def test_nothing_saved_tells_where_it_was_built(folder):
    for file in folder.glob("*.json"):
        assert tempfile.gettempdir() not in file.read_text(), file


@pytest.mark.integration
def test_the_tokenizer_needs_no_code_of_ours(folder):
    code = (
        "import sys; from transformers import AutoTokenizer;"
        f"ids = AutoTokenizer.from_pretrained({str(folder)!r})({TEXTS!r}, padding=True, truncation=True)['input_ids'];"
        "print([name for name in sys.modules if name.startswith('lotlip')], ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[] {text_tokenizer()(TEXTS)[0].tolist()}"
