"""Comparison with results of the released code (tests/data/parity), from its checkpoint to its losses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from lotlip.importing.official import import_official
from lotlip.models.saving import load_model
from lotlip.models.text.masks import corner_attention_mask
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.pretrain.model import LotlipForPreTraining
from tests.parity import IMAGE_TOWER, PARITY, write_checkpoint, write_text_config


class Vectors:
    """A case, and the folder of its imported checkpoint."""

    def __init__(self, case: str, folder: Path) -> None:
        self.files = PARITY / case
        self.case = json.loads((self.files / "case.json").read_text())
        self.expected = load_file(self.files / "expected.safetensors")
        self.folder = folder / case
        import_official(write_checkpoint(case, folder), self.folder, IMAGE_TOWER, write_text_config(case, folder))
        self.model, self.tokenizer = load_model(self.folder)

    def texts(self, *columns: int) -> list[str]:
        """Captions of each image: 0 short, 1 long, 2 less long."""
        return [captions[column] for captions in self.case["captions"] for column in columns]

    def tokens(self, *columns: int) -> tuple[Tensor, Tensor]:
        ids, lengths = self.tokenizer(self.texts(*columns))
        return torch.from_numpy(ids), torch.from_numpy(lengths)


@pytest.fixture(scope="module", params=["m0", "m2"])
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    return Vectors(request.param, tmp_path_factory.mktemp("parity"))


def assert_near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_the_checkpoint_has_the_number_of_corner_tokens(vectors: Vectors) -> None:
    assert vectors.model.config.corner_tokens == vectors.case["num_corner_tokens"]
    assert vectors.model.config.embed_dim == vectors.case["embed_dim"]
    assert vectors.tokenizer.context_length == vectors.case["context_length"]


def test_token_ids_are_identical(vectors: Vectors) -> None:
    ids, _ = vectors.tokenizer(vectors.texts(0, 1, 2), pad_to=vectors.case["context_length"])
    assert np.array_equal(ids, vectors.expected["input_ids"].flatten(0, 1).numpy())


def test_mask_is_identical(vectors: Vectors) -> None:
    ids, lengths = vectors.tokenizer(vectors.texts(1), pad_to=vectors.case["context_length"])
    mask = corner_attention_mask(torch.from_numpy(lengths), ids.shape[1], vectors.tokenizer.corner_tokens)
    expected = vectors.expected["attention_mask_long"].bool()
    real = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    if vectors.tokenizer.corner_tokens:  # rows of padding are never used
        assert torch.equal(mask[:, 0] & real[:, :, None], expected & real[:, :, None])
    else:
        assert torch.equal(mask[:, 0, 0], expected)


@pytest.mark.slow
@torch.no_grad()
def test_transformers_auto_classes_give_the_same_features(vectors: Vectors) -> None:
    model = AutoModel.from_pretrained(vectors.folder).eval()
    processor = AutoProcessor.from_pretrained(vectors.folder)
    images = [Image.open(vectors.files / name) for name in vectors.case["images"]]
    inputs = processor(text=vectors.texts(1), images=images, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], vectors.expected["input_ids"][:, 1])
    assert torch.equal(inputs["pixel_values"], vectors.expected["pixel_values"])
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    image_features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert_near(texts, vectors.expected["text_features_eval_long"])
    assert_near(image_features, vectors.expected["image_features"])
    output = model(**inputs)
    assert_near(output.text_embeds, vectors.expected["text_features_eval_long"])
    logits = vectors.expected["logit_scale"] * output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_training_features_and_losses_agree(vectors: Vectors) -> None:
    model = LotlipForPreTraining.from_pretrained(vectors.folder).eval()
    output = model(vectors.expected["pixel_values"], *vectors.tokens(0), *vectors.tokens(1, 2))
    assert_near(output["image_features"], vectors.expected["image_features"])
    assert_near(output["text_features"], vectors.expected["text_features_training"])
    assert_near(output["logit_scale"], vectors.expected["logit_scale"])
    losses = lotlip_loss(**output)
    assert_near(losses["raw"], vectors.expected["loss_raw_caption"][0])
    assert_near(losses["long"], vectors.expected["loss_long_captions"][0])
