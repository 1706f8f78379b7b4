"""Runs DVC so that it can be interrupted safely, and checks quickly whether DVC has anything to run.

`python -m flows.runtime.dvc ARGUMENTS…` runs `dvc ARGUMENTS…`. DVC rewrites its lock file in place, so a signal at that
moment leaves the file empty, and the next run refuses to start. A signal to this program therefore never interrupts
DVC: it ends the running stage, and DVC then exits.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from flows.runtime.supervisor import END_SIGNALS, group
from lotlip.config.params import load_params
from lotlip.core.console import INTERRUPTED
from lotlip.core.files import remove
from lotlip.core.section import ConfigError, nearest
from lotlip.data.models import local_model

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import Stage

SINGLE_ITEM = "--single-item"  # option of `dvc repro`: runs the named stage without the stages that it depends on
RUN_CACHE = "LOTLIP_RUN_CACHE"  # set in the environment where DVC's run cache holds trainings
TRAININGS = ("pretrain@", "finetune@")
DVC_PROGRAMS = ("dvc", "flows.runtime.dvc", "flows.runtime.lanes")
STOPPING = "LOTLIP_STOPPING"  # set in the environment of a stage that DVC starts after a signal
STOP_SECONDS = 30
_PUSH_ADVICE = "Use `dvc push`"
_PARTIAL_COPY = re.compile(r"\.[\w-]{22}\.tmp")  # as DVC names what it copies, until the copy is complete


def is_up_to_date(runs: Sequence[Sequence[str]]) -> bool:
    """Returns whether `dvc repro` would run no stage, by DVC's own checks and without starting a process.

    Returns False if this is uncertain: for unknown options and stages, while another DVC process writes outputs, and
    when DVC raises an error, which `dvc repro` then reports.

    Args:
        runs: arguments of each `dvc repro`: names of stages, `--single-item` and a name, or nothing for all stages.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock, _params_read_once():
            locks = Path(repo.tmp_dir, "rwlock")
            if locks.is_file() and json.loads(locks.read_text(encoding="utf-8")):
                return False
            named = _stages(repo)
            return bool(named) and not _any_is_stale({named[name] for run in runs for name in _steps(repo, named, run)})
    except (DvcException, KeyError, ValueError, OSError, sqlite3.Error):
        return False


def plan(runs: Sequence[Sequence[str]]) -> dict[str, set[str]] | None:
    """Returns name of a stage → names of the stages that it waits for, for what `dvc repro` would check or run.

    Args:
        runs: as of `is_up_to_date`. The stages of a run wait for those of earlier runs.

    Returns:
        The stages. None for unknown options and stages, and when DVC raises an error: `dvc repro` reports them.
    """
    from dvc.exceptions import DvcException

    waits: dict[str, set[str]] = {}
    try:
        with _open_project() as repo, _params_read_once():
            named = _stages(repo)
            for run in runs:
                earlier = set(waits)
                for name in _steps(repo, named, run):
                    if name not in waits:
                        after = {stage.addressing for stage in repo.index.graph.successors(named[name])}
                        waits[name] = earlier | after
    except (DvcException, KeyError, ValueError, OSError, sqlite3.Error):
        return None
    return {name: after & waits.keys() for name, after in waits.items()}


def _stages(repo: Repo) -> dict[str, Stage]:
    # The index parses dvc.lock once. DVC's own lookup by name parses it for each name.
    return {stage.addressing: stage for stage in repo.index.stages}


@contextmanager
def _open_project() -> Iterator[Repo]:
    """Opens the DVC project, also if it is not a git repository and DVC has not run in it."""
    from dvc.repo import Repo

    if root := project_root(Path.cwd()):
        match_git(root)
    with Repo() as repo:
        yield repo


def check_targets(names: Iterable[str]) -> None:
    """Checks that DVC knows the targets of a `dvc repro`, before servers start.

    Raises:
        ConfigError: it does not know one.
    """
    from dvc.exceptions import DvcException

    with _open_project() as repo:
        for name in names:
            try:
                repo.stage.collect(name)
            except DvcException as error:
                raise ConfigError(f"{error}{nearest(name, _stages(repo))}") from error


def _steps(repo: Repo, named: Mapping[str, Stage], run: Sequence[str]) -> list[str]:
    """Returns the names of the stages that a `dvc repro` checks, in its order.

    Raises:
        KeyError: an argument is an unknown option or stage.
    """
    from dvc.repo.reproduce import get_active_graph, plan_repro

    if run[:1] == [SINGLE_ITEM]:
        return [named[name].addressing for name in run[1:]]
    targets = [named[name] for name in run] if run else list(named.values())
    return [stage.addressing for stage in plan_repro(get_active_graph(repo.index.graph), targets)]


def _any_is_stale(stages: Iterable[Stage]) -> bool:
    """Does what `stage.changed` does, without DVC's locks of files, which a signal to this process could damage.

    Most stages read the same code and data, so a path that several stages share is checked once.
    """
    expected: dict[tuple[object, ...], Output] = {}
    for stage in stages:
        if stage.changed_stage() or stage.is_callback or stage.always_changed:
            return True
        for path in (*stage.deps, *stage.outs):
            expected[type(path), path.fs_path, repr(path.hash_info), repr(getattr(path, "params", None))] = path
    return any(path.status() for path in expected.values())


@contextmanager
def _params_read_once() -> Iterator[None]:
    """Caches parsed parameter files within the block. DVC would parse params.yaml per stage: a third of the time."""
    from dvc.dependency import param

    load = param.load_path
    param.load_path = cache(load)
    try:
        yield
    finally:
        param.load_path = load


def run_dvc(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs DVC and returns its exit status.

    If this program is interrupted, the running stage is ended, and DVC has STOP_SECONDS to exit.

    Args:
        arguments: arguments of `dvc`.
        environment: environment variables of DVC and its stages.
    """
    with group([sys.executable, "-m", "flows.runtime.dvc", *arguments], env=dict(environment)) as process:
        try:
            return process.wait()
        finally:
            stop(process)


def stop(*processes: subprocess.Popen[Any]) -> None:
    """Signals processes that run DVC until they exit, for at most STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while (running := [each for each in processes if each.poll() is None]) and time.monotonic() < deadline:
        for process in running:
            process.terminate()  # repeatedly: DVC may have started a stage at the moment of the last signal
        with suppress(subprocess.TimeoutExpired):
            running[0].wait(1)


class _Stop:
    """A signal handler that interrupts the running stage and prevents further stages from starting."""

    def __init__(self) -> None:
        self.signalled: set[int] = set()

    def __call__(self, _sign: int, _frame: Any) -> None:
        os.environ[STOPPING] = "1"
        own = os.getpgrp()
        # A background job of a shell without job control ignores Ctrl-C, and so do its stages.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        sign = signal.SIGTERM if ignored else signal.SIGINT
        for process in psutil.Process().children(recursive=True):
            if process.pid in self.signalled:
                continue
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == own:  # a stage itself ends what it started in other groups
                    self.signalled.add(process.pid)
                    os.kill(process.pid, sign)


def remove_stale_lock(root: Path) -> bool:
    """Removes DVC's `rwlock` file if it is unreadable or names only dead processes, and no DVC runs in the project.

    DVC's other lock files use kernel locks, which end with their owner whatever the files contain.

    Args:
        root: root folder of the DVC project.

    Returns:
        Whether the file was removed.
    """
    folder = root / ".dvc" / "tmp"
    path = folder / "rwlock"
    if not _is_stale_lock(path):
        return False
    import zc.lockfile

    try:
        guard = zc.lockfile.LockFile(str(folder / "rwlock.lock"))  # as DVC does before it reads or writes the file
    except zc.lockfile.LockError:
        return False
    try:
        with _is_alone(root) as alone:
            if not alone or not _is_stale_lock(path):
                return False
            remove(path, _is_stale_lock)
            return True
    finally:
        guard.close()


def remove_partial_copies(root: Path) -> None:
    """Removes the copies that an interrupted DVC, or one on a full disk, left unfinished in the project's cache.

    Nothing is removed while another DVC may run in the project, or where the cache is elsewhere and may be shared.

    Args:
        root: of the DVC project.
    """
    partial = list((root / ".dvc" / "cache" / "files" / "md5").glob("??/.*.tmp"))
    if not partial:
        return
    with _is_alone(root) as alone:
        for path in partial if alone else ():
            remove(path, _is_partial_copy)


def _is_partial_copy(path: Path) -> bool:
    return _PARTIAL_COPY.fullmatch(path.name) is not None


def cache_trainings() -> None:
    """Lets DVC's run cache hold trainings.

    DVC leaves out stages with outputs that persist, which all stages here have. But what a training writes depends only
    on what DVC watches, unless it starts from a model on this machine. Other stages stay left out: some depend on files
    that DVC cannot watch (flows.reproduce).
    """
    from dvc.stage import cache

    can_hash = cache._can_hash

    def can_hash_trainings(stage: Stage) -> bool:
        if not stage.addressing.startswith(TRAININGS) or _starts_from_files(stage):
            return can_hash(stage)
        persisting = [out for out in stage.outs if out.persist]
        try:
            for out in persisting:
                out.persist = False
            return can_hash(stage)
        finally:
            for out in persisting:
                out.persist = True

    cache._can_hash = can_hash_trainings


def _starts_from_files(stage: Stage) -> bool:
    """Returns whether a training starts from a model that no stage wrote for it."""
    kind, _, ablation = stage.addressing.partition("@")
    model = load_params().ablation(ablation).text.pretrained
    return kind == "pretrain" and bool(model and local_model(model))


def leave_out_push_advice() -> None:
    """Leaves out DVC's advice after each run to use `dvc push` if no remote is configured."""
    from dvc.ui import ui

    write = ui.write

    def write_unless_useless(*objects: Any, **options: Any) -> None:
        if not str(objects[0] if objects else "").startswith(_PUSH_ADVICE) or _has_remote():
            write(*objects, **options)

    ui.write = write_unless_useless


def _has_remote() -> bool:
    from dvc.config import Config

    return bool(Config.from_cwd(validate=False)["remote"])


def match_git(root: Path) -> None:
    """Sets DVC's `core.no_scm` if the project is not in git, for example if it was downloaded as an archive.

    This includes a folder that its repository ignores: DVC ignores a dvc.yaml there, and would find no stage. The
    setting is in `.dvc/config.local`, which git ignores. It is removed once the project is in git.

    Args:
        root: root folder of the DVC project.
    """
    from dvc.config import Config

    local = root / ".dvc" / "config.local"
    config = Config(str(local.parent), validate=False)
    without = config.load_one("local").get("core", {}).get("no_scm", False) if local.is_file() else False
    has_git = any((folder / ".git").exists() for folder in (root, *root.parents)) and not _is_git_ignored(root)
    if without == (not has_git) or config.load_one("repo").get("core", {}).get("no_scm"):
        return
    with config.edit("local") as settings:
        core = settings.setdefault("core", {})
        if has_git:
            core.pop("no_scm")
        else:
            core["no_scm"] = True


def _is_git_ignored(root: Path) -> bool:
    """Whether the git repository of a project ignores its dvc.yaml, as DVC checks it."""
    from scmrepo.exceptions import SCMError
    from scmrepo.git import Git

    try:
        git = Git(str(root), search_parent_directories=True)
    except SCMError:
        return False
    with closing(git):
        return git.is_ignored(str(root / "dvc.yaml"))


def _is_stale_lock(path: Path) -> bool:
    try:
        locks = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    if not isinstance(locks, dict):
        return True
    holders = list(_lock_holders(locks))
    return bool(holders) and not any(map(_is_alive, holders))


def _is_alive(pid: int) -> bool:
    """Whether a process has not ended. A process that ended stays as a zombie until its parent waits for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _lock_holders(entry: Any) -> Iterator[int]:
    """Yields the process ids in a part of DVC's lock file."""
    if isinstance(entry, dict):
        if isinstance(entry.get("pid"), int):
            yield entry["pid"]
        for value in entry.values():
            yield from _lock_holders(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _lock_holders(value)


@contextmanager
def running(root: Path | None) -> Iterator[None]:
    """Marks a project as used by DVC during the block, also for other machines and containers that share its folder.

    Their process ids in DVC's lock file mean nothing here.

    Args:
        root: of the DVC project; None: there is none.
    """
    if root is None:
        yield
        return
    with _open_mark(root) as mark:
        fcntl.flock(mark, fcntl.LOCK_SH)
        yield


@contextmanager
def _is_alone(root: Path) -> Iterator[bool]:
    """Tells whether no other DVC runs in the project, and keeps `running` waiting until the end of the block."""
    with _open_mark(root) as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not _other_dvc_processes(root)


def _open_mark(root: Path) -> IO[bytes]:
    path = root / ".dvc" / "tmp" / "lotlip-running"
    path.parent.mkdir(exist_ok=True)
    return path.open("ab")


def _other_dvc_processes(root: Path) -> list[int]:
    """Returns the ids of other processes on this machine that may be DVC in the project."""
    family = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    others = []
    for process in psutil.process_iter():
        if process.pid in family:
            continue
        try:
            words = process.cmdline()
            named = any(Path(word).name in DVC_PROGRAMS for word in words[:4])
            if named and process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root):
                others.append(process.pid)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:  # another user's process, whose folder is unknown
            if named:
                others.append(process.pid)
    return others


def project_root(folder: Path) -> Path | None:
    """The DVC project that contains a folder, if there is one."""
    return next((parent for parent in (folder, *folder.parents) if (parent / ".dvc").is_dir()), None)


def handle_signals() -> None:
    """Makes a signal end the running stage, and nothing else."""
    stop = _Stop()
    for sign in END_SIGNALS:
        if signal.getsignal(sign) != signal.SIG_IGN:
            signal.signal(sign, stop)


def prepare() -> None:
    """Removes what an interrupted DVC left in the current folder's project, and matches its settings to git."""
    root = project_root(Path.cwd())
    if root is None:
        return
    if remove_stale_lock(root):
        print(f"removed {root / '.dvc/tmp/rwlock'}: a stale lock of an interrupted DVC", file=sys.stderr)
    remove_partial_copies(root)
    match_git(root)


def clean_up() -> None:
    """Removes the lock of a process of this program's DVC that has not quite ended."""
    if root := project_root(Path.cwd()):
        remove_stale_lock(root)


def main(arguments: Sequence[str]) -> int:
    """Runs DVC in this process and returns its exit status."""
    handle_signals()
    prepare()
    if STOPPING in os.environ:
        return INTERRUPTED
    if RUN_CACHE in os.environ:
        cache_trainings()
    leave_out_push_advice()
    from dvc.cli import main as dvc

    with running(project_root(Path.cwd())):
        status = dvc(list(arguments))
    clean_up()
    return INTERRUPTED if STOPPING in os.environ and status else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
