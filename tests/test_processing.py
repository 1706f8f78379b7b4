"""Processors of texts and images agree with training, through each Auto class of transformers."""

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


def make_image(mode: str = "RGB", size: tuple[int, int] = (51, 40), seed: int = 0) -> Image.Image:
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


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["m0", "m2"])
def test_pixels_equal_the_released_code(case):
    names = json.loads((PARITY / case / "case.json").read_text())["images"]
    images = [Image.open(PARITY / case / name) for name in names]
    pixels = LotlipImageProcessor(160)(images, return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, load_file(PARITY / case / "expected.safetensors")["pixel_values"], atol=1e-5)


def image_forms(image: Image.Image, folder: Path) -> dict[str, Any]:
    """An opaque image in every form that processors accept."""
    data = encoded(image)
    (folder / "image.png").write_bytes(data)
    return {
        "PIL": image,
        "array": np.asarray(image),
        "tensor": torch.from_numpy(np.asarray(image).copy()),
        "bytes": data,
        "path": folder / "image.png",
        "name": str(folder / "image.png"),
        "data URL": data_url(data),
    }


@pytest.mark.parametrize("size", [(51, 40), (40, 51), (32, 32), (33, 7), (1, 1)])
def test_every_form_of_an_image_gives_the_pixels_of_training(processor, tmp_path, size):
    image = make_image(size=size)
    expected = image_transform(32, TOWER["mean"], TOWER["std"])(image)
    for kind, form in image_forms(image, tmp_path).items():
        for pixels in (
            processor.image_processor(form, return_tensors="np")["pixel_values"],
            processor(images=form, return_tensors="np")["pixel_values"],
            processor(images=[form], return_tensors="np")["pixel_values"],
        ):
            assert pixels.shape == (1, 3, 32, 32), kind
            assert np.array_equal(pixels[0], expected), kind


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(51, 40), (40, 90), (200, 33)])
def test_the_saved_processor_gives_the_pixels_of_training_in_every_resize_mode(tmp_path, resize, size):
    config = LotlipConfig(image_config={**TOWER, "resize": resize})
    LotlipProcessor.build(text_tokenizer(), config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lotlip"}')
    data = encoded(make_image(size=size))
    training = training_transform(32, TOWER["mean"], TOWER["std"], resize=resize)(data, random.Random(0))
    for saved in (AutoImageProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert np.array_equal(saved(images=data, return_tensors="np")["pixel_values"][0], training)


def test_a_processor_saved_without_a_resize_mode_crops(tmp_path):
    LotlipImageProcessor(48).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in saved.items() if name != "resize"}))
    assert AutoImageProcessor.from_pretrained(tmp_path).resize == "crop"


def test_an_unknown_resize_mode_is_an_error():
    with pytest.raises(ValueError, match="unknown resize mode 'stretch'"):
        LotlipImageProcessor(48, resize="stretch")


def test_a_batch_equals_its_single_images(processor):
    images = [make_image(size=(40 + number, 50), seed=number) for number in range(3)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    alone = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(pixels, torch.cat(alone))
    assert list(processor(images=images, return_tensors="pt")) == ["pixel_values"]


def unusual_images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    palette = Image.new("P", (40, 40))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    return {
        "transparent": encoded(make_image("RGBA")),
        "palette": encoded(palette, transparency=0),
        "turned": encoded(make_image(), "JPEG", exif=exif),
        "grey": encoded(make_image("L")),
        "deep grey": encoded(Image.fromarray(np.full((40, 40), 0x8000, dtype=np.uint16))),
    }


@pytest.mark.parametrize("kind", unusual_images())
def test_unusual_images_are_decoded_as_in_training(processor, tmp_path, kind):
    data = unusual_images()[kind]
    expected = image_transform(32, TOWER["mean"], TOWER["std"])(decode_rgb(data))
    (tmp_path / "image").write_bytes(data)
    forms = (data, Image.open(io.BytesIO(data)), tmp_path / "image", str(tmp_path / "image"), data_url(data))
    for form in forms:
        assert np.array_equal(processor(images=form, return_tensors="np")["pixel_values"][0], expected)
        assert np.array_equal(processor.image_processor(form)["pixel_values"][0], expected)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((1, 8, 8, 3))]
)
def test_an_array_that_is_not_an_image_is_an_error(array):
    with pytest.raises(ValueError, match=r"an array of (uint8|float64) and shape \[.*\] is not an image; pass uint8"):
        LotlipImageProcessor()(array)


@pytest.mark.parametrize(("number", "what"), [(0, "empty"), (2, "a list of lists")])
def test_what_is_not_a_list_of_images_is_an_error(processor, number, what):
    images = [[Image.new("RGB", (4, 4))]] * number
    with pytest.raises(ValueError, match=f"images is {what}; pass one image or a list of images"):
        processor(images=images, text=["a dog"])


def test_unreadable_bytes_are_an_error(processor):
    with pytest.raises(ValueError, match="not a readable image"):
        processor(images=b"not an image")


def test_the_limit_of_pixels_applies_to_data_urls(processor):
    data = encoded(make_image())
    header = b"IHDR" + struct.pack(">II", 2**15, 2**15) + data[24:29]  # between the length and the checksum
    huge = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    for form in (huge, data_url(huge)):
        with pytest.raises(TooManyPixels):
            processor(images=form)


@pytest.mark.parametrize(
    "url", ["data:image/png,%89PNG", "data:image/png;base64,a", "data:image/png;base64,!!!!", "data:image/png;base64"]
)
def test_an_invalid_data_url_is_an_error(processor, url):
    with pytest.raises(ValueError, match="base64"):
        processor(images=url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "https://example.org/a.png", "HTTPS://example.org/a.png"])
def test_a_web_address_is_an_error_without_a_request(processor, monkeypatch, url):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr("httpx.get", fetch)
    for prepare in (processor, processor.image_processor):
        with pytest.raises(ValueError, match=f"{url}.*download"):
            prepare(images=url)


def test_preprocessing_options_are_errors(processor):
    with pytest.raises(ValueError, match="has no options do_resize; remove them, images are prepared as trained"):
        processor.image_processor(make_image(), do_resize=False)
    with pytest.raises(ValueError, match="has no options do_center_crop"):
        processor(images=make_image(), images_kwargs={"do_center_crop": False})


def test_the_image_processor_can_be_saved_alone(tmp_path):
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


def test_the_default_preprocessing_is_that_of_the_released_models():
    default = LotlipImageProcessor()
    model_processor = LotlipProcessor.build(text_tokenizer(), LotlipConfig()).image_processor
    assert default.to_dict() == model_processor.to_dict()
    assert (default.image_size, default.image_mean, default.image_std) == (224, list(MEAN), list(STD))


# --- texts --------------------------------------------------------------------------------------------------------


def test_texts_are_padded_and_truncated_as_in_training(processor):
    ids, lengths = text_tokenizer()(TEXTS)
    encoding = processor(text=TEXTS, return_tensors="pt")
    assert list(encoding) == ["input_ids", "attention_mask"]
    assert np.array_equal(encoding["input_ids"].numpy(), ids)
    assert np.array_equal(encoding["attention_mask"].sum(dim=1).numpy(), lengths)
    assert ids.shape[1] == 24  # the last text was truncated


def test_padding_and_truncation_can_be_changed(processor):
    rows = text_tokenizer().encode(TEXTS)
    assert processor(text=TEXTS, padding=False)["input_ids"] == rows
    assert processor(text=TEXTS[0])["input_ids"] == rows[0]
    wide = processor(text=TEXTS[:2], padding="max_length", return_tensors="np")
    assert wide["input_ids"].shape == (2, 24)
    short = processor(text=TEXTS, max_length=12, return_tensors="np")["input_ids"]
    assert np.array_equal(short, TextTokenizer("bert-base-uncased", 12, 2, 1)(TEXTS)[0])
    with pytest.warns(UserWarning, match="max_length"):
        untruncated = processor(text=TEXTS, truncation=False)["input_ids"]
    assert len(untruncated[-1]) == 1 + 3 + 40 + 1


def test_texts_and_images_give_one_set_of_inputs(processor):
    inputs = processor(text=TEXTS, images=[make_image()] * 2, return_tensors="pt")
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (5, 24),
        "attention_mask": (5, 24),
        "pixel_values": (2, 3, 32, 32),
    }
    assert set(processor.model_input_names) == set(inputs)


# --- on disk ------------------------------------------------------------------------------------------------------


def test_auto_classes_read_the_folder(processor, folder):
    inputs = {"text": TEXTS, "images": [make_image()], "return_tensors": "np"}
    expected = processor(**inputs)
    processor_read = AutoProcessor.from_pretrained(folder)
    assert type(processor_read) is LotlipProcessor
    assert type(LotlipProcessor.from_pretrained(folder)) is LotlipProcessor
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert type(image_processor) is LotlipImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for outputs in (
        processor_read(**inputs),
        LotlipProcessor.from_pretrained(folder)(**inputs),
        {
            **image_processor(inputs["images"], return_tensors="np"),
            **tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np"),
        },
    ):
        assert set(outputs) == set(expected)
        for name, value in expected.items():
            assert np.array_equal(outputs[name], value), name


def test_auto_processor_finds_the_class_by_the_model_type(folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    LotlipImageProcessor(32).save_pretrained(tmp_path)
    text_tokenizer().save(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LotlipProcessor


@pytest.mark.slow
def test_saving_again_changes_nothing(folder, tmp_path):
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text()), name
    reloaded = TextTokenizer(str(tmp_path), 24, 2, 1)
    assert reloaded.encode(TEXTS) == text_tokenizer().encode(TEXTS)
    assert reloaded.vocabulary_size == text_tokenizer().vocabulary_size


def test_saved_files_hold_no_local_path(folder):
    for file in folder.glob("*.json"):
        assert tempfile.gettempdir() not in file.read_text(), file


@pytest.mark.integration
def test_the_tokenizer_does_not_import_this_package(folder):
    code = (
        "import sys; from transformers import AutoTokenizer;"
        f"ids = AutoTokenizer.from_pretrained({str(folder)!r})({TEXTS!r}, padding=True, truncation=True)['input_ids'];"
        "print([name for name in sys.modules if name.startswith('lotlip')], ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[] {text_tokenizer()(TEXTS)[0].tolist()}"
