"""What every stage's flow shares: scratch that survives a kill, a clock, fan-out over units, publishing, the record."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from prefect import Flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.settings import PREFECT_API_URL
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.runtime import scratch
from flows.runtime.scratch import SCRATCH, StageFailed
from lotlip.config.outputs import outputs, prepare
from lotlip.config.params import Params, load_params
from lotlip.core import files
from lotlip.core.caches import lock
from lotlip.core.checks import Check, GateFailed
from lotlip.core.code import code_hash
from lotlip.core.console import explain
from lotlip.core.files import (
    atomic_write,
    check_files,
    publish,
    remove,
    sha256_files,
    sha256_json,
    write_record,
)
from lotlip.data.index import Totals
from lotlip.data.records import DATA_DOCS, Failure, UnitReport, Unusable
from lotlip.data.stage_record import StageRecord

# Four megabytes of films and fonts that Great Expectations puts beside each of its pages.
_DECORATION = shutil.ignore_patterns("*.gif", "fonts")
T = TypeVar("T")


class Clock:
    """Where a stage's time went: orchestration by part, everything else is work."""

    def __init__(self) -> None:
        self.started = time.time()
        self.parts: dict[str, float] = {}
        self.called = 0.0

    def call(self) -> None:
        """Marks the moment the flow is called: all before it, since the process started, was imports."""
        self.started = psutil.Process().create_time()
        self.parts = {"imports": self.seconds()}
        self.called = time.monotonic()

    def begin(self) -> None:
        """Marks the moment the flow's body begins: since `call`, it was Prefect's turn."""
        if self.called:
            self.add("prefect", time.monotonic() - self.called)
            self.called = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the block's time to a part of orchestration: "imports", "prefect", "gate" or "mlflow"."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - start)

    def add(self, part: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def seconds(self) -> float:
        """Since the process started."""
        return time.time() - self.started


_clock = Clock()


class Stage:
    """One run of a stage. No other process runs the same one at the same time.

    Before it does anything, it checks that all it will publish replaces nothing but its own earlier output.

    Args:
        name: of the stage: "ingest", "pretrain", …
        params: the whole configuration.
        settings: the part of it that decides the outputs.
        inputs: the hashes of what it reads.
        item: the instance of a stage that fans out in dvc.yaml: an ablation or captioner.

    Attributes:
        fingerprint: of settings, inputs and code. Scratch is kept under it, so that work killed half-way goes on where
            it was, and only there: other settings never find it.
        scratch: what is not published yet. `out` in it becomes the stage's output, whole.

    Raises:
        Locked: another process runs it.
        ForeignFileError: a file or folder that no stage wrote is where this one would write.
    """

    def __init__(
        self, name: str, params: Params, settings: Any, inputs: dict[str, str] | None = None, item: str | None = None
    ) -> None:
        self.name, self.item, self.params = name, item, params
        self.clock = _clock
        self.clock.begin()
        self.log = get_run_logger()
        self.label = claim(params, name, item)
        self.fingerprint = sha256_json({"settings": settings, "inputs": inputs or {}, "code": code_hash(name)})
        self.scratch = SCRATCH / "work" / self.label / self.fingerprint[:16]
        self.out = self.scratch / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.gate_report = SCRATCH / "gates" / self.label

    def fan_out(
        self,
        units: Sequence[T],
        work: Callable[[T], list[UnitReport]],
        name: Callable[[T], str],
        size: Callable[[T], int],
    ) -> list[UnitReport]:
        """Runs `work` on every unit as a Prefect task, some at a time, each retried.

        A unit whose last try fails is reported with all its items failed: the gate decides whether the stage may go on.

        Args:
            units: pieces of work that are done whole.
            work: does one; returns at once what a finished unit's markers say. Where units run in other processes,
                it is sent to them: a function of a module or a small frozen object, no closure.
            name: of a unit.
            size: items in a unit.

        Returns:
            What `work` returned, in the order of the units.

        Raises:
            OSError: the disk is full or read-only: no other unit would fare better.
            Unusable: as a unit says of what all of them need.
        """
        settings = self.params.compute
        futures = {}
        for unit in units:
            run = _run_unit.with_options(
                task_run_name=f"{self.label}: {name(unit)}",
                retries=settings.retries,
                retry_delay_seconds=settings.retry_delay_seconds,
                retry_condition_fn=_may_pass,
            )
            futures[run.submit(_Opaque(partial(work, unit)))] = unit
        reports: dict[str, list[UnitReport]] = {}
        started = time.monotonic()
        for future in as_completed(list(futures)):
            unit = futures[future]
            try:
                reports[name(unit)] = future.result()
            except Exception as error:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
                if full or isinstance(error, Unusable):
                    raise
                self.log.warning("%s: %s failed for good: %s", self.label, name(unit), error)
                failures = [Failure(f"{name(unit)}#{i}", name(unit), repr(error), "unit") for i in range(size(unit))]
                reports[name(unit)] = [UnitReport(name(unit), size(unit), 0, "", 0, failures)]
            left = (time.monotonic() - started) / len(reports) * (len(futures) - len(reports))
            self.log.info("%s: %d of %d units, %.0f s left", self.label, len(reports), len(futures), left)
        return [report for unit in units for report in reports[name(unit)]]

    def publish(self, out: Path) -> None:
        """Moves the scratch's output into its place atomically, and removes what other settings left behind."""
        publish(self.out, out)
        self.discard()
        files.fill_hash_cache(out, hash_cache_of(out))
        self.log.info("%s: wrote %s", self.label, out)

    def discard(self) -> None:
        """Removes the stage's scratch, other settings' too: it ended well."""
        remove(self.scratch.parent)

    def record(
        self,
        samples: int,
        checks: Sequence[Check],
        index: Totals | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Writes what the report says of the stage: time, throughput, counts, what the gate checked and its pages.

        Args:
            samples: images (or texts, or training samples) that went through.
            checks: the gate's.
            index: the index.json that the stage wrote; None where a stage has no items.
            notes: anything else, by name.
        """
        seconds, orchestration = self.clock.seconds(), dict(self.clock.parts)
        work = max(seconds - sum(orchestration.values()), 1e-6)
        record = StageRecord(
            stage=self.name,
            name=self.item,
            seconds=seconds,
            work_seconds=work,
            samples=samples,
            samples_per_second=samples / work,
            orchestration_seconds=orchestration,
            counts=index.model_dump(include={"read", "written", "failed"}) if index else {},
            failure_kinds=index.failure_kinds if index else {},
            gate=list(checks),
            notes=notes or {},
        )
        stages = self.params.paths.stages
        record.write(stages / f"{self.label}.json")
        pages = self.gate_report / "data_docs"
        if pages.is_dir():
            copy = stages / DATA_DOCS / self.label
            with atomic_write(copy) as partial:
                shutil.copytree(pages, partial, ignore=_DECORATION)
                write_record(partial, copy)


def claim(params: Params, name: str, item: str | None = None) -> str:
    """Locks a stage until this process ends, and checks that it replaces nothing but its own earlier output.

    Args:
        params: the whole configuration.
        name: of the stage.
        item: of the stage, if it fans out.

    Returns:
        What files of this stage are called.

    Raises:
        Locked: another process runs it.
        ForeignFileError: a file or folder that no stage wrote is where this one would write.
        StageFailed: scratch is a link.
        ValueError: a path leads out of the project.
    """
    label = f"{name}-{item}" if item else name
    check_scratch()
    hold(SCRATCH / "locks" / f"{label}.lock", f"stage {label}")
    params.paths.check_links(Path())
    prepare(outputs(params.paths, name, item))
    return label


class _Opaque:
    """A unit's work, in this folder, for any process of any machine that has the folder.

    It hides the work's contents from Prefect, which would search a task's arguments for futures.
    """

    def __init__(self, work: Callable[[], list[UnitReport]]) -> None:
        self.work = work
        self.folder = Path.cwd()

    def call(self) -> list[UnitReport]:
        if Path.cwd() != self.folder:  # a cluster's worker starts elsewhere
            os.chdir(self.folder)
        return self.work()


@task(name="unit", cache_policy=NO_CACHE)
def _run_unit(work: _Opaque) -> list[UnitReport]:
    return work.call()


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether what made a unit fail may be gone at the next try."""
    return not isinstance(state.result(raise_on_failure=False), Unusable)


def hash_of(index: Path) -> str:
    """The hash of a published folder's contents, from its index.json.

    Raises:
        StageFailed: there is none; the message names the command to run.
        Damaged: a file in the folder is not what its stage wrote.
    """
    if not index.is_file():
        raise StageFailed(f"{index} is not there; run `dvc repro` so that the stage that writes it runs first")
    check_input(index.parent)
    return sha256_files([index])


def check_input(folder: Path, within: str = "") -> None:
    """Compares a folder that another stage published with its record; large files only if they were touched.

    Args:
        folder: that is read.
        within: only files whose names begin with this.

    Raises:
        Damaged: a file is missing or has other contents.
    """
    if folder.is_dir():
        check_files(folder, within, None if within else hash_cache_of(folder))


def hash_cache_of(folder: Path) -> Path:
    """Where it is remembered which files of a published folder were hashed."""
    return SCRATCH / "checked" / f"{sha256_json(folder.absolute().as_posix())[:16]}.json"


def check_scratch() -> None:
    """Checks that scratch is in the project.

    Raises:
        StageFailed: it is a link: what is in it would not be known to be scratch.
    """
    if SCRATCH.is_symlink():
        raise StageFailed(
            f"{SCRATCH} is a link, but scratch must be a folder of the project; remove the link, and mount another "
            "disk there if this one is too small"
        )


_held: dict[Path, ExitStack] = {}


def hold(path: Path, what: str) -> None:
    """Holds a lock until this process ends, or `release` is called.

    Args:
        path: of the lock file.
        what: is locked, for the message.

    Raises:
        Locked: another process holds it.
    """
    path = path.absolute()
    if path not in _held:
        with ExitStack() as stack:
            stack.enter_context(lock(path, what))
            _held[path] = stack.pop_all()


def release() -> None:
    """Frees all locks that `hold` took."""
    while _held:
        _held.popitem()[1].close()


EXPECTED = (*scratch.EXPECTED, GateFailed)


class _NoTraceback(logging.Filter):
    """Keeps Prefect from printing a traceback for what `main` says in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(error, (*EXPECTED, httpx.TransportError))


class _OneLine(logging.Filter):
    """Says once, in one line, that Prefect's server has ended, instead of a traceback for each event."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "EventsWorker" not in record.getMessage():
            return True
        if self.said:
            return False
        self.said = True
        record.msg, record.args = f"{no_answer()}; the stage goes on, and its page will lack what happens now", ()
        record.exc_info = record.exc_text = None
        return True


def unreachable(error: Exception) -> bool:
    """Whether an error of Prefect's client is that its server does not answer."""
    return isinstance(error, httpx.TransportError) or str(error).startswith("Failed to reach API")


def no_answer() -> str:
    """That Prefect's server does not answer, with its address."""
    return f"Prefect's server at {(PREFECT_API_URL.value() or '').removesuffix('/api')} does not answer"


def with_tracebacks() -> bool:
    """Whether LOTLIP_TRACEBACK asks for tracebacks; where it does not, Prefect prints none for what a user can mend."""
    asked = bool(os.environ.get("LOTLIP_TRACEBACK"))
    if not asked:
        for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
            logging.getLogger(name).addFilter(_NoTraceback())
        logging.getLogger("prefect._internal.concurrency").addFilter(_OneLine())
        logging.raiseExceptions = False  # or each log that Prefect's server does not take prints an error of its own
    return asked


@contextmanager
def on_threads(params: Params) -> Iterator[Any]:
    """Units run in threads of this process, `compute.workers` at a time."""
    yield ThreadPoolTaskRunner(max_workers=params.compute.workers)


def main(
    stage: Flow[..., Any],
    *arguments: str,
    running: Callable[[Params], AbstractContextManager[Any]] = on_threads,
) -> None:
    """Runs a stage's flow as a program, `python -m flows.STAGE [ITEM]`; a failure is status 1 and one clear line.

    Args:
        stage: the flow.
        arguments: of the flow.
        running: gives Prefect's runner of units, for the time that the flow takes.
    """
    from flows.runtime.servers import prefect_for_program

    tracebacks = with_tracebacks()
    finished = False
    missing = ""  # names the server; its address is a setting of the block below

    @wraps(stage.fn)  # Prefect names a run by the parameters
    def body(*given: Any, **named: Any) -> None:
        nonlocal finished
        stage.fn(*given, **named)
        finished = True

    name = " ".join([stage.name, *arguments])
    try:
        params = load_params()
        if set(arguments) <= {*params.names, *params.caption.captioners}:  # the flow refuses what is not there
            claim(params, stage.name, *arguments)  # before Prefect's server starts, which takes seconds
        with prefect_for_program(), running(params) as runner:
            missing = no_answer()
            _clock.call()
            configured = stage.with_options(task_runner=runner)
            configured.fn = body
            configured(*arguments)
    except EXPECTED as error:
        if tracebacks:
            raise
        sys.exit(f"error in {name}: {explain(error)}")
    except (httpx.TransportError, RuntimeError) as error:
        if not unreachable(error):
            raise
        if finished:  # all is published; only the run's last state could not be sent
            print(f"warning in {name}: {missing}; the stage has finished, and its page shows it as running")
            return
        if tracebacks:
            raise
        sys.exit(f"error in {name}: {missing}; start it and run again: finished units are kept")
    finally:
        release()
