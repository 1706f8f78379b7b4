"""The whole pipeline by `dvc repro`, under one Prefect server for its duration. Ends with the report's address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.processes import end_group, ending_well, start_group
from flows.servers import api_address, claimed_port, prefect_server
from flows.stage import EXPECTED, SCRATCH, StageFailed
from flows.warm import warm
from lotlip.config import Params, load_params
from lotlip.files import write_json

PREFECT_PORT = 4200

# DeepSpeed builds its communication op at first use. On a CPU that takes half a minute of one core, which the stages
# before training leave idle. A GPU has no such op.
_BUILD_OP = """
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
if builder is not None:
    builder.load()
"""


def reproduce(arguments: list[str]) -> None:
    """Runs `dvc repro`, with a Prefect server unless PREFECT_API_URL names one.

    Args:
        arguments: handed on to `dvc repro`, such as a stage's name.

    Raises:
        StageFailed: a stage failed.
    """
    params, started = load_params(), time.time()
    # dvc.yaml says `python`, and DeepSpeed asks for `ninja`: both are those beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with ExitStack() as stack:
        stack.enter_context(ending_well())
        stack.enter_context(building_op())
        given = os.environ.get("PREFECT_API_URL")
        port = stack.enter_context(claimed_port(PREFECT_PORT))
        api = given or api_address(port)
        # both take some seconds to come up, so they do it side by side
        environment = stack.enter_context(warm({**os.environ, "PREFECT_API_URL": api}))
        if not given:
            stack.enter_context(prefect_server(port))
        print(f"Prefect: {api.removesuffix('/api')}", flush=True)
        # in this program's own group, so that Ctrl-C reaches DVC, which then ends its stage and its lock file whole
        dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", *arguments], env=environment)
        stack.callback(dvc.terminate)
        status = dvc.wait()
    seconds = time.time() - started
    write_json(SCRATCH / "reproduce.json", {"started": started, "seconds": seconds})
    if status:
        raise StageFailed("a stage failed (see above); mend it and run again: it goes on from the last finished unit")
    print(closing_words(params, seconds))


@contextmanager
def building_op() -> Iterator[None]:
    """Has DeepSpeed's op built while the block runs; training waits for it by itself if it comes first."""
    log = SCRATCH / "logs" / "deepspeed-op.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        builder = start_group([sys.executable, "-c", _BUILD_OP], stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            end_group(builder)


def closing_words(params: Params, seconds: float) -> str:
    """What to look at next."""
    page = (params.paths.report / "index.html").resolve()
    return (
        f"\nDone in {seconds / 60:.1f} minutes.\n"
        f"  report          {page}\n"
        f"  models          {params.paths.models}/<ablation>/seed-<seed>\n"
        f"  scores          {params.paths.metrics}/<ablation>.json\n"
        f"  Prefect, MLflow `make ui` shows every run"
    )


if __name__ == "__main__":
    try:
        reproduce(sys.argv[1:])
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the next run goes on from the last finished unit")
