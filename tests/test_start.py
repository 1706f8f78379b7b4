"""Training from a complete dual encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from lotlip.importing.start import open_start
from lotlip.models.saving import load_model, save_whole_model
from lotlip.models.vision.image_tower import save_image_tower
from lotlip.models.vision.spec import START
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import Engine, parameter_groups
from lotlip.pretrain.initialisation import build_for_pretraining
from tests.conftest import TinyWorld
from tests.tiny_baselines import CLIP_LENGTH, SIGLIP_LENGTH, save_clip, save_siglip
from tests.training import finish, losses, same, start, tiny_job, train, weights

TEXTS = ["a red dog", "the white house is on the tree"]
pytestmark = pytest.mark.usefixtures("group", "forked")
SAVE = {"clip": (save_clip, CLIP_LENGTH), "siglip": (save_siglip, SIGLIP_LENGTH)}


def starting_tower(kind: str, folder: Path) -> Path:
    """The folder that the image-tower stage writes with `kind: start`."""
    opened = open_start(str(SAVE[kind][0](folder / kind)))
    model = opened.build()
    save_image_tower(model.image_tower, folder / "tower")
    save_whole_model(model, opened.tokenizer, folder / "tower" / START, {})
    return folder / "tower"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: starting_tower(kind, tmp_path_factory.mktemp(kind)) for kind in SAVE}


def settings(kind: str, **more: Any) -> dict[str, Any]:
    text = {"context_length": SAVE[kind][1], "corner_tokens": 2, **more.pop("text", {})}
    loss = {"objective": "siglip" if kind == "siglip" else "infonce"}
    return {"start": f"tests/{kind}", "text": text, "loss": loss, **more}


kinds = pytest.mark.parametrize("kind", SAVE)


@kinds
def test_the_initial_features_equal_the_starting_models(kind: str, towers: dict[str, Path]) -> None:
    model = build_for_pretraining(PretrainConfig.model_validate(settings(kind)), towers[kind]).eval()
    original, tokenizer = load_model(towers[kind] / START)
    ids, lengths = (torch.from_numpy(part) for part in tokenizer(TEXTS))
    with torch.no_grad():
        features = model.encode_text(ids, lengths)
        assert features.shape[1] == 3
        assert torch.allclose(features[:, 0], original.encode_text(ids, lengths)[:, 0], atol=1e-6)
    assert torch.equal(model.logit_scale, original.logit_scale)
    if kind == "siglip":
        assert torch.equal(model.logit_bias, original.logit_bias)


@kinds
def test_interpolation_keeps_the_first_positions(kind: str, towers: dict[str, Path]) -> None:
    length = SAVE[kind][1]
    interpolation = {"positions": length, "keep": 4, "factor": 2}
    longer = {"context_length": 4 + 2 * (length - 4), "position_interpolation": interpolation}
    model = build_for_pretraining(PretrainConfig.model_validate(settings(kind, text=longer)), towers[kind])
    assert model.text.positions == longer["context_length"]
    start_table = load_model(towers[kind] / START)[0].text.transformer.embeddings.position_embedding.weight
    table = model.text.transformer.embeddings.position_embedding.weight
    assert torch.equal(table[:5], start_table[:5])
    assert torch.allclose(table[5], (start_table[4] + start_table[5]) / 2)


def test_another_context_than_siglips_positions_is_an_error(towers: dict[str, Path]) -> None:
    shorter = PretrainConfig.model_validate(settings("siglip", text={"context_length": 10}))
    with pytest.raises(ValueError, match="reads texts padded to its 12 positions"):
        build_for_pretraining(shorter, towers["siglip"])
    longer = PretrainConfig.model_validate(settings("clip", text={"context_length": 99}))
    with pytest.raises(ValueError, match=r"exceeds the encoder's 20 positions; .*position_interpolation"):
        build_for_pretraining(longer, towers["clip"])


def test_towers_have_their_own_learning_rate_and_weight_decay(towers: dict[str, Path]) -> None:
    config = PretrainConfig.model_validate(
        settings(
            "clip",
            text={"learning_rate": 1e-4, "weight_decay": 0.1, "frozen_positions": 4},
            image_tower={"frozen": False, "learning_rate": 1e-6},
            optimizer={"learning_rate": 1e-3, "weight_decay": 0.2},
        )
    )
    model = build_for_pretraining(config, towers["clip"])
    options = {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert len(options) == len(list(model.parameters()))
    assert options["logit_scale"] == (1e-3, 0.0)
    assert options["text.proj.weight"] == (1e-4, 0.1)
    assert options["image.proj.weight"] == (1e-6, 0.2)
    assert options["text.transformer.embeddings.position_embedding.weight"] == (1e-4, 0.0)


def train_images(
    tmp_path: Path, world: TinyWorld, tower: Path, differences: dict[str, Any], processes: int = 1, **compute: Any
) -> Any:
    """Trains on the images of the tiny world."""
    differences = {"text": {"config": {}}, **differences}
    job = tiny_job(world, tmp_path, None, image_tower=str(tower))
    config = PretrainConfig.model_validate(
        {"steps": 6, "batch_size": 8, "long_texts": {"sub_captions": 2}} | differences
    )
    changed = job.compute.model_copy(update={"processes": processes, **compute})
    job = job.model_copy(update={"config": config, "compute": changed})
    if processes == 1:
        return train(job)
    finish(start(job, tmp_path, processes))
    return job


@pytest.mark.integration
@kinds
def test_training_changes_what_is_not_frozen(
    kind: str, towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    differences = settings(
        kind, text={"frozen_positions": 4}, image_tower={"frozen": False}, optimizer={"warmup_steps": 1}
    )
    job = train_images(tmp_path, tiny_world, towers[kind], differences)
    before = build_for_pretraining(job.config, towers[kind]).state_dict()
    after = weights(job)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    table = "text.transformer.embeddings.position_embedding.weight"
    assert {table, "text.proj.weight", "logit_scale"} < changed
    assert any(name.startswith("image.") for name in changed)
    assert torch.equal(before[table][:4], after[table][:4])
    assert not torch.equal(before[table][4], after[table][4])
    assert load_model(job.model_folder(0))[0].config.corner_tokens == 2


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_text_tower_does_not_change(
    precision: str, towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    differences = settings("clip", text={"corner_tokens": 0, "frozen": True}, image_tower={"frozen": False})
    differences["precision"] = precision
    job = train_images(tmp_path, tiny_world, towers["clip"], differences, checkpoint_every=2)
    model = build_for_pretraining(job.config, towers["clip"])
    assert not model.text.training
    before = model.state_dict()
    changed = {name for name, value in weights(job).items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("text.")]


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_training_with_a_frozen_tower_resumes_exactly(
    zero_stage: int, towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = settings("clip", text={"corner_tokens": 0, "frozen": True}, image_tower={"frozen": False})
    compute = {"checkpoint_every": 2, "zero_stage": zero_stage}
    uninterrupted = train_images(tmp_path / "uninterrupted", tiny_world, towers["clip"], differences, **compute)
    step = Engine.step

    def stop(self: Engine, batches: Any, number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_images(tmp_path / "cut", tiny_world, towers["clip"], differences, **compute)
    resumed = train_images(tmp_path / "cut", tiny_world, towers["clip"], differences, **compute)
    assert same(weights(uninterrupted), weights(resumed))


@pytest.mark.integration
def test_frozen_positions_are_exact_in_bf16(towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path) -> None:
    differences = settings("clip", text={"frozen_positions": 4}, image_tower={"frozen": False})
    job = train_images(tmp_path, tiny_world, towers["clip"], {**differences, "precision": "bf16"})
    table = "text.transformer.embeddings.position_embedding.weight"
    before, after = build_for_pretraining(job.config, towers["clip"]).state_dict()[table], weights(job)[table]
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])


@pytest.mark.integration
def test_two_processes_train_like_one(towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path) -> None:
    differences = settings("clip", text={"frozen_positions": 4}, image_tower={"frozen": False})
    one = train_images(tmp_path / "one", tiny_world, towers["clip"], differences)
    two = train_images(tmp_path / "two", tiny_world, towers["clip"], differences, processes=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.integration
def test_checkpointing_does_not_change_the_losses(
    towers: dict[str, Path], tiny_world: TinyWorld, tmp_path: Path
) -> None:
    differences = settings("clip", image_tower={"frozen": False})
    plain = train_images(tmp_path / "plain", tiny_world, towers["clip"], differences)
    checkpointed = train_images(
        tmp_path / "again", tiny_world, towers["clip"], differences, activation_checkpointing=True
    )
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "x", "text": {"pretrained": "y"}}, "both name the text tower"),
        ({"start": "x", "text": {"config": {"hidden_size": 8}}}, "text.config has no effect"),
        ({"text": {"frozen": True, "corner_tokens": 0}}, "text.frozen needs trained weights"),
        ({"start": "x", "text": {"frozen": True}}, "2 corner and register tokens need training"),
        ({"start": "x", "text": {"frozen": True, "corner_tokens": 0}}, "both towers are frozen"),
        ({"text": {"frozen_positions": 128}}, "leaves none of 128 positions"),
        ({"image_tower": {"learning_rate": 1e-5}}, "learning_rate of a frozen image tower"),
        ({"text": {"position_interpolation": {}, "context_length": 248}}, "needs trained positions"),
    ],
)
def test_contradictory_settings_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig.model_validate(change)


def test_a_frozen_encoder_without_a_projection_is_an_error(tmp_path: Path, tiny_tower: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    text = {
        "pretrained": str(folder),
        "tokenizer": str(folder),
        "frozen": True,
        "corner_tokens": 0,
        "context_length": 20,
    }
    config = PretrainConfig.model_validate({"text": text, "image_tower": {"frozen": False}})
    with pytest.raises(ValueError, match="has no projection to the shared space"):
        build_for_pretraining(config, tiny_tower)


@pytest.mark.slow
@kinds
def test_the_text_encoder_of_a_dual_encoder_is_used(kind: str, tmp_path: Path, tiny_tower: Path) -> None:
    save, length = SAVE[kind]
    folder = save(tmp_path / kind)
    text = {"pretrained": str(folder), "tokenizer": str(folder), "context_length": length}
    model = build_for_pretraining(PretrainConfig.model_validate({"text": text}), tiny_tower)
    original: Any = AutoModel.from_pretrained(folder).text_model
    assert torch.equal(
        model.text.transformer.encoder.layers[1].mlp.fc1.weight, original.encoder.layers[1].mlp.fc1.weight
    )
    other = {**text, "tokenizer": "bert-base-uncased", "context_length": length}
    with pytest.raises(ValueError, match="tokenizer bert-base-uncased"):
        build_for_pretraining(PretrainConfig.model_validate({"text": other}), tiny_tower)
