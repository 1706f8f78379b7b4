"""Checkpoints in safetensors and JSON, without pickle, that any number of processes and any ZeRO stage can resume.

Random numbers are derived from seed and step, and the learning rate from the step. So a checkpoint contains only the
weights, the optimizer's two moments and the step. DeepSpeed's own checkpoints have one piece per process instead.

Each checkpoint has a file, `sha256.json`, with the hashes of its other files. When training resumes, a checkpoint that
does not match its hashes is skipped, and the one before it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from lotlip.core.files import atomic_write, read_json, remove, sha256_files, write_json
from lotlip.data.weights import open_weights

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
HASHES = "sha256.json"
FILES = ("state.json", *(f"{name}.safetensors" for name in ("weights", *MOMENTS)))  # of a checkpoint, besides HASHES
_NAME = "step-{:09d}"


class Checkpoints:
    """The checkpoints of a run, each written atomically.

    Args:
        folder: contains one folder `step-…` per checkpoint. All processes read it; the first process writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: list[Path] = []

    def newest(self) -> Path | None:
        """Returns the checkpoint of the latest step; None if there is none."""
        return max(self._folders(), default=None)

    def save(self, engine: Any, step: int, extra: dict[str, Any]) -> None:
        """Writes a checkpoint and removes all but the newest `KEPT`. Every process must call it.

        Args:
            engine: DeepSpeed's engine.
            step: number of optimizer steps done.
            extra: further state to save, as plain JSON.

        Raises:
            FloatingPointError: a weight or moment is not finite; earlier checkpoints are kept.
            OSError: the first process could not write it.
        """
        weights, moments = full_weights(engine), _full_moments(engine)
        by_first_process(lambda: self._write({"weights": weights, **moments}, step, extra))

    def _write(self, parts: Mapping[str, Mapping[str, Tensor]], step: int, extra: dict[str, Any]) -> None:
        require_finite(parts.values(), step)
        # hashing takes longer than writing, so each file is hashed while the next ones are written
        with atomic_write(self.folder / _NAME.format(step)) as partial, ThreadPoolExecutor(len(FILES)) as pool:
            partial.mkdir(parents=True)
            write_json(partial / "state.json", {"step": step, **extra})
            hashes = {"state.json": pool.submit(sha256_files, [partial / "state.json"])}
            for name, values in parts.items():
                file = partial / f"{name}.safetensors"
                save_file(dict(values), file)
                hashes[file.name] = pool.submit(sha256_files, [file])
            write_json(partial / HASHES, {name: future.result() for name, future in hashes.items()})
            for path in [*partial.iterdir(), partial]:  # flush to disk before the rename
                _sync(path)
        _sync(self.folder)
        for damaged in self._damaged:  # damaged checkpoints must not count towards KEPT
            if damaged.name != _NAME.format(step):
                remove(damaged)
        self._damaged.clear()
        for old in sorted(self._folders())[:-KEPT]:
            remove(old)

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest intact checkpoint into an engine that has done no step yet. Every process must call it.

        Damaged checkpoints are skipped with a warning. All processes load the same checkpoint: it counts as intact only
        if the hashes match in every process.

        Returns:
            `step` and the further state; None if there is no intact checkpoint.

        Raises:
            ValueError: a checkpoint belongs to another model.
        """
        # on a shared file system, one process may see an older listing than another
        folders = broadcast(sorted(self._folders(), reverse=True))
        for folder in folders:
            problem = _first_problem(damage(folder))
            if problem:
                self._damaged.append(folder)
                self._warn(folder, problem)
                continue
            try:
                state = read_json(folder / "state.json")
                _load_into(engine, folder, state["step"])
            except Exception as error:  # safetensors, JSON and torch raise different types
                raise ValueError(
                    f"cannot resume from checkpoint {folder}: {error}; remove the folder to resume from an earlier "
                    "checkpoint, or to start again if there is none"
                ) from error
            return state
        if folders and dist.get_rank() == 0:
            print(f"warning: {self.folder} has no intact checkpoint; training starts at step 0", flush=True)
        return None

    def _warn(self, folder: Path, problem: str) -> None:
        if dist.get_rank() == 0:
            print(f"warning: skipped damaged checkpoint {folder}: {problem}", flush=True)

    def remove(self) -> None:
        """Removes all checkpoints after the run has finished."""
        remove(self.folder)

    def _folders(self) -> list[Path]:
        return list(self.folder.glob("step-*[0-9]"))


def damage(folder: Path) -> str | None:
    """Describes the first file of a checkpoint that does not match its hash; returns None if all match.

    The file of hashes needs no hash: if it is damaged, it does not match the files.
    """
    try:
        hashes = read_json(folder / HASHES)
        if not isinstance(hashes, dict) or hashes.keys() != set(FILES):
            return f"{HASHES} does not list {', '.join(FILES)}"
        return next(
            (f"{name} does not match its hash" for name in FILES if sha256_files([folder / name]) != hashes[name]), None
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)


def require_finite(parts: Iterable[Mapping[str, Tensor]], step: int) -> None:
    """Checks weights and moments after a step.

    Raises:
        FloatingPointError: one contains NaN or infinity.
    """
    broken = sorted(name for part in parts for name, value in part.items() if not value.isfinite().all())
    if broken:
        raise FloatingPointError(f"{len(broken)} weights are not finite after step {step}, such as {broken[0]}")


def by_first_process(work: Callable[[], None]) -> None:
    """Runs `work` in the first process while the others wait. Every process must call it.

    If the work fails, every process raises the error, so that none waits for `peer_timeout_seconds`.
    """
    error = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as raised:
            error = raised
    error = broadcast(error)
    if error is not None:
        raise error


def broadcast(value: Any) -> Any:
    """Returns the first process's value in all processes. Every process must call it."""
    if dist.get_world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def _first_problem(problem: str | None) -> str | None:
    """Returns, in all processes, the problem of the first process that has one; None if no process has one."""
    if dist.get_world_size() == 1:
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((reported for reported in problems if reported), None)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Returns the trained weights in fp32 on the CPU, from the optimizer's copy if the model is in bf16 or partitioned.

    Every process must call it. The first process gets all weights, including the full table of word embeddings.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(engine.module).items():
        value = safe_get_full_fp32_param(parameter)
        _collect(weights, name, parameter if value is None else value)
    rows = engine.module.word_rows
    if rows is not None and rows.name in weights:
        weights[rows.name] = rows.full(weights[rows.name], engine.global_steps)
    return weights


def _full_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Returns the optimizer's two moments of every weight, in the same form as `full_weights`."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(engine)
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in trained_parameters(engine.module).items():
        for moment in MOMENTS:
            if _is_split(parameter):
                value = safe_get_full_optimizer_state(parameter, moment)
            else:
                value = engine.optimizer.state[parameter][moment]
            _collect(moments[moment], name, value)
    rows = engine.module.word_rows
    if rows is not None:
        for values in moments.values():
            if rows.name in values:
                values[rows.name] = rows.full_moment(values[rows.name])
    return moments


def _collect(values: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Adds a value to `values` in the first process."""
    if dist.get_rank() == 0:
        values[name] = value.detach().float().cpu().contiguous()


def _is_split(parameter: nn.Parameter) -> bool:
    """Returns whether ZeRO partitions the parameter's fp32 copy and its optimizer states."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _link_moments(engine: Any) -> None:
    """Makes DeepSpeed link the moments of all parameters.

    DeepSpeed 0.19 links them once, after the step of the first parameter group, and so misses the other groups.
    """
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _load_into(engine: Any, folder: Path, step: int) -> None:
    _create_states(engine, step)
    _link_moments(engine)
    parameters = trained_parameters(engine.module)
    rows = engine.module.word_rows
    for file in ("weights", *MOMENTS):
        with open_weights(folder / f"{file}.safetensors") as tensors:
            missing = sorted(parameters.keys() ^ set(tensors.keys()))
            if missing:
                raise ValueError(
                    f"{len(missing)} weights are only in the model or only in {file}.safetensors, such as {missing[0]}"
                )
            for name, parameter in parameters.items():
                value = tensors.get_tensor(name)
                if rows is not None and name == rows.name:
                    value = rows.select(value)
                _assign(engine, parameter, value, None if file == "weights" else file)
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def _create_states(engine: Any, step: int) -> None:
    """Creates the optimizer's states, which it otherwise creates in its first step."""
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        parameters = zero.fp32_partitioned_groups_flat
    else:
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for group in inner.param_groups:
        if "bias_correction" in group:  # timm's LAMB counts steps here
            group["step"] = torch.tensor(float(step))
    for value in parameters:
        inner.state[value] = {moment: torch.zeros_like(value) for moment in MOMENTS}
        inner.state[value]["step"] = torch.tensor(float(step), device=value.device)


def assign_weights(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Writes trained weights in fp32 into DeepSpeed's copy, which it otherwise makes from the rounded weights."""
    for name, parameter in trained_parameters(engine.module).items():
        _assign(engine, parameter, weights[name], None)


def _assign(engine: Any, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    """Writes a weight, or one of its moments, into this process's part of it."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        _assign_stage_3(parameter, value, moment)
        return
    expected = tuple(parameter.shape)
    if tuple(value.shape) != expected:
        raise ValueError(f"a weight has shape {tuple(value.shape)} in {moment or 'weights'}, not {expected}")
    with torch.no_grad():
        if hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
        elif moment:
            engine.optimizer.state[parameter][moment].copy_(value)
        if not moment:
            parameter.copy_(value)


def _assign_stage_3(parameter: Any, value: Tensor, moment: str | None) -> None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

    piece = safe_get_local_fp32_param(parameter).numel()
    padded = torch.zeros(piece * dist.get_world_size(), device=value.device)
    padded[: value.numel()] = value.flatten()
    local = padded[piece * dist.get_rank() :][:piece]
    if moment:
        safe_set_local_optimizer_state(parameter, local, moment)
    else:
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
