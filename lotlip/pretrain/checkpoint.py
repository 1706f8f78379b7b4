"""Checkpoints that any number of processes, under any ZeRO stage, goes on from: safetensors and JSON, no pickle.

Whatever training draws at random it draws from seed and step, and the learning rate follows from the step: so weights,
the optimizer's two moments and the step are all there is to keep. DeepSpeed's own checkpoints come in pieces, as many
as there were processes.

Each checkpoint has a file of hashes, `sha256.json`, over all of its other files. A checkpoint that does not match its
hashes is skipped when training resumes, and the one before it is loaded.
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
FILES = ("state.json", *(f"{name}.safetensors" for name in ("weights", *MOMENTS)))  # of a checkpoint, beside HASHES
_NAME = "step-{:09d}"


class Checkpoints:
    """The checkpoints of a run in one folder, each whole or not there.

    Args:
        folder: in which each is a folder `step-…`. All processes see it; the first one writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: list[Path] = []

    def newest(self) -> Path | None:
        """The one of the latest step; None where there is none."""
        return max(self._all(), default=None)

    def save(self, engine: Any, step: int, more: dict[str, Any]) -> None:
        """Writes a checkpoint and removes those that are too old. Every process has to call it.

        Args:
            engine: of DeepSpeed.
            step: optimizer steps that were done.
            more: what else is to be kept, as plain JSON.

        Raises:
            FloatingPointError: a weight or moment is not finite; the earlier checkpoints stay.
            OSError: the first process could not write it.
        """
        weights, moments = full_weights(engine), _full_moments(engine)
        by_first_process(lambda: self._write({"weights": weights, **moments}, step, more))

    def _write(self, parts: Mapping[str, Mapping[str, Tensor]], step: int, more: dict[str, Any]) -> None:
        require_finite(parts.values(), step)
        # hashing takes longer than writing, so each file is hashed while the next ones are written
        with atomic_write(self.folder / _NAME.format(step)) as partial, ThreadPoolExecutor(len(FILES)) as pool:
            partial.mkdir(parents=True)
            write_json(partial / "state.json", {"step": step, **more})
            hashes = {"state.json": pool.submit(sha256_files, [partial / "state.json"])}
            for name, values in parts.items():
                file = partial / f"{name}.safetensors"
                save_file(dict(values), file)
                hashes[file.name] = pool.submit(sha256_files, [file])
            write_json(partial / HASHES, {name: found.result() for name, found in hashes.items()})
            for path in [*partial.iterdir(), partial]:  # on disk before it takes its name
                _sync(path)
        _sync(self.folder)
        for damaged in self._damaged:  # so that none of them takes the place of an intact one
            if damaged.name != _NAME.format(step):
                remove(damaged)
        self._damaged.clear()
        for old in sorted(self._all())[:-KEPT]:
            remove(old)

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Loads the newest intact checkpoint into an engine that has made no step yet. Every process has to call it.

        Damaged checkpoints are skipped with a warning. All processes load the same one: a checkpoint counts as intact
        only if each of them reads it as it was written.

        Returns:
            `step`, and what else was kept; None if there is no intact checkpoint.

        Raises:
            ValueError: a checkpoint is of another model.
        """
        # one process's view of a shared folder may be older than another's
        folders = _of_first_process(sorted(self._all(), reverse=True))
        for folder in folders:
            problem = _first_problem(damage(folder))
            if problem:
                self._damaged.append(folder)
                self._warn(folder, problem)
                continue
            try:
                state = read_json(folder / "state.json")
                _put(engine, folder, state["step"])
            except Exception as error:  # safetensors, JSON and torch each have errors of their own
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
        """Removes them all: the run is over."""
        remove(self.folder)

    def _all(self) -> list[Path]:
        return list(self.folder.glob("step-*[0-9]"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint on disk: the first file that does not match its hash; None if it is intact.

    A changed file of hashes does not match the files either, so it needs no hash of its own.
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
        FloatingPointError: one has NaN or infinity.
    """
    broken = sorted(name for part in parts for name, value in part.items() if not value.isfinite().all())
    if broken:
        raise FloatingPointError(f"{len(broken)} weights are no numbers after step {step}, such as {broken[0]}")


def by_first_process(work: Callable[[], None]) -> None:
    """Has the first process do some work while the others wait. Every process has to call it.

    If the work fails, every process raises the error. Otherwise the others would wait for `peer_timeout_seconds`.
    """
    error = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as found:
            error = found
    error = _of_first_process(error)
    if error is not None:
        raise error


def _of_first_process(value: Any) -> Any:
    """The first process's value, in all processes."""
    if dist.get_world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def _first_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one, in all processes; None if none has one."""
    if dist.get_world_size() == 1:
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Every trained weight in fp32 on the CPU: the optimizer's own copy where the model is rounded or split.

    Every process has to call it, and the first one gets all of them, the whole table of word embeddings among them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        _keep(found, name, parameter if value is None else value)
    rows = engine.module.word_rows
    if rows is not None and rows.name in found:
        found[rows.name] = rows.whole(found[rows.name], engine.global_steps)
    return found


def _full_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    """The optimizer's two moments of every weight, as `full_weights` gives these."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(engine)
    found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            if _is_split(parameter):
                value = safe_get_full_optimizer_state(parameter, moment)
            else:
                value = engine.optimizer.state[parameter][moment]
            _keep(found[moment], name, value)
    rows = engine.module.word_rows
    if rows is not None:
        for moments in found.values():
            if rows.name in moments:
                moments[rows.name] = rows.whole_moment(moments[rows.name])
    return found


def _keep(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    if dist.get_rank() == 0:
        found[name] = value.detach().float().cpu().contiguous()


def _is_split(parameter: nn.Parameter) -> bool:
    """Whether ZeRO holds the parameter's fp32 copy and its optimizer states, in pieces."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _link_moments(engine: Any) -> None:
    """DeepSpeed (0.19) looks for the moments once, when its first parameter group has stepped and the others have not
    yet, and so misses theirs; it is made to look again."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _put(engine: Any, folder: Path, step: int) -> None:
    _make_states(engine, step)
    _link_moments(engine)
    parameters = dict(engine.module.named_parameters())
    rows = engine.module.word_rows
    for file in ("weights", *MOMENTS):
        with open_weights(folder / f"{file}.safetensors") as tensors:
            missing = sorted(parameters.keys() ^ set(tensors.keys()))
            if missing:
                raise ValueError(
                    f"{len(missing)} weights are in one of model and {file}.safetensors only: {missing[0]}"
                )
            for name, parameter in parameters.items():
                value = tensors.get_tensor(name)
                if rows is not None and name == rows.name:
                    value = rows.used(value)
                _set(engine, parameter, value, None if file == "weights" else file)
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def _make_states(engine: Any, step: int) -> None:
    """The optimizer's states, which AdamW would make at its first step."""
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        held = zero.fp32_partitioned_groups_flat
    else:
        held = [parameter for group in inner.param_groups for parameter in group["params"]]
    for value in held:
        inner.state[value] = {moment: torch.zeros_like(value) for moment in MOMENTS}
        inner.state[value]["step"] = torch.tensor(float(step), device=value.device)


def _set(engine: Any, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    """Writes a weight, or one of its moments, into what this process holds of it."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        _set_stage_3(parameter, value, moment)
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


def _set_stage_3(parameter: Any, value: Tensor, moment: str | None) -> None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

    piece = safe_get_local_fp32_param(parameter).numel()
    padded = torch.zeros(piece * dist.get_world_size(), device=value.device)
    padded[: value.numel()] = value.flatten()
    own = padded[piece * dist.get_rank() :][:piece]
    if moment:
        safe_set_local_optimizer_state(parameter, own, moment)
    else:
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.data.copy_(own)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
