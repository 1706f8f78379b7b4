"""The drills: each disturbs the pipeline, runs the same command again without help, and compares the end."""

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
from benchmarks.drills.processes import Found, children, end_all, listening, marked, send, wait_until
from benchmarks.drills.world import ENDING_SECONDS, REPRODUCE, Place, Reference, Run
from lotlip.core.code import ROOT

KINDS = ("kill", "checkpoint", "flip", "two", "disk")
# An order in which every kind comes early, and kills most often.
_CYCLE = ("kill", "checkpoint", "two", "flip", "disk", *("kill",) * 14)
# What is hit by what. `alone` is a stage that is run by itself.
KILLS = (
    ("top", "SIGKILL"),
    ("warm", "SIGKILL"),
    ("group", "SIGINT"),
    ("child", "SIGKILL"),
    ("server", "SIGKILL"),
    ("alone", "SIGKILL"),
    ("group", "SIGTERM"),
    ("group", "SIGKILL"),
    ("top", "SIGTERM"),
    ("top", "SIGINT"),
    ("child", "SIGTERM"),
    ("warm", "SIGTERM"),
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
    """Which drill it is; everything random in it follows from seed and number.

    Attributes:
        number: of the drill.
        kind: one of KINDS.
        target: what is disturbed.
        how: the signal, or the kind of damage.
        seed: of the whole session.
    """

    number: int
    kind: str
    target: str
    how: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and marker."""
        return f"{self.number:03d}-{self.kind}-{self.target}-{self.how}".replace(" ", "-").replace(".", "-")

    def chance(self) -> random.Random:
        """The drill's own generator."""
        return random.Random(f"{self.seed}-{self.number}")


def plan(number: int, seed: int, kinds: Sequence[str] = KINDS) -> Spec:
    """The drill of a number: kinds and targets come in turn."""
    cycle = [kind for kind in _CYCLE if kind in kinds]
    kind = cycle[number % len(cycle)]
    before = number // len(cycle) * cycle.count(kind) + cycle[: number % len(cycle)].count(kind)
    pairs = KILLS if kind == "kill" else OTHERS[kind]
    target, how = pairs[before % len(pairs)]
    return Spec(number, kind, target, how, seed)


@dataclass
class Disturbance:
    """One disturbance and what came of it.

    Attributes:
        moment: when, in words.
        recovered: whether the same command, run again, ended well or got on to the next disturbance.
        stopped_seconds: from the disturbance until the program had ended.
        recovery_seconds: that the run after it took, to its end or the next disturbance.
    """

    moment: str
    recovered: bool = False
    stopped_seconds: float = 0.0
    recovery_seconds: float = 0.0


@dataclass
class Result:
    """What a drill found.

    Attributes:
        spec: the drill.
        state: that it started from.
        disturbances: in their order.
        problems: what failed, a line each; none: the drill passed.
        different: outputs that differ from the reference's at the end.
        left: what was left behind: processes, files, locks.
        warnings: what does not fail a drill.
        seconds: that it took.
        kept: folder of the failed drill's checkout and log.
        skipped: why it was not run.
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
        """Whether all outputs were compared and are the reference's."""
        return self.compared and not self.different

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return bool(self.skipped) or not (
            self.problems or self.left or not self.identical or not all(hit.recovered for hit in self.disturbances)
        )


class Bench:
    """A worker's place and the states that it starts drills from.

    Args:
        place: the folders in which drills run.
        folder: with the states `fresh` and `done`; failed drills are kept in it, too.
        reference: the undisturbed run.
        isolated: whether this process may mount.
        limit: seconds that a run may take before it counts as hanging.
        ending: seconds in which a stopped run and what it started must have ended.
        kills: at most in one drill.
        deadline: by the monotonic clock, after which a drill kills no more and only recovers.
        command: that is disturbed and run again.
    """

    def __init__(
        self,
        place: Place,
        folder: Path,
        reference: Reference,
        isolated: bool,
        limit: float,
        ending: float = ENDING_SECONDS,
        kills: int = 24,
        deadline: float = math.inf,
        command: Sequence[str] = REPRODUCE,
    ) -> None:
        self.place, self.folder, self.reference, self.isolated = place, folder, reference, isolated
        self.limit, self.ending, self.kills, self.deadline = limit, ending, kills, deadline
        self.command = command

    def run(self, spec: Spec) -> Result:
        """Runs one drill; keeps its checkout and log if it fails."""
        drill = Drill(self, spec)
        started = time.monotonic()
        try:
            drill.run()
        except _Failed as error:
            drill.result.problems.append(str(error))
        finally:
            end_all(spec.name, self.place.root)
            drill.clean_up()
        drill.result.seconds = time.monotonic() - started
        return drill.result


class _Failed(Exception):
    """A drill cannot go on; the message says why."""


class Drill:
    """One drill in progress.

    Args:
        bench: where.
        spec: which.
    """

    def __init__(self, bench: Bench, spec: Spec) -> None:
        self.bench, self.spec, self.place, self.reference = bench, spec, bench.place, bench.reference
        self.result = Result(spec)
        self.chance = spec.chance()
        self.folder = bench.folder / "failed" / spec.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs = 0
        self.mounted: list[Path] = []
        self.when = 0.0  # of the first kill, in seconds of the reference run
        self.overlapped = False  # whether the last run was started beside remains of the one before

    def run(self) -> None:
        """Runs it to its end."""
        {
            "kill": self._kill,
            "checkpoint": self._checkpoint,
            "flip": self._flip,
            "two": self._two,
            "disk": self._disk,
        }[self.spec.kind]()

    def clean_up(self) -> None:
        """Unmounts; keeps what is needed for a diagnosis if the drill failed."""
        if self.result.passed:
            shutil.rmtree(self.folder)
        else:
            self.result.kept = str(self.folder)
            shutil.copytree(self.place.project, self.folder / "project", symlinks=True)
            if self.place.temporary.is_dir():
                shutil.copytree(self.place.temporary, self.folder / "tmp", symlinks=True, ignore=_sockets)
        for place in self.mounted:
            isolation.unmount(place)

    # --- what all kinds share -----------------------------------------------------------------------------------------

    def restore(self, stage: int | None) -> None:
        """Puts the checkout to the moment before a stage; None: to that of a fresh clone."""
        if stage is None:
            self.place.restore(self.bench.folder / "fresh")
            self.result.state = "fresh"
        else:
            self.place.restore(self.bench.folder / "done")
            self.place.rewind(self.reference.stages[stage:])
            self.result.state = f"before {self.reference.stages[stage]}"

    def start(self, command: Sequence[str] | None = None) -> Run:
        """Starts a program, with a log of its own: what an earlier one has left may still write to its log."""
        self.runs += 1
        self.overlapped = bool(marked(self.spec.name, self.place.root))
        return self.place.start(command or self.bench.command, self.spec.name, self.folder / f"run-{self.runs}.log")

    def hit(self, moment: str) -> Disturbance:
        """Records a disturbance."""
        self.result.disturbances.append(Disturbance(moment))
        return self.result.disturbances[-1]

    def end(self, run: Run, seconds: float) -> int | None:
        """Waits for a program's end; one that does not end is recorded and killed, and gives None."""
        try:
            return run.wait(seconds)
        except TimeoutError as error:
            self.result.problems.append(f"the run {error} and was killed")
            end_all(self.spec.name, self.place.root)
            run.process.wait()
            return None

    def settle(self) -> None:
        """Waits until no process of the drill is left; those that stay are recorded and killed."""
        if not wait_until(lambda: not marked(self.spec.name, self.place.root), self.bench.ending):
            for process in marked(self.spec.name, self.place.root):
                self.result.left.append(f"process after {self.bench.ending:.0f} s: {process.role}: {process.command}")
            ports = listening(self.spec.name, self.place.root)
            self.result.left += [f"listens on port {port}" for port in ports]
            end_all(self.spec.name, self.place.root)

    def recover(self) -> None:
        """Runs the command to its end; it must end well, which is the last disturbance's recovery.

        Raises:
            _Failed: it does not.
        """
        run = self.start()
        status = self.end(run, self.bench.limit)
        if status != 0:
            raise _Failed(f"the run after the disturbance ended with status {status}")
        for hit in self.result.disturbances[-1:]:
            hit.recovered, hit.recovery_seconds = True, run.seconds

    def compare(self) -> None:
        """Looks at what is left when all is done."""
        self.settle()
        self.result.different = differences(self.reference.outputs, self.place.project)
        self.result.compared = True
        self.result.left += self.place.left_behind(self.reference)

    # --- kills --------------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        target, sign = self.spec.target, signal.Signals[self.spec.how]
        alone = target == "alone"
        stage = self._uniform_moment(alone)
        self.restore(stage)
        command: Sequence[str] = self._alone(stage or 0) if alone else self.bench.command
        for number in range(self.chance.randint((self.bench.kills + 1) // 2, self.bench.kills)):
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
            status = self.end(run, self.bench.limit)
            hit.stopped_seconds = time.monotonic() - struck
            if status == 0:  # what was hit was not needed
                hit.recovered = True
                break
            if self.chance.random() < 0.5:
                self.settle()
            if time.monotonic() > self.bench.deadline:
                run = self.start(command)
                break
        else:
            run = self.start(command)
        self._last(run, command)
        if alone:
            self.settle()
            self._undisturbed()
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("run-*.log"))}
        traced = [name for name, text in texts.items() if TRACEBACK in text]
        if traced:
            self.result.warnings.append(f"tracebacks in {', '.join(traced)}")
        self.compare()

    def _uniform_moment(self, alone: bool) -> int | None:
        """Chooses the state to start from: by a moment that is uniform over the reference run."""
        stages, reference = range(len(self.reference.stages)), self.reference
        if alone:
            return self.chance.choice(stages)
        self.when = self.chance.uniform(0, reference.seconds)
        reached = [stage for stage in stages if reference.starts[stage] <= self.when]
        return reached[-1] if reached else None

    def _moment(self, first: bool, alone: bool) -> tuple[str, str, int, float]:
        """When to strike: what it is in words, the text to wait for and how often, and the seconds after that."""
        reference, chance = self.reference, self.chance
        if alone:
            return ("in a stage alone", "", 0, chance.uniform(0, max(reference.startup, 5.0)))
        if first and self.when >= reference.startup:
            stage = max(s for s in range(len(reference.stages)) if reference.starts[s] <= self.when)
            return (f"in {reference.stages[stage]}", "Running stage '", 1, self.when - reference.starts[stage])
        if first or chance.random() < 0.4:
            return ("in the start", "", 0, chance.uniform(0, reference.startup))
        text, words, longest = chance.choice(
            [
                ("Running stage '", "in a stage", 5.0),
                ("Running stage '", "in a stage", 5.0),
                (": wrote ", "when a stage has published", 1.0),
                ("Updating lock file", "when DVC writes", 0.2),
            ]
        )
        return (words, text, chance.randint(1, 2), chance.uniform(0, longest))

    def _reach(self, run: Run, moment: tuple[str, str, int, float]) -> bool:
        """Waits for a moment; returns whether it came before the program's end."""
        _, text, times, delay = moment
        try:
            if text and not run.wait_for(lambda: run.output().count(text) >= times, self.bench.limit):
                return False
        except TimeoutError as error:
            raise _Failed(f"the run hung: {error}") from None
        reached = time.monotonic()
        came = run.wait_for(lambda: time.monotonic() - reached >= delay, delay + 60)
        if came:
            self._got_on(run)
        return came

    def _got_on(self, run: Run) -> None:
        """The run has got to its own disturbance, so the one before is recovered from."""
        for hit in self.result.disturbances[-1:]:
            hit.recovered, hit.recovery_seconds = True, run.seconds

    def _victim(self, run: Run, target: str) -> Found | None:
        """The process to strike, as soon as there is one; None if the program ends before."""
        if target in ("top", "group", "alone"):
            return Found(run.process.pid, " ".join(run.command))
        chosen: list[Found] = []

        def look() -> bool:
            living = {process.pid: process for process in marked(self.spec.name, self.place.root)}
            descendants = [living[pid] for pid in children(run.process.pid) if pid in living]
            if target == "warm":
                descendants = [p for p in descendants if p.role == "warm" and _session(p.pid) == p.pid]
            elif target == "server":
                descendants = [p for p in descendants if p.role == "server"]
            chosen[:] = descendants
            return bool(chosen)

        try:
            return self.chance.choice(sorted(chosen, key=lambda p: p.pid)) if run.wait_for(look, 60) else None
        except TimeoutError:
            return None

    def _strike(self, run: Run, target: str, victim: Found, sign: signal.Signals) -> None:
        if target == "group" or (target == "alone" and sign == signal.SIGINT):  # as a terminal does for Ctrl-C
            if run.process.poll() is None:
                os.killpg(run.process.pid, sign)
        else:
            send(victim, sign, self.spec.name, self.place.root)

    def _last(self, run: Run, command: Sequence[str]) -> None:
        """Waits for the end of the last run. One that met what the run before it left running may be started again.

        Raises:
            _Failed: it did not end well.
        """
        status = self.end(run, self.bench.limit)
        if status not in (0, None) and self.result.disturbances:
            if not self.overlapped:
                raise _Failed(f"the run after the disturbance ended with status {status}")
            self.result.warnings.append("a run was refused while the killed one was still ending")
            self.settle()
            run = self.start(command)
            status = self.end(run, self.bench.limit)
        if status != 0:
            raise _Failed(f"the run after the disturbance ended with status {status}")
        self._got_on(run)

    def _undisturbed(self) -> None:
        run = self.start()
        if self.end(run, self.bench.limit) != 0:
            raise _Failed("flows.reproduce failed after all was over")

    def _alone(self, stage: int) -> Sequence[str]:
        """The command of a stage."""
        return stage_command(self.reference.stages[stage])

    def _stage(self, name: str) -> int:
        """The number of the first stage of a name."""
        return next(n for n, stage in enumerate(self.reference.stages) if stage.split("@")[0] == name)

    # --- damaged files ------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self.restore(self._stage("pretrain"))
        run = self.start()
        pattern = ".lotlip/work/pretrain-*/*/checkpoints-*/step-*[0-9]"
        least = self.chance.randint(1, 2)
        if not run.wait_for(lambda: len(list(self.place.project.glob(pattern))) >= least, self.bench.limit):
            raise _Failed("training ended before there was a checkpoint")
        end_all(self.spec.name, self.place.root)
        run.process.wait()
        newest = max(self.place.project.glob(pattern), key=lambda path: path.name)
        files = sorted(newest.iterdir())
        weights = [path for path in files if path.name.startswith("weights")]
        # most of what is in the moments belongs to words that do not occur, where damage changes no output
        path = self.chance.choice([*files, *weights * len(files)])
        self._damage(path, truncate=self.spec.how == "truncated")
        self.recover()
        self.compare()

    def _damage(self, path: Path, truncate: bool) -> None:
        data = bytearray(path.read_bytes())
        place = self.chance.randrange(len(data))
        if truncate:
            del data[place:]
        else:
            data[place] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)
        name = path.relative_to(self.place.project)
        self.hit(f"{'truncated at' if truncate else 'bit flipped in'} byte {place} of {name}")

    def _flip(self) -> None:
        stage = self.chance.randrange(1, len(self.reference.stages))
        self.restore(stage)
        published = [name for name in fingerprints(self.place.project) if not name.startswith("data/caption-store")]
        if "alone" in self.spec.how:  # what a stage reads by itself; the rest is for DVC to find
            published = [name for name in published if name.startswith(("data/", "models/"))]
        files = [self.place.project / name for name in published if "TIME" not in name]
        self._damage(self.chance.choice([path for path in files if path.is_file() and path.stat().st_size]), False)
        if "alone" in self.spec.how:
            command = self._alone(stage)
            self.result.disturbances[-1].moment += f", then {command[2]}"
            run = self.start(command)
            status = self.end(run, self.bench.limit)
            if status == 0:
                self._nothing_false(self.reference.stages[stage])
            self.settle()
        self.recover()
        self.compare()

    def _nothing_false(self, stage: str) -> None:
        """A stage that ended well although its input is damaged must have published what it should."""
        damaged = set(differences(self.reference.outputs, self.place.project))
        own = {"ingest": "data/ingest/", "image-tower": "data/image-tower/", "shard": "data/shards/"}
        name, _, item = stage.partition("@")
        prefix = {**own, "caption": f"data/captions/{item}/", "pretrain": f"models/{item}/", "report": "report/"}
        begins = prefix.get(name, f"metrics/{item}")
        wrong = [line for line in damaged if line.startswith(f"different: {begins}")]
        if wrong:
            self.result.problems.append(f"{stage} ended well on damaged input, and published {wrong[0]}")

    # --- two at once --------------------------------------------------------------------------------------------------

    def _two(self) -> None:
        stage = self._stage("pretrain") if "pretrain" in self.spec.target else None
        self.restore(self.chance.randrange(len(self.reference.stages)) if stage is None else stage)
        command = self.bench.command if stage is None else self._alone(stage)
        gap = self.chance.choice([0.0, self.chance.uniform(0, 3), self.chance.uniform(0, self.reference.startup + 5)])
        first = self.start(command)
        first.wait_for(lambda: first.seconds >= gap, gap + 60)
        second = self.start(command)
        self.hit(f"a second {command[2]} after {gap:.1f} s")
        statuses = [self.end(run, self.bench.limit) for run in (first, second)]
        for run, status in zip((first, second), statuses, strict=True):
            if status and TRACEBACK in run.output():  # a refusal is one clear line
                self.result.problems.append(f"one of the two failed with a traceback; see {run.log.name}")
        self.result.warnings.append(f"they ended with {statuses}")
        if 0 not in statuses:
            self.result.problems.append(f"neither of the two ended well: {statuses}")
        elif stage is not None:
            model = [line for line in differences(self.reference.outputs, self.place.project) if ": models/" in line]
            self.result.problems += [f"after both had ended: {line}" for line in model]
        self.settle()
        self.recover()
        self.compare()

    # --- a full disk --------------------------------------------------------------------------------------------------

    def _disk(self) -> None:
        if not self.bench.isolated:
            self.result.skipped = "mounting a small file system needs root"
            return
        stage = self.chance.randrange(len(self.reference.stages))
        self.restore(stage)
        place = {
            "project": self.place.project,
            "scratch": self.place.project / ".lotlip",
            "TMPDIR": self.place.temporary,
        }[self.spec.target]
        done = self.bench.folder / "done" / place.relative_to(self.place.root)
        used = _size(place)
        room = self.chance.randint(1 << 16, max(_size(done) - used, 1 << 17))
        copy = self.place.root / "moved"
        place.mkdir(exist_ok=True)
        place.rename(copy)
        place.mkdir()
        isolation.mount_small(place, GIGABYTE)
        self.mounted.append(place)
        subprocess.run(["cp", "-a", f"{copy}/.", str(place)], check=True)
        shutil.rmtree(copy)
        isolation.resize(place, _used(place) + room)
        hit = self.hit(f"{room >> 10} KiB free in {self.spec.target}, {self.result.state}")
        run = self.start()
        status = self.end(run, self.bench.limit)
        hit.stopped_seconds = run.seconds
        if status == 0:
            self.result.warnings.append("the room was enough")
        self.settle()
        isolation.resize(place, GIGABYTE)
        self.recover()
        self.compare()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _used(place: Path) -> int:
    usage = os.statvfs(place)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def _sockets(folder: str, names: list[str]) -> list[str]:
    """Names that cannot be copied: sockets and pipes."""
    return [name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())]


def stage_command(stage: str) -> Sequence[str]:
    """The command of a stage by its name in DVC, such as `caption@llava`, from dvc.yaml."""
    name, _, item = stage.partition("@")
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    _, *arguments = (definition.get("do") or definition)["cmd"].replace("${key}", item).split()
    return (sys.executable, *arguments)
