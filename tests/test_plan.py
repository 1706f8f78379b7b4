"""The predictions of `lotlip plan`, compared with what torch and DeepSpeed allocate."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from lotlip.config.params import Params, load_params
from lotlip.core.compute import TrainingCompute
from lotlip.core.files import read_json
from lotlip.core.section import merge
from lotlip.data.index import ShardIndex, read_index
from lotlip.data.statistics import text_statistics
from lotlip.evaluate.flops import text_tower_flops
from lotlip.models.configuration import LotlipConfig
from lotlip.models.text import packing
from lotlip.models.vision.image_tower import build_image_tower
from lotlip.models.vision.spec import ImageTowerSpec
from lotlip.objectives.contrastive import lotlip_loss
from lotlip.plan.describe import describe
from lotlip.plan.flops import image_flops, loss_flops, step_flops
from lotlip.plan.memory import activation_bytes, encoder_bytes, loss_bytes, state_bytes
from lotlip.plan.plan import Gpu, on_gpus, plan
from lotlip.plan.texts import TextLengths, text_lengths
from lotlip.plan.towers import Towers, build_towers
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.model import LotlipForPreTraining
from tests.conftest import TinyWorld
from tests.saved_tensors import SavedTensors
from tests.training import split, tiny_job

ROOT = Path(__file__).parent.parent
DEMO = load_params(ROOT / "params.yaml")
CC3M = load_params(ROOT / "profiles" / "cc3m.yaml")

MINIMAL: dict[str, Any] = {
    "ingest": {"source": {"kind": "folder", "path": "images"}},
    "caption": {"captioners": {"llava": {"kind": "table", "path": "llava.parquet"}}},
    "evaluate": {"benchmarks": {"mine": {"kind": "held-out"}}},
    "ablations": {"lotlip": {}},
}


@pytest.fixture(scope="module", autouse=True)
def _equal_towers_are_counted_once() -> Iterator[None]:
    """Counting FLOPs is four fifths of a plan's time, and most plans of these tests have equal towers."""

    def once(count: Callable[..., int], key: Callable[..., Any]) -> Callable[..., int]:
        counts: dict[Any, int] = {}

        def counted(*arguments: Any) -> int:
            found = key(*arguments)
            if found not in counts:
                counts[found] = count(*arguments)
            return counts[found]

        return counted

    text = once(text_tower_flops, lambda config, length: (config.to_json_string(use_diff=False), length))
    image = once(image_flops, lambda tower: json.dumps(tower.spec.to_json()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lotlip.plan.flops.text_tower_flops", text)
        patch.setattr("lotlip.plan.flops.image_flops", image)
        patch.setattr("lotlip.plan.plan.image_flops", image)
        yield


def planned(params: Params, ablation: str = "lotlip", differences: dict[str, Any] | None = None, **more: Any):
    recipe, how = split(differences or {})
    config = params.ablation(ablation).model_dump(mode="json", exclude_unset=True)
    compute = params.training_compute(ablation).model_dump(mode="json", exclude_unset=True)
    config = PretrainConfig.model_validate(merge(config, recipe))
    return plan(params, config, TrainingCompute.model_validate(merge(compute, how)), Gpu(), **more)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "images", "used"),
    [
        (None, 8000, 8000),
        (0.125, 8000, 1000),
        (0.00001, 8000, 1),
        (500, 8000, 500),
        (500, None, 500),
        (0.5, None, None),
        (None, None, None),
    ],
)
def test_epochs_count_the_used_images(samples, images, used):
    planned_run = planned(DEMO, "lit", {"samples": samples}, images=images)
    epochs = None if used is None else DEMO.pretrain.steps * 64 / used
    assert (planned_run.used_images, planned_run.epochs) == (used, epochs)
    assert planned_run.to_json()["epochs"] == epochs
    words = next(line for line in describe(planned_run, "lit") if line.split()[:1] == ["epochs"])
    assert (f"{epochs:.1f} of {used:,} images" if used else "unknown (--images)") in words
    # frozen features are computed and stored for all images
    assert planned_run.feature_flops == planned(DEMO, "lit", images=images).feature_flops


def test_more_samples_than_images_are_an_error():
    with pytest.raises(
        ValueError, match=r"pretrain\.samples is 8001, but there are 8000 training images; set it lower"
    ):
        planned(DEMO, "lit", {"samples": 8001}, images=8000)


def test_text_lengths_follow_the_statistics_of_the_shards():
    statistics = {
        "raw": {"sub_captions_per_text": 1.0, "tokens_per_text": 9.0},
        "a": {"sub_captions_per_text": 10.0, "tokens_per_text": 200.0},
        "b": {"sub_captions_per_text": 2.0, "tokens_per_text": 30.0},
    }
    config = PretrainConfig(long_texts={"sub_captions": 3, "per_image": 2})
    lengths = text_lengths(config, statistics)
    assert (lengths.short, lengths.long) == (1 + 2 + 9 + 1, 1 + 2 + (3 * 20 + 30) / 2)  # b has only two sub-captions
    assert lengths.tokens == lengths.short + 2 * lengths.long
    one = PretrainConfig(long_texts={"sub_captions": 3, "captioners": ["a"]}, text={"context_length": 40})
    assert text_lengths(one, statistics).long == 40
    assert text_lengths(PretrainConfig(long_texts={"sub_captions": 0}), statistics).tokens == lengths.short


def test_a_captioner_missing_from_the_shards_is_an_error():
    statistics = {name: {"sub_captions_per_text": 1.0, "tokens_per_text": 9.0} for name in ("raw", "llava")}
    config = PretrainConfig(long_texts={"captioners": ["llava", "gpt"]})
    with pytest.raises(ValueError, match=r"captioners names gpt, but the shards have captions by llava; .*dvc repro"):
        text_lengths(config, statistics)


@pytest.mark.slow
def test_text_flops_are_six_per_weight_and_token_plus_attention():
    flops = planned(CC3M).flops["text tower"]
    tokens = 2048 * (14 + 63)
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    attention = 12 * 3 * 4 * 768 * 2048 * (14**2 + 63**2)
    assert flops == pytest.approx(6 * weights * tokens + attention, rel=0.01)
    twice = planned(CC3M, differences={"gradient_accumulation_steps": 2}).flops["text tower"]
    assert twice / flops == pytest.approx(4 / 3)  # every feature is computed before the loss is known


@pytest.mark.slow
def test_frozen_features_take_one_pass_over_the_data_set():
    planned_run = planned(CC3M, images=3_000_000)
    assert planned_run.feature_flops == pytest.approx(3e6 * 35.1e9, rel=0.01)
    assert planned_run.feature_seconds == planned_run.feature_flops / (989e12 * 0.4)
    assert planned(CC3M).feature_flops == 0  # the number of images is unknown
    assert any("frozen features" in line for line in describe(planned_run, "x"))


@pytest.mark.slow
def test_time_is_flops_over_the_throughput_of_the_gpus():
    planned_run = planned(CC3M)
    assert planned_run.seconds == pytest.approx(14648 * sum(planned_run.flops.values()) / (8 * 989e12 * 0.4))
    assert planned_run.samples == 14648 * 2048


@pytest.mark.slow
def test_a_computed_or_trained_tower_costs_memory_and_flops():
    stored = planned(CC3M)
    computed = planned(CC3M, differences={"image_tower": {"features": "computed"}})
    trained = planned(CC3M, differences={"image_tower": {"frozen": False}})
    assert stored.flops["image tower"] == 0
    assert computed.flops["image tower"] == pytest.approx(2048 * 35.1e9, rel=0.01)  # one forward pass
    assert trained.flops["image tower"] == 3 * computed.flops["image tower"]
    part = "images and image activations"
    assert stored.memory[part] == 0 < computed.memory[part] < trained.memory[part]
    assert trained.trained["image tower"] == stored.frozen["image tower"]


@pytest.mark.slow
def test_a_plan_that_does_not_fit_names_a_remedy():
    too_large = planned(CC3M, differences={"processes": 1, "batch_size": 8192})
    assert sum(too_large.memory.values()) > 80e9
    accumulation = int(
        re.fullmatch(r"raise compute.training.gradient_accumulation_steps to (\d+)", too_large.remedy)[1]
    )
    fitting = planned(
        CC3M, differences={"processes": 1, "batch_size": 8192, "gradient_accumulation_steps": accumulation}
    )
    assert sum(fitting.memory.values()) <= 80e9 and fitting.remedy == ""
    assert describe(too_large, "x")[-1] == f"does not fit in memory: {too_large.remedy}"
    impossible = plan(CC3M, CC3M.ablation("lotlip"), CC3M.training_compute("lotlip"), Gpu(memory=1e9))
    assert impossible.remedy.startswith("use more GPUs or lower pretrain.batch_size")


def test_on_gpus_keeps_the_micro_batch_of_each_gpu():
    config = CC3M.ablation("lotlip")
    compute = CC3M.training_compute("lotlip").model_copy(update={"gradient_accumulation_steps": 2})
    for gpus, accumulation in ((1, 16), (8, 2), (16, 1), (32, 1)):
        _, adapted = on_gpus(config, compute, gpus)
        assert (adapted.processes, adapted.gradient_accumulation_steps) == (gpus, accumulation)
    with pytest.raises(ValueError, match="3 GPUs cannot train this: batch_size 2048 is not divisible"):
        on_gpus(config, compute, 3)


def test_an_unavailable_pretrained_tower_is_an_error():
    with pytest.raises(
        ValueError, match=r"text\.pretrained roberta-large are not available locally; train it first, download it"
    ):
        planned(CC3M, differences={"text": {"pretrained": "roberta-large"}})


@pytest.mark.slow
def test_every_ablation_of_the_demo_can_be_planned():
    planned_before = set()
    for name in DEMO.ablations:
        config = DEMO.ablation(name)
        loss = (config.loss.objective, config.loss.masks, config.loss.conditioned)
        parts = (config.text, config.image_tower, config.similarity, loss, config.long_texts.per_image, config.samples)
        if repr(parts) in planned_before or config.samples not in (None, 0.125):
            continue  # its plan differs only in the lengths of texts
        planned_before.add(repr(parts))
        planned_run = planned(DEMO, name, images=8000)
        assert planned_run.remedy == ""
        assert sum(planned_run.trained.values()) == build_towers(planned_run.config, DEMO.image_tower).trained
        images = 8000 * (planned_run.config.samples or 1)
        assert json.loads(json.dumps(planned_run.to_json()))["epochs"] == DEMO.pretrain.steps * 64 / images


# --- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "layers", "heads"), [(32, 1, 2), (256, 4, 4)])
def test_activations_of_a_text_encoder_match_the_prediction(hidden, layers, heads, precision):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 3 * hidden, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = LotlipConfig(text_config={**sizes, "vocab_size": 200}, embed_dim=hidden)
    model = LotlipForPreTraining(config, image_tower=False).to(precision).train()
    texts, length, lengths = 6, 24, [16, 24, 24, 16, 24, 16]
    with SavedTensors(model) as saved:
        model.text.hidden_states(torch.randint(5, 200, (texts, length)), torch.full((texts,), length))
    encoder = model.text.transformer.config
    predicted = encoder_bytes(encoder, texts, length, precision.itemsize, masked=True)
    assert predicted == pytest.approx(saved.total, rel=0.1)
    with SavedTensors(model) as saved:
        batch = packing.TextBatch(torch.randint(5, 200, (texts, length)), torch.tensor(lengths))
        model.text._packed_hidden_states(packing.pack([batch], model.text._arrange))
    length = sum(lengths) / texts
    predicted = encoder_bytes(encoder, texts, length, precision.itemsize, masked=True, outputs=3)
    assert predicted == pytest.approx(saved.total, rel=0.1)


TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "clip_text_model": {"max_position_embeddings": 32, "projection_dim": 64},
    "siglip_text_model": {"max_position_embeddings": 32, "projection_size": 64},
    "modernbert": {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_activations_of_other_text_towers_match_the_prediction(kind: str):
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 256}
    ids = {"vocab_size": 202, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {"model_type": kind, **sizes, **ids, **TEXT_TOWERS[kind]}
    config = LotlipConfig(text_config=text, embed_dim=64, context_length=32)
    model = LotlipForPreTraining(config, image_tower=False).train()
    with SavedTensors(model) as saved:
        short = packing.TextBatch(torch.randint(5, 200, (6, 16)), torch.full((6,), 16), cls_only=True)
        outputs = model.text.encode(short, packing.TextBatch(torch.randint(5, 200, (6, 32)), torch.full((6,), 32)))
    with torch.device("meta"):
        towers = Towers(LotlipForPreTraining(config, image_tower=False), build_image_tower(IMAGE_TOWERS["vit"]))
    settings = PretrainConfig(batch_size=6, text={"context_length": 32}, long_texts={"sub_captions": 1})
    lengths = TextLengths(32 if kind == "siglip_text_model" else 16, 32, 1)  # SigLIP pads to its context
    parts = activation_bytes(settings, TrainingCompute(), towers, lengths)
    assert parts["text activations"] == pytest.approx(saved.total, rel=0.1)
    del outputs
    model.text.enable_checkpointing()
    with SavedTensors(model) as saved:
        outputs = model.text.encode(short, packing.TextBatch(torch.randint(5, 200, (6, 32)), torch.full((6,), 32)))
    compute = TrainingCompute(activation_checkpointing=True)
    checkpointed = activation_bytes(settings, compute, towers, lengths)
    one_layer = parts["text activations"] / 12  # recomputed in the backward pass, which this test does not run
    assert checkpointed["text activations"] - one_layer == pytest.approx(saved.now, rel=0.25)
    del outputs


DINO = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
IMAGE_TOWERS = {
    "vit": ImageTowerSpec("vit_base_patch16_224", 32, {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}),
    "convnext": ImageTowerSpec("test_convnext", 64, pooling="model"),
    "dinov2": ImageTowerSpec(
        "dinov2", 32, {"config": {"model_type": "dinov2", **DINO}}, library="transformers", pooling="model"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_activations_of_image_towers_match_the_prediction(kind: str):
    spec = IMAGE_TOWERS[kind]
    tower = build_image_tower(spec).eval()
    with SavedTensors(tower) as saved:
        tower(torch.randn(8, 3, spec.image_size, spec.image_size))
    config = PretrainConfig(batch_size=8, image_tower={"frozen": False})
    with torch.device("meta"):
        planned = build_image_tower(spec)
    towers = Towers(build_towers(config, DEMO.image_tower).model, planned)
    parts = activation_bytes(config, TrainingCompute(), towers, TextLengths(8, 8, 0))
    assert parts["images and image activations"] == pytest.approx(saved.total, rel=0.1)
    assert step_flops(config, TrainingCompute(), towers, TextLengths(8, 8, 0))["image tower"] > 0


def test_activations_of_the_loss_match_the_prediction():
    batch, width = 96, 48
    images = torch.randn(batch, width, requires_grad=True)
    texts = torch.randn(batch, 4, width, requires_grad=True)
    with SavedTensors() as saved:
        lotlip_loss(images, texts, torch.ones(1, requires_grad=True))
    features = images.nbytes + texts.nbytes
    predicted = loss_bytes(PretrainConfig(batch_size=batch), TrainingCompute(), TextLengths(8, 8, 1), width)
    assert predicted - 2 * features == pytest.approx(saved.total - features, rel=0.1)


def test_late_interaction_matches_its_prediction():
    batch, patches, tokens, width = 64, 20, 9, 48
    images = torch.randn(batch, patches, width)  # of a frozen tower
    texts = torch.randn(batch, 1, tokens, width, requires_grad=True)
    mask = torch.ones(batch, 1, tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, SavedTensors() as saved:
        lotlip_loss(images, texts, torch.ones(1, requires_grad=True), text_mask=mask)["loss"].backward()
    config = PretrainConfig(batch_size=batch, similarity="late-interaction", text={"corner_tokens": 0})
    lengths = TextLengths(tokens, 0, 0)
    features = images.nbytes + texts.nbytes
    predicted = loss_bytes(config, TrainingCompute(), lengths, width, patches)
    assert predicted - 2 * features == pytest.approx(saved.total - images.nbytes, rel=0.1)
    assert loss_flops(config, TrainingCompute(), lengths, width, patches) == counter.get_total_flops()


# --- weights, gradients, optimizer --------------------------------------------------------------------------------

# Trains a small network in two processes and writes the bytes of each part of DeepSpeed's engine.
MEASURE_STATE = """
import json, sys
import deepspeed, torch
from torch import nn
from lotlip.core.compute import TrainingCompute
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import deepspeed_config, initialise_processes, parameter_groups

sizes = {}
initialise_processes(TrainingCompute(processes=2))
for precision, stage in (("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2)):
    config = PretrainConfig(batch_size=2, precision=precision)
    compute = TrainingCompute(processes=2, zero_stage=stage)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, compute))
    inputs = torch.randn(1, 256, dtype=next(engine.module.parameters()).dtype)
    for _ in range(2):
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
    groups = optimizer.param_groups
    weights = [value for group in groups for value in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    sizes[f"{precision} {stage}"] = {
        "weights": sum(value.nbytes for value in engine.module.parameters()),
        "fp32 weights": sum(value.nbytes for value in weights) if stage else 0,
        "AdamW's moments": sum(value.nbytes for value in states),
    }
if torch.distributed.get_rank() == 0:
    json.dump(sizes, open(sys.argv[1], "w"))
"""


@pytest.mark.system
def test_state_of_two_processes_matches_the_prediction(tmp_path):
    program = tmp_path / "measure.py"
    program.write_text(MEASURE_STATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(program), str(tmp_path / "sizes.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    trained = 8 * (256 * 256 + 256)
    for name, parts in read_json(tmp_path / "sizes.json").items():
        precision, stage = name.split()
        config = PretrainConfig(batch_size=2, precision=precision)
        predicted = state_bytes(config, TrainingCompute(processes=2, zero_stage=int(stage)), trained)
        assert {part: predicted[part] for part in parts} == pytest.approx(parts, rel=0.1), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_partitions_the_states_of_its_stage(stage):
    """Bytes per parameter with 4 processes in fp32, as in table 1 of the ZeRO paper."""
    config, compute = PretrainConfig(batch_size=4), TrainingCompute(processes=4, zero_stage=stage)
    gigabytes = {name: value / 1e9 for name, value in state_bytes(config, compute, 1_000_000_000).items()}
    assert gigabytes["weights"] == (1 if stage == 3 else 4)
    assert gigabytes["gradients"] == (4 if stage == 0 else 1)
    assert gigabytes["AdamW's moments"] == (8 if stage == 0 else 2)
    assert gigabytes["fp32 weights"] == (0 if stage == 0 else 1)
    assert gigabytes["gathered weights"] == (4 if stage == 3 else 0)
    several = compute.model_copy(update={"gradient_accumulation_steps": 2})
    assert state_bytes(config, several, 1_000_000_000)["gradients"] / 1e9 == (4 if stage < 2 else 1)


# --- a complete run -----------------------------------------------------------------------------------------------

# Trains a job like `python -m lotlip.train`, and writes the bytes of saved tensors and checkpoints.
MEASURE_RUN = """
import json, sys
import deepspeed
from lotlip.pretrain import trainer
from lotlip.train import sink
from lotlip.pretrain.checkpoint import Checkpoints
from tests.saved_tensors import SavedTensors

saved, sizes = SavedTensors(), {}
initialize, save = deepspeed.initialize, Checkpoints.save

def initialize_measured(model, **others):
    saved.exclude(model)
    return initialize(model=model, **others)

def save_measured(checkpoints, *arguments):
    save(checkpoints, *arguments)
    sizes["checkpoint"] = sum(file.stat().st_size for file in checkpoints.newest().rglob("*"))

deepspeed.initialize, Checkpoints.save = initialize_measured, save_measured
with saved:
    failure = trainer.run(sys.argv[1], sink)
json.dump({**sizes, "activations": saved.peak}, open(sys.argv[2], "w"))
sys.exit(failure)
"""


def statistics(world: TinyWorld) -> dict[str, Any]:
    """Text statistics in the form of the shards' index."""
    infos = [sample.info for sample in world.samples.values()]
    texts = {"raw": [info["raw"] for info in infos]}
    for name in infos[0]["captions"]:
        texts[name] = [". ".join(info["captions"][name]) + "." for info in infos]
    return {name: text_statistics(captions, "bert-base-uncased").to_json() for name, captions in texts.items()}


@pytest.mark.system
def test_a_tiny_run_matches_its_plan(tiny_world, tmp_path):
    job = tiny_job(tiny_world, tmp_path, {"steps": 7, "checkpoint_every": 4, "log_every": 1})
    job.write(tmp_path / "job.json")
    command = [sys.executable, "-c", MEASURE_RUN, str(tmp_path / "job.json"), str(tmp_path / "sizes.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = read_json(tmp_path / "sizes.json")

    tower = {"kind": "scenes", "image_size": 32, "patch_size": 4, "width": 32, "depth": 1, "heads": 2}
    params = Params.model_validate({**MINIMAL, "image_tower": tower})
    index = read_index(tiny_world.shards, ShardIndex).model_copy(update={"statistics": statistics(tiny_world)})
    expected = plan(
        params,
        job.config,
        job.compute,
        Gpu(),
        index,
    )

    history = read_json(job.model_folder(0) / "history.json")
    assert history[-1]["step"] == len(history) == expected.config.steps
    assert expected.samples / expected.images == 7 * 8 / 48
    with safe_open(job.model_folder(0) / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if not name.startswith("image.")]  # noqa: SIM118 (no mapping)
        sizes = [weights.get_slice(name).get_shape() for name in names]
    assert sum(expected.trained.values()) == sum(map(math.prod, sizes))
    assert expected.storage["checkpoint"] == pytest.approx(measured["checkpoint"], rel=0.1)
    assert expected.storage["model"] == pytest.approx(
        (job.model_folder(0) / "model.safetensors").stat().st_size, rel=0.1
    )
    activations = expected.memory["text activations"] + expected.memory["features and logits"]
    assert activations == pytest.approx(measured["activations"], rel=0.1)
