"""Fails if Prefect's services have reported nothing for a minute: they have no address to ask."""

from __future__ import annotations

import os
import sys
import time

import redis

SILENCE_SECONDS = 60


def main() -> None:
    """Reads when a service's worker last reported to Redis."""
    client = redis.Redis.from_url(os.environ["PREFECT_SERVER_DOCKET_URL"])
    newest = client.zrange("prefect-server:workers", 0, 0, desc=True, withscores=True)
    if not newest or time.time() - newest[0][1] > SILENCE_SECONDS:
        sys.exit("Prefect's services have reported nothing for a minute")


if __name__ == "__main__":
    main()
