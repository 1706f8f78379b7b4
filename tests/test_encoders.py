"""Encoders of every kind of model agree with its library and report their protocol."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lotlip.core.files import weights_hash
from lotlip.data.images import decode_rgb
from lotlip.evaluate.encoders import LotlipEncoder, Runner
from lotlip.evaluate.models import open_encoder
from lotlip.importing.official import import_official
from lotlip.importing.start import open_start
from tests.parity import IMAGE_TOWER, write_checkpoint, write_text_config
from tests.test_processing import encoded, make_image
from tests.tiny_baselines import (
    CLIP_LENGTH,
    OPEN_CLIP_LENGTH,
    SIGLIP_LENGTH,
    SIZE,
    register_open_clip,
    save_clip,
    save_open_clip,
    save_siglip,
)
from tests.tiny_model import save_tiny_model

TEXTS = [
    "a red dog",
    "there is a green tree and a white house on the red and blue house and the dog is there and there and there",
    "blue",
    "a white dog on a green house",
    "",
]
KINDS = ("clip", "siglip", "open_clip", "lotlip", "official")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> dict[str, Path]:
    """A folder for each kind of model; tests do not change them."""
    root = tmp_path_factory.mktemp("models")
    import_official(write_checkpoint("m2", root), root / "official", IMAGE_TOWER, write_text_config("m2", root))
    return {
        "clip": save_clip(root / "clip"),
        "siglip": save_siglip(root / "siglip"),
        "open_clip": save_open_clip(root / "open_clip", register_open_clip(root)),
        "lotlip": save_tiny_model(root / "lotlip", tiny_tower),
        "official": root / "official",
    }


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Portrait, landscape and square images; one is transparent, one is small."""
    sizes = [(51, 40), (30, 70), (24, 24), (90, 31)]
    opaque = [encoded(make_image(size=size, seed=seed)) for seed, size in enumerate(sizes)]
    return [*opaque, encoded(make_image("RGBA", (40, 33), seed=9)), encoded(make_image(size=(9, 7), seed=10))]


def decoded(images: list[bytes]) -> list[Image.Image]:
    return [decode_rgb(image) for image in images]


def by_transformers(folder: Path, texts: list[str], images: list[bytes], **padding: Any) -> tuple[Any, Any]:
    """Features by transformers, one text at a time."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=decoded(images), return_tensors="pt")
    with torch.inference_mode():
        outputs = [
            model(**tokenizer([text], truncation=True, return_tensors="pt", **padding), **pixels) for text in texts
        ]
    return torch.cat([one.text_embeds for one in outputs]), outputs[0].image_embeds


def by_open_clip(folder: Path, texts: list[str], images: list[bytes]) -> tuple[Any, Any]:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        text = model.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
        pixels = torch.stack([transform(image) for image in decoded(images)])
        return text, model.encode_image(pixels, normalize=True)


# --- features -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize(
    ("kind", "expect"),
    [
        ("clip", by_transformers),
        ("siglip", lambda *given: by_transformers(*given, padding="max_length", return_attention_mask=False)),
        ("open_clip", by_open_clip),
        ("lotlip", by_transformers),
        ("official", by_transformers),
    ],
)
def test_features_equal_those_of_the_models_library(models, images, kind, expect, batch_size):
    expected_texts, expected_images = expect(models[kind], TEXTS, images)
    encoder = open_encoder(str(models[kind]), batch_size, "cpu")
    texts, mask = encoder.texts(TEXTS)
    assert mask is None
    torch.testing.assert_close(texts, expected_texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.images(iter(images)), expected_images, atol=1e-5, rtol=0)
    assert torch.pdist(texts).min() > 1e-3  # otherwise the order would not matter


@pytest.mark.parametrize(("kind", "length"), [("clip", CLIP_LENGTH), ("open_clip", OPEN_CLIP_LENGTH)])
def test_a_long_text_is_truncated_before_its_end_token(models, kind, length):
    """The kept words are surrounded by start and end tokens; words after them do not matter."""
    encoder = open_encoder(str(models[kind]))
    words = ["a", "b", "c", "d"] * 20
    long, longest_kept, shorter = encoder.texts([" ".join(words[:number]) for number in (80, length - 2, length - 3)])[
        0
    ]
    torch.testing.assert_close(long, longest_kept)
    assert (long - shorter).norm() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_features_are_near_fp32_and_returned_as_fp32(models, images, kind):
    exact, rounded = (open_encoder(str(models[kind]), precision=precision) for precision in ("fp32", "bf16"))
    for features, expected in (
        (rounded.texts(TEXTS)[0], exact.texts(TEXTS)[0]),
        (rounded.images(images), exact.images(images)),
    ):
        assert features.dtype == expected.dtype == torch.float32
        assert not torch.equal(features, expected)
        assert (features * expected).sum(dim=1).min() > 0.99
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert (exact.protocol()["precision"], rounded.protocol()["precision"]) == ("fp32", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_on_batch_gets_the_size_of_every_batch(models, images, kind):
    sizes: list[int] = []
    encoder = open_encoder(str(models[kind]), 2, on_batch=sizes.append)
    encoder.texts(TEXTS)
    assert sizes == [2, 2, 1]
    encoder.images(images)
    assert sizes == [2, 2, 1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_an_error(models, images, kind):
    with pytest.raises(ValueError, match=r"not a readable image \(5 bytes\)"):
        open_encoder(str(models[kind])).images([images[0], b"wrong"])


# --- protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_protocol_of_a_model_of_this_project(models):
    about = open_encoder(str(models["official"])).protocol()
    assert (about["kind"], about["context_length"], about["image_size"]) == ("lotlip", 128, 160)
    assert about["weights_sha256"] == weights_hash(models["official"])
    assert about["preprocessing"].startswith("shorter side to 160, bicubic, centre crop to 160, mean 0.48145466, ")
    assert about["model"] == str(models["official"])
    assert about["text_preparation"] == "sub-captions joined by [SEP], cut at the context length"


@pytest.mark.parametrize(
    ("save", "preparation"),
    [(save_clip, "cut at the context length"), (save_siglip, "cut at the context length, padded to it")],
)
def test_protocol_of_an_imported_model_names_no_sub_captions(save, preparation, tmp_path):
    start = open_start(str(save(tmp_path / "theirs")))
    assert LotlipEncoder(start.build(), start.tokenizer, 4).protocol()["text_preparation"] == preparation


@pytest.mark.parametrize(
    ("kind", "length", "about", "preprocessing"),
    [
        (
            "clip",
            CLIP_LENGTH,
            "transformers, clip",
            "to shortest edge 24, bicubic, centre crop to height 24 × width 24",
        ),
        ("siglip", SIGLIP_LENGTH, "transformers, siglip", "to height 24 × width 24, bicubic, mean 0.5, 0.5, 0.5, std"),
        (
            "open_clip",
            OPEN_CLIP_LENGTH,
            "open_clip",
            "shorter side to 24 × 24, bicubic, centre crop to 24 × 24, mean 0.5",
        ),
    ],
)
def test_protocol_of_other_models(models, kind, length, about, preprocessing):
    protocol = open_encoder(str(models[kind])).protocol()
    assert (protocol["model"], protocol["kind"]) == (str(models[kind]), about)
    assert (protocol["context_length"], protocol["image_size"], protocol["similarity"]) == (length, SIZE, "cosine")
    assert preprocessing in protocol["preprocessing"]
    assert f"torch {torch.__version__.partition('+')[0]}, " in protocol["libraries"]
    json.dumps(protocol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_the_weights_hash_changes_with_one_weight(models, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models[kind], tmp_path / "copy")
    first = open_encoder(str(models[kind])).protocol()["weights_sha256"]
    assert open_encoder(str(folder)).protocol()["weights_sha256"] == first
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["logit_scale"] += 0.5
    save_file(weights, file, {"format": "pt"})
    assert open_encoder(str(folder)).protocol()["weights_sha256"] != first


# --- opening models -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_open_clip_architecture_with_a_file_equals_its_folder(models, tmp_path, images):
    name = register_open_clip(tmp_path, "tiny-file")
    file = models["open_clip"] / "open_clip_model.safetensors"
    named, folder = open_encoder(f"open_clip:{name}:{file}"), open_encoder(f"open_clip:local-dir:{models['open_clip']}")
    torch.testing.assert_close(named.texts(TEXTS)[0], folder.texts(TEXTS)[0])
    assert named.protocol()["weights_sha256"] == folder.protocol()["weights_sha256"]
    assert (
        named.protocol()["preprocessing"] != folder.protocol()["preprocessing"]
    )  # open_clip's default instead of the folder's


def test_torch_weights_are_read_as_tensors_only(models, tmp_path):
    from safetensors.torch import load_file

    folder = shutil.copytree(models["clip"], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    torch.testing.assert_close(
        open_encoder(str(folder)).texts(TEXTS)[0], open_encoder(str(models["clip"])).texts(TEXTS)[0]
    )
    torch.save({**weights, "bad": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_encoder(str(folder))


def as_bert(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": auto}))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def drop_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (as_bert, "a bert is not a dual encoder of images and texts; a model must be the folder"),
        (with_code, "cannot be loaded: .*custom code"),
        (drop_weight, r"lacks weights of a clip: text_projection\.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: there is neither model"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be loaded: "),
        (lambda folder: (folder / "config.json").unlink(), "neither a config.json with a model_type nor an open_clip"),
    ],
)
def test_an_invalid_model_folder_is_an_error(models, tmp_path, spoil, message):
    folder = shutil.copytree(models["clip"], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(str(folder))
    assert str(folder) in str(error.value)
    assert not (folder / "ran").exists()


def test_the_code_of_a_tokenizer_is_not_run(models, tmp_path):
    folder = shutil.copytree(models["open_clip"], tmp_path / "copy")
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "mine", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    auto = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        open_encoder(str(folder))
    assert not (folder / "ran").exists()


def test_the_code_of_a_text_tower_is_not_run_even_if_the_user_agrees(models, tmp_path, monkeypatch):
    tower = shutil.copytree(models["clip"], tmp_path / "tower")
    with_code(tower)
    folder = shutil.copytree(models["open_clip"], tmp_path / "copy")
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["text_cfg"] |= {"hf_model_name": str(tower)}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*custom code"):
        open_encoder(str(folder))
    assert not (tower / "ran").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "nobody/nothing",
            "there is no folder nobody/nothing, and no model of that name can be downloaded from",
        ),
        ("models/no/such", "there is no folder models/no/such"),
        ("open_clip:ViT-B-33:openai", r"no architecture 'ViT-B-33'; did you mean .*ViT-B-32"),
        ("open_clip:ViT-B-32", r"no weights are given; use open_clip:ViT-B-32:FILE or a tag .*openai, "),
        ("open_clip:ViT-B-32:none", "'none' is neither one of its tags nor a file"),
        ("open_clip:ViT-B-32:openai", r"open_clip:ViT-B-32:openai cannot be loaded: .*download"),
        ("open_clip:hf-hub:nobody/nothing", "open_clip:hf-hub:nobody/nothing cannot be loaded"),
    ],
)
def test_a_missing_model_is_an_error_of_one_line(model, message):
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(model)
    assert len(str(error.value).splitlines()) == 1


def test_a_released_checkpoint_must_be_imported_first(tmp_path):
    with pytest.raises(ValueError, match=r"is a file; .*`lotlip import-official`"):
        open_encoder(str(write_checkpoint("m2", tmp_path)))


def test_invalid_arguments_are_errors(models):
    with pytest.raises(ValueError, match="unknown precision 'fp8'; choose fp32 or bf16"):
        Runner(precision="fp8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_encoder(str(models["clip"]), 0)
    with pytest.raises(ValueError, match="no device 'tpu'"):
        open_encoder(str(models["clip"]), device="tpu")
