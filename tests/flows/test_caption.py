"""The stage `caption`: killed while running, with other rules, on every task runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from flows.runtime.fork_server import SOCKET
from flows.runtime.servers import free_port
from lotlip.data.index import CaptionIndex, read_index
from lotlip.data.partitions import read_captions, unit_names
from tests.workspace import Workspace, tiny

UNIT = 30  # images in a partition

# --- in a checkout ------------------------------------------------------------------------------------------------

ENTRY_POINTS = "[lotlip.captioners]\ncounting = counting:Counting\n"
COUNTING = """
import os, time
from typing import Literal

from lotlip.caption.config import SceneCaptionerConfig
from lotlip.demo.captioner import SceneCaptioner


class Counting(SceneCaptioner):
    class Config(SceneCaptionerConfig):
        kind: Literal["counting"]

    def _caption(self, record):
        if os.path.exists("dies") and open("dies").read() == record.key:
            os.kill(os.getpid(), 9)
        time.sleep(float(open("seconds").read()))
        with open("calls", "a") as calls:
            calls.write(f"{record.key} {os.getpid()}\\n")
        return super()._caption(record)
"""


@pytest.fixture(scope="module")
def workspace(make_workspace) -> Workspace:
    """A workspace with 330 images in partitions, and captioners that record their calls.

    They belong to another package, so that the fork server, which runs the checkout's code, can run them.
    """
    workspace: Workspace = make_workspace()
    workspace.change(tiny)
    workspace.change(lambda params: params["ingest"].update(partition_size=UNIT))
    (workspace.folder / "counting.py").write_text(COUNTING)
    about = workspace.folder / "counting-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    for captioner in ("llava", "sharegpt4v", "instructblip"):
        workspace.change(lambda params: params["caption"]["captioners"][captioner].update(kind="counting"))  # noqa: B023
    workspace.python("flows.stages.ingest")
    return workspace


def set_delay(workspace: Workspace, seconds: float) -> None:
    """Sets the time that a caption takes."""
    (workspace.folder / "seconds").write_text(str(seconds))


def read_calls(workspace: Workspace) -> list[list[str]]:
    """Returns key and process of every recorded caption, and clears them."""
    path = workspace.folder / "calls"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def clear_calls(workspace: Workspace) -> None:
    (workspace.folder / "calls").unlink(missing_ok=True)


def run_on(workspace: Workspace, runner: str, **quality: Any) -> None:
    workspace.change(lambda params: params["caption"].update(quality=quality))
    workspace.change(lambda params: params["compute"].update(task_runner=runner))


def start_flow(workspace: Workspace, captioner: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log = (workspace.folder / "flow.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "caption", captioner],
        cwd=workspace.folder,
        env=environment,
        start_new_session=True,
        stdout=log,
        stderr=log,
    )


def await_calls(workspace: Workspace, number: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 900
    while len(read_calls(workspace)) < number:
        assert process.poll() is None, (workspace.folder / "flow.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def published(workspace: Workspace, captioner: str) -> dict[str, bytes]:
    folder = workspace.folder / "data" / "captions" / captioner
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keys(workspace: Workspace, captioner: str) -> list[str]:
    folder = workspace.folder / "data" / "captions" / captioner
    return [key for name in unit_names(folder) for key in read_captions(folder, name, ["key"])["key"]]


@pytest.mark.system
def test_each_image_is_captioned_once_despite_kills_and_changed_rules(workspace) -> None:
    set_delay(workspace, 0.02)
    clear_calls(workspace)
    run_on(workspace, "threads")
    process = start_flow(workspace, "llava", workspace.environment)
    await_calls(workspace, 150, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    store = workspace.folder / "data" / "caption-store" / "llava"
    finished = {path: path.stat().st_mtime_ns for path in store.rglob("part-*.json")}
    assert 0 < len(finished) < 11
    assert not (workspace.folder / "data" / "captions" / "llava").exists()

    workspace.python("flows.stages.caption", "llava")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    counted = Counter(key for key, _ in read_calls(workspace))
    assert len(counted) == len(keys(workspace, "llava")) == len(set(keys(workspace, "llava"))) == 330
    # two partitions were in progress when the flow was killed
    assert sum(counted.values()) <= 330 + 2 * UNIT

    clear_calls(workspace)
    run_on(workspace, "threads", long=120)
    workspace.change(lambda params: params["caption"].update(max_filtered_share=1.0))  # many are dropped
    workspace.python("flows.stages.caption", "llava")
    index = read_index(workspace.folder / "data" / "captions" / "llava", CaptionIndex)
    assert index.failure_kinds == {"long": index.failed}
    assert index.quality["filtered"]["long"] == index.failed > 0
    assert read_calls(workspace) == []

    workspace.change(lambda params: params["caption"]["captioners"]["llava"].update(seed=5))
    workspace.python("flows.stages.caption", "llava")
    assert len(read_calls(workspace)) == 330
    assert len([folder for folder in store.iterdir() if folder.is_dir()]) == 2
    clear_calls(workspace)
    workspace.change(lambda params: params["caption"]["captioners"]["llava"].pop("seed"))
    workspace.python("flows.stages.caption", "llava")
    assert read_calls(workspace) == []


@pytest.fixture(scope="module")
def expected(workspace) -> dict[str, bytes]:
    """What the stage writes in threads."""
    set_delay(workspace, 0)
    run_on(workspace, "threads")
    workspace.python("flows.stages.caption", "sharegpt4v")
    return published(workspace, "sharegpt4v")


def clear_store(workspace: Workspace) -> None:
    for path in sorted((workspace.folder / "data" / "caption-store").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def start_on(workspace: Workspace, runner: str, delay: float, calls: int) -> subprocess.Popen[bytes]:
    """Starts the stage on a task runner, and waits until so many captions are written."""
    set_delay(workspace, delay)
    clear_calls(workspace)
    run_on(workspace, runner)
    process = start_flow(workspace, "sharegpt4v", {**workspace.environment, SOCKET: ""})
    await_calls(workspace, calls, process)
    return process


def kill_worker(workspace: Workspace, process: subprocess.Popen[bytes]) -> tuple[str, list[psutil.Process]]:
    """Kills a worker of a flow in the middle of a unit.

    Returns:
        The image that it captioned last, and all processes that the flow had started.
    """
    flow = psutil.Process(process.pid)
    started = flow.children(recursive=True)
    listening = {
        connection.laddr.ip
        for one in [flow, *started]
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    while process.poll() is None:
        calls = read_calls(workspace)
        key, victim = calls[-1]
        if 0 < sum(worker == victim for _, worker in calls) % UNIT < UNIT // 2:  # far from the end of its unit
            break
        time.sleep(0.02)
    assert int(victim) in {child.pid for child in started}
    os.kill(int(victim), signal.SIGKILL)
    return key, started


@pytest.mark.integration
def test_a_killed_worker_loses_nothing(workspace, expected) -> None:
    clear_store(workspace)
    process = start_on(workspace, "processes", delay=0.1, calls=100)  # long enough for a new worker
    key, started = kill_worker(workspace, process)
    assert process.wait(900) == 0, (workspace.folder / "flow.log").read_text()

    assert published(workspace, "sharegpt4v") == expected
    recorded_calls = read_calls(workspace)
    counted = Counter(key for key, _ in recorded_calls)
    assert len({worker for _, worker in recorded_calls}) >= 3  # another worker replaced the killed one
    assert len(counted) == 330 and sum(counted.values()) <= 330 + UNIT
    assert counted[key] == 2
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive


@pytest.mark.system
@pytest.mark.parametrize(
    ("runner", "signs"),
    [
        ("processes", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
        ("ray", (signal.SIGTERM, signal.SIGKILL)),
        ("dask", (signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_workers_end_with_their_flow(workspace, expected, runner, signs) -> None:
    """Each flow goes on with what the one before has stored. The first one of a cluster also loses a worker."""
    clear_store(workspace)
    stored: dict[str, int] = {}
    for sign in signs:
        process = start_on(workspace, runner, delay=0.1, calls=70)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        if runner != "processes" and not stored:
            key, _ = kill_worker(workspace, process)
            set_delay(workspace, 0.5)  # a new worker takes seconds to start
            await_worker(workspace, key, process)
            started += psutil.Process(process.pid).children(recursive=True)
        before, stored = stored, finished_units(workspace)
        assert before.items() < stored.items()
        process.send_signal(sign)
        assert process.wait(120) != 0
        # Ray's agents wait a minute for one another if Ray is killed
        _, alive = psutil.wait_procs(started, timeout=600 if runner == "ray" and sign == signal.SIGKILL else 30)
        for one in alive:
            one.kill()
        assert not alive
        assert stored.items() <= finished_units(workspace).items()
    run_on(workspace, "threads")
    set_delay(workspace, 0)
    workspace.python("flows.stages.caption", "sharegpt4v")
    assert published(workspace, "sharegpt4v") == expected
    assert stored.items() <= finished_units(workspace).items()


def await_worker(workspace: Workspace, key: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until a new worker has captioned the image again that killed a worker; at most a unit is repeated."""
    deadline = time.monotonic() + 900
    while True:
        calls = read_calls(workspace)
        counted = Counter(key for key, _ in calls)
        assert counted[key] <= 2 and sum(counted.values()) <= len(counted) + UNIT
        if counted[key] == 2 and len({worker for _, worker in calls}) >= 3:
            return
        assert process.poll() is None, (workspace.folder / "flow.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished_units(workspace: Workspace) -> dict[str, int]:
    """The stored partitions, with the time at which each was written."""
    folder = workspace.folder / "data" / "caption-store" / "sharegpt4v"
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("part-*.json")}


@pytest.mark.system
def test_a_unit_that_always_kills_its_worker_fails_alone(workspace, expected) -> None:
    clear_store(workspace)
    run_on(workspace, "processes")
    (workspace.folder / "dies").write_text("train-000033")
    try:
        done = workspace.python("flows.stages.caption", "sharegpt4v", check=False)
    finally:
        (workspace.folder / "dies").unlink()
    assert done.returncode == 1
    assert "train/part-00001 failed on its last attempt: the process that ran it was killed" in done.stderr
    assert "11 of 11 units" in done.stderr
    assert "caption.max_missing_partitions in params.yaml sets the limit" in done.stderr
    assert len(finished_units(workspace)) == 10
    workspace.python("flows.stages.caption", "sharegpt4v")
    assert published(workspace, "sharegpt4v") == expected


@pytest.mark.integration
def test_a_missing_server_is_an_error_of_one_line(workspace: Workspace) -> None:
    run_on(workspace, "threads")
    before = (workspace.folder / "params.yaml").read_text()
    gone = {"kind": "endpoint", "path": "lotlip/caption/captioners/endpoint.py", "model": "tiny", "revision": "1"}
    gone["url"] = f"http://127.0.0.1:{free_port()}/v1"
    workspace.change(lambda params: params["caption"]["captioners"].update(gone=gone))
    done = workspace.python("flows.stages.caption", "gone", check=False)
    (workspace.folder / "params.yaml").write_text(before)
    assert done.returncode == 1
    assert f"error in caption gone: {gone['url']} does not respond" in done.stderr
    assert "start the server there, or correct `url` of caption.captioners.gone" in done.stderr
    assert "- Retry " not in done.stderr  # Prefect's log line of a retry
    assert "Traceback" not in done.stderr
