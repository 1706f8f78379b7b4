"""Starting models: the features, texts and preprocessing of each library, and errors that name what is wrong."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    SiglipConfig,
    SiglipModel,
)

from lotlip import cli
from lotlip.core.files import Damaged, check_model
from lotlip.data.plain_tokenizer import open_tokenizer
from lotlip.importing import openai
from lotlip.importing.start import StartingModel, open_start, split_commit
from lotlip.models.lotlip import LotlipModel
from lotlip.models.saving import load_model, save_model
from tests.parity import write_checkpoint
from tests.tiny_baselines import (
    CLIP_LENGTH,
    SIGLIP_LENGTH,
    register_open_clip,
    save_clip,
    save_open_clip,
    save_siglip,
    spread,
)

# The second text is longer than each context.
TEXTS = ["a red dog", "The white house is on the tree, and there is a Blue dog. A green house! " * 3, "a dog"]


def images_of_two_sizes() -> list[Image.Image]:
    draw = torch.Generator().manual_seed(1)
    sizes = ((30, 40), (64, 24))
    return [
        Image.fromarray(torch.randint(256, (*size, 3), generator=draw, dtype=torch.uint8).numpy()) for size in sizes
    ]


def features(start: StartingModel, folder: Path) -> tuple[Tensor, Tensor, LotlipModel]:
    """Saves a starting model, loads it as users do, and returns its features of the images and `TEXTS`."""
    save_model(start.config, start.read_weights(), start.tokenizer, folder, image_tower=None)
    model: Any = AutoModel.from_pretrained(folder).eval()
    inputs = AutoProcessor.from_pretrained(folder)(text=TEXTS, images=images_of_two_sizes(), return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
        again, tokenizer = load_model(folder)
        ids, lengths = tokenizer(TEXTS)
        encoded = again.encode_text(torch.from_numpy(ids), torch.from_numpy(lengths))[:, 0]
    assert torch.allclose(encoded, output.text_embeds, atol=1e-6)
    return output.image_embeds, output.text_embeds, model


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_a_model_of_transformers_keeps_its_features(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs")
    images, texts, ours = features(open_start(str(folder)), tmp_path / "ours")
    theirs: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    length = {"padding": "max_length"} if save is save_siglip else {"padding": True}
    length["max_length"] = CLIP_LENGTH if save is save_clip else SIGLIP_LENGTH
    # SigLIP's training lowers case and removes punctuation before the tokenizer (`canonicalize_text` of big_vision)
    plain = [text.lower().translate(str.maketrans("", "", string.punctuation)) for text in TEXTS]
    read = plain if save is save_siglip else TEXTS
    ids = tokenizer(read, truncation=True, return_tensors="pt", **length)["input_ids"]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images_of_two_sizes(), return_tensors="pt")
    with torch.inference_mode():
        expected = theirs(input_ids=ids, **pixels)
    assert torch.allclose(texts, expected.text_embeds, atol=1e-5)
    assert torch.allclose(images, expected.image_embeds, atol=1e-3)  # transformers rounds pixels to 8 bits
    assert torch.allclose(ours.scale, theirs.logit_scale.exp())
    if save is save_siglip:
        assert torch.equal(ours.logit_bias, theirs.logit_bias)


@pytest.mark.slow
def test_a_model_of_open_clip_keeps_its_features(tmp_path: Path) -> None:
    name = register_open_clip(tmp_path, "start-test")
    save_open_clip(tmp_path / "theirs", name)
    file = tmp_path / "theirs" / "open_clip_model.safetensors"
    images, texts, _ = features(open_start(f"open_clip:{name}:{file}"), tmp_path / "ours")
    theirs, _, prepare = open_clip.create_model_and_transforms(name, str(file))
    compare_with_open_clip(theirs, open_clip.get_tokenizer(name), prepare, images, texts)


def compare_with_open_clip(model: Any, tokenizer: Any, prepare: Any, images: Tensor, texts: Tensor) -> None:
    """Compares features of `images_of_two_sizes` and `TEXTS` with those of a model of open_clip."""
    model.eval()
    with torch.inference_mode():
        assert torch.allclose(texts, normalize(model.encode_text(tokenizer(TEXTS)), dim=-1), atol=1e-5)
        pixels = torch.stack([prepare(picture) for picture in images_of_two_sizes()])
        assert torch.allclose(images, normalize(model.encode_image(pixels), dim=-1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "open_clip:local-dir:"])
def test_a_folder_of_open_clip_has_architecture_and_preprocessing(prefix: str, tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "theirs", register_open_clip(tmp_path, "start-test"))
    images, texts, model = features(open_start(f"{prefix}{folder}"), tmp_path / "ours")
    assert model.image_tower.spec.mean == (0.5, 0.4, 0.3)
    theirs, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    compare_with_open_clip(theirs, open_clip.get_tokenizer(f"local-dir:{folder}"), prepare, images, texts)


@pytest.mark.slow
def test_an_incomplete_folder_of_open_clip_is_an_error(tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "theirs", register_open_clip(tmp_path, "start-test"))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="open_clip cannot load local-dir:"):
        open_start(str(folder)).build()
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"open_clip_config\.json has no model_cfg"):
        open_start(str(folder))
    with pytest.raises(ValueError, match=r"open_clip_config\.json does not exist"):
        open_start("open_clip:local-dir:nowhere")


@pytest.mark.slow
def test_text_positions_are_not_interpolated_silently(tmp_path: Path) -> None:
    name = register_open_clip(tmp_path, "start-test")
    file = save_open_clip(tmp_path / "theirs", name) / "open_clip_model.safetensors"
    weights = load_file(file)
    (key,) = (key for key in weights if key in ("positional_embedding", "text.positional_embedding"))
    save_file({**weights, key: torch.cat([weights[key], weights[key]])}, file)
    with pytest.raises(ValueError, match=r"has \d+ text positions, but start-test has a context of \d+ tokens"):
        open_start(f"open_clip:{name}:{file}").build()


@pytest.fixture
def tiny_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the widths of `save_longclip` those of released models."""
    monkeypatch.setattr(openai, "_WIDTHS", {"image": (128,), "text": (64,)})


def save_longclip(file: Path) -> Any:
    """Writes a checkpoint of Long-CLIP; returns open_clip's model with the positions that Long-CLIP uses."""
    about = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 30, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    model = spread(open_clip.CLIP(**about, quick_gelu=True))
    weights = {name: value for name, value in model.state_dict().items() if name != "attn_mask"}
    first, rest = torch.randn(30, 64), torch.randn(30, 64)
    torch.save(weights | {"positional_embedding": first, "positional_embedding_res": rest}, file)
    model.positional_embedding.data = torch.cat([first[:20], rest[20:]])
    return model


@pytest.mark.slow
def test_a_checkpoint_of_long_clip_keeps_its_features(tiny_widths: None, tmp_path: Path) -> None:
    theirs = save_longclip(tmp_path / "longclip-B.pt")
    start = open_start(str(tmp_path / "longclip-B.pt"))
    assert start.config.context_length == 30
    images, texts, ours = features(start, tmp_path / "ours")
    with torch.inference_mode():
        ids = open_clip.get_tokenizer("ViT-B-32", context_length=30)(TEXTS)
        assert torch.allclose(texts, normalize(theirs.encode_text(ids), dim=-1), atol=1e-5)
        pixels = AutoProcessor.from_pretrained(tmp_path / "ours")(images=images_of_two_sizes(), return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.allclose(images, normalize(theirs.encode_image(pixels), dim=-1), atol=1e-5)
    assert torch.equal(ours.logit_scale, theirs.logit_scale.reshape(1))


def test_a_checkpoint_keeps_its_bias(tiny_widths: None, tmp_path: Path) -> None:
    file = tmp_path / "longclip-B.pt"
    save_longclip(file)
    torch.save(torch.load(file, weights_only=True) | {"logit_bias": torch.tensor(-7.0)}, file)
    bias = open_start(str(file)).build().logit_bias
    assert bias is not None and bias.tolist() == [-7]


def test_a_checkpoint_with_an_unknown_number_of_heads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "vit-h.pt"
    save_longclip(file)
    for tower, width, known in (("image", 128, {"text": (64,)}), ("text", 64, {"image": (128,)})):
        monkeypatch.setattr(openai, "_WIDTHS", {"image": (768, 1024), "text": (512, 768)} | known)
        with pytest.raises(ValueError, match=rf"the {tower} tower of .* is {width} wide, .* open_clip:NAME:{file}"):
            open_start(str(file))


@pytest.mark.slow
def test_a_caption_that_spells_a_special_token_of_clip_has_only_words(tmp_path: Path) -> None:
    tokenizer = open_tokenizer("clip", 77)
    assert tokenizer.encode(["a <|endoftext|> dog<|startoftext|>"]) == tokenizer.encode(["a dog"])
    tokenizer.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(["a <|endoftext|> dog<|startoftext|>"])["input_ids"] == tokenizer.encode(["a dog"])


def test_a_commit_is_split_from_a_name() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert split_commit(f"openai/clip@{commit}") == ("openai/clip", commit)
    assert split_commit("folder@home/model") == ("folder@home/model", None)


def test_what_cannot_be_a_starting_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_start(str(tmp_path / "empty"))
    (tmp_path / "seeds" / "seed-0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"name one of its seeds, such as .*seed-0"):
        open_start(str(tmp_path / "seeds"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type 'bert', which cannot be a starting model"):
        open_start(str(tmp_path / "bert"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"lacks positional_embedding, visual\.proj, text_projection"):
        open_start(str(tmp_path / "other.pt"))
    for name, message in {
        "ViT-B-33:openai": r"no architecture 'ViT-B-33'; did you mean .*ViT-B-32",
        "ViT-B-32": "no weights are given; use open_clip:ViT-B-32:FILE or a tag .*openai, ",
        "ViT-B-32:missing.pt": "'missing.pt' is neither one of its tags nor a file; use open_clip:ViT-B-32:FILE",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            open_start(f"open_clip:{name}")
        assert "image_tower" not in str(error.value)
    with pytest.raises(ValueError, match="text tower of another kind"):
        open_start("open_clip:roberta-ViT-B-32:laion2b_s12b_b32k")


def test_an_unusable_processor_is_an_error_without_settings_that_a_start_lacks(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "theirs")
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"^{folder} takes images of 24 pixels, .* prepares 64; correct that file$"):
        open_start(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=rf"(?s)^how {folder} prepares images .*; restore or correct that file$"):
        open_start(str(folder))


def test_a_checkpoint_of_another_lotlip_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    file = write_checkpoint("m2", tmp_path)
    with pytest.raises(
        ValueError, match=rf"not like LoTLIP's .* `lotlip import-official {file}`, whose options"
    ) as error:
        open_start(str(file))
    assert "\n" not in str(error.value)


def test_missing_and_unexpected_weights_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_clip(tmp_path / "theirs")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights | {"extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing keys: text_projection\.weight; unexpected keys: extra\.weight"):
        open_start(str(folder)).read_weights()


def test_a_siglip_without_attention_pooling_cannot_be_a_starting_model(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path / "theirs")
    config = SiglipConfig.from_pretrained(folder)
    config.vision_config.vision_use_head = False
    SiglipModel(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no attention pooling"):
        open_start(str(folder)).build()


def test_padding_that_a_tokenizer_file_remembers_has_no_effect(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path / "theirs")
    expected = open_start(str(folder)).tokenizer.encode(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=SIGLIP_LENGTH)
    tokenizer.save_pretrained(folder)
    assert open_start(str(folder)).tokenizer.encode(TEXTS) == expected


@pytest.mark.parametrize("tokenizer", [None, "itself"])
def test_siglips_texts_are_prepared_wherever_the_tokenizer_comes_from(tokenizer: str | None, tmp_path: Path) -> None:
    folder = save_siglip(tmp_path / "theirs")
    start = open_start(str(folder), str(folder) if tokenizer else None)
    assert start.tokenizer.encode(["A RED dog!"]) == start.tokenizer.encode(["a red dog"])


@pytest.mark.parametrize(
    ("kind", "tokenizer"), [("clip", "bert"), ("siglip", "bert"), ("siglip", "clip"), ("open_clip", "bert")]
)
def test_a_tokenizer_of_another_family_is_an_error(kind: str, tokenizer: str, tmp_path: Path) -> None:
    if kind == "open_clip":
        name = str(save_open_clip(tmp_path / "theirs", register_open_clip(tmp_path)))
    else:
        name = str({"clip": save_clip, "siglip": save_siglip}[kind](tmp_path / "theirs"))
    with pytest.raises(
        ValueError, match=rf"of the \w+ family, but its tokenizer .* of the {tokenizer} family; .*--tok"
    ):
        open_start(name, {"bert": "bert-base-uncased"}.get(tokenizer, tokenizer))


def test_a_tokenizer_of_another_family_is_an_error_for_a_file(tiny_widths: None, tmp_path: Path) -> None:
    save_longclip(tmp_path / "longclip-B.pt")
    with pytest.raises(ValueError, match=r"longclip-B\.pt is of the clip family, .* of the bert family"):
        open_start(str(tmp_path / "longclip-B.pt"), "bert-base-uncased")


def test_a_tokenizer_for_a_model_of_this_project_is_an_error(tmp_path: Path) -> None:
    start = open_start(str(save_clip(tmp_path / "theirs")))
    save_model(start.config, start.read_weights(), start.tokenizer, tmp_path / "ours", image_tower=None)
    with pytest.raises(ValueError, match="has its own tokenizer; remove --tokenizer"):
        open_start(str(tmp_path / "ours"), "clip")


def test_the_command_records_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = save_clip(tmp_path / "theirs"), tmp_path / "ours"
    monkeypatch.setattr(sys, "argv", ["lotlip", "import", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 0
    (out / "README.md").write_text("a note")
    check_model(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(
        Damaged, match=rf"config\.json is damaged: .* write {out} again with `lotlip import` and --force"
    ):
        check_model(out)


def test_a_tokenizer_class_that_cannot_be_imported_does_not_matter(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path / "theirs")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "SiglipTokenizer"}))
    assert open_start(str(folder)).tokenizer.encode(["a red dog"])[0]


def test_a_folder_without_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "theirs")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        open_start(str(folder))


def test_an_archive_with_code_is_named(tmp_path: Path) -> None:
    # DeepSpeed replaces the function of a linear layer by one that cannot be scripted
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive, .* open_clip:ViT-B-16:openai"):
        open_start(str(tmp_path / "ViT-B-32.pt"))
