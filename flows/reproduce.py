"""Runs the whole pipeline with `dvc repro` and one Prefect server, and prints the location of the report.

python -m flows.reproduce            the ablations of `reproduce` in params.yaml, and a report (`make reproduce`)
python -m flows.reproduce --all      all ablations (`make reproduce-all`)
python -m flows.reproduce STAGE…     some stages, such as evaluate@lit report, and those that they depend on
python -m flows.reproduce --dry …    shows the stages that would run

Other options are passed to `dvc repro`; `dvc repro --help` lists them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from flows.runtime.dvc import SINGLE_ITEM, check_targets, is_up_to_date, plan, run_dvc
from flows.runtime.edits import check_watched_parameters
from flows.runtime.fork_server import SOCKET, fork_server
from flows.runtime.lanes import run_stages
from flows.runtime.scratch import EXPECTED, SCRATCH, StageFailed
from flows.runtime.servers import listen_for, new_login, port_at, prefect_client, prefect_server, print_prefect
from flows.runtime.supervisor import exit_on_signals
from lotlip.config.outputs import is_stage_record
from lotlip.config.params import Params, load_params
from lotlip.core.console import INTERRUPTED, answer_help
from lotlip.core.cores import CORES, available_cores
from lotlip.core.files import read_json, remove, remove_listed
from lotlip.core.record import Record
from lotlip.data.models import STARTING_MODELS, local_hashes
from lotlip.data.paths import check_inputs
from lotlip.evaluate.config import baseline_hashes
from lotlip.evaluate.records import BASELINE_SCORES, BASELINES, Baselines
from lotlip.report.stored import FINDINGS, STORED_RESULTS, table_hash

PULL, DRY = "--pull", "--dry"  # options of `dvc repro`
REPRODUCTION = SCRATCH / "reproduce.json"


class Reproduction(Record):
    """Start and duration of the last run that ran a stage and succeeded.

    Attributes:
        started: Unix time, in seconds.
        seconds: duration.
        parallel_stages: how many stages ran at the same time.
    """

    started: float
    seconds: float
    parallel_stages: int


def reproduce(params: Params, runs: Sequence[Sequence[str]], pull: bool = False) -> None:
    """Runs `dvc repro`, with a Prefect server unless PREFECT_API_URL names one. Starts no process if nothing is stale.

    With `--dry`, DVC only shows the stages that would run, and no server starts.

    Args:
        params: params.yaml of the project.
        runs: arguments of each `dvc repro`; they run one after another.
        pull: whether missing outputs that dvc.lock lists are pulled from DVC's default remote.

    Raises:
        ConfigError: params.yaml lacks a key that DVC watches.
        StageFailed: a stage failed.
        ValueError: a folder of the source, a captioner or a benchmark has an entry that DVC cannot hash.
    """
    check_watched_parameters(params)
    check_inputs(params.inputs())
    if not params.caption.captioners:
        make_captions(params.paths.captions)
    dry = any(DRY in run for run in runs)
    if remove_outdated_records(params, dry):
        pull, runs = False, [[option for option in run if option != PULL] for run in runs]
    remove_outdated_baselines(params, dry)
    remove_outdated_report(params, dry)
    started, records = time.time(), _stage_records(params)
    # so that `python` in dvc.yaml is this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    parallel = params.compute.parallel_stages
    if dry:
        status = _repro(runs, os.environ)
    elif is_up_to_date(runs):
        print("Nothing has changed since the last run.")
        status = 0
    else:
        status = _run(runs, parallel, pull)
    seconds = time.time() - started
    if status:
        raise StageFailed("a stage failed (see above); fix the cause and run again: finished units are kept")
    if dry:
        return
    if _stage_records(params) != records:  # a stage ran
        Reproduction(started=started, seconds=seconds, parallel_stages=parallel).write(REPRODUCTION)
    print(closing_message(params, seconds))


def _stage_records(params: Params) -> dict[Path, int]:
    """Every stage's record of its last run, and when it was written."""
    return {record: record.stat().st_mtime_ns for record in params.paths.stages.glob("*.json")}


def make_captions(folder: Path) -> None:
    """Makes the folder of captions, which later stages depend on, but no stage writes without captioners.

    It is not empty, because DVC warns of empty folders; `make clean` keeps `.gitkeep`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / ".gitkeep").touch()


def remove_outdated_records(params: Params, dry: bool = False) -> bool:
    """Removes the record of each stage whose starting model has changed since, so that DVC runs the stage again.

    DVC cannot watch the model: dvc.yaml cannot name a path that may be null. The trained models stay until new ones
    replace them.

    Args:
        params: params.yaml of the project.
        dry: only tell what would be removed.

    Returns:
        Whether there was one. `dvc repro --pull` would pull it instead of running the stage.
    """
    files = [
        file for name in ("image-tower", "pretrain-*") for file in sorted(params.paths.stages.glob(f"{name}.json"))
    ]
    used = {file: read_json(file).get("notes", {}).get(STARTING_MODELS, {}) for file in files if is_stage_record(file)}
    hashes = local_hashes({name for models in used.values() for name in models})
    outdated = False
    for file, models in used.items():
        changed = [name for name, value in models.items() if hashes.get(name, value) != value]
        if changed:
            print(f"{', '.join(changed)} has changed, so {file.stem} runs again.")
            outdated = True
            if not dry:
                remove(file, ours=is_stage_record)
    return outdated


def remove_outdated_baselines(params: Params, dry: bool = False) -> None:
    """Removes the scores of baselines if a model's files have changed since, so that DVC runs their stage again.

    DVC cannot watch these files: dvc.yaml cannot name the paths in a list of models.

    Args:
        params: params.yaml of the project.
        dry: only tell what would be removed.
    """
    file = params.paths.metrics / BASELINES / BASELINE_SCORES
    if not file.is_file():
        return
    hashes = baseline_hashes(params.evaluate.baselines)
    changed = [one.model for one in Baselines.load(file).models if hashes.get(one.model) != one.sha256]
    if changed:
        print(f"Changed since they were scored, so all baselines are scored again: {', '.join(changed)}")
        if not dry:
            remove_listed(file.parent)


def remove_outdated_report(params: Params, dry: bool = False) -> None:
    """Removes the report if the table of stored results has changed since, so that DVC runs its stage again.

    DVC cannot watch the table: dvc.yaml cannot name a path that may be null.

    Args:
        params: params.yaml of the project.
        dry: only tell what would be removed.
    """
    file = params.paths.report / FINDINGS
    try:
        shown = read_json(file)[STORED_RESULTS] if file.is_file() else None
    except (ValueError, KeyError, TypeError):  # damaged, or of an earlier version: DVC runs the stage again
        return
    if (shown or {}).get("sha256") != table_hash(params.report.stored_results) and file.is_file():
        print("The stored results have changed since the last report, so the report is written again.")
        if not dry:
            remove_listed(file.parent)


def _run(runs: Sequence[Sequence[str]], parallel: int, pull: bool) -> int:
    """Runs stale stages with a Prefect server and a fork server, up to the first that fails.

    The servers that the environment names are used instead of new ones.

    Args:
        runs: as of `reproduce`.
        parallel: stages that run at the same time.
        pull: as of `reproduce`.

    Returns:
        The exit status of the run that failed, or 0.

    Raises:
        StageFailed: a server did not start.
    """
    with ExitStack() as stack:
        stack.enter_context(exit_on_signals())
        given = os.environ.get("PREFECT_API_URL")
        listener = None if given else stack.enter_context(listen_for("prefect", any_port=True))
        login = new_login()
        client = prefect_client(port_at(listener), login) if listener else {}
        # More threads than cores wait for each other: on two cores, two stages with two threads each take longer at the
        # same time than one after the other.
        cores = str(max(1, available_cores() // parallel))
        share = {CORES: cores, "OMP_NUM_THREADS": cores} if parallel > 1 else {}
        environment = {**share, **os.environ, **client}
        # A given fork server uses the Prefect server that was given with it.
        if not given or SOCKET not in environment:
            # both servers take some seconds to start, so they start in parallel
            environment = stack.enter_context(fork_server(environment))
        if given:
            print(f"Prefect  {given.removesuffix('/api')} (PREFECT_API_URL)", flush=True)
        elif listener:
            port = port_at(listener)
            stack.enter_context(prefect_server(listener, login))
            print_prefect(port, login)
        if parallel > 1 and (stages := plan(runs)):
            return run_stages(stages, parallel, environment, pull)
        return _repro([[PULL, *run] for run in runs] if pull else runs, environment)


def _repro(runs: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Runs each `dvc repro` up to the first that fails, and returns its exit status, or 0."""
    return next(filter(None, (run_dvc(["repro", *run], environment) for run in runs)), 0)


def dvc_runs(params: Params, arguments: list[str]) -> list[list[str]]:
    """Returns the arguments of each `dvc repro` for a command line.

    Args:
        params: params.yaml of the project.
        arguments: without any, the ablations of `reproduce` in params.yaml and a report; with `--all`, everything.
            Others, such as a stage's name, are passed to `dvc repro`.
    """
    if arguments == ["--all"]:
        return [[]]
    return [arguments] if arguments else runs_of_ablations(params, params.reproduce.ablations)


def runs_of_ablations(params: Params, names: Sequence[str]) -> list[list[str]]:
    """Returns the arguments of each `dvc repro` that evaluates ablations and reports all scores on disk.

    Args:
        params: params.yaml of the project.
        names: ablations; without any, everything is run.
    """
    scores = [f"{'evaluate-finetune' if name in params.finetune else 'evaluate'}@{name}" for name in names]
    # without `--single-item`, DVC would first run every ablation that the report can show
    return [scores, [SINGLE_ITEM, "report"]] if scores else [[]]


def closing_message(params: Params, seconds: float) -> str:
    """Returns the message after a successful run: where the results are, as far as its stages have written them."""
    page, models, scores = params.paths.report / "index.html", params.paths.models, params.paths.metrics
    servers = "make ui" if Path("Makefile").is_file() else "python -m flows.ui"
    lines = [
        f"\nDone in {seconds / 60:.1f} minutes.",
        f"  report          {page.resolve()}" if page.is_file() else "",
        f"  models          {models}/<ablation>/seed-<seed>" if models.is_dir() else "",
        f"  scores          {scores}/<ablation>.json" if scores.is_dir() else "",
        f"  Prefect, MLflow `{servers}` shows every run",
    ]
    return "\n".join(filter(None, lines))


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        settings = load_params()
        given = sys.argv[1:]
        if given and not any(argument.startswith("-") for argument in given):
            check_targets(given)
        reproduce(settings, dvc_runs(settings, given))
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the next run resumes from the last finished unit", file=sys.stderr)
        sys.exit(INTERRUPTED)
