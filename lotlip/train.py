"""The program of a training process: `python -m lotlip.train JOB.json` trains and logs its curves to MLflow."""

from __future__ import annotations

import sys

from lotlip.pretrain.sink import Sink
from lotlip.pretrain.trainer import run
from lotlip.tracking.sink import TRACKING_WARNING, open_sink


def sink(uri: str, run_id: str | None) -> Sink:
    """Opens the MLflow sink. Its warnings go to standard output, where the flow reads them."""
    return open_sink(uri, run_id, lambda line: print(f"{TRACKING_WARNING}{line}", flush=True))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sink))
