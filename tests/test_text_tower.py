"""The text tower: the attention mask of corner tokens, packed texts, and independence from other texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, BertConfig, PretrainedConfig

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.bert import BertTower
from lotlip.models.text.masks import corner_attention_mask
from lotlip.models.text.packing import SLACK, PackedTexts, TextBatch, pack

WORDS = 50
LENGTH = 12


def build(config: PretrainedConfig, corner_tokens: int, corner_mask: bool = True) -> BertTower:
    settings = {"corner_tokens": corner_tokens, "corner_mask": corner_mask, "embed_dim": 8}
    return BertTower(LotlipConfig(text_config=config, **settings)).eval()


def tower(corner_tokens: int, corner_mask: bool = True, layers: int = 2) -> BertTower:
    torch.manual_seed(corner_tokens)
    config = BertConfig(
        vocab_size=WORDS + corner_tokens,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,  # large, so that a wrong dependence would show
    )
    return build(config, corner_tokens, corner_mask)


def texts(lengths: list[int], corner_tokens: int, padded: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Random texts [B, padded] with [CLS], corner tokens and words."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, WORDS, (len(lengths), LENGTH), generator=generator)
    ids[:, 0] = 1
    ids[:, 1 : 1 + corner_tokens] = torch.arange(WORDS, WORDS + corner_tokens)
    rows = torch.zeros(len(lengths), padded, dtype=torch.int64)
    for row, text, length in zip(rows, ids, lengths, strict=True):
        row[:length] = text[:length]
    return rows, torch.tensor(lengths)


def naive_mask(length: int, padded: int, corner_tokens: int, separate: bool) -> Tensor:
    """The table of the paper's section 3.2, one pair of tokens at a time."""
    corner = range(1, 1 + corner_tokens)
    mask = torch.zeros(padded, padded, dtype=torch.bool)
    for query in range(padded):
        for key in range(padded):
            if key >= length:
                visible = False
            elif not separate or query == key:
                visible = True
            elif key in corner:
                visible = False
            else:
                visible = not (query in corner and key == 0)
            mask[query, key] = visible
    return mask


@pytest.mark.slow
@given(
    corner_tokens=st.integers(0, 4),
    extra=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    separate=st.booleans(),
)
def test_the_attention_mask_follows_the_paper(corner_tokens, extra, padding, separate):
    lengths = [corner_tokens + 2 + more for more in extra]
    padded = max(lengths) + padding
    mask = corner_attention_mask(torch.tensor(lengths), padded, corner_tokens, separate)
    assert mask.dtype == torch.bool
    masks = mask.expand(-1, 1, padded, padded)[:, 0]
    for text_mask, length in zip(masks, lengths, strict=True):
        expected = naive_mask(length, padded, corner_tokens, separate)
        assert torch.equal(text_mask[:length], expected[:length])  # rows of padding are never used
        assert not text_mask[:, length:].any()


@pytest.mark.slow
@given(
    corner_tokens=st.integers(0, 3),
    extra=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    padding=st.integers(0, 6),
    seed=st.integers(0, 100),
)
def test_features_do_not_depend_on_other_texts_and_padding(corner_tokens, extra, padding, seed):
    model = tower(corner_tokens)
    lengths = [corner_tokens + 3 + more for more in extra]
    ids, given_lengths = texts(lengths, corner_tokens)
    with torch.no_grad():
        together = model(ids, given_lengths)
        assert together.shape == (len(lengths), 1 + corner_tokens, 8)
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        shuffled = model(ids[order], given_lengths[order])
        wider = model(*texts(lengths, corner_tokens, LENGTH + padding))
        one_by_one = zip(ids.split(1), given_lengths.split(1), strict=True)
        alone = torch.cat([model(row[:, :length], length) for row, length in one_by_one])
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(wider, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("corner_tokens", [0, 1, 2])
def test_small_batches_have_the_right_shape(batch, corner_tokens):
    ids, lengths = texts([8, 11][:batch], corner_tokens)
    assert tower(corner_tokens)(ids, lengths).shape == (batch, 1 + corner_tokens, 8)


def feature_changes(corner_mask: bool) -> tuple[Tensor, Tensor]:
    """Changes of each feature [1 + m] and of each word's hidden state with the second of three corner tokens."""
    model = tower(3, corner_mask)
    ids, lengths = texts([LENGTH], 3)

    def outputs() -> tuple[Tensor, Tensor]:
        mask = corner_attention_mask(lengths, LENGTH, 3, corner_mask).expand(-1, 1, LENGTH, LENGTH)
        hidden = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return model(ids, lengths)[0], hidden[0, 4:]

    with torch.no_grad():
        features, words = outputs()
        model.transformer.get_input_embeddings().weight[WORDS + 1] += torch.randn(16)
        new_features, new_words = outputs()
    return (new_features - features).abs().amax(dim=1), (new_words - words).abs().amax(dim=1)


def test_a_corner_token_changes_only_its_own_feature():
    features, words = feature_changes(corner_mask=True)
    assert features[2] > 1e-2
    assert features[[0, 1, 3]].max() < 1e-6
    assert words.max() < 1e-6


def test_a_corner_token_without_the_mask_changes_all_features():
    features, words = feature_changes(corner_mask=False)
    assert features.min() > 1e-3
    assert words.min() > 1e-3


def test_words_change_every_feature():
    model = tower(2)
    ids, lengths = texts([LENGTH], 2)
    other = ids.clone()
    other[0, 5] = (other[0, 5] - 4) % 40 + 5
    with torch.no_grad():
        assert (model(ids, lengths) - model(other, lengths)).abs().amax(dim=2).min() > 1e-3


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value


@pytest.mark.parametrize("corner_tokens", [0, 2])
def test_attention_and_its_gradients_equal_a_plain_softmax(corner_tokens):
    torch.manual_seed(0)
    mask = corner_attention_mask(torch.tensor([5, 9, 12]), 12, corner_tokens)
    values = [torch.randn(3, 2, 12, 8) for _ in range(3)]
    weight = torch.randn(3, 2, 12, 8)
    outputs, gradients = [], []
    for attention in (scaled_dot_product_attention, softmax_attention):
        inputs = [value.clone().requires_grad_() for value in values]
        result = attention(*inputs, mask)
        outputs.append(result)
        gradients.append(torch.autograd.grad((result * weight).sum(), inputs))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


def test_the_towers_gradients_equal_those_of_eager_attention():
    """Transformers' eager attention gets the same mask in additive form."""
    fused = tower(2)
    eager = tower(2)
    eager.transformer.set_attn_implementation("eager")
    ids, lengths = texts([7, 12], 2)
    mask = corner_attention_mask(lengths, LENGTH, 2)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden = eager.transformer(input_ids=ids, attention_mask=additive).last_hidden_state[:, :3]
    expected = eager.proj(torch.tanh(eager.transformer.pooler.dense(hidden)))
    features = fused(ids, lengths)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn(features.shape)
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    plain = dict(eager.named_parameters())
    for name, parameter in fused.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, plain[name].grad, atol=1e-4, rtol=1e-3)


def test_bf16_features_are_near_fp32():
    model = tower(2)
    ids, lengths = texts([7, 12], 2)
    with torch.no_grad():
        expected = model(ids, lengths)
        features = model.bfloat16()(ids, lengths)
    assert features.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(features.float(), expected, dim=-1)
    assert cosine.min() > 0.995


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "electra", "distilbert", "albert", "nomic_bert"])
def test_other_families_mask_the_corner_tokens(family):
    """Each family's attention accepts the mask. RoBERTa's positions start after the padding's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    config = AutoConfig.for_model(family, **sizes, vocab_size=WORDS + 2, max_position_embeddings=32)
    config.initializer_range = 0.3
    model = build(config, corner_tokens=2)
    ids, lengths = texts([7, 12], 2)
    ids[0, 7:] = config.pad_token_id or 0
    other = ids.clone()
    other[:, 1] = 5  # a different first corner token
    with torch.no_grad():
        together = model(ids, lengths)
        alone = torch.cat(
            [model(row[:, :length], length) for row, length in zip(ids.split(1), lengths[:, None], strict=True)]
        )
        changed = (model(other, lengths) - together).abs().amax(dim=-1)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert changed[:, 1].min() > 1e-3
    assert changed[:, [0, 2]].max() < 1e-6
    assert model.positions == 32 - (2 if "roberta" in family else 0)


def test_a_family_without_such_a_mask_is_an_error():
    with pytest.raises(ValueError, match=r"a mpnet model cannot be the text tower: .* such as bert, roberta"):
        build(AutoConfig.for_model("mpnet"), corner_tokens=2)


# --- packed texts -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(lengths=st.lists(st.integers(4, LENGTH), min_size=1, max_size=6), cls_only=st.booleans(), separate=st.booleans())
def test_packed_texts_hold_every_token_at_its_position(lengths, cls_only, separate):
    ids, counts = texts(lengths, 2)
    model = tower(2, separate)
    packed = pack([model._trimmed(TextBatch(ids, counts, only)) for only in (False, cls_only)], model._arrange)
    assert sum(mask.shape[0] * mask.shape[-1] for mask in packed.masks) == len(packed.ids) == len(packed.positions)
    assert [tuple(indices.shape) for indices in packed.outputs] == [(len(ids), 3), (len(ids), 1 if cls_only else 3)]
    columns = zip(first_tokens(packed), packed.needed.columns, strict=True)
    assert torch.equal(
        torch.cat([(first[:, None] + group).flatten() for first, group in columns]), packed.needed.indices
    )
    for outputs, dropped in zip(packed.outputs, (0, 2 if cls_only and separate else 0), strict=True):
        positions = [0, *range(1 + dropped, LENGTH)]
        for text, length, start in zip(ids, lengths, packed.needed.indices[outputs[:, 0]].tolist(), strict=True):
            text_positions = positions[: length - dropped]
            assert packed.positions[start : start + len(text_positions)].tolist() == text_positions
            assert torch.equal(packed.ids[start : start + len(text_positions)], text[text_positions])
    # keys that any query sees: the text's tokens
    visible_keys = [mask.any(dim=2).sum(dim=-1).flatten() for mask in packed.masks]
    for mask, tokens in zip(packed.masks, visible_keys, strict=True):
        assert mask.shape[-1] == tokens.max() <= tokens.min() * (1 + SLACK)


def first_tokens(packed: PackedTexts) -> list[Tensor]:
    """The index of each text's first token, for each group."""
    sizes = [mask.shape[0] * mask.shape[-1] for mask in packed.masks]
    parts = torch.arange(len(packed.ids)).split(sizes)
    return [part[:: mask.shape[-1]] for part, mask in zip(parts, packed.masks, strict=True)]


def padded_features(model: BertTower, ids: Tensor, lengths: Tensor) -> Tensor:
    return model.features(model.hidden_states(ids, lengths)[1])


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize(("corner_tokens", "corner_mask"), [(0, True), (1, True), (3, True), (3, False)])
def test_packed_texts_equal_padded_ones_in_features_and_gradients(family, corner_tokens, corner_mask):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": WORDS + corner_tokens, "max_position_embeddings": 32, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, initializer_range=0.3)
    model = build(config, corner_tokens, corner_mask)
    short, long = texts([7, 5, 6, 5], corner_tokens), texts([12, 9, 12, 6, 7], corner_tokens)
    packed_features = model.encode(TextBatch(*short, cls_only=True), TextBatch(*long))
    expected = [padded_features(model, *short)[:, :1], padded_features(model, *long)]
    parameters = dict(model.named_parameters())
    gradients = []
    for features in (packed_features, expected):
        loss = sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in features)
        gradients.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    for packed, padded in zip(packed_features, expected, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    for name, packed, padded in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_applies_in_training_only():
    model = tower(2)
    given_texts = texts([7, 12], 2)
    assert torch.equal(model(*given_texts), model(*given_texts))
    model.train()
    assert not torch.equal(model(*given_texts), model(*given_texts))
