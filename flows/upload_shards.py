"""Copies the shards to the store that training reads them from: `python -m flows.upload_shards [URL]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from flows.runtime.scratch import EXPECTED, StageFailed
from lotlip.config.params import Params, load_params
from lotlip.core.console import answer_help
from lotlip.data.remote_shards import upload


def upload_shards(params: Params, url: str | None, say: Callable[[str], object] = print) -> None:
    """Copies the shards to a URL; files that are there are not copied again.

    Args:
        params: params.yaml of the project.
        url: address that fsspec understands; None: `compute.training.remote_shards.url`.
        say: receives the progress, a line at most every second, and the result.

    Raises:
        StageFailed: no address is named.
        ValueError: there are no shards, or the store refuses.
    """
    remote = params.compute.training.remote_shards
    url = url or (remote.url if remote else None)
    if url is None:
        raise StageFailed("name an address, such as s3://bucket/shards, or set compute.training.remote_shards.url")
    start = said = time.monotonic()

    def on_file(done: int, total: int, name: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 1:
            said = now
            say(f"{done} of {total} files, {(now - start) / done * (total - done):.0f} s left: {name}")

    copied = upload(params.paths.shards, url, on_file)
    say(f"{url}: copied {copied} files of {params.paths.shards}")


if __name__ == "__main__":
    answer_help(__doc__)
    try:
        if len(sys.argv) > 2:
            raise StageFailed("give one address, or none for compute.training.remote_shards.url")
        upload_shards(load_params(), sys.argv[1] if sys.argv[1:] else None)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
