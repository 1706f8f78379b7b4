"""Restores MLflow's store from DVC's outputs, without training: runs, curves, scores, figures and models.

Use it after `git clone` and `dvc pull`, which do not include the store, or when the store was lost.
"""

from __future__ import annotations

import os
import sys

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import EXPECTED, configure_tracebacks
from lotlip.config.params import load_params
from lotlip.core.console import answer_help
from lotlip.evaluate.records import AblationScores
from lotlip.pretrain.records import RUN, Run


def restore() -> list[str]:
    """Logs every trained ablation on disk, including those that are no longer in params.yaml. It is idempotent.

    Returns:
        The names of the ablations.

    Raises:
        StageFailed: there are no trained ablations.
    """
    params = load_params()
    paths = params.paths
    trained = sorted(paths.models.glob(f"*/{RUN}"))
    if not trained:
        raise StageFailed(f"{paths.models} has no trained ablations; run `dvc pull` or `dvc repro`")
    from lotlip.tracking.mlflow import Tracker

    tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.pretrain)
    for file in trained:
        run, folder = Run.load(file), file.parent
        name = run.ablation
        scores_file = paths.metrics / f"{name}.json"
        scores = AblationScores.load(scores_file) if scores_file.is_file() else None
        if scores is None:
            status = f"no scores ({scores_file} does not exist)"
        elif scores.fingerprints != run.fingerprints:
            status = f"no scores ({scores_file} is for other models; run `dvc repro`)"
            scores = None
        else:
            status = f"scores on {', '.join(scores.benchmarks)}"
        results = scores.benchmarks if scores else {}
        for run_id in tracker.log_scores(run, results, folder, paths.metrics / "attention" / name).values():
            tracker.set_tags(run_id, {"model": str(folder)})
        print(f"{name}: {len(run.fingerprints)} seeds, {status}", flush=True)
    return [file.parent.name for file in trained]


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        print(f"MLflow has {len(restore())} ablations; `make ui` shows them")
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # MLflow raises many types
        if configure_tracebacks():
            raise
        from lotlip.tracking.store import failure

        sys.exit(f"error: {failure(os.environ.get('MLFLOW_TRACKING_URI') or load_params().tracking.uri, error)}")
