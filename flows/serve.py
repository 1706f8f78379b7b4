"""Both UIs, and what can be started from Prefect's (flows.deployments).

A schedule that is switched on in the UI runs while this program does.
"""

from __future__ import annotations

import sys

from prefect import serve
from prefect.settings import PREFECT_API_URL

from flows.deployments import deployments
from flows.runtime.stage import EXPECTED
from flows.runtime.supervisor import ending_well
from flows.ui import shown
from lotlip.core.console import INTERRUPTED


def main() -> None:
    """Serves until Ctrl-C or a SIGTERM; what runs then is ended."""
    with ending_well(), shown():
        api = PREFECT_API_URL.value() or ""
        print(f"Forms    {api.removesuffix('/api')}/deployments\nCtrl-C stops all.", flush=True)
        serve(*deployments(), print_starting_message=False)


if __name__ == "__main__":
    try:
        main()
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
