"""Training the used rows of the table of word embeddings gives what training all rows gives."""

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
from lotlip.pretrain.trainer import Trainer
from lotlip.pretrain.word_rows import MAX_SHARE, keep_used_rows
from lotlip.tracking.mlflow import NullSink
from tests.conftest import TinyWorld
from tests.training import losses, same, same_to, tiny_job, train, weights

TABLE = "text.transformer.embeddings.word_embeddings.weight"
ROWS = 30522 + 2


def with_index(world: TinyWorld, folder: Path, **changes: Any) -> TinyWorld:
    """The same shards with another index; None takes a key out."""
    shutil.copytree(world.shards, folder)
    index = {**read_json(folder / "index.json"), **changes}
    kept = {key: value for key, value in index.items() if value is not None}
    (folder / "index.json").write_text(json.dumps(kept))
    return TinyWorld(world.image_tower, folder, world.pixel_shards, world.samples)


def trainer(world: TinyWorld, folder: Path, differences: dict[str, Any] | None = None) -> Trainer:
    return Trainer(tiny_job(world, folder, differences), 0, NullSink())


@pytest.fixture(scope="module")
def whole_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Shards that do not say which words they have, so that the whole table is trained."""
    return with_index(tiny_world, tmp_path_factory.mktemp("whole") / "shards", tokenizer=None)


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


@pytest.mark.integration
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_is_that_of_the_whole_table(group, tiny_world, whole_world, tmp_path, recipe):
    used, whole = (
        tiny_job(world, tmp_path / name, RECIPES[recipe])
        for name, world in (("used", tiny_world), ("whole", whole_world))
    )
    started = trainer(tiny_world, tmp_path / "start", RECIPES[recipe])
    assert started.engine.model.word_rows is not None
    assert trainer(whole_world, tmp_path / "start", RECIPES[recipe]).engine.model.word_rows is None
    train(used)
    train(whole)
    assert losses(used) == pytest.approx(losses(whole), abs=1e-6)
    # with bf16, DeepSpeed starts from rounded weights; unused rows are not rounded, and are below 0.5 here
    assert same_to(weights(used), weights(whole), 1e-3 if recipe == "bf16" else 1e-6)
    load_model(used.model_folder(0))


@pytest.mark.integration
def test_unused_rows_decay(group, tiny_world, whole_world, tmp_path):
    """AdamW rounds at each step, the product of all steps is rounded once: they differ in the last digits."""
    strong = {"optimizer": {"weight_decay": 20.0}}
    used, whole = (
        train(tiny_job(world, tmp_path / name, strong))
        for name, world in (("used", tiny_world), ("whole", whole_world))
    )
    start = trainer(whole_world, tmp_path / "start", strong).engine.model.get_parameter(TABLE).detach()
    row = 29_000
    assert row not in read_json(tiny_world.shards / "index.json")["vocabulary"]
    left = weights(used)[TABLE][row] / start[row]
    assert left.max() < 0.9
    torch.testing.assert_close(weights(used)[TABLE][row], weights(whole)[TABLE][row], rtol=1e-6, atol=0)


@pytest.mark.integration
def test_a_checkpoint_has_the_whole_table(group, tiny_world, whole_world, tmp_path):
    """Each kind of run resumes from a checkpoint of the other."""
    made = trainer(tiny_world, tmp_path / "used")
    made.engine.step(next(made.loader.steps(0, 1)), 0)
    made._checkpoint(1)
    assert made.engine.model.get_parameter(TABLE).shape[0] < 100
    other = trainer(whole_world, tmp_path / "used")
    state = other.checkpoints.load(other.engine.deepspeed)
    assert state is not None and state["step"] == 1
    assert other.engine.model.get_parameter(TABLE).shape[0] == ROWS
    other.engine.step(next(other.loader.steps(1, 2)), 1)
    other._checkpoint(2)
    assert made.checkpoints.load(made.engine.deepspeed)["step"] == 2


@pytest.mark.integration
def test_a_run_goes_on_from_another_ones_model(group, tiny_world, whole_world, tmp_path):
    first = train(tiny_job(tiny_world, tmp_path / "first"))
    start = {"text": {"pretrained": str(first.model_folder(0)), "config": {}}, "optimizer": {"weight_decay": 0.5}}

    def continued(world: TinyWorld, name: str) -> Job:
        job = tiny_job(world, tmp_path / name, start)
        text = job.config.text.model_copy(update={"config": {}})  # sizes are those of the model
        return train(job.model_copy(update={"config": job.config.model_copy(update={"text": text})}))

    used, whole = continued(tiny_world, "used"), continued(whole_world, "whole")
    assert same_to(weights(used), weights(whole), 1e-6)
    assert not same(weights(used), weights(first))


@pytest.mark.integration
def test_a_token_outside_of_the_vocabulary_is_an_error(group, tiny_world, tmp_path):
    vocabulary = read_json(tiny_world.shards / "index.json")["vocabulary"]
    world = with_index(tiny_world, tmp_path / "shards", vocabulary=[index for index in vocabulary if index != 3899])
    made = trainer(world, tmp_path)
    message = r"a text of sample \w+-dog has the token 'dog' \(id 3899\), .* rewrite the shards"
    with pytest.raises(ValueError, match=message):
        list(made.loader.steps(0, 12))


@pytest.mark.integration
def test_another_tokenizer_needs_the_whole_table(group, tiny_world, tmp_path):
    world = with_index(tiny_world, tmp_path / "shards", tokenizer="another")
    assert trainer(world, tmp_path).engine.model.word_rows is None


@pytest.mark.integration
@pytest.mark.parametrize(("rows", "cut"), [(int(ROWS * MAX_SHARE) + 1, False), (int(ROWS * MAX_SHARE), True)])
def test_a_table_that_is_mostly_used_stays_whole(group, whole_world, tmp_path, rows, cut):
    model = trainer(whole_world, tmp_path).engine.model
    keep_used_rows(model, range(rows), lambda steps: 1.0)
    assert (model.word_rows is not None) is cut
    assert model.get_parameter(TABLE).shape[0] == (rows if cut else ROWS)


@pytest.mark.integration
def test_a_checkpoint_of_a_smaller_table_is_an_error(group, tiny_world, tmp_path):
    rows = trainer(tiny_world, tmp_path).engine.model.word_rows
    assert rows is not None
    with pytest.raises(ValueError, match=rf"{TABLE} has shape \(5, 32\), not \({ROWS}, 32\)"):
        rows.select(torch.zeros(5, 32))
