"""Where the work at hand comes from: known to every line that is logged meanwhile, and kept with the job."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class Origin(NamedTuple):
    """The request, and the job once there is one."""

    request_id: str | None = None
    job_id: str | None = None


NOWHERE = Origin()
ORIGIN: ContextVar[Origin] = ContextVar("origin", default=NOWHERE)
"""That of the running task. A worker's is the job's, which another replica may have accepted."""
