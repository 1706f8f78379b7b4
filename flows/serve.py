"""Serves both UIs, with deployments that Prefect's UI can start (flows.deployments).

Schedules activated in the UI run while this program runs.
"""

from __future__ import annotations

import sys

from prefect import serve
from prefect.settings import PREFECT_API_URL

from flows.deployments import deployments
from flows.runtime.stage import EXPECTED
from flows.runtime.supervisor import exit_on_signals
from flows.ui import serve_uis
from lotlip.core.console import INTERRUPTED, answer_help


def main() -> None:
    """Serves until Ctrl-C or SIGTERM, which also end running flows."""
    with exit_on_signals(), serve_uis():
        api = PREFECT_API_URL.value() or ""
        print(f"Forms    {api.removesuffix('/api')}/deployments\nPress Ctrl-C to stop.", flush=True)
        serve(*deployments(), print_starting_message=False)


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        main()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
