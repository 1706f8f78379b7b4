"""Training only the used rows of the word embeddings gives the model that training all rows gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lotlip.core.files import read_json
from lotlip.models.saving import load_model
from lotlip.pretrain.job import Job
from lotlip.pretrain.sink import NullSink
from lotlip.pretrain.trainer import Trainer
from lotlip.pretrain.word_rows import MAX_SHARE, keep_used_rows
from tests.conftest import TinyWorld
from tests.training import losses, near, same, tiny_job, train, weights

TABLE = "text.transformer.embeddings.word_embeddings.weight"
ROWS = 30522 + 2


def with_index(world: TinyWorld, folder: Path, **changes: Any) -> TinyWorld:
    """The same shards with a changed index; None removes a key."""
    shutil.copytree(world.shards, folder)
    index = {**read_json(folder / "index.json"), **changes}
    fields = {key: value for key, value in index.items() if value is not None}
    (folder / "index.json").write_text(json.dumps(fields))
    return TinyWorld(world.image_tower, folder, world.pixel_shards, world.samples)


def trainer(world: TinyWorld, folder: Path, differences: dict[str, Any] | None = None) -> Trainer:
    return Trainer(tiny_job(world, folder, differences), 0, NullSink())


@pytest.fixture(scope="module")
def full_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Shards without a vocabulary, so the full table is trained."""
    return with_index(tiny_world, tmp_path_factory.mktemp("full") / "shards", tokenizer=None)


RECIPES: dict[str, dict[str, Any]] = {
    "weight decay": {"optimizer": {"weight_decay": 0.5}},
    "clipping": {"optimizer": {"gradient_clipping": 0.1}},
    "micro-batches": {"gradient_accumulation_steps": 2},
    "late interaction": {"similarity": "late-interaction", "text": {"corner_tokens": 0}},
    "roberta": {"text": {"config": {"model_type": "roberta", "max_position_embeddings": 40}}},
    "electra": {"text": {"config": {"model_type": "electra", "embedding_size": 16}}},
    "bf16": {"precision": "bf16", "optimizer": {"weight_decay": 0.5}},
    "zero 3": {"zero_stage": 3, "optimizer": {"weight_decay": 0.5}},
}
MAIN_RECIPES = ("weight decay", "clipping", "bf16")  # the others are left to `make test-all`


@pytest.mark.integration
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name in MAIN_RECIPES else pytest.mark.system) for name in RECIPES],
)
def test_training_used_rows_gives_the_model_of_the_full_table(group, tiny_world, full_world, tmp_path, recipe):
    used, full = (
        tiny_job(world, tmp_path / name, RECIPES[recipe])
        for name, world in (("used", tiny_world), ("full", full_world))
    )
    started = trainer(tiny_world, tmp_path / "start", RECIPES[recipe])
    assert started.engine.model.word_rows is not None
    assert trainer(full_world, tmp_path / "start", RECIPES[recipe]).engine.model.word_rows is None
    train(used)
    train(full)
    assert losses(used) == pytest.approx(losses(full), abs=1e-6)
    # with bf16, DeepSpeed rounds the first weights, but not those of unused rows, which are below 0.5 here
    assert near(weights(used), weights(full), 1e-3 if recipe == "bf16" else 1e-6)
    load_model(used.model_folder(0))


@pytest.mark.integration
def test_unused_rows_are_decayed(group, tiny_world, full_world, tmp_path):
    """AdamW rounds at each step, and the product of all steps is rounded once, so the last digits differ."""
    strong = {"optimizer": {"weight_decay": 20.0}}
    used, full = (
        train(tiny_job(world, tmp_path / name, strong)) for name, world in (("used", tiny_world), ("full", full_world))
    )
    start = trainer(full_world, tmp_path / "start", strong).engine.model.get_parameter(TABLE).detach()
    row = 29_000
    assert row not in read_json(tiny_world.shards / "index.json")["vocabulary"]
    factor = weights(used)[TABLE][row] / start[row]
    assert factor.max() < 0.9
    torch.testing.assert_close(weights(used)[TABLE][row], weights(full)[TABLE][row], rtol=1e-6, atol=0)


@pytest.mark.integration
def test_a_checkpoint_holds_the_full_table(group, tiny_world, full_world, tmp_path):
    """Each kind of run resumes from a checkpoint of the other kind."""
    first = trainer(tiny_world, tmp_path / "used")
    first.engine.step(next(first.loader.steps(0, 1)), 0)
    first._checkpoint(1)
    assert first.engine.model.get_parameter(TABLE).shape[0] < 100
    second = trainer(full_world, tmp_path / "used")
    state = second.checkpoints.load(second.engine.deepspeed)
    assert state is not None and state["step"] == 1
    assert second.engine.model.get_parameter(TABLE).shape[0] == ROWS
    second.engine.step(next(second.loader.steps(1, 2)), 1)
    second._checkpoint(2)
    assert first.checkpoints.load(first.engine.deepspeed)["step"] == 2


@pytest.mark.integration
def test_finetuning_used_rows_gives_the_model_of_the_full_table(group, tiny_world, full_world, tmp_path):
    first = train(tiny_job(tiny_world, tmp_path / "first"))
    start = {"text": {"pretrained": str(first.model_folder(0)), "config": {}}, "optimizer": {"weight_decay": 0.5}}

    def finetuned(world: TinyWorld, name: str) -> Job:
        job = tiny_job(world, tmp_path / name, start)
        text = job.config.text.model_copy(update={"config": {}})  # the pretrained model has the sizes
        return train(job.model_copy(update={"config": job.config.model_copy(update={"text": text})}))

    used, full = finetuned(tiny_world, "used"), finetuned(full_world, "full")
    assert near(weights(used), weights(full), 1e-6)
    assert not same(weights(used), weights(first))


@pytest.mark.integration
def test_a_token_outside_the_vocabulary_is_an_error(group, tiny_world, tmp_path):
    vocabulary = read_json(tiny_world.shards / "index.json")["vocabulary"]
    world = with_index(tiny_world, tmp_path / "shards", vocabulary=[index for index in vocabulary if index != 3899])
    new_trainer = trainer(world, tmp_path)
    message = r"a text of sample \w+-dog has the token 'dog' \(id 3899\), .* rewrite the shards"
    with pytest.raises(ValueError, match=message):
        list(new_trainer.loader.steps(0, 12))


@pytest.mark.integration
def test_another_tokenizer_needs_the_full_table(group, tiny_world, tmp_path):
    world = with_index(tiny_world, tmp_path / "shards", tokenizer="another")
    assert trainer(world, tmp_path).engine.model.word_rows is None


@pytest.mark.integration
@pytest.mark.parametrize(("rows", "reduced"), [(int(ROWS * MAX_SHARE) + 1, False), (int(ROWS * MAX_SHARE), True)])
def test_a_mostly_used_table_is_not_reduced(group, full_world, tmp_path, rows, reduced):
    model = trainer(full_world, tmp_path).engine.model
    keep_used_rows(model, range(rows), lambda steps: 1.0)
    assert (model.word_rows is not None) is reduced
    assert model.get_parameter(TABLE).shape[0] == (rows if reduced else ROWS)


@pytest.mark.integration
def test_a_checkpoint_of_a_smaller_table_is_an_error(group, tiny_world, tmp_path):
    rows = trainer(tiny_world, tmp_path).engine.model.word_rows
    assert rows is not None
    with pytest.raises(ValueError, match=rf"{TABLE} has shape \(5, 32\), not \({ROWS}, 32\)"):
        rows.select(torch.zeros(5, 32))
