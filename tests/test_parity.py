"""Against what the method's released code computes (tests/data/parity)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lotlip.data.tokenizer import TextTokenizer
from lotlip.losses import lotlip_loss
from lotlip.models.lotlip import LotlipConfig, LotlipModel
from lotlip.models.text_tower import corner_attention_mask

PARITY = Path(__file__).parent / "data" / "parity"


class Vectors:
    def __init__(self, folder: Path) -> None:
        self.case = json.loads((folder / "case.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")
        with np.load(folder / "weights.npz") as arrays:
            self.weights = {name.removeprefix("module."): torch.from_numpy(arrays[name]) for name in arrays.files}
        self.corners = self.case["num_corner_tokens"]
        self.tokenizer = TextTokenizer("bert-base-uncased", self.case["context_length"], self.corners)

    def model(self) -> LotlipModel:
        text = {key: value for key, value in self.case["text"].items() if key not in ("pooler", "proj")}
        text |= {"model_type": "bert", "vocab_size": text["vocab_size"] + self.corners}
        vision = self.case["vision"]
        image = {"timm_model": vision["timm_model"], "kwargs": {}, "image_size": vision["image_size"]}
        image |= {"mean": vision["mean"], "std": vision["std"]}
        config = LotlipConfig(text, image, self.case["embed_dim"], self.case["context_length"], self.corners)
        model = LotlipModel(config).eval()
        weights = {name.replace("visual.trunk.", "image.trunk."): value for name, value in self.weights.items()}
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # the released code has no buffers for these, transformers has
        assert all("position_ids" in name or "token_type_ids" in name for name in missing)
        assert not unexpected
        return model


@pytest.fixture(scope="module", params=["m0", "m2"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return Vectors(PARITY / request.param)


def test_token_ids_are_identical(vectors: Vectors) -> None:
    for captions, expected in zip(vectors.case["captions"], vectors.expected["input_ids"], strict=True):
        ids, _ = vectors.tokenizer(captions, pad_to=vectors.case["context_length"])
        assert np.array_equal(ids, expected.numpy())


def test_mask_is_identical(vectors: Vectors) -> None:
    texts = [captions[1] for captions in vectors.case["captions"]]
    ids, lengths = vectors.tokenizer(texts, pad_to=vectors.case["context_length"])
    mask = corner_attention_mask(torch.from_numpy(lengths), ids.shape[1], vectors.corners)
    expected = vectors.expected["attention_mask_long"].bool()
    real = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    if vectors.corners:  # what a padded position would see is never used
        assert torch.equal(mask[:, 0] & real[:, :, None], expected & real[:, :, None])
    else:
        assert torch.equal(mask[:, 0, 0], expected)


def test_features_and_loss_agree(vectors: Vectors) -> None:
    model, expected = vectors.model(), vectors.expected
    batch = []
    for column in (0, 1, 2):
        ids, lengths = vectors.tokenizer([captions[column] for captions in vectors.case["captions"]])
        batch.append((torch.from_numpy(ids), torch.from_numpy(lengths)))
    long_ids = torch.zeros(6, 128, dtype=torch.int64)
    long_lengths = torch.zeros(6, dtype=torch.int64)
    for column, (ids, lengths) in enumerate(batch[1:]):
        long_ids[column::2, : ids.shape[1]] = ids
        long_lengths[column::2] = lengths
    with torch.no_grad():
        images = model.get_image_features(expected["pixel_values"])
        features = model(*batch[0], long_ids, long_lengths)
        evaluated = model.get_text_features(*batch[1])
        losses = lotlip_loss(images, **features)
    torch.testing.assert_close(images, expected["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["text_features"], expected["text_features_training"], atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluated, expected["text_features_eval_long"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["logit_scale"], expected["logit_scale"], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses["raw"], expected["loss_raw_caption"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses["long"], expected["loss_long_captions"][0], atol=1e-5, rtol=0)
