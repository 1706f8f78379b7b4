"""The model card shows what the configuration records."""

from __future__ import annotations

import yaml

from lotlip.models.card import model_card
from lotlip.models.configuration import LotlipConfig
from tests.conftest import TEXT

SMALL = {**TEXT, "vocab_size": 30524}


def test_a_card_without_provenance_describes_the_model_only():
    card = model_card(LotlipConfig(SMALL))
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "lotlip" in front["tags"]
    assert "# LoTLIP\n" in card
    assert "- text tower: bert, 1 layers, 32 wide; 2 corner tokens\n" in card
    assert "- image tower: vit_base_patch16_224 (timm), 224 pixels" in card
    assert "Not evaluated yet." in card
    assert "Training configuration" not in card
    assert "## Origin" not in card


def test_a_card_names_variants():
    config = LotlipConfig(SMALL, corner_mask=False, register_tokens=1, similarity="late-interaction", logit_bias=True)
    card = model_card(config)
    assert "2 corner tokens without their mask, 1 register tokens" in card
    assert "similarity: late-interaction, logits with a bias" in card


def test_a_card_shows_all_provenance():
    card = model_card(
        LotlipConfig(
            SMALL,
            provenance={
                "name": "lotlip, seed 0",
                "seed": 0,
                "git_commit": "abc",
                "pretraining": {"steps": 5, "text": {"pretrained": None, "corner_tokens": 2}},
                "data": {"samples": {"train": 8}, "statistics": {"llava": {"tokens_per_text": 40.123456}}},
                "scores": {"scenes": {"long.text_to_image.r1": 0.25}},
                "protocol": {"scenes": {"images": 10, "text_preparation": "a | b"}},
            },
        )
    )
    for line in (
        "# lotlip, seed 0",
        "| seed | 0 |",
        "| git_commit | abc |",
        "| text.corner_tokens | 2 |",
        "| text.pretrained | null |",
        "| samples.train | 8 |",
        "| statistics.llava.tokens_per_text | 40.12 |",
        "| long.text_to_image.r1 | 0.25 |",
        "| images | 10 |",
        "| text_preparation | a \\| b |",
    ):
        assert line in card.splitlines(), line
    assert "Not evaluated" not in card
