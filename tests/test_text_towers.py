"""Text towers of every family: the mask of corner tokens, and independence of padding, order and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTextModelWithProjection, ModernBertModel, SiglipTextModel

from lotlip.models.configuration import LotlipConfig
from lotlip.models.text.packing import TextBatch
from lotlip.models.text.text_tower import TextTower, build_text_tower, position_table
from tests.saved_tensors import SavedTensors

WORDS, CONTEXT = 60, 16
START, END, PAD = 58, 59, 1
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 40},
    "modernbert": {"num_hidden_layers": 4, "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    "clip_text_model": {"max_position_embeddings": CONTEXT, "projection_dim": 8},
    "siglip_text_model": {"max_position_embeddings": CONTEXT, "projection_size": 8},
}
families = pytest.mark.parametrize("family", SETTINGS)
masks = pytest.mark.parametrize("corner_mask", [True, False])


def build(family: str, corner_tokens: int = 0, registers: int = 0, corner_mask: bool = True) -> TextTower:
    """A tower with large weights, so that a wrong dependence shows."""
    common = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    config = LotlipConfig(
        text_config={
            "model_type": family,
            **common,
            **ids,
            **SETTINGS[family],
            "vocab_size": WORDS + corner_tokens + registers,
        },
        embed_dim=8,
        context_length=CONTEXT,
        corner_tokens=corner_tokens,
        corner_mask=corner_mask,
        register_tokens=registers,
    )
    torch.manual_seed(0)
    tower = build_text_tower(config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower.eval()


def texts(tower: TextTower, lengths: list[int], padded: int | None = None) -> tuple[Tensor, Tensor]:
    """Random texts in the family's layout; `lengths` count words and the first and last token."""
    draw = torch.Generator().manual_seed(3)
    vocabulary = tower.transformer.config.vocab_size
    extra = torch.arange(WORDS, vocabulary) if tower.first_word > 1 else torch.arange(0)
    rows = torch.full((len(lengths), len(extra) + (padded or max(lengths))), PAD)
    for row, length in zip(rows, lengths, strict=True):
        words = torch.randint(5, START, (CONTEXT,), generator=draw)[: length - 2]
        row[: length + len(extra)] = torch.cat([torch.tensor([START]), extra, words, torch.tensor([END])])
    return rows, torch.tensor(lengths) + len(extra)


@families
def test_features_without_corner_tokens_equal_the_librarys(family: str) -> None:
    tower = build(family)
    ids, lengths = texts(tower, [9, 4, 12, 7])
    encoder: Any = tower.transformer
    weights = encoder.state_dict()
    with torch.no_grad():
        features = tower(ids, lengths)[:, 0]
        if family == "clip_text_model":
            clip: Any = CLIPTextModelWithProjection(encoder.config).eval()
            clip.text_model.load_state_dict(weights)
            clip.text_projection.weight = tower.proj.weight
            expected = clip(input_ids=ids).text_embeds
        elif family == "siglip_text_model":
            siglip: Any = SiglipTextModel(encoder.config).eval()
            siglip.load_state_dict(weights | {f"head.{k}": v for k, v in tower.proj.state_dict().items()})
            padded_ids = torch.full((4, CONTEXT), PAD)
            padded_ids[:, : ids.shape[1]] = ids
            expected = siglip(input_ids=padded_ids).pooler_output
        else:
            other: Any = ModernBertModel(encoder.config).eval() if family == "modernbert" else encoder
            other.load_state_dict(weights)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            expected = tower.features(other(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@families
@given(
    corner_tokens=st.integers(0, 3),
    registers=st.integers(0, 2),
    corner_mask=st.booleans(),
    lengths=st.lists(st.integers(3, 12), min_size=1, max_size=4),
    padding=st.integers(0, 4),
)
def test_features_do_not_depend_on_other_texts_and_padding(
    family: str, corner_tokens: int, registers: int, corner_mask: bool, lengths: list[int], padding: int
) -> None:
    tower = build(family, corner_tokens, registers, corner_mask)
    ids, counts = texts(tower, lengths)
    with torch.no_grad():
        together, summaries = tower.encode(TextBatch(ids, counts), TextBatch(ids, counts, cls_only=True))
        assert together.shape == (len(lengths), 1 + corner_tokens, 8)
        wider = tower(*texts(tower, lengths, max(lengths) + padding))
        alone = torch.cat([tower(row[:, :n], torch.tensor([n])) for row, n in zip(ids.split(1), counts, strict=True)])
        padded = tower.features(tower.hidden_states(ids, counts)[1])
        reverse = torch.arange(len(lengths)).flip(0)
        backwards = tower(ids[reverse], counts[reverse])
    for other in (wider, alone, padded, backwards[reverse]):
        torch.testing.assert_close(other, together, atol=2e-5, rtol=0)
    torch.testing.assert_close(summaries[:, 0], together[:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "clip_text_model"])
@pytest.mark.parametrize(("corner_tokens", "corner_mask"), [(0, True), (2, True), (2, False)])
def test_offsets_shift_words_but_not_cls_and_corner_tokens(family, corner_tokens, corner_mask):
    tower = build(family, corner_tokens, 1, corner_mask)
    ids, lengths = texts(tower, [9, 4, 12, 4])
    offsets = torch.tensor([0, 9, CONTEXT - 12, 2])
    table: Any = position_table(tower.transformer)[1]  # type: ignore[index]
    fixed = 1 + corner_tokens if family == "bert" else 1
    for cls_only in (True, False):
        (features,) = tower.encode(TextBatch(ids, lengths, cls_only, offsets))
        weights = table.weight.detach().clone()
        for row, offset in enumerate(offsets.tolist()):
            with torch.no_grad():  # the same text without an offset, with a shifted table of positions
                moved = weights[fixed + offset :]
                table.weight[fixed : fixed + len(moved)] = moved
                expected = tower.encode(TextBatch(ids[row : row + 1], lengths[row : row + 1], cls_only))[0]
                table.weight.copy_(weights)
            torch.testing.assert_close(features[row : row + 1], expected, atol=2e-5, rtol=0)


def test_offsets_need_learned_positions():
    assert {family: build(family).moves_words for family in SETTINGS} == {
        "bert": True,
        "modernbert": False,
        "clip_text_model": True,
        "siglip_text_model": False,
    }


def influence(tower: TextTower, token: int) -> Tensor:
    """The change of each feature [1 + m] with the embedding of a token."""
    ids, lengths = texts(tower, [CONTEXT - 4])
    table: Any = tower.transformer.get_input_embeddings()
    with torch.no_grad():
        before = tower(ids, lengths)
        table.weight[token] += torch.randn(16, generator=torch.Generator().manual_seed(1))
        return (tower(ids, lengths) - before).abs().amax(dim=-1)[0]


@families
def test_a_corner_token_changes_only_its_own_feature(family: str) -> None:
    changes = influence(build(family, corner_tokens=3, registers=1), WORDS + 1)
    assert changes[2] > 1e-2
    assert changes[[0, 1, 3]].max() < 1e-6


@families
def test_a_corner_token_without_the_mask_changes_other_features(family: str) -> None:
    """All other features change; in CLIP, whose attention is causal, only later ones."""
    changes = influence(build(family, corner_tokens=3, corner_mask=False), WORDS + 1)
    assert changes[[2, 3]].min() > 1e-3
    assert (changes[[0, 1]] > 1e-3).all() == (family != "clip_text_model")


@families
@masks
def test_a_register_changes_every_feature(family: str, corner_mask: bool) -> None:
    assert influence(build(family, corner_tokens=2, registers=2, corner_mask=corner_mask), WORDS + 3).min() > 1e-3


@families
def test_words_change_every_feature(family: str) -> None:
    tower = build(family, corner_tokens=2)
    ids, lengths = texts(tower, [10])
    other = ids.clone()
    other[0, -3] = (other[0, -3] - 4) % 40 + 5
    with torch.no_grad():
        changes = (tower(ids, lengths) - tower(other, lengths)).abs().amax(dim=-1)
    assert changes.min() > 1e-3


@pytest.mark.parametrize("family", ["clip_text_model", "siglip_text_model"])
def test_the_text_feature_does_not_depend_on_the_number_of_corner_tokens(family: str) -> None:
    without, with_three = build(family), build(family, corner_tokens=3)
    weights = without.state_dict()
    table = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[table] = torch.cat([weights[table], with_three.state_dict()[table][WORDS:]])
    with_three.load_state_dict(weights)
    given_texts = texts(without, [9, 4, 14])
    with torch.no_grad():
        assert torch.allclose(with_three(*given_texts)[:, 0], without(*given_texts)[:, 0], atol=1e-5)


@families
@masks
def test_packed_texts_have_the_gradients_of_padded_texts(family: str, corner_mask: bool) -> None:
    tower = build(family, 2, 1, corner_mask)
    batch = texts(tower, [9, 4, 12, 7])
    gradients = []
    for features in (tower(*batch), tower.features(tower.hidden_states(*batch)[1])):
        loss = (features * torch.linspace(-1, 1, features.numel()).view(features.shape)).sum()
        gradients.append(torch.autograd.grad(loss, list(tower.parameters()), allow_unused=True))
    for (name, _), packed, padded in zip(tower.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@families
def test_checkpointing_saves_memory_and_keeps_the_gradients(family: str) -> None:
    gradients, bytes_saved = [], []
    for checkpointing in (False, True):
        tower = build(family, corner_tokens=2).train()
        if checkpointing:
            tower.enable_checkpointing()
        with SavedTensors(tower) as saved:
            features = tower(*texts(tower, [9, 4, 12, 7]))
        bytes_saved.append(saved.now)
        gradients.append(torch.autograd.grad(features.square().sum(), list(tower.parameters()), allow_unused=True))
    assert bytes_saved[1] < bytes_saved[0] / 2
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@families
def test_bf16_features_are_near_fp32(family: str) -> None:
    tower = build(family, corner_tokens=2)
    batch = texts(tower, [7, 12])
    with torch.no_grad():
        expected = tower(*batch)
        features = tower.bfloat16()(*batch)
    assert features.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(features.float(), expected, dim=-1).min() > 0.99


def test_clip_uses_the_first_end_token_of_a_padded_text() -> None:
    tower = build("clip_text_model")
    ids = torch.tensor([[START, 7, 8, END, END, END], [START, 7, END, 0, 0, 0]])
    assert tower.attention_mask(ids).sum(dim=1).tolist() == [4, 3]


def test_a_text_longer_than_siglips_context_is_an_error() -> None:
    ids = torch.full((1, CONTEXT + 1), 7)
    with pytest.raises(ValueError, match="17 tokens, but the model's context length is 16"):
        build("siglip_text_model")(ids, torch.tensor([CONTEXT + 1]))


def test_texts_without_an_end_token_are_an_error_for_clip() -> None:
    tower = build("clip_text_model")
    with pytest.raises(ValueError, match="17 tokens, but the model's context length is 16"):
        tower(torch.full((1, CONTEXT + 1), 7), torch.tensor([CONTEXT + 1]))
    with pytest.raises(ValueError, match="begins with the end token; pad texts at the end"):
        tower.attention_mask(torch.tensor([[END, END, START, 7, END]]))
