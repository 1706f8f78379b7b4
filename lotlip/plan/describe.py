"""A plan as text."""

from __future__ import annotations

from collections.abc import Mapping

from lotlip.plan.plan import Plan
from lotlip.pretrain.engine import deepspeed_config


def describe(plan: Plan, title: str) -> list[str]:
    """Formats the plan as lines of text."""
    config, compute, gpu = plan.config, plan.compute, plan.gpu
    required = sum(plan.memory.values())
    micro = config.batch_size // (compute.processes * compute.gradient_accumulation_steps)
    count = "1 GPU" if compute.processes == 1 else f"{compute.processes} GPUs"
    epochs = f"{plan.epochs:.1f} of {plan.used_images:,} images" if plan.epochs else "unknown (--images)"
    zero = deepspeed_config(config, compute)["zero_optimization"]["stage"]
    tokens = {"short caption": plan.texts.short, **({"long text": plan.texts.long} if plan.texts.per_image else {})}
    lines = [f"{title} on {count}, {config.precision}, ZeRO {zero}"]
    lines += _table("parameters, trained", {name: f"{count:,}" for name, count in plan.trained.items()})
    lines.append(_row("total", f"{sum(plan.trained.values()):,}"))
    if plan.frozen:
        lines += _table("parameters, frozen", {name: f"{count:,}" for name, count in plan.frozen.items()})
    lines += _table(
        "run, one seed",
        {
            "steps": f"{config.steps:,}",
            "batch": f"{config.batch_size:,}",
            "gradient accumulation steps": f"{compute.gradient_accumulation_steps:,}",
            "micro-batch per GPU": f"{micro:,}",
            "samples": f"{plan.samples:,}",
            "epochs": epochs,
            **{f"tokens per {name}": f"{count:.1f}" for name, count in tokens.items()},
            "tokens": f"{plan.samples * plan.texts.tokens / 1e9:,.1f} G",
        },
    )
    lines += _table("TFLOP per step", {name: f"{value / 1e12:,.1f}" for name, value in plan.flops.items() if value})
    lines += _table("GB per GPU", {name: f"{value / 1e9:,.2f}" for name, value in plan.memory.items() if value})
    lines.append(_row("total", f"{required / 1e9:,.2f} of {gpu.memory / 1e9:,.0f}"))
    lines += _table("storage", {name: _bytes(value) for name, value in plan.storage.items()})
    if plan.feature_flops:
        hours = f"{plan.feature_seconds / 3600:,.1f}"
        lines += _table("frozen features, once for all ablations", {"hours on one GPU": hours})
    lines += _table("time", {"hours": f"{plan.seconds / 3600:,.1f}", "GPU hours": f"{_gpu_hours(plan):,.0f}"})
    lines += ["", "assumed", *(f"  {line}" for line in plan.assumed)]
    if plan.remedy:
        lines += ["", f"does not fit in memory: {plan.remedy}"]
    return lines


def _gpu_hours(plan: Plan) -> float:
    return plan.seconds / 3600 * plan.compute.processes


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return ["", title, *(_row(name, value) for name, value in rows.items())]


def _row(name: str, value: str) -> str:
    return f"  {name:<32}{value:>24}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
