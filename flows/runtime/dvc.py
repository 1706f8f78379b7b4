"""DVC: a quick check whether it has anything to run, and a program that may be interrupted at any moment.

The program is `python -m flows.runtime.dvc ARGUMENTS…`.

DVC writes the file of its locks in place. A signal in that moment leaves it empty, and the next run refuses to start.
So a signal to this program never interrupts DVC: it ends the stage that runs, and DVC then ends by itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows.runtime.supervisor import ENDING, group
from lotlip.core.console import INTERRUPTED
from lotlip.core.files import remove

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import Stage

SINGLE_ITEM = "--single-item"  # of `dvc repro`: the named stage without those that it depends on
STOPPING = "LOTLIP_STOPPING"  # in the environment of a stage that DVC starts after it was told to end
STOP_SECONDS = 30
_PARTIAL_COPY = re.compile(r"\.[\w-]{22}\.tmp")  # as DVC names what it copies, until the copy is complete


def is_up_to_date(runs: Sequence[Sequence[str]]) -> bool:
    """Whether `dvc repro` would run no stage, by DVC's own checks and without starting anything.

    It is False where this is uncertain: for options and names that are unknown here, while another DVC writes outputs,
    and whenever DVC raises an error, which `dvc repro` then reports.

    Args:
        runs: arguments of each `dvc repro`: names of stages, `--single-item` and a name, or nothing for all stages.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from networkx import descendants

    targets = [(name, run[0] != SINGLE_ITEM) for run in runs for name in run if name != SINGLE_ITEM]
    if any(name.startswith("-") for name, _ in targets):
        return False
    try:
        with Repo() as repo, repo.lock, _params_read_once():
            locks = Path(repo.tmp_dir, "rwlock")
            if locks.is_file() and json.loads(locks.read_text(encoding="utf-8")):
                return False
            # of the index, which parses dvc.lock once; DVC's own look-up parses it for each name
            named = {stage.addressing: stage for stage in repo.index.stages}
            stages = set() if all(runs) else set(named.values())
            for name, with_deps in targets:
                stages.add(named[name])
                if with_deps:
                    stages |= descendants(repo.index.graph, named[name])
            return not _any_is_stale(stages)
    except (DvcException, KeyError, ValueError, OSError):
        return False


def _any_is_stale(stages: Iterable[Stage]) -> bool:
    """As `stage.changed`, without DVC's locks of single files, which a signal to this process could leave damaged.

    What several stages expect of one path is checked once: most of them read the same code and data.
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
    """Keeps what DVC parses for the block: it would parse params.yaml for each stage, a third of the time."""
    from dvc.dependency import param

    load = param.load_path
    param.load_path = cache(load)
    try:
        yield
    finally:
        param.load_path = load


def run_dvc(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs DVC to its end; gives its status.

    If this program is interrupted, the running stage is ended, and DVC has STOP_SECONDS to end by itself.

    Args:
        arguments: of `dvc`.
        environment: of DVC and its stages.
    """
    with group([sys.executable, "-m", "flows.runtime.dvc", *arguments], env=dict(environment)) as process:
        try:
            return process.wait()
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """Has a `flows.runtime.dvc` end, and waits for it; one that does not end in time is left as it is."""
    deadline = time.monotonic() + STOP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        process.terminate()  # again and again: DVC may have started a stage at the moment of the last one
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)


class _Stop:
    """The handler of signals: ends the stage that runs, and lets none begin."""

    def __init__(self) -> None:
        self.signalled: set[int] = set()

    def __call__(self, _sign: int, _frame: Any) -> None:
        os.environ[STOPPING] = "1"
        own = os.getpgrp()
        for process in psutil.Process().children(recursive=True):
            if process.pid in self.signalled:
                continue
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == own:  # what a stage starts in another group, it ends itself
                    self.signalled.add(process.pid)
                    os.kill(process.pid, signal.SIGINT)


def remove_stale_lock(root: Path) -> bool:
    """Removes DVC's file of locks if it is unreadable, or names dead processes alone, and no DVC runs in the project.

    DVC's other lock files are locked by the kernel: whatever is in them, they block nobody when their owner has ended.

    Args:
        root: of the DVC project.

    Returns:
        Whether it was removed.
    """
    folder = root / ".dvc" / "tmp"
    path = folder / "rwlock"
    if not _stale(path):
        return False
    import zc.lockfile

    try:
        guard = zc.lockfile.LockFile(str(folder / "rwlock.lock"))  # as DVC does before it reads or writes the file
    except zc.lockfile.LockError:
        return False
    try:
        if not _stale(path) or _others(root):
            return False
        remove(path, _stale)
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
    if partial and not _others(root):
        for path in partial:
            remove(path, _is_partial_copy)


def _is_partial_copy(path: Path) -> bool:
    return _PARTIAL_COPY.fullmatch(path.name) is not None


def match_git(root: Path) -> None:
    """Lets DVC work without git where the project is no git repository, as a downloaded archive is, and only there.

    The setting is in `.dvc/config.local`, which git ignores. It goes again when the project has become a repository.

    Args:
        root: of the DVC project.
    """
    from dvc.config import Config

    local = root / ".dvc" / "config.local"
    config = Config(str(local.parent), validate=False)
    without = config.load_one("local").get("core", {}).get("no_scm", False) if local.is_file() else False
    has_git = any((folder / ".git").exists() for folder in (root, *root.parents))  # where DVC looks
    if without == (not has_git) or config.load_one("repo").get("core", {}).get("no_scm"):
        return
    with config.edit("local") as settings:
        core = settings.setdefault("core", {})
        if has_git:
            core.pop("no_scm")
        else:
            core["no_scm"] = True


def _stale(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    if not isinstance(found, dict):
        return True
    holders = list(_holders(found))
    return bool(holders) and not any(map(_lives, holders))


def _lives(pid: int) -> bool:
    """Whether a process exists that has not ended; one that nobody waits for stays as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holders(entry: Any) -> Iterator[int]:
    """The processes that a part of DVC's file of locks names."""
    if isinstance(entry, dict):
        if isinstance(entry.get("pid"), int):
            yield entry["pid"]
        for value in entry.values():
            yield from _holders(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _holders(value)


def _others(root: Path) -> list[int]:
    """Other processes of this machine that may be DVC in the project."""
    family = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in family:
            continue
        try:
            words = process.cmdline()
            named = any(Path(word).name in ("dvc", "flows.runtime.dvc") for word in words[:4])
            if named and process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:  # another user's: it may be
            if named:
                found.append(process.pid)
    return found


def _root(folder: Path) -> Path | None:
    return next((place for place in (folder, *folder.parents) if (place / ".dvc").is_dir()), None)


def main(arguments: Sequence[str]) -> int:
    """Runs DVC in this process; gives its status."""
    stop = _Stop()
    for sign in ENDING:
        if signal.getsignal(sign) != signal.SIG_IGN:
            signal.signal(sign, stop)
    root = _root(Path.cwd())
    if root and remove_stale_lock(root):
        print(f"removed {root / '.dvc/tmp/rwlock'}, which an interrupted DVC left behind", file=sys.stderr)
    if STOPPING in os.environ:
        return INTERRUPTED
    if root:
        remove_partial_copies(root)
        match_git(root)
    from dvc.cli import main as dvc

    status = dvc(list(arguments))
    if root:
        remove_stale_lock(root)  # of a process that had not quite ended before
    return INTERRUPTED if STOPPING in os.environ and status else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
