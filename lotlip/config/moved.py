"""New names of keys from earlier versions of params.yaml; docs/migration.md has the same list."""

from __future__ import annotations

import re

_TRAINING = (
    "processes",
    "launch",
    "zero_stage",
    "log_every",
    "checkpoint_every",
    "stop_at_chance_after",
    "peer_timeout_seconds",
    "max_final_loss_share",
)
# Old key → new key. NAME stands for a name that the user chooses; it is the same in both.
MOVED = {
    **{f"pretrain.{key}": f"compute.training.{key}" for key in _TRAINING},
    "pretrain.accumulation": "compute.training.gradient_accumulation_steps",
    "pretrain.seeds_at_once": "compute.training.parallel_seeds",
    "pretrain.loader.workers": "compute.training.loader_workers",
    "pretrain.loader.prefetch": "compute.training.prefetch",
    "pretrain.loss.raw_share": "pretrain.loss.short_loss_fraction",
    "pretrain.loss.raw_weight": "pretrain.loss.short_loss_weight",
    "pretrain.loss.long_weight": "pretrain.loss.long_loss_weight",
    "pretrain.loss.raw_components": "pretrain.loss.image_components",
    "pretrain.loss.contrast": "pretrain.loss.objective (softmax is infonce, sigmoid is siglip)",
    "pretrain.text.stretch": "pretrain.text.position_interpolation",
    "caption.task_runner": "compute.task_runner",
    "caption.ray": "compute.ray",
    **{
        f"caption.captioners.NAME.{key}": f"compute.captioners.NAME.{key}"
        for key in ("device", "batch_size", "concurrency", "timeout_seconds", "retries")
    },
    "shard.feature_batch_size": "compute.batch_size",
    "evaluate.batch_size": "compute.batch_size",
    "compute.precision": "evaluate.precision (for scores) and shard.precision (for stored features)",
    "orchestration": "compute",
    "continued": "finetune (with init_from for after)",
    "finetune.NAME.after": "finetune.NAME.init_from",
    "registry.least": "registry.min_scores",
    "registry.most_loss": "registry.max_score_drop",
}


def moved(key: str) -> str | None:
    """The new name of an unknown key; None if it was never a key.

    Args:
        key: dotted, as in params.yaml. Keys of an ablation are looked up as keys of `pretrain`; those about compute are
            now in `compute.ablations`.
    """
    ablation = re.fullmatch(r"(?:ablations\.([^.]+)|finetune\.([^.]+)\.pretrain)\.(.+)", key)
    name, rest = (ablation[1] or ablation[2], f"pretrain.{ablation[3]}") if ablation else ("", key)
    for old, new in MOVED.items():
        match = re.fullmatch(re.escape(old).replace("NAME", "([^.]+)"), rest)
        if match is None:
            continue
        new = new.replace("NAME", match[1]) if match.groups() else new
        if not ablation:
            return new
        if new.startswith("compute.training."):
            return new.replace("compute.training", f"compute.ablations.{name}", 1)
        return new.replace("pretrain.", key.removesuffix(ablation[3]), 1)
    return None
