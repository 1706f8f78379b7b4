"""What the fork server does before it forks."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from flows.runtime import fork_server
from lotlip.core.code import ROOT
from lotlip.core.stages import STAGES

# CUDA cannot be used after a fork if it was initialised before. Without a GPU, stand-ins for torch's functions of the
# driver record their calls; with a GPU, a fork uses it.
PROBE = """
    import importlib, json, os, sys, traceback
    import torch
    from flows.runtime.fork_server import PRELOADED, _prepare

    calls = []
    gpu = torch.cuda._device_count_nvml() > 0
    if not gpu:
        def stand_in(name, result):
            def call(*_):
                calls.append(f"{name}: {traceback.format_stack()[-2]}")
                return result
            return call

        torch._C._cuda_getDeviceCount = stand_in("torch._C._cuda_getDeviceCount", 1)
        torch._C._cuda_init = stand_in("torch._C._cuda_init", None)
    for name in PRELOADED:
        importlib.import_module(name)
    _prepare()
    found = {"calls": calls, "initialised": torch.cuda.is_initialized(), "fork": 0}
    if gpu:
        child = os.fork()
        if not child:
            status = 1
            try:
                status = int(torch.ones(2, device="cuda").sum().item() != 2)
            finally:
                os._exit(status)
        found["fork"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(found))
"""


def probe() -> dict[str, object]:
    command = [sys.executable, "-c", textwrap.dedent(PROBE)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.system
def test_no_import_initialises_cuda_before_the_fork() -> None:
    assert probe() == {"calls": [], "initialised": False, "fork": 0}


@pytest.mark.slow
def test_a_broken_source_file_does_not_end_the_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that do not import it run; the others report it themselves."""
    parsed = []

    def parse(stage: str) -> None:
        parsed.append(stage)
        raise SyntaxError("'(' was never closed (rendering.py, line 3)")

    monkeypatch.setattr(fork_server, "stage_files", parse)
    monkeypatch.setattr(fork_server.importlib, "import_module", parse)
    fork_server._prepare()
    assert set(STAGES) < set(parsed)
