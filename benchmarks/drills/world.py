"""The checkout that drills disturb: its folders, its reference run, and the states that a drill starts from."""

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
ENDING_SECONDS = 20.0  # in which what a stopped run leaves running must end

# Not compared by name: what changes in them is no trace of a disturbance.
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
    """What an undisturbed run does.

    Attributes:
        outputs: name → hash, as `outputs.fingerprints` gives them.
        stages: names in the order of the run.
        starts: when each began, in seconds since the start of the run.
        seconds: of the whole run.
        files: names outside of the outputs that the run leaves in the checkout.
        temporary: names that it leaves in TMPDIR.
    """

    outputs: dict[str, str]
    stages: list[str]
    starts: list[float]
    seconds: float
    files: set[str] = field(default_factory=set)
    temporary: set[str] = field(default_factory=set)

    def duration(self, stage: int) -> float:
        """Seconds from a stage's start to the next one's, or to the end."""
        return [*self.starts, self.seconds][stage + 1] - self.starts[stage]

    @property
    def startup(self) -> float:
        """Seconds until the first stage begins."""
        return self.starts[0] if self.starts else self.seconds


class Place:
    """The folders of a checkout under test, all below one root: nothing of the user's is read or written.

    Args:
        root: the folder.

    Attributes:
        project: the checkout.
        temporary: its TMPDIR.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project"
        self.temporary = root / "tmp"

    def environment(self, marker: str) -> dict[str, str]:
        """Of a drill's programs: one thread each, caches of their own, and the drill's marker."""
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
        """Makes a fresh checkout of the smallest world."""
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
        """Copies all of it; blocks are shared where the file system can."""
        folder.mkdir(parents=True)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{self.root}/.", str(folder)], check=True)

    def clear(self) -> None:
        """Removes what is in it."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def restore(self, saved: Path) -> None:
        """Makes it what was copied before."""
        self.clear()
        subprocess.run(["cp", "-a", "--reflink=auto", f"{saved}/.", str(self.root)], check=True)

    def rewind(self, stages: Sequence[str]) -> None:
        """Undoes stages of a finished run, as if they had never been run: outputs, DVC's lock and cache, scratch."""
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
        """Removes what DVC's cache holds of other stages, so that these write it again."""
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
        """Names in the checkout outside of the outputs and of what changes from run to run."""
        found = set()
        for folder, folders, files in os.walk(self.project):
            here = Path(folder).relative_to(self.project)
            folders[:] = [name for name in folders if (here / name).as_posix() not in _NOISY and name != "__pycache__"]
            found |= {(here / name).as_posix() for name in files}
        return {name for name in found if not _RECOVERED_LATER.fullmatch(name)}

    def left_behind(self, reference: Reference) -> list[str]:
        """Files that a finished run has left and the undisturbed run has not, and locks without a holder."""
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
        """Starts a program in the checkout, as from a shell of its own."""
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
        place: the checkout's folders.
        command: the program and its arguments.
        marker: of the drill.
        log: file that takes what the program prints.

    Attributes:
        process: the program, leader of a group and session of its own.
        started: by the monotonic clock.
    """

    def __init__(self, place: Place, command: Sequence[str], marker: str, log: Path) -> None:
        self.place, self.command, self.marker, self.log = place, command, marker, log
        with log.open("wb") as output:
            output.write(f"=== {time.strftime('%H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                cwd=place.project,
                env=place.environment(marker),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What the program has printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether the program has ended; what it started may still run."""
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def wait_for(self, event: Callable[[], bool], seconds: float) -> bool:
        """Waits for an event while the program runs; returns whether it came.

        Raises:
            TimeoutError: neither the event nor the end of the program came in time.
        """
        if not wait_until(lambda: self.ended or event(), seconds):
            raise TimeoutError(f"nothing happened for {seconds:.0f} s")
        return not self.ended

    def wait(self, seconds: float) -> int:
        """Waits for the program's end and returns its status.

        Raises:
            TimeoutError: it runs longer than `seconds`.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"did not end within {seconds:.0f} s") from None


def prepare(place: Place, folder: Path, limit: float, prebuilt: Path | None = None) -> Reference:
    """Makes a checkout, runs it undisturbed, and keeps both states in `folder` as `fresh` and `done`.

    Args:
        place: where the checkout is made.
        folder: that takes the states, and the run's log.
        limit: seconds that the run may take.
        prebuilt: folder of what takes long to make and is copied instead, such as Prefect's database in
            `project/.prefect`.

    Raises:
        RuntimeError: the run failed.
    """
    place.make()
    if prebuilt:
        subprocess.run(["cp", "-a", f"{prebuilt}/.", str(place.root)], check=True)
    place.copy_to(folder / "fresh")
    run = place.start(REPRODUCE, "reference", folder / "reference.log")
    starts: dict[str, float] = {}
    try:
        while not run.ended and run.seconds < limit:
            for stage in RUNNING.findall(run.output()):
                starts.setdefault(stage, run.seconds)
            time.sleep(POLL_SECONDS)
        seconds = run.seconds
        if run.process.poll() != 0:
            raise RuntimeError(f"the undisturbed run failed; see {run.log}")
        if not wait_until(lambda: not marked("reference", place.root), ENDING_SECONDS):
            raise RuntimeError(f"the undisturbed run left processes: {marked('reference', place.root)}")
    finally:
        end_all("reference", place.root)
    place.copy_to(folder / "done")
    reference = Reference(fingerprints(place.project), list(starts), list(starts.values()), seconds)
    reference.files = place.files()
    reference.temporary = _names(place.temporary)
    return reference
