"""Operations of the text tower, compared with a closed form and with a tower that has weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lotlip.evaluate.flops import CONTEXT_LENGTHS, flops_by_context, text_tower_flops
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.text_tower import build_text_tower

# No size is four times another, so that mixed-up sizes show.
NARROW = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 3}
BROAD = {"hidden_size": 40, "intermediate_size": 264, "num_attention_heads": 5, "num_hidden_layers": 2}
SHALLOW = {**NARROW, "num_hidden_layers": 1}
BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}


def model_config(size: dict[str, int], corner_tokens: int = 2, positions: int = 512, **changes: Any) -> LotlipConfig:
    text = {"model_type": "bert", "vocab_size": 60, "max_position_embeddings": positions, **size}
    return LotlipConfig(text_config=text, **{"embed_dim": 56, "corner_tokens": corner_tokens, **changes})


def closed_form(size: dict[str, int], length: int, read: int, embed_dim: int = 56) -> int:
    """Operations by formula. `read`: number of hidden states that become features; BERT itself also pools [CLS]."""
    width, inner = size["hidden_size"], size["intermediate_size"]
    linear = 2 * length * (4 * width * width + 2 * width * inner)  # query, key, value, output; up and down
    attention = 2 * 2 * length * length * width  # scores and weighted values
    pooler, projection = 2 * width * width, 2 * width * embed_dim
    return size["num_hidden_layers"] * (linear + attention) + (1 + read) * pooler + read * projection


@pytest.mark.parametrize("length", [20, 64])
@pytest.mark.parametrize("corner_tokens", [0, 2])
@pytest.mark.parametrize("size", [NARROW, BROAD], ids=["narrow", "broad"])
def test_the_count_equals_the_closed_form(size, corner_tokens, length):
    assert text_tower_flops(model_config(size, corner_tokens), length) == closed_form(size, length, 1 + corner_tokens)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    heads=st.integers(1, 4),
    head_width=st.integers(1, 9),
    inner=st.integers(1, 50),
    layers=st.integers(1, 3),
    corner_tokens=st.integers(0, 4),
    embed_dim=st.integers(1, 30),
    length=st.integers(6, 40),
)
def test_the_count_equals_the_closed_form_for_any_size(
    heads, head_width, inner, layers, corner_tokens, embed_dim, length
):
    size = {
        "hidden_size": heads * head_width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }
    flops = text_tower_flops(model_config(size, corner_tokens, embed_dim=embed_dim), length)
    assert flops == closed_form(size, length, 1 + corner_tokens, embed_dim)


@pytest.mark.slow
@pytest.mark.parametrize("corner_mask", [True, False])
@pytest.mark.parametrize("corner_tokens", [0, 2])
def test_the_count_equals_that_of_a_tower_with_weights(corner_tokens, corner_mask):
    """Operations of a real forward pass, which skips hidden states that no feature needs."""
    config = model_config(NARROW, corner_tokens, corner_mask=corner_mask)
    tower = build_text_tower(config)
    text = torch.zeros(1, 24, dtype=torch.int64), torch.tensor([24])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.features(tower.hidden_states(*text)[1])
    assert text_tower_flops(config, 24) == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(*text)
    unread = 24 - (1 + corner_tokens)
    weights = 2 * NARROW["hidden_size"] ** 2 + 2 * NARROW["hidden_size"] * NARROW["intermediate_size"]
    attention = 2 * 24 * NARROW["hidden_size"]  # products with keys and values
    last_layer = 2 * unread * (weights + attention)
    pooled_twice = 2 * NARROW["hidden_size"] ** 2
    assert text_tower_flops(config, 24) - counter.get_total_flops() == last_layer + pooled_twice


@pytest.mark.slow
def test_the_count_of_bert_base_is_known():
    """85 million weights, each used once per token, take 22 GFLOPs for 128 tokens, plus attention."""
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert weights == 84_934_656
    flops = text_tower_flops(model_config(BERT_BASE, embed_dim=768), 128)
    assert flops == closed_form(BERT_BASE, 128, 3, embed_dim=768)
    assert flops / (2 * 128 * weights) == pytest.approx(1 + 128 / (6 * 768), rel=1e-3)  # attention adds L / 6h


def test_late_interaction_counts_every_token():
    flops = text_tower_flops(model_config(NARROW, 0, similarity="late-interaction"), 20)
    assert flops == closed_form(NARROW, 20, 20)


def test_register_tokens_count_as_context():
    plain, registers = (model_config(NARROW, 0, register_tokens=count) for count in (0, 2))
    assert text_tower_flops(registers, 32) == text_tower_flops(plain, 32)


@pytest.mark.slow
def test_counting_allocates_no_weights():
    """The weights would take 310 GB."""
    size = {"hidden_size": 40960, "intermediate_size": 163840, "num_attention_heads": 64, "num_hidden_layers": 4}
    assert text_tower_flops(model_config(size, 0), 512) == closed_form(size, 512, 1)


@pytest.mark.slow
def test_a_series_ends_at_the_encoders_positions():
    config = model_config(SHALLOW, positions=200)
    series = flops_by_context(config)
    assert list(series) == [32, 64, 96, 128, 192]
    assert series == {length: closed_form(SHALLOW, length, 3) for length in series}
    assert list(flops_by_context(model_config(SHALLOW))) == list(CONTEXT_LENGTHS)


@pytest.mark.slow
def test_a_series_includes_the_models_context_length():
    assert list(flops_by_context(model_config(SHALLOW, positions=100, context_length=77))) == [32, 64, 77, 96]
    assert list(flops_by_context(model_config(SHALLOW, positions=24, context_length=24))) == [24]
    assert list(flops_by_context(model_config(SHALLOW, context_length=24), [64, 32, 64, 600])) == [24, 32, 64]


def test_a_text_longer_than_the_positions_is_an_error():
    config = model_config(NARROW, positions=64)
    assert text_tower_flops(config, 64) > 0
    with pytest.raises(ValueError, match="context length 65 exceeds the text encoder's 64 positions"):
        text_tower_flops(config, 65)


def test_unused_first_positions_are_not_counted():
    """RoBERTa does not use the positions up to the padding's."""
    config = LotlipConfig(
        text_config={"model_type": "roberta", "vocab_size": 60, "max_position_embeddings": 66, **SHALLOW},
        context_length=48,
    )
    assert list(flops_by_context(config, [32, 64, 65])) == [32, 48, 64]
