"""Brings MLflow's store up to date from DVC's outputs: runs, curves, scores, figures and models, without training.

After `git clone` and `dvc pull` there is all of it but the store; a store that was lost comes back in the same way.
"""

from __future__ import annotations

import os
import sys

from flows.runtime.scratch import StageFailed
from flows.runtime.stage import EXPECTED, with_tracebacks
from lotlip.config.params import load_params
from lotlip.evaluate.records import AblationScores
from lotlip.pretrain.records import RUN, Run


def restore() -> list[str]:
    """Logs every trained ablation on disk, those that params.yaml no longer has included. Again changes nothing.

    Returns:
        The ablations' names.

    Raises:
        StageFailed: there is none.
    """
    params = load_params()
    paths = params.paths
    trained = sorted(paths.models.glob(f"*/{RUN}"))
    if not trained:
        raise StageFailed(f"{paths.models} has no trained ablation; `dvc pull` gets them, `dvc repro` trains them")
    from lotlip.tracking.mlflow import Tracker

    tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.pretrain)
    for file in trained:
        run, folder = Run.load(file), file.parent
        name = run.ablation
        measured = paths.metrics / f"{name}.json"
        scores = AblationScores.load(measured) if measured.is_file() else None
        if scores is None:
            said = f"{measured} is not there, so it has no scores"
        elif scores.fingerprints != run.fingerprints:
            said = f"{measured} is of other models, so it has no scores; `dvc repro` measures these"
            scores = None
        else:
            said = f"scores on {', '.join(scores.benchmarks)}"
        results = scores.benchmarks if scores else {}
        for run_id in tracker.log_scores(run, results, folder, paths.metrics / "attention" / name).values():
            tracker.set_tags(run_id, {"model": str(folder)})
        print(f"{name}: {len(run.fingerprints)} seeds, {said}", flush=True)
    return [file.parent.name for file in trained]


if __name__ == "__main__":
    try:
        print(f"MLflow has {len(restore())} ablations; `make ui` shows them")
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # MLflow's, of which there are many kinds
        if with_tracebacks():
            raise
        from lotlip.tracking.mlflow import failure

        sys.exit(f"error: {failure(os.environ.get('MLFLOW_TRACKING_URI') or load_params().tracking.uri, error)}")
