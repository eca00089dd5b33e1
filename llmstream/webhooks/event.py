"""What a receiver is told: one event for each job, the same bytes however often it is sent. Pure."""

from __future__ import annotations

import hashlib

from llmstream.report import job_body
from llmstream.transcript import Transcript
from llmstream.types import Job, JobState, encode


def event_id(job: Job) -> str:
    """The same for every try and every receiver, so that these can tell a repeat; ids of jobs may come again after
    their retention time, those of events do not."""
    return "evt_" + hashlib.sha256(f"{job.id}\n{job.created_at!r}".encode()).hexdigest()[:32]


def event_type(state: JobState) -> str:
    return f"response.{state.status}"


def render(state: JobState, transcript: Transcript | None, max_text_chars: int) -> bytes:
    """The event as JSON; without a transcript it has no text."""
    body = job_body(state, transcript or Transcript())
    del body["last_event_id"]
    text = body.pop("text")
    if transcript is not None:
        body["text"] = text[:max_text_chars]
        body["text_truncated"] = len(text) > max_text_chars
    return encode(
        {
            "id": event_id(state.job),
            "object": "event",
            "type": event_type(state),
            "created_at": int(state.finished_at or state.job.created_at),
            "data": {"id": state.job.id, **body},
        }
    )
