"""The parts that the flows of all stages share: resumable scratch, a clock, fan-out over units, publishing, records."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

from flows.runtime import scratch
from flows.runtime.edits import Inputs
from flows.runtime.runners import Submit, UnitLost, task_runner
from flows.runtime.scratch import SCRATCH, StageFailed
from flows.runtime.unit_work import UnitWork
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
from lotlip.data.records import DATA_DOCS, Failure, NonRetryableError, UnitReport
from lotlip.data.stage_record import StageRecord

# Great Expectations adds 4 MB of animations and fonts to each of its sites.
_PAGE_MEDIA = shutil.ignore_patterns("*.gif", "fonts")
T = TypeVar("T")


class Clock:
    """Measures the time that a stage spends on each part of orchestration. The rest of its time is work."""

    def __init__(self) -> None:
        self.started = time.time()
        self.parts: dict[str, float] = {}
        self.called = 0.0

    def call(self) -> None:
        """Marks the call of the flow. The time since the start of the process counts as imports."""
        self.started = psutil.Process().create_time()
        self.parts = {"imports": self.seconds()}
        self.called = time.monotonic()

    def begin(self) -> None:
        """Marks the start of the flow's body. The time since `call` counts as Prefect's."""
        if self.called:
            self.add("prefect", time.monotonic() - self.called)
            self.called = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the duration of the block to a part of orchestration: "imports", "prefect", "gate" or "mlflow"."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - start)

    def add(self, part: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def seconds(self) -> float:
        """Returns the time since the process started."""
        return time.time() - self.started


_clock = Clock()


class Stage:
    """One run of a stage. A lock prevents a second process from running the same stage.

    Before any work it checks that it will replace only its own earlier outputs.

    Args:
        name: name of the stage: "ingest", "pretrain", …
        params: the whole configuration.
        settings: the part of the configuration that decides the outputs.
        inputs: hashes of the inputs by name.
        item: the item of a stage with a `foreach` in dvc.yaml: an ablation or captioner.

    Attributes:
        started_with: parameters and code of the stage.
        fingerprint: hash of settings, inputs and code. It names the scratch folder, so that an interrupted stage
            resumes its own work, and never that of other settings.
        scratch: folder of unpublished work. Its subfolder `out` is published atomically as the stage's output.

    Raises:
        Locked: another process runs the stage.
        ForeignFileError: a file or folder that no stage wrote is in the place of an output.
    """

    def __init__(
        self, name: str, params: Params, settings: Any, inputs: dict[str, str] | None = None, item: str | None = None
    ) -> None:
        self.name, self.item, self.params = name, item, params
        self.clock = _clock
        self.clock.begin()
        self.log = get_run_logger()
        self.label = claim(params, name, item)
        self.started_with = Inputs(name, item)
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
        on_gpu: bool = False,
    ) -> list[UnitReport]:
        """Runs `work` on every unit as a Prefect task of `compute.task_runner`, with retries.

        If the last attempt at a unit fails, all items of the unit are reported as failures. The gate decides whether
        the stage continues.

        Args:
            units: the work units; each is written atomically.
            work: processes a unit, or returns the stored reports of a finished one. It must be picklable and small,
                because it is sent to other processes with each unit: a frozen object with settings and paths.
            name: returns the name of a unit.
            size: returns the number of items in a unit.
            on_gpu: whether units run models.

        Returns:
            The reports of all units, in the order of `units`.

        Raises:
            OSError: the disk is full or read-only, so other units would fail too.
            NonRetryableError: a resource that all units need cannot be used.
            StageFailed: the packages of the task runner are not installed.
        """
        settings = self.params.compute
        self.log.info("%s: %d units, task runner %s", self.label, len(units), settings.task_runner)
        with ExitStack() as stack:
            with self.clock.measure("prefect"):
                submit = stack.enter_context(task_runner(settings, on_gpu))
            reports = self._finish(submit, units, work, name, size)
        return [report for unit in units for report in reports[name(unit)]]

    def _finish(
        self,
        submit: Submit,
        units: Sequence[T],
        work: Callable[[T], list[UnitReport]],
        name: Callable[[T], str],
        size: Callable[[T], int],
    ) -> dict[str, list[UnitReport]]:
        """Submits all units and waits for them. Returns their reports by the name of the unit."""
        settings = self.params.compute
        futures = {}
        for unit in units:
            run = run_unit.with_options(
                task_run_name=f"{self.label}: {name(unit)}",
                retries=settings.retries,
                retry_delay_seconds=settings.retry_delay_seconds,
                retry_condition_fn=_is_retryable,
            )
            futures[submit(run, UnitWork(partial(work, unit)))] = unit
        reports: dict[str, list[UnitReport]] = {}
        started = time.monotonic()
        for future in as_completed(list(futures)):
            unit = futures[future]
            try:
                reports[name(unit)] = future.result()
            except Exception as error:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
                if full or isinstance(error, NonRetryableError):
                    raise
                self.log.warning("%s: %s failed on its last attempt: %s", self.label, name(unit), error)
                failures = [Failure(f"{name(unit)}#{i}", name(unit), repr(error), "unit") for i in range(size(unit))]
                reports[name(unit)] = [UnitReport(name(unit), size(unit), 0, "", 0, failures)]
            left = (time.monotonic() - started) / len(reports) * (len(futures) - len(reports))
            self.log.info("%s: %d of %d units, %.0f s left", self.label, len(reports), len(futures), left)
        return reports

    def publish(self, out: Path) -> None:
        """Publishes `out` of the scratch folder atomically, and removes the scratch of all settings.

        Raises:
            StageFailed: parameters or code were edited during the run.
        """
        self.started_with.check()
        publish(self.out, out)
        self.discard()
        files.fill_hash_cache(out, hash_cache_of(out))
        self.log.info("%s: wrote %s", self.label, out)

    def discard(self) -> None:
        """Removes the stage's scratch, including that of other settings."""
        remove(self.scratch.parent)

    def record(
        self,
        samples: int,
        checks: Sequence[Check],
        index: Totals | None = None,
        notes: dict[str, Any] | None = None,
        processed: int | None = None,
    ) -> None:
        """Writes the stage record for the report: time, throughput, counts, the gate's checks and its pages.

        Args:
            samples: number of images, texts or training samples of the output.
            checks: the gate's checks.
            index: the index.json that the stage wrote; None for a stage without items.
            notes: further values by name.
            processed: number of samples that this run processed, for the throughput; None: all.

        Raises:
            StageFailed: parameters or code were edited during the run.
        """
        self.started_with.check()
        seconds, orchestration = self.clock.seconds(), dict(self.clock.parts)
        work = max(seconds - sum(orchestration.values()), 1e-6)
        record = StageRecord(
            stage=self.name,
            name=self.item,
            seconds=seconds,
            work_seconds=work,
            samples=samples,
            samples_per_second=(samples if processed is None else processed) / work,
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
                shutil.copytree(pages, partial, ignore=_PAGE_MEDIA)
                write_record(partial, copy)


def claim(params: Params, name: str, item: str | None = None) -> str:
    """Locks a stage until this process ends, and checks that it will replace only its own earlier outputs.

    Args:
        params: the whole configuration.
        name: name of the stage.
        item: the item of a stage with a `foreach` in dvc.yaml.

    Returns:
        The label of the stage, `NAME` or `NAME-ITEM`, which names its files.

    Raises:
        Locked: another process runs the stage.
        ForeignFileError: a file or folder that no stage wrote is in the place of an output.
        StageFailed: the scratch folder is a link.
        ValueError: a path leads out of the project.
    """
    label = f"{name}-{item}" if item else name
    check_scratch()
    hold_lock(SCRATCH / "locks" / f"{label}.lock", f"stage {label}")
    params.paths.check_links(Path())
    prepare(outputs(params.paths, name, item))
    return label


@task(name="unit", cache_policy=NO_CACHE)
def run_unit(work: UnitWork) -> list[UnitReport]:
    return work.call()


def _is_retryable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Returns whether a failed unit may succeed on the next attempt."""
    return not isinstance(state.result(raise_on_failure=False), (NonRetryableError, UnitLost))


def hash_of(index: Path) -> str:
    """Returns the hash of a published folder, after checking its files.

    Args:
        index: a file that identifies the folder's contents, such as its index.json.

    Raises:
        StageFailed: the file is missing; the message names the command to run.
        Damaged: a file in the folder is not what its stage wrote.
    """
    if not index.is_file():
        raise StageFailed(f"{index} is missing; run `dvc repro`, which first runs the stage that writes it")
    check_input(index.parent)
    return sha256_files([index])


def check_input(folder: Path, within: str = "") -> None:
    """Compares the files of a published folder with its record. Large files are hashed only if they were touched.

    Args:
        folder: the folder that a stage reads.
        within: only files whose names begin with this are checked.

    Raises:
        Damaged: a file is missing or has other contents.
    """
    if folder.is_dir():
        check_files(folder, within, None if within else hash_cache_of(folder))


def hash_cache_of(folder: Path) -> Path:
    """Returns the file that caches the hashes of a published folder's files."""
    return SCRATCH / "checked" / f"{sha256_json(folder.absolute().as_posix())[:16]}.json"


def check_scratch() -> None:
    """Checks that the scratch folder is in the project.

    Raises:
        StageFailed: it is a link, so the files in it may not be scratch.
    """
    if SCRATCH.is_symlink():
        raise StageFailed(
            f"{SCRATCH} is a link, but it must be a folder in the project; remove the link, and mount another disk "
            "there if this one is too small"
        )


_held: dict[Path, ExitStack] = {}


def hold_lock(path: Path, what: str) -> None:
    """Holds a lock until this process ends or calls `release_locks`.

    Args:
        path: path of the lock file.
        what: what the lock protects, for the error message.

    Raises:
        Locked: another process holds the lock.
    """
    path = path.absolute()
    if path not in _held:
        with ExitStack() as stack:
            stack.enter_context(lock(path, what))
            _held[path] = stack.pop_all()


def release_locks() -> None:
    """Releases all locks that `hold_lock` acquired."""
    while _held:
        _held.popitem()[1].close()


EXPECTED = (*scratch.EXPECTED, GateFailed)


class _TracebackFilter(logging.Filter):
    """Keeps Prefect from printing tracebacks of errors that `main` prints as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(error, (*EXPECTED, httpx.TransportError))


class _ServerLossFilter(logging.Filter):
    """Logs one line when Prefect's server has ended, instead of a traceback for each event."""

    logged = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "EventsWorker" not in record.getMessage():
            return True
        if self.logged:
            return False
        self.logged = True
        record.msg = f"{no_answer_message()}; the stage continues, and its page in Prefect will lack later events"
        record.args = ()
        record.exc_info = record.exc_text = None
        return True


def is_unreachable(error: Exception) -> bool:
    """Returns whether an error of Prefect's client means that its server does not answer."""
    return isinstance(error, httpx.TransportError) or str(error).startswith("Failed to reach API")


def no_answer_message() -> str:
    """Returns the message that Prefect's server does not answer, with its address."""
    return f"Prefect's server at {(PREFECT_API_URL.value() or '').removesuffix('/api')} does not answer"


def configure_tracebacks() -> bool:
    """Returns whether LOTLIP_TRACEBACK asks for tracebacks. If not, Prefect prints none for errors of the user."""
    enabled = bool(os.environ.get("LOTLIP_TRACEBACK"))
    if not enabled:
        for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
            logging.getLogger(name).addFilter(_TracebackFilter())
        logging.getLogger("prefect._internal.concurrency").addFilter(_ServerLossFilter())
        logging.raiseExceptions = False  # otherwise each record that Prefect's server does not accept prints an error
    return enabled


def main(stage: Flow[..., Any], *arguments: str) -> None:
    """Runs a stage's flow as a program, `python -m flows STAGE [ITEM]`. A failure prints one line and exits with 1.

    Args:
        stage: the flow.
        arguments: arguments of the flow.
    """
    from flows.runtime.servers import prefect_for_program

    tracebacks = configure_tracebacks()
    finished = False
    no_answer = ""  # has the server's address, which is known only in the block below

    @wraps(stage.fn)  # Prefect derives the run's name from the signature
    def body(*given: Any, **named: Any) -> None:
        nonlocal finished
        stage.fn(*given, **named)
        finished = True

    name = " ".join([stage.name, *arguments])
    try:
        params = load_params()
        if set(arguments) <= {*params.names, *params.caption.captioners}:  # the flow rejects unknown names
            claim(params, stage.name, *arguments)  # before Prefect's server starts, which takes seconds
        with prefect_for_program():
            no_answer = no_answer_message()
            _clock.call()
            configured = stage.with_options()
            configured.fn = body
            configured(*arguments)
    except EXPECTED as error:
        if tracebacks:
            raise
        sys.exit(f"error in {name}: {explain(error)}")
    except (httpx.TransportError, RuntimeError) as error:
        if not is_unreachable(error):
            raise
        if finished:  # the outputs are published; only the run's final state could not be sent
            print(
                f"warning in {name}: {no_answer}; the stage has finished, and its page in Prefect shows it as running"
            )
            return
        if tracebacks:
            raise
        sys.exit(f"error in {name}: {no_answer}; start it and run again: finished units are kept")
    finally:
        release_locks()
