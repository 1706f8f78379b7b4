"""Import of the authors' checkpoints. test_parity compares results with the released code."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from lotlip.data.tokenizer import TextTokenizer
from lotlip.data.weights import read_any_weights
from lotlip.importing import official
from lotlip.importing.official import (
    RELEASED_IMAGE_TOWER,
    Checkpoint,
    WrongWeightsError,
    convert,
    import_official,
    read_checkpoint,
    read_text_config,
)
from lotlip.importing.output import describe
from lotlip.models.saving import load_model
from lotlip.models.vision.spec import ImageTowerSpec
from tests.parity import IMAGE_TOWER, state_dict, write_checkpoint, write_text_config
from tests.test_cli import program

HEADS = {"num_attention_heads": 4}
POSITION_IDS = "module.text.transformer.embeddings.position_ids"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of the parity case with two corner tokens, under the authors' names."""
    return state_dict("m2")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and the folder of its import."""
    folder = tmp_path_factory.mktemp("official")
    file = write_checkpoint("m2", folder)
    import_official(file, folder / "tiny", IMAGE_TOWER, write_text_config("m2", folder))
    return file, folder / "tiny"


def save_checkpoint(folder: Path, content: Any, **kwargs: Any) -> Path:
    torch.save(content, folder / "saved.pt", **kwargs)
    return folder / "saved.pt"


def checkpoint(weights: dict[str, Tensor], **changes: Tensor | None) -> Checkpoint:
    """A checkpoint with some weights changed; None removes a weight."""
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    changed = {**plain, **{name.replace("__", "."): value for name, value in changes.items()}}
    return Checkpoint(Path("model.pt"), {name: value for name, value in changed.items() if value is not None}, {})


def convert_tiny(weights: dict[str, Tensor], changes: dict[str, Tensor | None] | None = None, **others: Any) -> Any:
    """Converts the model of the parity case with other weights or arguments."""
    arguments = {"image": IMAGE_TOWER, "text_config": HEADS, **others}
    return convert(checkpoint(weights, **(changes or {})), **arguments)


# --- conversion ---------------------------------------------------------------------------------------------------


def test_sizes_are_read_from_the_weights(weights):
    config, converted, tokenizer = convert_tiny(weights)
    text = config.text_config
    sizes = (text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.max_position_embeddings)
    assert sizes == (32, 2, 64, 512)
    assert (text.type_vocab_size, text.vocab_size, text.num_attention_heads) == (2, 30524, 4)
    assert (text.model_type, text.hidden_act, text.layer_norm_eps, text.pad_token_id) == ("bert", "gelu", 1e-12, 0)
    assert (config.corner_tokens, config.embed_dim, config.context_length, config.corner_mask) == (2, 64, 128, True)
    assert (config.register_tokens, config.similarity, config.logit_bias) == (0, "cosine", False)
    assert ImageTowerSpec.from_json(config.image_config) == IMAGE_TOWER
    assert (tokenizer.corner_tokens, tokenizer.context_length) == (2, 128)
    assert converted["logit_scale"].shape == (1,)
    assert torch.equal(converted["image.trunk.pos_embed"], weights["module.visual.trunk.pos_embed"])
    assert len(converted) == len(weights)


@pytest.mark.slow
def test_an_imported_model_records_its_source(imported):
    file, folder = imported
    model, tokenizer = load_model(folder)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    about = {"name": "tiny", "source": f"model.pt, sha256 {digest}", "epoch": 1, "official_name": "parity"}
    assert model.config.provenance == about
    card = (folder / "README.md").read_text()
    assert "# tiny" in card and digest in card
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.text_config.initializer_range == 0.2  # from the text config
    assert tokenizer.corner_tokens == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model.pt", "text.json", "tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32])
def test_the_defaults_fit_the_released_models(size):
    """Names and shapes are those of timm's ViT-B and transformers' BERT-base with two corner tokens."""
    with torch.device("meta"):
        trunk = timm.create_model(f"vit_base_patch{size}_224", num_classes=0)
        encoder = BertModel(BertConfig(vocab_size=30522 + 2))
        released = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
        released |= {f"text.transformer.{name}": value for name, value in encoder.state_dict().items()}
        released |= {"text.proj.weight": torch.empty(768, 768), "logit_scale": torch.empty(())}
    spec = RELEASED_IMAGE_TOWER if size == 16 else ImageTowerSpec("vit_base_patch32_224", 224)
    config, converted, _ = convert(Checkpoint(Path("model.pt"), released, {}), spec, {})
    assert (config.corner_tokens, config.context_length, config.text_config.num_attention_heads) == (2, 128, 12)
    assert config.text_config.to_diff_dict() == BertConfig(vocab_size=30524).to_diff_dict()
    assert len(converted) == len(released) == 351
    assert describe(config) == [
        "text tower: bert, 12 layers, 768 wide, 12 heads, feed-forward width 3072, 512 positions, 2 token types",
        "vocabulary: 30522 words and 2 corner tokens; texts of 128 tokens",
        f"image tower: vit_base_patch{size}_224, 224 pixels, 768-dimensional features",
    ]


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda weights: weights,
    "no prefix": lambda weights: {"state_dict": {name.removeprefix("module."): weights[name] for name in weights}},
    "position ids": lambda weights: {"state_dict": {**weights, POSITION_IDS: torch.arange(512)[None]}},
    "optimizer": lambda weights: {"state_dict": weights, "optimizer": {"state": {}}, "epoch": "last", "name": None},
    "temperature of one": lambda weights: weights | {"module.logit_scale": weights["module.logit_scale"].reshape(1)},
    "double": lambda weights: {name: value.double() for name, value in weights.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "zipped"), [*((form, True) for form in FORMS), ("bare", False)])
def test_all_forms_of_a_checkpoint_are_read(form, zipped, weights, imported, tmp_path):
    file = read_checkpoint(save_checkpoint(tmp_path, FORMS[form](weights), _use_new_zipfile_serialization=zipped))
    assert file.about == ({"epoch": "last"} if form == "optimizer" else {})
    _, converted, _ = convert(file, IMAGE_TOWER, HEADS)
    expected = load_file(imported[1] / "model.safetensors")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())
    assert {value.dtype for value in converted.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(dtype, weights, tmp_path):
    halves = {name: value.to(dtype) for name, value in weights.items()}
    _, converted, _ = convert(read_checkpoint(save_checkpoint(tmp_path, halves)), IMAGE_TOWER, HEADS)
    assert {value.dtype for value in converted.values()} == {torch.float32}
    assert torch.equal(converted["text.proj.weight"], weights["module.text.proj.weight"].to(dtype).float())


@pytest.mark.slow
def test_a_tokenizer_may_be_a_file_or_a_folder(weights, tmp_path):
    TextTokenizer("bert-base-uncased", 64, 3).save(tmp_path)  # its corner tokens are not counted as words
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        config, _, tokenizer = convert_tiny(weights, tokenizer=str(name), context_length=64)
        assert (config.corner_tokens, tokenizer.corner_tokens) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "corner_tokens"), [(30522, 0), (30523, 1), (30538, 16)])
def test_extra_rows_are_corner_tokens(rows, corner_tokens, weights):
    config, *_ = convert_tiny(
        weights, {"text__transformer__embeddings__word_embeddings__weight": torch.zeros(rows, 32)}
    )
    assert config.corner_tokens == corner_tokens


# --- the text encoder's configuration -----------------------------------------------------------------------------


def test_a_full_config_json_is_read(tmp_path, weights):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
    BertConfig(**sizes, hidden_act="relu", hidden_dropout_prob=0.3, dtype="float16").save_pretrained(tmp_path)
    fields, ignored = read_text_config(tmp_path / "config.json")
    assert ignored == []
    config, *_ = convert_tiny(weights, text_config=fields)
    text = config.text_config
    assert (text.num_attention_heads, text.hidden_act, text.hidden_dropout_prob) == (8, "relu", 0.3)
    assert text.dtype is None  # the precision is not taken from the file


def test_unknown_keys_of_a_text_config_are_returned(tmp_path):
    fields, ignored = read_text_config(write_text_config("m2", tmp_path, position_embedding_type="absolute"))
    assert ignored == ["pooler", "position_embedding_type", "proj"]
    assert fields["num_attention_heads"] == 4
    assert not set(ignored) & set(fields)


@pytest.mark.slow
@pytest.mark.parametrize("words", [30522, 30524])
def test_the_vocabulary_may_count_corner_tokens_or_not(words, weights):
    config, *_ = convert_tiny(weights, text_config={**HEADS, "vocab_size": words})
    assert config.text_config.vocab_size == 30524


@pytest.mark.slow
def test_robertas_layout_is_read(weights, tmp_path):
    """Its positions start after the padding's row, so there are two fewer."""
    tokenizer = json.loads(
        Path(official.__file__).parents[1].joinpath("data/bert-base-uncased/tokenizer.json").read_text()
    )
    tokenizer["model"]["vocab"] |= {"[PAD]": 1, "[unused0]": 0}
    tokenizer["added_tokens"] = [
        {**token, "id": 1} if token["id"] == 0 else token for token in tokenizer["added_tokens"]
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = {"text_config": {"model_type": "roberta", **HEADS}, "tokenizer": str(tmp_path)}
    config, *_ = convert_tiny(weights, **arguments, context_length=510)
    assert (config.text_config.model_type, config.text_config.pad_token_id) == ("roberta", 1)
    with pytest.raises(ValueError, match="--context-length 511 exceeds the 510 positions"):
        convert_tiny(weights, **arguments, context_length=511)
    with pytest.raises(ValueError, match=r"pad_token_id is 0 in --text-config, but 1 in the tokenizer"):
        convert_tiny(weights, tokenizer=str(tmp_path), text_config={**HEADS, "pad_token_id": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "contains a list; it needs an object"),
        ('{"model_type": "distilbert"}', "describes a 'distilbert'.*layout can be read: bert, roberta, xlm-roberta"),
        ('{"model_type": []}', r"describes a \[\]"),
    ],
)
def test_an_invalid_text_config_is_an_error(content, message, tmp_path):
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(ValueError, match=f"--text-config .*text.json {message}"):
        read_text_config(tmp_path / "text.json")


def test_a_missing_text_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--text-config .*none\.json does not exist"):
        read_text_config(tmp_path / "none.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 48}, "hidden_size is 48 in --text-config, but 32 in the weights"),
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12 in --text-config, but 2 in the weights"),
        ({"intermediate_size": 128}, "intermediate_size is 128 in --text-config, but 64 in the weights"),
        ({"max_position_embeddings": 77}, "max_position_embeddings is 77 in --text-config, but 512 in the weights"),
        ({"type_vocab_size": 1}, "type_vocab_size is 1 in --text-config, but 2 in the weights"),
        ({"vocab_size": 30523}, "vocab_size is 30523 in --text-config, but 30524 in the weights"),
        ({"hidden_size": 30522}, "hidden_size is 30522 in --text-config, but 32 in the weights"),
        ({"pad_token_id": 1}, "pad_token_id is 1 in --text-config, but 0 in the tokenizer"),
        ({"hidden_act": "swoosh"}, "--text-config has a value that a bert cannot have: 'swoosh'"),
        ({"hidden_act": 1}, "--text-config has a value that a bert cannot have: .*hidden_act"),
    ],
)
def test_a_text_config_that_contradicts_the_weights_is_an_error(given, message, weights):
    with pytest.raises(ValueError, match=message):
        convert_tiny(weights, text_config={**HEADS, **given})


@pytest.mark.parametrize(
    ("given", "heads"), [({}, "0.5"), *(({"num_attention_heads": heads}, repr(heads)) for heads in (3, 0, -4, "four"))]
)
def test_heads_that_do_not_divide_the_width_are_an_error(given, heads, weights):
    with pytest.raises(ValueError, match=f"width 32, which cannot have {heads} attention heads.*num_attention_heads"):
        convert_tiny(weights, text_config=given)


# --- mismatched weights -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_mismatched_weights_are_listed(weights):
    changes = {
        "text__transformer__pooler__dense__bias": None,
        "visual__trunk__blocks__3__norm1__weight": None,
        "visual__head__proj__weight": torch.zeros(64, 64),
        "text__transformer__embeddings__token_type_ids": torch.zeros(1, 512),
        "visual__trunk__norm__bias": torch.zeros(65),
        "logit_scale": torch.zeros(2),
    }
    with pytest.raises(WrongWeightsError) as error:
        convert_tiny(weights, changes)
    first, *lines = str(error.value).split("\n  ")
    assert first == (
        "model.pt does not contain a test_vit for 160 pixels and a bert; describe the model that it was trained as "
        "with --vision, --image-size and --text-config. Mismatches:"
    )
    assert sorted(lines) == [
        "logit_scale is [2], in the model [1]",
        "text.transformer.embeddings.token_type_ids is not in the model",
        "text.transformer.pooler.dense.bias is missing",
        "visual.head.proj.weight is not in the model",
        "visual.trunk.blocks.3.norm1.weight is missing",
        "visual.trunk.norm.bias is [65], in the model [64]",
    ]


@pytest.mark.slow
def test_another_image_size_is_an_error(weights):
    with pytest.raises(
        WrongWeightsError, match=r"visual.trunk.pos_embed is \[1, 101, 64\], in the model \[1, 145, 64\]"
    ):
        convert_tiny(weights, image=replace(IMAGE_TOWER, image_size=192))


@pytest.mark.slow
def test_another_image_tower_is_an_error(weights):
    with pytest.raises(WrongWeightsError) as error:
        convert_tiny(weights, image=RELEASED_IMAGE_TOWER)
    assert len(str(error.value).splitlines()) > 140  # all are listed


@pytest.mark.slow
def test_a_missing_layer_is_an_error(weights):
    renamed = {name.replace("encoder.layer.1.", "encoder.layer.7."): value for name, value in weights.items()}
    with pytest.raises(WrongWeightsError, match=r"layer\.1\.output\.dense\.bias is missing"):
        convert_tiny(renamed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "resnet18"])
def test_an_image_tower_without_cls_is_an_error(name, weights):
    with pytest.raises(ValueError, match=rf"{name} has no \[CLS\] token"):
        convert_tiny(weights, image=ImageTowerSpec(name, 224))


def test_features_of_different_widths_are_an_error(weights):
    with pytest.raises(ValueError, match="text features have 48 dimensions, those of test_vit 64; set --vision"):
        convert_tiny(weights, {"text__proj__weight": torch.zeros(48, 32)})


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "is missing"), (torch.zeros(64), r"has the shape \[64\]"), (torch.tensor(1.0), r"\[\]")],
)
def test_weights_that_define_sizes_are_required(value, message, weights):
    with pytest.raises(ValueError, match=f"model.pt is not a LoTLIP checkpoint: text.proj.weight .*{message}"):
        convert_tiny(weights, {"text__proj__weight": value})


@pytest.mark.parametrize("rows", [30521, 30539])
def test_another_tokenizers_checkpoint_is_an_error(rows, weights):
    with pytest.raises(ValueError, match=f"has {rows} rows .*bert-base-uncased has 30522 words.*--tokenizer"):
        convert_tiny(weights, {"text__transformer__embeddings__word_embeddings__weight": torch.zeros(rows, 32)})


@pytest.mark.slow
def test_context_lengths(weights):
    for context_length in (5, 512):
        assert convert_tiny(weights, context_length=context_length)[0].context_length == context_length
    with pytest.raises(ValueError, match=r"--context-length 513 exceeds the 512 positions of model\.pt"):
        convert_tiny(weights, context_length=513)
    with pytest.raises(ValueError, match="context_length 4 has no room for words"):
        convert_tiny(weights, context_length=4)


# --- invalid files ------------------------------------------------------------------------------------------------


class Dangerous:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def test_a_checkpoint_cannot_run_code(tmp_path, weights):
    with pytest.raises(ValueError, match=r"needs \S*exec besides its weights, so reading it would run code"):
        read_checkpoint(save_checkpoint(tmp_path, {"state_dict": weights, "args": Dangerous()}))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_needs_pickle_is_an_error(zipped, tmp_path, weights):
    content = {"state_dict": weights, "args": argparse.Namespace(lr=5e-4)}
    with pytest.raises(ValueError, match=r"saved.pt needs argparse\.Namespace .*save only its 'state_dict'"):
        read_checkpoint(save_checkpoint(tmp_path, content, _use_new_zipfile_serialization=zipped))


@pytest.mark.parametrize("content", [b"", bytes(1000), b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_not_a_checkpoint_is_an_error(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"model.pt \({len(content)} bytes\) is incomplete or not a torch checkpoint .*download"
    ):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", r"a text file that begins with 'version https:"),
        (b"<!doctype html>\r\n", r"a text file that begins with '<!doctype html>'"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"\x08\x07\x12\x07pytorch" + bytes(100), "an ONNX model"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_another_format_is_an_error_naming_it(name, content, kind, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is {kind}.*, not a .*; name a file of weights"):
        read_any_weights(tmp_path / name)


def test_a_safetensors_file_is_recognised_without_its_suffix(tmp_path, weights):
    save_file(weights, tmp_path / "model")
    for found in (read_any_weights(tmp_path / "model"), read_checkpoint(tmp_path / "model").weights):
        assert found.keys() == {name.removeprefix("module.") for name in weights}


def test_a_truncated_checkpoint_is_an_error(imported, tmp_path):
    data = imported[0].read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is incomplete or not a torch checkpoint that is safe to read"):
        read_checkpoint(tmp_path / "model.pt")


def test_a_missing_checkpoint_is_an_error(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ValueError, match=f"there is no checkpoint {path}"):
            read_checkpoint(path)


def test_an_inaccessible_checkpoint_is_not_reported_as_broken(imported, monkeypatch):
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError, match="not yours"):
        read_checkpoint(imported[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "contains a Tensor, not weights by name"),
        ({}, "contains a dict, not weights by name"),
        ({"state_dict": [1]}, "contains a list, not weights by name"),
        ({"epoch": 3, "model": {}, "a": torch.zeros(1)}, "has no weights under epoch, model; name a checkpoint with"),
        ({"state_dict": {1: torch.zeros(1)}}, "has no weights under 1;"),
    ],
)
def test_a_checkpoint_of_something_else_is_an_error(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(save_checkpoint(tmp_path, content))


# --- output folder ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_existing_folder_is_kept_unless_forced(imported, tmp_path):
    file, text = imported[0], write_text_config("m2", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    import_official(file, out, IMAGE_TOWER, text)  # an empty folder may be replaced
    (out / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ValueError, match=r"--out .*out"):
            import_official(file, out, IMAGE_TOWER, text, force=force)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    import_official(file, out, IMAGE_TOWER, text, force=True)
    assert load_model(out)[1].corner_tokens == 2


@pytest.mark.parametrize("force", [False, True])
def test_inputs_are_not_replaced(imported, tmp_path, force):
    text = write_text_config("m2", tmp_path)
    with pytest.raises(ValueError, match=r"--out .* contains the input .*model\.pt"):
        import_official(imported[0], imported[0].parent, IMAGE_TOWER, text, force=force)
    with pytest.raises(ValueError, match=r"--out .* contains the input .*text\.json"):
        import_official(imported[0], tmp_path, IMAGE_TOWER, text, force=force)
    with pytest.raises(ValueError, match=r"--out .*model\.pt is a file"):
        import_official(imported[0], imported[0], IMAGE_TOWER, text, force=force)
    assert imported[0].is_file() and text.is_file()


@pytest.mark.slow
def test_a_failed_import_leaves_nothing(imported, tmp_path, monkeypatch):
    text = write_text_config("m2", tmp_path)

    def full(config: Any, weights: Any, tokenizer: Any, folder: Path, image_tower: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(official, "save_model", full)
    with pytest.raises(OSError, match="no space left"):
        import_official(imported[0], tmp_path / "out", IMAGE_TOWER, text)
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


# --- the command --------------------------------------------------------------------------------------------------


def command(file: Path, out: Path, text: Path, *more: object) -> list[object]:
    return ["import-official", file, "--out", out, "--vision", "test_vit", "--text-config", text, *more]


@pytest.mark.slow
def test_the_command_describes_the_model_and_how_to_load_it(imported, tmp_path, monkeypatch, capsys):
    text, out = write_text_config("m2", tmp_path), tmp_path / "out"
    arguments = command(imported[0], out, text, "--image-size", 160, "--context-length", 64)
    assert program(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    *lines, example = printed.out.splitlines()
    assert lines == [
        f"reading {imported[0]}",
        "text tower: bert, 2 layers, 32 wide, 4 heads, feed-forward width 64, 512 positions, 2 token types",
        "vocabulary: 30522 words and 2 corner tokens; texts of 64 tokens",
        "image tower: test_vit, 160 pixels, 64-dimensional features",
        f"written to {out}; to load it:",
    ]
    assert f"ignored unknown fields of {text}: pooler, proj\n" in printed.err
    names: dict[str, Any] = {}
    exec(example.strip(), names)
    assert names["model"].config.context_length == 64
    assert str(program(monkeypatch, *arguments)).startswith(f"error: --out {out} is not empty")
    assert program(monkeypatch, *arguments, "--force") == 0


@pytest.mark.slow
def test_the_command_lists_one_weight_per_line(imported, tmp_path, monkeypatch, capsys):
    arguments = command(imported[0], tmp_path / "out", write_text_config("m2", tmp_path), "--image-size", 192)
    assert program(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("error: ") and error[0].endswith("Mismatches:")
    assert error[1:] == ["  visual.trunk.pos_embed is [1, 101, 64], in the model [1, 145, 64]"]
    assert not (tmp_path / "out").exists()


def test_the_command_fails_in_one_line(tmp_path, monkeypatch, capsys):
    message = program(monkeypatch, "import-official", tmp_path / "none.pt", "--out", tmp_path / "out")
    assert message == f"error: there is no checkpoint {tmp_path}/none.pt; check the path"
    assert capsys.readouterr().err == ""
