"""The project's scratch folder, and the error of a failed stage."""

from pathlib import Path

from lotlip.core import files

SCRATCH = Path(files.SCRATCH)


class StageFailed(RuntimeError):
    """A stage ended without publishing. The message is for the user."""


# Errors that a user can fix. They are shown as one line; LOTLIP_TRACEBACK=1 shows the traceback too.
EXPECTED = (StageFailed, ValueError, OSError)
