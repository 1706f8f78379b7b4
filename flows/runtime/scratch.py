"""The project's scratch, and how a stage says that it failed."""

from pathlib import Path

from lotlip.core import files

SCRATCH = Path(files.SCRATCH)


class StageFailed(RuntimeError):
    """A stage ended without publishing; the message is for a person."""
