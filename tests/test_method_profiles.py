"""Profiles of other released methods: their settings, plans and DeepSpeed configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import CLIPConfig, CLIPImageProcessor

from flows.stages.evaluate import learns_short_captions
from lotlip.caption.captioners.table import TableCaptioner
from lotlip.config.params import Params, checked_params, load_params
from lotlip.data.plain_tokenizer import PlainTokenizer
from lotlip.ingest.sources import open_source
from lotlip.plan.plan import Gpu, plan
from lotlip.plan.towers import build_towers, parameters
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import deepspeed_config
from tests.test_webdataset_source import image_bytes

ROOT = Path(__file__).parent.parent
FROM_CLIP = ("long-clip", "debias-clip", "himo-clip", "smart-clip")
NO_SHORT = {"loss": {"short_loss_fraction": 0}}
FROM_SCRATCH = ("laclip", "align", "flair")
# Published sizes of CLIP B/16: 149,620,737 parameters with both projections and the temperature, of which 85,799,424
# and 63,165,952 are in the two encoders.
CLIP_B16 = 149_620_737


def profile(name: str) -> tuple[Params, PretrainConfig]:
    params = load_params(ROOT / "profiles" / f"{name}.yaml")
    (ablation,) = params.names
    assert ablation == name
    (table,) = params.tables.values()
    assert [*table.rows] == [name] and table.published  # published scores stand beside its own
    return params, params.ablation(name)


@pytest.mark.parametrize("name", FROM_CLIP)
def test_methods_that_finetune_clip_interpolate_its_positions(name):
    params, config = profile(name)
    (line,) = params.warnings
    assert "is not pinned" in line
    assert config.start == "openai/clip-vit-base-patch16" and params.image_tower.kind == "start"
    stretched = config.text.position_interpolation
    assert stretched is not None and stretched.interpolated == config.text.context_length == 248
    assert config.text.frozen_positions == 20
    assert not config.image_tower.frozen and not config.image_tower.from_scratch
    assert config.long_texts.sampler == ("first" if name == "smart-clip" else "all") and config.long_texts.sub_captions
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.warmup_steps) == (1e-6, 1e-2, 200)


def test_methods_that_finetune_clip_differ_in_texts_and_losses_only():
    settings = {name: profile(name)[1] for name in FROM_CLIP}
    shared = [config.model_dump(exclude={"short_texts", "long_texts", "loss"}) for config in settings.values()]
    assert shared == shared[:1] * 4
    long_clip, debias, himo, _ = settings.values()
    assert (long_clip.short_texts.sampler, debias.short_texts.sampler) == ("summary", "without-first")
    assert debias.short_texts.random_offset and not long_clip.short_texts.random_offset
    shares = [config.loss.short_loss_fraction for config in settings.values()]
    assert shares == [0.5, 0.1, 0, 0]
    assert (long_clip.loss.image_components, debias.loss.image_components, himo.loss.text_components) == (32, 32, 0.9)
    smoothing = [config.loss.label_smoothing for config in settings.values()]
    assert smoothing == [0.1, 0, 0.1, 0]
    assert [config.loss.masks is not None for config in settings.values()] == [False, False, False, True]


@pytest.mark.parametrize("name", FROM_CLIP)
def test_the_documented_table_gives_images_and_captions(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(ROOT / "profiles" / f"{name}.yaml")
    folder = Path("data/raw/sharegpt4v")
    (folder / "images/coco").mkdir(parents=True)
    (folder / "images/coco/1.jpg").write_bytes(image_bytes())
    (folder / "captions.csv").write_text('image,text\ncoco/1.jpg,"A dog. It runs, fast."\n', encoding="utf-8")
    source = open_source(params.ingest.source, params.ingest.images)
    (record,) = (item for unit in source.units(10) for item in source.read(unit))
    author = TableCaptioner("sharegpt4v", params.caption.captioners["sharegpt4v"], len)  # type: ignore[arg-type]
    (caption,) = author.caption([record])  # type: ignore[list-item]
    assert caption.text == record.short_caption == "A dog. It runs, fast."  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def clip_b16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything of OpenAI's CLIP B/16 but its weights, which planning does not read."""
    folder = tmp_path_factory.mktemp("clip") / "clip-vit-base-patch16"
    CLIPConfig(vision_config={"patch_size": 16}).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    PlainTokenizer("clip").save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_CLIP)
def test_methods_that_finetune_clip_fit_eight_gpus(name, clip_b16):
    data = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text(encoding="utf-8"))
    params = checked_params({**data, "pretrain": {**data["pretrain"], "start": str(clip_b16)}}, name)
    config, compute = params.ablation(name), params.training_compute(name)
    assert compute.processes == 8
    assert deepspeed_config(config, compute)["train_batch_size"] == config.batch_size
    planned = plan(params, config, compute, Gpu())
    assert planned.remedy == "" and not planned.frozen
    masks = planned.trained.pop("modules of the objective", 0)
    assert bool(masks) is (name == "smart-clip")
    positions = config.text.context_length - 77
    assert sum(planned.trained.values()) == CLIP_B16 + positions * 512
    assert planned.trained["image tower"] == 85_799_424 + 768 * 512
    assert planned.trained["text encoder"] == 63_165_952 + positions * 512


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_methods_from_scratch_fit_eight_gpus(name):
    params, config = profile(name)
    assert params.warnings == []  # nothing is downloaded
    assert config.image_tower.from_scratch and config.text.pretrained is None
    assert bool(config.long_texts.sub_captions) is (name == "flair")
    compute = params.training_compute(name)
    deepspeed_settings = deepspeed_config(config, compute)
    assert deepspeed_settings["train_batch_size"] == config.batch_size
    assert plan(params, config, compute, Gpu()).remedy == ""
    trained, frozen = parameters(config, build_towers(config, params.image_tower))
    assert not frozen and trained["image tower"] > 5e7 and trained["text encoder"] > 5e7


def test_ablations_without_short_captions_are_known_to_the_gate_of_scores():
    params = load_params(ROOT / "params.yaml")
    of_long = {name for name in params.names if not learns_short_captions(params.ablation(name))}
    switches = {"debias-with-first", "debias-in-order", "debias-no-offset"}
    assert of_long == {"debias", *switches, "lotlip-debias", "himo", "smartclip", "flair"}
    assert learns_short_captions(PretrainConfig.model_validate({"long_texts": {"sub_captions": 0}} | NO_SHORT))
    assert not learns_short_captions(PretrainConfig.model_validate(NO_SHORT))


def test_laclip_has_its_released_settings():
    params, config = profile("laclip")
    assert len(params.caption.rewriting) == 4 and not params.caption.describing
    assert config.short_texts.sampler == "raw-or-rewrite"
    assert config.image_tower.augmentation is not None and config.image_tower.augmentation.scale == (0.5, 1.0)
    assert config.optimizer.betas == (0.9, 0.98) and config.optimizer.eps == 1e-8
    assert config.steps == 25 * config.optimizer.warmup_steps
    assert config.temperature.initial is None and config.temperature.min == 0.01


def test_align_has_its_published_settings():
    params, config = profile("align")
    images = params.ingest.images
    assert (images.min_side, images.max_aspect_ratio) == (201, 3)
    assert (config.loss.label_smoothing, config.temperature.initial, config.temperature.min) == (0.1, 1.0, None)
    assert (config.batch_size, config.text.context_length) == (16384, 64)
    assert deepspeed_config(config, params.training_compute("align"))["zero_optimization"]["stage"] == 0
    assert config.optimizer.decay == "linear" and config.optimizer.name == "lamb"


def test_flair_has_eight_texts_of_up_to_three_sentences():
    _, config = profile("flair")
    texts, loss = config.long_texts, config.loss
    assert (texts.sampler, texts.sub_captions, texts.per_image) == ("merged", 3, 8)
    assert loss.objective == "siglip" and loss.conditioned is not None and loss.conditioned.heads == 8
    assert (config.temperature.initial, loss.initial_bias) == (0.07, -10)
