"""Which ablations belong in one table, decided by their configurations, never by their names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lotlip.core.section import flatten
from lotlip.pretrain.config import PretrainConfig
from lotlip.report.inputs import Ablation

CORNER_TOKENS, CORNER_MASK, REGISTER_TOKENS = "text.corner_tokens", "text.corner_mask", "text.register_tokens"
SUB_CAPTIONS, CAPTIONERS, CONTEXT_LENGTH = "long_texts.sub_captions", "long_texts.captioners", "text.context_length"
LOSS_WEIGHTS = {"loss.short_loss_fraction", "loss.short_loss_weight", "loss.long_loss_weight"}
# These change when and how often something is written down or how work is spread, not what is learned.
BOOKKEEPING = {
    "seeds",
    "seeds_at_once",
    "log_every",
    "checkpoint_every",
    "max_final_loss_share",
    "processes",
    "zero_stage",
}
# What makes a model go on from another's positions, as Long-CLIP does, and how long it does so: a fine-tuning's own.
LONG_CLIP = (
    "text.pretrained",
    "text.revision",
    "text.position_interpolation",
    "loss.image_components",
    CONTEXT_LENGTH,
    "steps",
    "optimizer.",
)
# What CLIP, SigLIP and FILIP do otherwise than LiT, and at which pace.
BASELINE = ("image_tower.", "loss.objective", "similarity")
PACE = ("steps", "batch_size", "accumulation", "optimizer.")
SYSTEMS = ("LiT", "LiT + long texts", "Long-CLIP", "LoTLIP")


def differences(config: PretrainConfig, base: PretrainConfig) -> dict[str, Any]:
    """Dotted key → value wherever `config` differs from `base` in a way that matters.

    Without corner tokens the mask does not matter; without long texts nothing about them does.
    """
    ours, theirs = flatten(config.model_dump(mode="json")), flatten(base.model_dump(mode="json"))
    ignored = set(BOOKKEEPING)
    if config.text.corner_tokens == 0:
        ignored.add(CORNER_MASK)
    if config.long_texts.sub_captions == 0:
        ignored |= {key for key in ours if key.startswith("long_texts.")} - {SUB_CAPTIONS}
        ignored |= {"loss.long_loss_weight", "loss.short_loss_fraction"}
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return {key: ours.get(key) for key in keys if key not in ignored and ours.get(key) != theirs.get(key)}


def system(config: PretrainConfig, base: PretrainConfig) -> str | None:
    """The system of the paper's comparison that a configuration is, whatever weights its loss has; None: no such."""
    beyond = differences(config, base).keys() - LOSS_WEIGHTS - {CORNER_TOKENS, SUB_CAPTIONS}
    corners, parts = config.text.corner_tokens, config.long_texts.sub_captions
    if config.text.position_interpolation and config.loss.image_components:
        known = corners == 0 and parts > 0 and all(key.startswith(LONG_CLIP) for key in beyond)
        return "Long-CLIP" if known else None
    if beyond:
        return None
    if corners == 0 and parts == 0:
        return "LiT"
    if parts == 0 or parts != base.long_texts.sub_captions:
        return None
    if corners == 0:
        return "LiT + long texts"
    return "LoTLIP" if corners == base.text.corner_tokens else None


def systems(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """LiT, LiT with long texts, Long-CLIP, LoTLIP; of each the one with the base's loss weights first."""
    kinds = {ablation.name: system(ablation.config, base) for ablation in ablations}
    chosen = [ablation for ablation in ablations if kinds[ablation.name]]
    return sorted(chosen, key=lambda a: (SYSTEMS.index(str(kinds[a.name])), weighs_otherwise(a, base)))


def weighs_otherwise(ablation: Ablation, base: PretrainConfig) -> bool:
    """Whether its loss has other weights than the base's."""
    return bool(differences(ablation.config, base).keys() & LOSS_WEIGHTS)


def main_systems(ablations: list[Ablation], base: PretrainConfig) -> dict[str, Ablation]:
    """System → the one ablation that stands for it in headlines."""
    found: dict[str, Ablation] = {}
    for ablation in systems(ablations, base):
        found.setdefault(str(system(ablation.config, base)), ablation)
    return found


def corner_tokens(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those that differ in corner tokens and their mask alone, by m, mask on before off."""
    chosen = [a for a in ablations if differences(a.config, base).keys() <= {CORNER_TOKENS, CORNER_MASK}]
    return sorted(chosen, key=lambda a: (a.config.text.corner_tokens, masked_off(a)))


def sub_captions(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those that differ in k alone, with the base's corner tokens or with none, by m, then k."""
    chosen = []
    for ablation in ablations:
        differs = differences(ablation.config, base).keys()
        if differs <= {SUB_CAPTIONS} or (differs <= {SUB_CAPTIONS, CORNER_TOKENS} and not _corners(ablation)):
            chosen.append(ablation)
    return sorted(chosen, key=lambda a: (_corners(a), a.config.long_texts.sub_captions))


def registers(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those with register tokens and none of the corner, and beside them those with as many corner tokens, and none.

    By number, registers first; empty where none has registers.
    """
    alone = {CORNER_TOKENS, REGISTER_TOKENS}
    alike = [a for a in ablations if differences(a.config, base).keys() <= alone]
    having = [a for a in alike if a.config.text.register_tokens and not _corners(a)]
    counts = {a.config.text.register_tokens for a in having} | {0}
    corners = [a for a in alike if not a.config.text.register_tokens and _corners(a) in counts]
    chosen = [*having, *corners] if having else []
    return sorted(chosen, key=lambda a: (a.config.text.register_tokens + _corners(a), _corners(a)))


def captioners(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those that differ in the captioners alone, single ones first; that which names none has all."""
    chosen = [a for a in ablations if differences(a.config, base).keys() <= {CAPTIONERS}]
    return sorted(chosen, key=lambda a: len(a.config.long_texts.captioners) or math.inf)


def baselines(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those that contrast or compare otherwise or train the image tower, after what else is like them.

    Empty where there are none. By texts, then by corner tokens.
    """

    def is_one(ablation: Ablation) -> bool:
        differs = differences(ablation.config, base).keys() - {CORNER_TOKENS, SUB_CAPTIONS}
        return method(ablation) != "LiT" and all(key.startswith(BASELINE + PACE) for key in differs)

    def kind(ablation: Ablation) -> tuple[int, int]:
        return ablation.config.long_texts.sub_captions, _corners(ablation)

    found = [ablation for ablation in ablations if is_one(ablation)]
    kinds = {kind(ablation) for ablation in found}
    alone = {CORNER_TOKENS, SUB_CAPTIONS}
    plain = [a for a in ablations if differences(a.config, base).keys() <= alone and kind(a) in kinds]
    return sorted([*plain, *found], key=kind)


def method(ablation: Ablation) -> str:
    """Whose similarity, contrast or image tower it has, of those that learn from short captions: "LiT" for ours."""
    if ablation.config.similarity == "late-interaction":
        return "FILIP"
    if ablation.config.loss.objective == "siglip":
        return "SigLIP"
    return "LiT" if ablation.config.image_tower.frozen else "CLIP"


def context_lengths(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those that differ in the context length alone, shortest first."""
    chosen = [a for a in ablations if differences(a.config, base).keys() <= {CONTEXT_LENGTH}]
    return sorted(chosen, key=lambda a: a.config.text.context_length)


def with_base_tower(ablations: list[Ablation], base: PretrainConfig) -> list[Ablation]:
    """Those with counted operations whose text tower is the base's but for the context length, the base first.

    Where there is none, the first ablation with counted operations stands for it.
    """
    counted = [ablation for ablation in ablations if ablation.text_tower_flops]
    chosen = context_lengths(counted, base)
    return sorted(chosen, key=lambda a: len(differences(a.config, base))) or counted[:1]


def all_frozen(ablations: list[Ablation]) -> bool:
    """Whether none trains its image tower."""
    return all(ablation.config.image_tower.frozen for ablation in ablations)


def masked_off(ablation: Ablation) -> bool:
    """Whether it has corner tokens that the mask does not part."""
    return _corners(ablation) > 0 and not ablation.config.text.corner_mask


def in_words(differs: Mapping[str, Any]) -> str:
    """Differences as a person writes them: "m = 4", "mask off", "optimizer.learning_rate = 0.001"."""
    symbols = {CORNER_TOKENS: "m", SUB_CAPTIONS: "k", REGISTER_TOKENS: "registers", CAPTIONERS: "captioners"}
    words = []
    for key, value in differs.items():
        if key == CORNER_MASK:
            words.append("mask on" if value else "mask off")
        else:
            words.append(f"{symbols.get(key, key)} = {_plain(value)}")
    return ", ".join(words) or "the base"


def _plain(value: Any) -> str:
    """A value as params.yaml has it: "true", "null", "[0.9, 0.98]"; words go without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def _corners(ablation: Ablation) -> int:
    return ablation.config.text.corner_tokens
