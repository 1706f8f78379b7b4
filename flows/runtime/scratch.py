"""The project's scratch, and how a stage says that it failed."""

from pathlib import Path

from lotlip.core import files

SCRATCH = Path(files.SCRATCH)


class StageFailed(RuntimeError):
    """A stage ended without publishing; the message is for a person."""


# What a user can mend: shown as one line. LOTLIP_TRACEBACK=1 shows the traceback too.
EXPECTED = (StageFailed, ValueError, OSError)
