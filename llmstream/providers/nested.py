"""Another llmstream as upstream. It keeps its answers, knows our job by our name for it, and can be told to end it."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

from llmstream.errors import ProviderError
from llmstream.providers.http.connection import Connection
from llmstream.providers.http.origin import target
from llmstream.providers.refusals import Complaint
from llmstream.types import GenerateRequest

_REMEMBERED = 10_000
_STARTED_OVER = "restarted"


class UpstreamJobFailed(ProviderError):
    """The upstream's job for ours ended without an answer; asking for it again only shows that end again."""

    code, elsewhere = "upstream_job_failed", True


def name_of(request: GenerateRequest) -> bytes:
    """The header that gives all attempts of one job the same upstream job; empty while the job is not known."""
    if request.job_id is None:
        return b""
    model = blake2b(request.model.encode(), digest_size=8).hexdigest()
    return b"Idempotency-Key: llmstream-%b-%b\r\n" % (request.job_id.encode(), model.encode())


def is_final(complaint: Complaint | None) -> bool:
    """Whether an error in the stream is the upstream's last word; one that says that it starts over is not."""
    return complaint is not None and complaint.code != _STARTED_OVER


class UpstreamJobs:
    """The upstream's ids of jobs that it may still run for us."""

    def __init__(self, root: str) -> None:
        self._root = root.removesuffix("/v1")
        self._ids: OrderedDict[str, str] = OrderedDict()

    def note(self, request: GenerateRequest, response: Connection) -> None:
        """Remembers the id that an answer came with."""
        upstream_id = response.headers.get("x-job-id", "")
        if request.job_id is not None and upstream_id.isascii() and upstream_id.replace("-", "").isalnum():
            self._ids[request.job_id] = upstream_id
            if len(self._ids) > _REMEMBERED:
                self._ids.popitem(last=False)

    def over(self, request: GenerateRequest) -> None:
        """The answer has come to its end."""
        self._ids.pop(request.job_id or "", None)

    def cancelling(self, job_id: str) -> bytes | None:
        """Where the upstream's job for ours is cancelled, once; None when there is none that we know of."""
        upstream_id = self._ids.pop(job_id, None)
        return None if upstream_id is None else target(f"{self._root}/chat/{upstream_id}/cancel")
