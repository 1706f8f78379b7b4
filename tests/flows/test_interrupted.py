"""Ctrl-C ends every program with one line and status 130, at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspace import ROOT

BLOCKING_COMMAND = """
import threading
from lotlip import cli

@cli.app.command()
def block():
    print("ready", flush=True)
    threading.Event().wait()

cli.run()
"""


def environment() -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "LOTLIP_FORK_SERVER"},
        "PYTHONPATH": str(ROOT),
    }


def interrupt(process: subprocess.Popen[str]) -> None:
    try:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.count("\n") == 1 and errors.startswith("stopped"), errors


@pytest.mark.integration
def test_a_command_of_lotlip_ends_in_one_line(tmp_path: Path):
    command = [sys.executable, "-c", BLOCKING_COMMAND, "block"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    interrupt(process)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("module", "read"),
    [
        ("flows.runtime.agent", ".lotlip/announced.json"),
        ("flows.restore", "params.yaml"),
        ("flows.reproduce", "params.yaml"),
        ("flows.ui", "params.yaml"),
    ],
)
def test_a_flow_ends_in_one_line(module: str, read: str, tmp_path: Path):
    path = tmp_path / read
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)  # the program waits where it reads the file
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with path.open("w"):
        interrupt(process)
