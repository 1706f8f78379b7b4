"""Which ablations belong in one table, decided by their configurations, never by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lotlip.config import Pretrain, flatten
from lotlip.report.inputs import Ablation

CORNER_TOKENS, CORNER_MASK, SUB_CAPTIONS = "text.corner_tokens", "text.corner_mask", "long_texts.sub_captions"
CONTEXT_LENGTH = "text.context_length"
LOSS_WEIGHTS = {"loss.raw_weight", "loss.long_weight"}
# These change when and how often something is written down or how work is spread, not what is learned.
BOOKKEEPING = {"seeds", "log_every", "checkpoint_every", "max_final_loss_share", "processes", "zero_stage"}
SYSTEMS = ("LiT", "LiT + long texts", "LoTLIP")


def differences(config: Pretrain, base: Pretrain) -> dict[str, Any]:
    """Dotted key → value wherever `config` differs from `base` in a way that matters.

    Without corner tokens the mask does not matter; without long texts nothing about them does.
    """
    ours, theirs = flatten(config.model_dump(mode="json")), flatten(base.model_dump(mode="json"))
    ignored = set(BOOKKEEPING)
    if config.text.corner_tokens == 0:
        ignored.add(CORNER_MASK)
    if config.long_texts.sub_captions == 0:
        ignored |= {key for key in ours if key.startswith("long_texts.")} - {SUB_CAPTIONS} | {"loss.long_weight"}
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return {key: ours.get(key) for key in keys if key not in ignored and ours.get(key) != theirs.get(key)}


def system(config: Pretrain, base: Pretrain) -> str | None:
    """The system of the paper's comparison that a configuration is, whatever weights its loss has; None: no such."""
    beyond = differences(config, base).keys() - LOSS_WEIGHTS
    corners, parts = config.text.corner_tokens, config.long_texts.sub_captions
    if beyond - {CORNER_TOKENS, SUB_CAPTIONS}:
        return None
    if corners == 0 and parts == 0:
        return "LiT"
    if parts == 0 or parts != base.long_texts.sub_captions:
        return None
    if corners == 0:
        return "LiT + long texts"
    return "LoTLIP" if corners == base.text.corner_tokens else None


def systems(ablations: list[Ablation], base: Pretrain) -> list[Ablation]:
    """LiT, LiT with long texts, LoTLIP; of each the one with the base's loss weights first."""
    kinds = {ablation.name: system(ablation.config, base) for ablation in ablations}
    chosen = [ablation for ablation in ablations if kinds[ablation.name]]
    plain = {ablation.name: not differences(ablation.config, base).keys() & LOSS_WEIGHTS for ablation in chosen}
    return sorted(chosen, key=lambda ablation: (SYSTEMS.index(str(kinds[ablation.name])), not plain[ablation.name]))


def main_systems(ablations: list[Ablation], base: Pretrain) -> dict[str, Ablation]:
    """System → the one ablation that stands for it in headlines."""
    found: dict[str, Ablation] = {}
    for ablation in systems(ablations, base):
        found.setdefault(str(system(ablation.config, base)), ablation)
    return found


def corner_tokens(ablations: list[Ablation], base: Pretrain) -> list[Ablation]:
    """Those that differ in corner tokens and their mask alone, by m, mask on before off."""
    chosen = [a for a in ablations if differences(a.config, base).keys() <= {CORNER_TOKENS, CORNER_MASK}]
    return sorted(chosen, key=lambda a: (a.config.text.corner_tokens, masked_off(a)))


def sub_captions(ablations: list[Ablation], base: Pretrain) -> list[Ablation]:
    """Those that differ in k alone, with the base's corner tokens or with none, by m, then k."""
    chosen = []
    for ablation in ablations:
        differs = differences(ablation.config, base).keys()
        if differs <= {SUB_CAPTIONS} or (differs <= {SUB_CAPTIONS, CORNER_TOKENS} and not _corners(ablation)):
            chosen.append(ablation)
    return sorted(chosen, key=lambda a: (_corners(a), a.config.long_texts.sub_captions))


def context_lengths(ablations: list[Ablation], base: Pretrain) -> list[Ablation]:
    """Those that differ in the context length alone, shortest first."""
    chosen = [a for a in ablations if differences(a.config, base).keys() <= {CONTEXT_LENGTH}]
    return sorted(chosen, key=lambda a: a.config.text.context_length)


def with_base_tower(ablations: list[Ablation], base: Pretrain) -> list[Ablation]:
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
    symbols = {CORNER_TOKENS: "m", SUB_CAPTIONS: "k"}
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
    return value if isinstance(value, str) else json.dumps(value)


def _corners(ablation: Ablation) -> int:
    return ablation.config.text.corner_tokens
