"""The checkout that drills disturb: its folders, its reference run, and the states from which drills start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.drills.outputs import OUTPUTS, fingerprints
from benchmarks.drills.processes import MARKER, POLL_SECONDS, end_all, marked, wait_until
from lotlip.core.files import ASIDE, PARTIAL
from tests.tiny_pipeline import change_params, copy_checkout, smallest

REPRODUCE = (sys.executable, "-m", "flows.reproduce")
RUNNING = re.compile(r"^Running stage '(.+)':", re.MULTILINE)
ENDING_SECONDS = 20.0  # time in which the remaining processes of a stopped run must end

# Folders whose file names differ between undisturbed runs, so they are not compared.
_NOISY = (
    ".git",
    ".prefect",
    ".lotlip/gates",
    ".lotlip/logs",
    ".dvc/cache/files",
    ".dvc/cache/runs",
    "mlruns",
    *OUTPUTS,
)


# After a copy into its cache failed, DVC writes lists of folders again, in the layout of its version 2. The journal of
# a killed writer tells SQLite what to undo; the next writer does so and removes it.
_RECOVERED_LATER = re.compile(r"\.dvc/cache/[0-9a-f]{2}/[0-9a-f]{30}\.dir|mlflow\.db-journal")


@dataclass
class Reference:
    """The outputs and times of an undisturbed run.

    Attributes:
        outputs: hashes by name, from `outputs.fingerprints`.
        stages: names of the stages, in the order of the run.
        starts: start of each stage, in seconds since the start of the run.
        seconds: duration of the run.
        files: names of files that the run leaves in the checkout outside of the outputs.
        temporary: names of files that it leaves in TMPDIR.
    """

    outputs: dict[str, str]
    stages: list[str]
    starts: list[float]
    seconds: float
    files: set[str] = field(default_factory=set)
    temporary: set[str] = field(default_factory=set)

    def duration(self, stage: int) -> float:
        """Returns the seconds from a stage's start to the next stage's start, or to the end of the run."""
        return [*self.starts, self.seconds][stage + 1] - self.starts[stage]

    @property
    def startup(self) -> float:
        """Seconds until the first stage starts."""
        return self.starts[0] if self.starts else self.seconds


class Sandbox:
    """The folders of a checkout under test. All are in one root folder; no files of the user are read or written.

    Args:
        root: the root folder.

    Attributes:
        project: the checkout.
        temporary: its TMPDIR.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project"
        self.temporary = root / "tmp"

    def environment(self, marker: str) -> dict[str, str]:
        """Returns the environment of a drill's programs: one thread, separate caches, and the drill's marker."""
        foreign = ("PREFECT_", "LOTLIP_", "MLFLOW_", "DVC_", "COVERAGE_", "COV_CORE_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        cache = str(self.root / "cache")
        return {
            **kept,
            MARKER: marker,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
            "PYTHONPATH": str(self.project),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": cache,
            "LOTLIP_CACHE": f"{cache}/lotlip",
            "TORCH_EXTENSIONS_DIR": f"{cache}/torch_extensions",
            "DVC_SITE_CACHE_DIR": f"{cache}/dvc",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }

    def make(self) -> None:
        """Creates a fresh checkout with the smallest configuration."""
        self.temporary.mkdir(parents=True)
        copy_checkout(self.project)
        change_params(self.project, smallest)
        identity = ("-c", "user.name=drills", "-c", "user.email=drills@localhost")
        for command in (
            ("git", "init", "--quiet"),
            ("dvc", "init", "--quiet"),
            ("git", "add", "--all"),
            ("git", *identity, "commit", "--quiet", "--message", "start"),
        ):
            subprocess.run(command, cwd=self.project, env=self.environment("setup"), check=True, capture_output=True)

    def copy_to(self, folder: Path) -> None:
        """Copies the root folder. Blocks are shared if the file system supports it."""
        folder.mkdir(parents=True)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{self.root}/.", str(folder)], check=True)

    def clear(self) -> None:
        """Removes the contents of the root folder."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def restore(self, saved: Path) -> None:
        """Replaces the contents of the root folder by a copy."""
        self.clear()
        subprocess.run(["cp", "-a", "--reflink=auto", f"{saved}/.", str(self.root)], check=True)

    def rewind(self, stages: Sequence[str]) -> None:
        """Removes all traces of stages from a finished run: outputs, scratch, entries of dvc.lock and DVC's cache."""
        path = self.project / "dvc.lock"
        lock = yaml.safe_load(path.read_text())
        for stage in stages:
            for out in lock["stages"].pop(stage)["outs"]:
                _remove(self.project / out["path"])
        if lock["stages"]:
            path.write_text(yaml.safe_dump(lock, sort_keys=False))
        else:
            path.unlink()
        names = {stage.split("@")[0] for stage in stages}
        if "caption" in names:
            _remove(self.project / "data" / "caption-store")
        if "pretrain" in names:
            for name in ("mlflow.db", "mlruns", "mlartifacts"):
                _remove(self.project / name)
        for name in (".lotlip", ".dvc/cache/runs"):
            _remove(self.project / name)
        self._collect_garbage(lock["stages"])

    def _collect_garbage(self, stages: dict[str, Any]) -> None:
        """Removes the outputs of other stages from DVC's cache, so that those stages write them again."""
        cache = self.project / ".dvc" / "cache" / "files" / "md5"
        used = set()
        for stage in stages.values():
            for out in stage["outs"]:
                used.add(out["md5"])
                if out["md5"].endswith(".dir"):
                    used |= {
                        entry["md5"] for entry in json.loads((cache / out["md5"][:2] / out["md5"][2:]).read_text())
                    }
        for path in cache.glob("*/*"):
            if path.parent.name + path.name not in used:
                path.unlink()

    def files(self) -> set[str]:
        """Returns the names of files in the checkout, without outputs and files that differ between runs."""
        names = set()
        for folder, folders, files in os.walk(self.project):
            base = Path(folder).relative_to(self.project)
            folders[:] = [name for name in folders if (base / name).as_posix() not in _NOISY and name != "__pycache__"]
            names |= {(base / name).as_posix() for name in files}
        return {name for name in names if not _RECOVERED_LATER.fullmatch(name)}

    def left_behind(self, reference: Reference) -> list[str]:
        """Returns a line for each file that a run left but the undisturbed run did not, and for each stale lock."""
        left = [f"temporary file: {name}" for name in sorted(_names(self.temporary) - reference.temporary)]
        left += [f"file: {name}" for name in sorted(self.files() - reference.files)]
        unfinished = (path for ending in (PARTIAL, ASIDE) for path in self.project.rglob(f"*{ending}"))
        left += [f"unfinished: {path.relative_to(self.project)}" for path in sorted(unfinished)]
        left += [f"scratch: .lotlip/work/{name}" for name in sorted(_names(self.project / ".lotlip" / "work"))]
        cache = self.project / ".dvc" / "cache" / "files" / "md5"
        strange = (path for path in cache.rglob("*") if path.is_file() and not _CACHED.fullmatch(_short(path, cache)))
        left += [f"in DVC's cache: {path.relative_to(cache)}" for path in sorted(strange)]
        lock = self.project / ".dvc" / "tmp" / "rwlock"
        text = lock.read_text().strip() if lock.is_file() else "{}"
        if text != "{}":
            processes = sorted(set(re.findall(r'"pid": (\d+)', text)))
            left.append(f"DVC's lock: {'held by ' + ', '.join(processes) if processes else text[:80] or 'empty'}")
        return left

    def start(self, command: Sequence[str], marker: str, log: Path) -> Run:
        """Starts a program in the checkout, in a session of its own."""
        return Run(self, command, marker, log)


_CACHED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


def _short(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Run:
    """One run of a program in a checkout.

    Args:
        sandbox: the checkout's folders.
        command: the program and its arguments.
        marker: the drill's marker.
        log: file for the program's output.

    Attributes:
        process: the program, leader of its own process group and session.
        started: start time by the monotonic clock.
    """

    def __init__(self, sandbox: Sandbox, command: Sequence[str], marker: str, log: Path) -> None:
        self.sandbox, self.command, self.marker, self.log = sandbox, command, marker, log
        with log.open("wb") as output:
            output.write(f"=== {time.strftime('%H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                cwd=sandbox.project,
                env=sandbox.environment(marker),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """Returns the program's output so far."""
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether the program has ended. Its child processes may still run."""
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait_for(self, event: Callable[[], bool], seconds: float) -> bool:
        """Waits for an event while the program runs. Returns whether it occurred before the program's end.

        Raises:
            TimeoutError: neither the event nor the end of the program occurred in time.
        """
        if not wait_until(lambda: self.ended or event(), seconds):
            raise TimeoutError(f"nothing happened for {seconds:.0f} s")
        return not self.ended

    def wait(self, seconds: float) -> int:
        """Waits for the program's end and returns its exit status.

        Raises:
            TimeoutError: the program runs longer than `seconds`.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"did not end within {seconds:.0f} s") from None


def prepare(sandbox: Sandbox, folder: Path, limit: float, prebuilt: Path | None = None) -> Reference:
    """Creates a checkout, runs it undisturbed, and stores the states before and after in `folder`: `fresh` and `done`.

    Args:
        sandbox: the sandbox for the checkout.
        folder: folder for the two states and the run's log.
        limit: maximum duration of the run, in seconds.
        prebuilt: folder whose contents are copied into the sandbox because they are slow to create, such as Prefect's
            database in `project/.prefect`.

    Raises:
        RuntimeError: the run failed.
    """
    sandbox.make()
    if prebuilt:
        subprocess.run(["cp", "-a", f"{prebuilt}/.", str(sandbox.root)], check=True)
    sandbox.copy_to(folder / "fresh")
    run = sandbox.start(REPRODUCE, "reference", folder / "reference.log")
    starts: dict[str, float] = {}
    try:
        while not run.ended and run.seconds < limit:
            for stage in RUNNING.findall(run.output()):
                starts.setdefault(stage, run.seconds)
            time.sleep(POLL_SECONDS)
        seconds = run.seconds
        if run.process.poll() != 0:
            raise RuntimeError(f"the undisturbed run failed; see {run.log}")
        if not wait_until(lambda: not marked("reference", sandbox.root), ENDING_SECONDS):
            raise RuntimeError(f"the undisturbed run left processes: {marked('reference', sandbox.root)}")
    finally:
        end_all("reference", sandbox.root)
    sandbox.copy_to(folder / "done")
    reference = Reference(fingerprints(sandbox.project), list(starts), list(starts.values()), seconds)
    reference.files = sandbox.files()
    reference.temporary = _names(sandbox.temporary)
    return reference
