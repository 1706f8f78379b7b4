"""The drills. Each disturbs the pipeline, runs the same command again without any repair, and compares the outputs."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.drills import isolation
from benchmarks.drills.outputs import differences, fingerprints
from benchmarks.drills.processes import DrillProcess, children, end_all, listening, marked, send, wait_until
from benchmarks.drills.world import ENDING_SECONDS, REPRODUCE, Reference, Run, Sandbox
from lotlip.core.code import ROOT

KINDS = ("kill", "checkpoint", "flip", "two", "disk")
# Every kind is early in this order, and kills are the most frequent.
_CYCLE = ("kill", "checkpoint", "two", "flip", "disk", *("kill",) * 14)
# Targets and signals. `alone` is a stage that runs on its own.
KILLS = (
    ("top", "SIGKILL"),
    ("fork-server", "SIGKILL"),
    ("group", "SIGINT"),
    ("child", "SIGKILL"),
    ("server", "SIGKILL"),
    ("alone", "SIGKILL"),
    ("group", "SIGTERM"),
    ("group", "SIGKILL"),
    ("top", "SIGTERM"),
    ("top", "SIGINT"),
    ("child", "SIGTERM"),
    ("fork-server", "SIGTERM"),
    ("server", "SIGTERM"),
    ("alone", "SIGINT"),
    ("alone", "SIGTERM"),
)
OTHERS = {
    "checkpoint": (("newest", "bit flipped"), ("newest", "truncated")),
    "two": (("flows.reproduce", "at once"), ("flows pretrain", "at once")),
    "flip": (("output", "then flows.reproduce"), ("output", "then the stage alone")),
    "disk": (("project", "full"), ("scratch", "full"), ("TMPDIR", "full")),
}
GIGABYTE = 1 << 30
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Spec:
    """The specification of a drill. Its random choices are derived from (seed, number).

    Attributes:
        number: number of the drill.
        kind: one of KINDS.
        target: the target of the disturbance.
        how: the signal, or the kind of damage.
        seed: seed of the whole session.
    """

    number: int
    kind: str
    target: str
    how: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the drill's folder and marker."""
        return f"{self.number:03d}-{self.kind}-{self.target}-{self.how}".replace(" ", "-").replace(".", "-")

    def rng(self) -> random.Random:
        """Returns the drill's random number generator."""
        return random.Random(f"{self.seed}-{self.number}")


def plan(number: int, seed: int, kinds: Sequence[str] = KINDS) -> Spec:
    """Returns the drill of a number. Kinds and targets alternate."""
    cycle = [kind for kind in _CYCLE if kind in kinds]
    kind = cycle[number % len(cycle)]
    before = number // len(cycle) * cycle.count(kind) + cycle[: number % len(cycle)].count(kind)
    pairs = KILLS if kind == "kill" else OTHERS[kind]
    target, how = pairs[before % len(pairs)]
    return Spec(number, kind, target, how, seed)


@dataclass
class Disturbance:
    """A disturbance and its outcome.

    Attributes:
        moment: description of the moment.
        recovered: whether the next run of the same command succeeded or reached the next disturbance.
        stopped_seconds: time from the disturbance to the end of the program.
        recovery_seconds: duration of the next run, until its end or the next disturbance.
    """

    moment: str
    recovered: bool = False
    stopped_seconds: float = 0.0
    recovery_seconds: float = 0.0


@dataclass
class Result:
    """The result of a drill.

    Attributes:
        spec: the drill.
        state: the state of the checkout at the start.
        disturbances: the disturbances in order.
        problems: a line for each failure.
        different: outputs that differ from those of the reference run at the end.
        left: processes, files and locks that were left behind.
        warnings: observations that do not fail a drill.
        compared: whether the outputs were compared.
        seconds: duration of the drill.
        kept: folder with the checkout and logs of a failed drill.
        skipped: the reason why the drill did not run, or "".
    """

    spec: Spec
    state: str = ""
    disturbances: list[Disturbance] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    compared: bool = False
    seconds: float = 0.0
    kept: str = ""
    skipped: str = ""

    @property
    def identical(self) -> bool:
        """Whether all outputs were compared and equal those of the reference run."""
        return self.compared and not self.different

    @property
    def passed(self) -> bool:
        """Whether the drill had no failure, or was skipped."""
        return bool(self.skipped) or not (
            self.problems or self.left or not self.identical or not all(hit.recovered for hit in self.disturbances)
        )


class DrillRunner:
    """Runs a worker's drills in its sandbox.

    Args:
        sandbox: the folders in which drills run.
        folder: folder with the states `fresh` and `done`, and for failed drills.
        reference: the undisturbed run.
        isolated: whether this process may mount file systems.
        limit: seconds after which a run counts as hanging.
        ending: seconds in which a stopped run and its child processes must end.
        kills: maximum number of kills in a drill.
        deadline: time by the monotonic clock after which a drill kills no process and only recovers.
        command: the command that is disturbed and run again.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        folder: Path,
        reference: Reference,
        isolated: bool,
        limit: float,
        ending: float = ENDING_SECONDS,
        kills: int = 24,
        deadline: float = math.inf,
        command: Sequence[str] = REPRODUCE,
    ) -> None:
        self.sandbox, self.folder, self.reference, self.isolated = sandbox, folder, reference, isolated
        self.limit, self.ending, self.kills, self.deadline = limit, ending, kills, deadline
        self.command = command

    def run(self, spec: Spec) -> Result:
        """Runs a drill. Keeps its checkout and logs if it fails."""
        drill = Drill(self, spec)
        started = time.monotonic()
        try:
            drill.run()
        except _DrillFailed as error:
            drill.result.problems.append(str(error))
        finally:
            end_all(spec.name, self.sandbox.root)
            drill.clean_up()
        drill.result.seconds = time.monotonic() - started
        return drill.result


class _DrillFailed(Exception):
    """A drill cannot continue; the message says why."""


class Drill:
    """A drill in progress.

    Args:
        runner: the runner with the sandbox and the reference run.
        spec: the drill.
    """

    def __init__(self, runner: DrillRunner, spec: Spec) -> None:
        self.runner, self.spec, self.sandbox, self.reference = runner, spec, runner.sandbox, runner.reference
        self.result = Result(spec)
        self.rng = spec.rng()
        self.folder = runner.folder / "failed" / spec.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs = 0
        self.mounted: list[Path] = []
        self.when = 0.0  # time of the first kill, in seconds of the reference run
        self.overlapped = False  # whether processes of the previous run still ran when the last run started

    def run(self) -> None:
        """Runs the drill."""
        {
            "kill": self._kill,
            "checkpoint": self._checkpoint,
            "flip": self._flip,
            "two": self._concurrent_runs,
            "disk": self._disk,
        }[self.spec.kind]()

    def clean_up(self) -> None:
        """Unmounts file systems, and keeps the checkout, temporary files and logs of a failed drill."""
        if self.result.passed:
            shutil.rmtree(self.folder)
        else:
            self.result.kept = str(self.folder)
            shutil.copytree(self.sandbox.project, self.folder / "project", symlinks=True)
            if self.sandbox.temporary.is_dir():
                shutil.copytree(self.sandbox.temporary, self.folder / "tmp", symlinks=True, ignore=_sockets)
        for mountpoint in self.mounted:
            isolation.unmount(mountpoint)

    # --- shared by all kinds ------------------------------------------------------------------------------------------

    def restore(self, stage: int | None) -> None:
        """Restores the state of the checkout before a stage, or that of a fresh checkout if `stage` is None."""
        if stage is None:
            self.sandbox.restore(self.runner.folder / "fresh")
            self.result.state = "fresh"
        else:
            self.sandbox.restore(self.runner.folder / "done")
            self.sandbox.rewind(self.reference.stages[stage:])
            self.result.state = f"before {self.reference.stages[stage]}"

    def start(self, command: Sequence[str] | None = None) -> Run:
        """Starts a program with a new log: remaining processes of an earlier run may still write to theirs."""
        self.runs += 1
        self.overlapped = bool(marked(self.spec.name, self.sandbox.root))
        return self.sandbox.start(command or self.runner.command, self.spec.name, self.folder / f"run-{self.runs}.log")

    def hit(self, moment: str) -> Disturbance:
        """Records a disturbance."""
        self.result.disturbances.append(Disturbance(moment))
        return self.result.disturbances[-1]

    def end(self, run: Run, seconds: float) -> int | None:
        """Waits for a program's end and returns its status; if it hangs, records that, kills it and returns None."""
        try:
            return run.wait(seconds)
        except TimeoutError as error:
            self.result.problems.append(f"the run {error} and was killed")
            end_all(self.spec.name, self.sandbox.root)
            run.process.wait()
            return None

    def settle(self) -> None:
        """Waits until all processes of the drill have ended. Records and kills those that do not end."""
        if not wait_until(lambda: not marked(self.spec.name, self.sandbox.root), self.runner.ending):
            for process in marked(self.spec.name, self.sandbox.root):
                self.result.left.append(f"process after {self.runner.ending:.0f} s: {process.role}: {process.command}")
            ports = listening(self.spec.name, self.sandbox.root)
            self.result.left += [f"listens on port {port}" for port in ports]
            end_all(self.spec.name, self.sandbox.root)

    def recover(self) -> None:
        """Runs the command to its end, and marks the last disturbance as recovered.

        Raises:
            _DrillFailed: the command failed or did not end.
        """
        run = self.start()
        status = self.end(run, self.runner.limit)
        if status != 0:
            raise _DrillFailed(f"the run after the disturbance ended with status {status}")
        for hit in self.result.disturbances[-1:]:
            hit.recovered, hit.recovery_seconds = True, run.seconds

    def compare(self) -> None:
        """Compares the outputs with the reference run's, and records what was left behind."""
        self.settle()
        self.result.different = differences(self.reference.outputs, self.sandbox.project)
        self.result.compared = True
        self.result.left += self.sandbox.left_behind(self.reference)

    # --- kills --------------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        target, sign = self.spec.target, signal.Signals[self.spec.how]
        alone = target == "alone"
        stage = self._choose_start(alone)
        self.restore(stage)
        command: Sequence[str] = self._alone(stage or 0) if alone else self.runner.command
        for number in range(self.rng.randint((self.runner.kills + 1) // 2, self.runner.kills)):
            moment = self._moment(first=number == 0, alone=alone)
            run = self.start(command)
            if not self._reach(run, moment):
                break
            victim = self._victim(run, target)
            if victim is None:
                break
            hit = self.hit(f"{moment[0]}, after {run.seconds:.1f} s: {victim.role} ({victim.pid})")
            struck = time.monotonic()
            self._strike(run, target, victim, sign)
            status = self.end(run, self.runner.limit)
            hit.stopped_seconds = time.monotonic() - struck
            if status == 0:  # the killed process was not needed
                hit.recovered = True
                break
            if self.rng.random() < 0.5:
                self.settle()
            if time.monotonic() > self.runner.deadline:
                run = self.start(command)
                break
        else:
            run = self.start(command)
        self._finish(run, command)
        if alone:
            self.settle()
            self._run_undisturbed()
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("run-*.log"))}
        traced = [name for name, text in texts.items() if TRACEBACK in text]
        if traced:
            self.result.warnings.append(f"tracebacks in {', '.join(traced)}")
        self.compare()

    def _choose_start(self, alone: bool) -> int | None:
        """Chooses the stage to start at, by a uniformly random moment of the reference run."""
        stages, reference = range(len(self.reference.stages)), self.reference
        if alone:
            return self.rng.choice(stages)
        self.when = self.rng.uniform(0, reference.seconds)
        reached = [stage for stage in stages if reference.starts[stage] <= self.when]
        return reached[-1] if reached else None

    def _moment(self, first: bool, alone: bool) -> tuple[str, str, int, float]:
        """Chooses when to kill.

        Returns:
            A description, the text to wait for, the number of its occurrences, and the delay after them in seconds.
        """
        reference, rng = self.reference, self.rng
        if alone:
            return ("in a stage alone", "", 0, rng.uniform(0, max(reference.startup, 5.0)))
        if first and self.when >= reference.startup:
            stage = max(s for s in range(len(reference.stages)) if reference.starts[s] <= self.when)
            return (f"in {reference.stages[stage]}", "Running stage '", 1, self.when - reference.starts[stage])
        if first or rng.random() < 0.4:
            return ("in the start", "", 0, rng.uniform(0, reference.startup))
        text, words, longest = rng.choice(
            [
                ("Running stage '", "in a stage", 5.0),
                ("Running stage '", "in a stage", 5.0),
                (": wrote ", "when a stage has published", 1.0),
                ("Updating lock file", "when DVC writes", 0.2),
            ]
        )
        return (words, text, rng.randint(1, 2), rng.uniform(0, longest))

    def _reach(self, run: Run, moment: tuple[str, str, int, float]) -> bool:
        """Waits for a moment. Returns whether it occurred before the program's end."""
        _, text, times, delay = moment
        try:
            if text and not run.wait_for(lambda: run.output().count(text) >= times, self.runner.limit):
                return False
        except TimeoutError as error:
            raise _DrillFailed(f"the run hung: {error}") from None
        reached = time.monotonic()
        came = run.wait_for(lambda: time.monotonic() - reached >= delay, delay + 60)
        if came:
            self._mark_recovered(run)
        return came

    def _mark_recovered(self, run: Run) -> None:
        """Marks the previous disturbance as recovered: this run has reached its own disturbance, or its end."""
        for hit in self.result.disturbances[-1:]:
            hit.recovered, hit.recovery_seconds = True, run.seconds

    def _victim(self, run: Run, target: str) -> DrillProcess | None:
        """Waits for a process of the target and returns it, or None if the program ends first."""
        if target in ("top", "group", "alone"):
            return DrillProcess(run.process.pid, " ".join(run.command))
        candidates: list[DrillProcess] = []

        def find() -> bool:
            running = {process.pid: process for process in marked(self.spec.name, self.sandbox.root)}
            descendants = [running[pid] for pid in children(run.process.pid) if pid in running]
            if target == "fork-server":  # its forks have the same command line, but are not session leaders
                descendants = [p for p in descendants if p.role == "fork-server" and _session(p.pid) == p.pid]
            elif target == "server":
                descendants = [p for p in descendants if p.role == "server"]
            candidates[:] = descendants
            return bool(candidates)

        try:
            return self.rng.choice(sorted(candidates, key=lambda p: p.pid)) if run.wait_for(find, 60) else None
        except TimeoutError:
            return None

    def _strike(self, run: Run, target: str, victim: DrillProcess, sign: signal.Signals) -> None:
        if target == "group" or (target == "alone" and sign == signal.SIGINT):  # as a terminal does for Ctrl-C
            if run.process.poll() is None:
                os.killpg(run.process.pid, sign)
        else:
            send(victim, sign, self.spec.name, self.sandbox.root)

    def _finish(self, run: Run, command: Sequence[str]) -> None:
        """Waits for the end of the last run. Repeats it if it failed while processes of the previous run still ran.

        Raises:
            _DrillFailed: the run failed or did not end.
        """
        status = self.end(run, self.runner.limit)
        if status not in (0, None) and self.result.disturbances:
            if not self.overlapped:
                raise _DrillFailed(f"the run after the disturbance ended with status {status}")
            self.result.warnings.append("a run was refused while the killed one was still ending")
            self.settle()
            run = self.start(command)
            status = self.end(run, self.runner.limit)
        if status != 0:
            raise _DrillFailed(f"the run after the disturbance ended with status {status}")
        self._mark_recovered(run)

    def _run_undisturbed(self) -> None:
        run = self.start()
        if self.end(run, self.runner.limit) != 0:
            raise _DrillFailed("flows.reproduce failed after the drill had recovered")

    def _alone(self, stage: int) -> Sequence[str]:
        """Returns the command that runs a stage on its own."""
        return stage_command(self.reference.stages[stage])

    def _stage(self, name: str) -> int:
        """Returns the number of the first stage with a name."""
        return next(n for n, stage in enumerate(self.reference.stages) if stage.split("@")[0] == name)

    # --- damaged files ------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self.restore(self._stage("pretrain"))
        run = self.start()
        pattern = ".lotlip/work/pretrain-*/*/checkpoints-*/step-*[0-9]"
        count = self.rng.randint(1, 2)
        if not run.wait_for(lambda: len(list(self.sandbox.project.glob(pattern))) >= count, self.runner.limit):
            raise _DrillFailed("training ended before there was a checkpoint")
        end_all(self.spec.name, self.sandbox.root)
        run.process.wait()
        newest = max(self.sandbox.project.glob(pattern), key=lambda path: path.name)
        files = sorted(newest.iterdir())
        weights = [path for path in files if path.name.startswith("weights")]
        # Weights are chosen more often: most of the optimizer's moments belong to words that do not occur, where damage
        # changes no output.
        path = self.rng.choice([*files, *weights * len(files)])
        self._damage(path, truncate=self.spec.how == "truncated")
        self.recover()
        self.compare()

    def _damage(self, path: Path, truncate: bool) -> None:
        data = bytearray(path.read_bytes())
        offset = self.rng.randrange(len(data))
        if truncate:
            del data[offset:]
        else:
            data[offset] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        name = path.relative_to(self.sandbox.project)
        self.hit(f"{'truncated at' if truncate else 'bit flipped in'} byte {offset} of {name}")

    def _flip(self) -> None:
        stage = self.rng.randrange(1, len(self.reference.stages))
        self.restore(stage)
        published = [name for name in fingerprints(self.sandbox.project) if not name.startswith("data/caption-store")]
        if "alone" in self.spec.how:  # a stage checks only its own inputs; DVC finds damage in other outputs
            published = [name for name in published if name.startswith(("data/", "models/"))]
        files = [self.sandbox.project / name for name in published if "TIME" not in name]
        self._damage(self.rng.choice([path for path in files if path.is_file() and path.stat().st_size]), False)
        if "alone" in self.spec.how:
            command = self._alone(stage)
            self.result.disturbances[-1].moment += f", then {command[2]}"
            run = self.start(command)
            status = self.end(run, self.runner.limit)
            if status == 0:
                self._check_published(self.reference.stages[stage])
            self.settle()
        self.recover()
        self.compare()

    def _check_published(self, stage: str) -> None:
        """Checks that a stage that succeeded on a damaged input has published the outputs of the reference run."""
        damaged = set(differences(self.reference.outputs, self.sandbox.project))
        single = {
            "ingest": "data/ingest/",
            "image-tower": "data/image-tower/",
            "shard": "data/shards/",
            "baselines": "metrics/baselines/",
        }
        name, _, item = stage.partition("@")
        prefixes = {**single, "caption": f"data/captions/{item}/", "pretrain": f"models/{item}/", "report": "report/"}
        prefix = prefixes.get(name, f"metrics/{item}")
        wrong = [line for line in damaged if line.startswith(f"different: {prefix}")]
        if wrong:
            self.result.problems.append(f"{stage} succeeded on a damaged input, and published {wrong[0]}")

    # --- concurrent runs ----------------------------------------------------------------------------------------------

    def _concurrent_runs(self) -> None:
        stage = self._stage("pretrain") if "pretrain" in self.spec.target else None
        self.restore(self.rng.randrange(len(self.reference.stages)) if stage is None else stage)
        command = self.runner.command if stage is None else self._alone(stage)
        gap = self.rng.choice([0.0, self.rng.uniform(0, 3), self.rng.uniform(0, self.reference.startup + 5)])
        first = self.start(command)
        first.wait_for(lambda: first.seconds >= gap, gap + 60)
        second = self.start(command)
        self.hit(f"a second {command[2]} after {gap:.1f} s")
        statuses = [self.end(run, self.runner.limit) for run in (first, second)]
        for run, status in zip((first, second), statuses, strict=True):
            if status and TRACEBACK in run.output():  # a run that is refused prints one line
                self.result.problems.append(f"one of the two failed with a traceback; see {run.log.name}")
        self.result.warnings.append(f"their exit statuses: {statuses}")
        if 0 not in statuses:
            self.result.problems.append(f"both runs failed: {statuses}")
        elif stage is not None:
            model = [line for line in differences(self.reference.outputs, self.sandbox.project) if ": models/" in line]
            self.result.problems += [f"after both runs: {line}" for line in model]
        self.settle()
        self.recover()
        self.compare()

    # --- a full disk --------------------------------------------------------------------------------------------------

    def _disk(self) -> None:
        if not self.runner.isolated:
            self.result.skipped = "mounting a small file system needs root"
            return
        stage = self.rng.randrange(len(self.reference.stages))
        self.restore(stage)
        mountpoint = {
            "project": self.sandbox.project,
            "scratch": self.sandbox.project / ".lotlip",
            "TMPDIR": self.sandbox.temporary,
        }[self.spec.target]
        done = self.runner.folder / "done" / mountpoint.relative_to(self.sandbox.root)
        used = _size(mountpoint)
        free = self.rng.randint(1 << 16, max(_size(done) - used, 1 << 17))
        copy = self.sandbox.root / "moved"
        mountpoint.mkdir(exist_ok=True)
        mountpoint.rename(copy)
        mountpoint.mkdir()
        isolation.mount_small(mountpoint, GIGABYTE)
        self.mounted.append(mountpoint)
        subprocess.run(["cp", "-a", f"{copy}/.", str(mountpoint)], check=True)
        shutil.rmtree(copy)
        isolation.resize(mountpoint, _used(mountpoint) + free)
        hit = self.hit(f"{free >> 10} KiB free in {self.spec.target}, {self.result.state}")
        run = self.start()
        status = self.end(run, self.runner.limit)
        hit.stopped_seconds = run.seconds
        if status == 0:
            self.result.warnings.append("the free space was sufficient")
        self.settle()
        isolation.resize(mountpoint, GIGABYTE)
        self.recover()
        self.compare()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _used(mountpoint: Path) -> int:
    usage = os.statvfs(mountpoint)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def _sockets(folder: str, names: list[str]) -> list[str]:
    """Returns the names of sockets and pipes, which cannot be copied."""
    return [name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())]


def stage_command(stage: str) -> Sequence[str]:
    """The command of a stage by its name in DVC, such as `caption@llava`, from dvc.yaml."""
    name, _, item = stage.partition("@")
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    _, *arguments = (definition.get("do") or definition)["cmd"].replace("${key}", item).split()
    return (sys.executable, *arguments)
