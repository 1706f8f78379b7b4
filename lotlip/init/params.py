"""Writes params.yaml for own data, with settings that fit it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml

from lotlip.config.params import Params, checked_params
from lotlip.core.yaml import parse_yaml
from lotlip.importing.start import StartingModel
from lotlip.init.captioner import UNKNOWN
from lotlip.init.inspection import Inspection
from lotlip.init.source import DataSource
from lotlip.pretrain.config import RAW

CORNER_TOKENS = 2
# OpenAI's CLIP, which is assumed if the starting model cannot be read here.
CLIP_POSITIONS = 77
_LONGEST = 256  # tokens; longer contexts cost more and are seldom needed
_LARGEST_FACTOR = 4  # of interpolated positions (Long-CLIP, arXiv 2403.15378, section 3.1)
_KEPT = 20  # first positions that Long-CLIP keeps


@dataclass(frozen=True)
class Settings:
    """Settings that fit the data.

    Attributes:
        context_length: maximum number of tokens in a text.
        interpolation: `text.position_interpolation`, if the starting model has fewer positions; else None.
        batch_size: images per step.
        steps: number of steps.
        epochs: number of passes over the training images.
        test_share, val_share: shares of held-out images.
        from_scratch: whether there are no useful weights to keep.
    """

    context_length: int
    interpolation: dict[str, int] | None
    batch_size: int
    steps: int
    epochs: int
    test_share: float
    val_share: float
    from_scratch: bool


def fit(found: Inspection, start: StartingModel | None, named: str | None, knows: bool) -> Settings:
    """Chooses settings that fit the data.

    Args:
        found: what the data holds.
        start: the starting model, if it can be read.
        named: its name; None: the text tower is trained from scratch.
        knows: whether the starting model finds images of this data better than by chance.
    """
    longest = max(float(np.quantile(texts.tokens, 0.95)) for texts in [*found.texts.values(), *found.tried.values()])
    context_length, interpolation = _context_length(math.ceil(longest) + 2, start, named)
    test, val = min(max(1000 / found.usable, 0.05), 0.2), 0.05
    train = max(int(found.usable * (1 - test - val)), 2)
    gpu = torch.cuda.is_available()
    largest = 1024 if gpu else 64
    batch_size = max(2, min(largest, 2 ** int(math.log2(max(train // 4, 2)))))
    epochs = next(epochs for images, epochs in _EPOCHS if train <= images)
    return Settings(
        context_length,
        interpolation,
        batch_size,
        max(math.ceil(epochs * train / batch_size), 20),
        epochs,
        round(test, 3),
        val,
        named is None or not knows,
    )


# Passes over so many training images; small data sets need more to move at all.
_EPOCHS = ((1_000, 20), (10_000, 10), (100_000, 5), (1_000_000, 2), (math.inf, 1))


def _context_length(needed: int, start: StartingModel | None, named: str | None) -> tuple[int, dict[str, int] | None]:
    """The context for texts of so many tokens, and the interpolation of positions that it needs."""
    if named is None:
        return min(max(math.ceil((needed + CORNER_TOKENS) / 16) * 16, 32), _LONGEST), None
    positions = start.config.context_length if start else CLIP_POSITIONS
    if needed <= positions or (start and start.config.text_config.model_type not in _PLAIN):
        return positions, None
    keep = _KEPT if positions > 2 * _KEPT else positions // 4
    factor = min(math.ceil((needed - keep) / (positions - keep)), _LARGEST_FACTOR)
    return keep + (positions - keep) * factor, {"positions": positions, "keep": keep, "factor": factor}


# Text towers with learned positions, of which a longer context needs new ones.
_PLAIN = ("clip_text_model", "siglip_text_model")


def params_text(data: DataSource, start: str | None, found: Inspection, settings: Settings, title: str) -> str:
    """Returns a commented params.yaml.

    Args:
        data: how the data is stored.
        start: name of the starting model; None: a packaged image tower and a new text tower.
        found: what the data holds.
        settings: that fit it.
        title: of the report.
    """
    source = {**data.source, "test_share": settings.test_share, "val_share": settings.val_share}
    train = found.usable * (1 - settings.test_share - settings.val_share)
    captioners = "".join(f"{_revision_note(one)}\n    {name}: {_flow(one)}" for name, one in data.captioners.items())
    few = found.usable * settings.test_share < 100
    return _TEMPLATE.format(
        source=_flow(source),
        failures=_limit(found.failure_share, 0.01),
        missing=_limit(found.missing_share, 0.02),
        towers=_towers(start),
        sentence_ends=found.sentence_ends,
        captioners=captioners or " {}",
        steps=settings.steps,
        passes=f"about {settings.epochs} passes over {train:,.0f} training images",
        batch_size=settings.batch_size,
        start=_flow(start) if start else "null",
        own_tokenizer="  # counts words; the starting model has its own" if start else "",
        text_tower=_text_tower(start, settings),
        long_texts="" if data.captioners else f"\n    captioners: [{RAW}]  # sentences of the short captions",
        image_tower="" if start is None or not settings.from_scratch else _TRAINED_IMAGE_TOWER,
        learning_rate="1.0e-3" if settings.from_scratch else "1.0e-4",
        warmup=max(settings.steps // 10, 1),
        chance=0 if few else 1.0,
        few="  # too few test images for a reliable gate" if few else "",
        compute=_FEW_IMAGES if few else "",
        baselines="[start]" if start else "[]",
        title=_flow(title),
    )


def checked(text: str, place: str) -> Params:
    """Validates a params.yaml.

    Raises:
        ConfigError: it has invalid keys or values.
    """
    return checked_params(parse_yaml(text, place), place)


def _revision_note(captioner: Mapping[str, Any]) -> str:
    if captioner.get("revision") != UNKNOWN:
        return ""
    return "\n    # name the revision of the server's weights; another name has all images captioned again"


def _limit(share: float, least: float) -> str:
    """A limit of a share that leaves room for half as many more than in the sample, but never for all."""
    return f"{min(max(least, math.ceil(share * 150) / 100), math.floor((1 + share) * 50) / 100, 0.99):g}"


def _flow(value: Mapping[str, Any] | str) -> str:
    """A value as YAML on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _towers(start: str | None) -> str:
    if start:
        return "# both towers come from pretrain.start\nimage_tower: {kind: start}"
    return (
        "# EfficientNet-Lite0, trained on ImageNet, from a Python package. docs/image-towers.md lists others, such as\n"
        "#   {kind: timm, model: vit_base_patch16_224.augreg_in21k, resize: squash}\n"
        "# squash keeps the whole image, because captions describe all of it; pad keeps the aspect ratio too.\n"
        "image_tower: {kind: packaged, resize: squash}"
    )


def _text_tower(start: str | None, settings: Settings) -> str:
    lines = [f"context_length: {settings.context_length}  # fits 95 % of the texts, or as many as the model allows"]
    lines.append(f"corner_tokens: {CORNER_TOKENS}")
    if settings.interpolation:
        lines.append(f"position_interpolation: {_flow(settings.interpolation)}  # longer texts than the model has read")
    if start and not settings.from_scratch:
        lines.append("learning_rate: 1.0e-5  # of trained weights; new ones have that of optimizer")
    if not start:
        lines += ["# a small BERT, trained from scratch; docs/continue.md has pretrained ones", "config:"]
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
        others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.05}
        lines += [f"  {name}: {value}" for name, value in {**sizes, **others}.items()]
    return "\n    ".join(lines)


_TRAINED_IMAGE_TOWER = """
  image_tower:
    frozen: false  # the starting model does not know these images"""

_FEW_IMAGES = """\
# With few images, training may fail to beat chance. The report shows it; these limits would stop the run instead.
compute:
  training: {max_final_loss_share: 2.0, stop_at_chance_after: 0}

"""

_TEMPLATE = """\
# Own data, written by `lotlip init`. `lotlip run` runs the pipeline and writes report/index.html. docs/params.md
# explains every key.

ingest:
  source: {source}
  max_failure_share: {failures}  # largest share of images or captions that cannot be used

{towers}

caption:
  tokenizer: bert-base-uncased  # counts words in statistics
  sentence_ends: {sentence_ends}  # unicode: sentences of any language
  quality: {{refusal: true, reasoning: true, control: 0, mojibake: 0, repetition: 0.5, short: 3}}
  max_failure_share: {missing}  # largest share of images without a long caption
  max_filtered_share: 0.1
  max_reasoning_share: 0.01
  max_truncated_share: 0.5
  max_repeated_share: 0.2
  max_missing_partitions: 0.0
  max_length_ratio: 1.5
  min_agreement_ratio: 1.5
  # long captions; docs/captioning.md explains how a model can write them
  captioners:{captioners}

shard:
  samples_per_shard: 1000

pretrain:
  seeds: [0]
  steps: {steps}  # {passes}
  batch_size: {batch_size}
  start: {start}
  text:
    tokenizer: bert-base-uncased{own_tokenizer}
    {text_tower}
  long_texts:
    sub_captions: 3  # consecutive sentences in a long text{long_texts}{image_tower}
  optimizer:
    learning_rate: {learning_rate}
    warmup_steps: {warmup}

evaluate:
  benchmarks:
    own: {{kind: held-out, split: test}}
  min_score_over_chance: {chance}{few}
  max_short_text_loss: null  # 0.05: fail if short-text R@1 falls by more than 5 % below that of the start
  precision: fp32
  max_conditioned_pairs: 25000000
  baselines: {baselines}  # further rows of the report, such as models on this machine

{compute}report:
  title: {title}

tracking:
  experiment: own-images

paths:
  ingest: data/ingest
  image_tower: data/image-tower
  captions: data/captions
  shards: data/shards
  models: models
  metrics: metrics
  stages: metrics/stages
  report: report

# name: differences from `pretrain`. Add lines to compare, such as
#   no-corner-tokens: {{text: {{corner_tokens: 0}}}}
ablations:
  lotlip: {{}}

finetune: {{}}
tables: {{}}
findings: {{}}
"""
