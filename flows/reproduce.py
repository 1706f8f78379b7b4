"""The whole pipeline by `dvc repro`, under one Prefect server for its duration. Ends with the report's address."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from flows.runtime.dvc import SINGLE_ITEM, is_up_to_date, run_dvc
from flows.runtime.fork_server import fork_server
from flows.runtime.scratch import EXPECTED, SCRATCH, StageFailed
from flows.runtime.servers import listen_for, new_login, port_at, prefect_client, prefect_server, print_prefect
from flows.runtime.supervisor import ending_well
from lotlip.config.params import Params, load_params
from lotlip.core.console import INTERRUPTED
from lotlip.core.record import Record
from lotlip.data.paths import check_inputs

REPRODUCTION = SCRATCH / "reproduce.json"


class Reproduction(Record):
    """The last run.

    Attributes:
        started: seconds since 1970.
        seconds: that it took.
    """

    started: float
    seconds: float


def reproduce(params: Params, runs: Sequence[Sequence[str]]) -> None:
    """Runs `dvc repro`, with a Prefect server unless PREFECT_API_URL names one; starts nothing if nothing is stale.

    Args:
        params: the project's.
        runs: arguments of each `dvc repro`, one after another.

    Raises:
        StageFailed: a stage failed.
        ValueError: a folder of the source, a captioner or a benchmark has an entry that DVC cannot hash.
    """
    check_inputs(params.inputs())
    started = time.time()
    # dvc.yaml says `python`, which is the one beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if current := is_up_to_date(runs):
        print("Nothing has changed since the last run.")
    status = 0 if current else _run(runs)
    seconds = time.time() - started
    Reproduction(started=started, seconds=seconds).write(REPRODUCTION)
    if status:
        raise StageFailed("a stage failed (see above); mend it and run again: it goes on from the last finished unit")
    print(closing_words(params, seconds))


def _run(runs: Sequence[Sequence[str]]) -> int:
    """Runs `dvc repro` under a Prefect server and a fork server; gives the status of the first run that failed, or 0.

    Raises:
        StageFailed: a server did not come up.
    """
    with ExitStack() as stack:
        stack.enter_context(ending_well())
        given = os.environ.get("PREFECT_API_URL")
        listener = None if given else stack.enter_context(listen_for("prefect", any_port=True))
        login = new_login()
        client = prefect_client(port_at(listener), login) if listener else {}
        # both take some seconds to come up, so they do it side by side
        environment = stack.enter_context(fork_server({**os.environ, **client}))
        if given:
            print(f"Prefect  {given.removesuffix('/api')} (PREFECT_API_URL)", flush=True)
        elif listener:
            port = port_at(listener)
            stack.enter_context(prefect_server(listener, login))
            print_prefect(port, login)
        return next(filter(None, (run_dvc(["repro", *run], environment) for run in runs)), 0)


def asked_for(params: Params, arguments: list[str]) -> list[list[str]]:
    """The runs of `dvc repro` that a command line asks for.

    Args:
        params: the project's.
        arguments: none: the ablations of `reproduce` in params.yaml, with a report; `--all`: everything; anything else
            is handed on to `dvc repro`, such as a stage's name.
    """
    if arguments == ["--all"]:
        return [[]]
    return [arguments] if arguments else of_ablations(params, params.reproduce.ablations)


def of_ablations(params: Params, names: Sequence[str]) -> list[list[str]]:
    """The runs of `dvc repro` that score some ablations, and report all that is there; no name: everything."""
    scores = [f"{'evaluate-finetune' if name in params.finetune else 'evaluate'}@{name}" for name in names]
    # by its name alone, DVC would first run whatever the report could show
    return [scores, [SINGLE_ITEM, "report"]] if scores else [[]]


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
        settings = load_params()
        reproduce(settings, asked_for(settings, sys.argv[1:]))
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the next run resumes from the last finished unit", file=sys.stderr)
        sys.exit(INTERRUPTED)
