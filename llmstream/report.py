"""A job in the words of ``GET /chat/{task_id}`` and of the events that tell its end. Pure."""

from __future__ import annotations

from typing import Any

from llmstream.errors import error_body
from llmstream.transcript import Transcript
from llmstream.types import JobState, Usage


def usage_body(usage: Usage) -> dict[str, Any]:
    body = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        **(usage.details or {}),
    }
    return body if usage.cost is None else {**body, "cost": usage.cost}


def job_body(state: JobState, transcript: Transcript) -> dict[str, Any]:
    """``GET /chat/{task_id}``, apart from the position in the queue."""
    job = state.job
    started, finished = state.started_at, state.finished_at
    usage = state.usage or transcript.usage
    return {
        "task_id": job.id,
        "session_id": job.session_id,
        "status": state.status,
        "model": job.request.model,
        "priority": job.priority,
        "lane": job.lane,
        "attempt": state.attempt,
        "continues": job.continues,
        "text": transcript.text,
        "finish_reason": transcript.finish_reason or state.reason,
        "usage": usage_body(usage) if usage else None,
        "error": error_body(state.failure)["error"] if state.failure else None,
        "last_event_id": str(transcript.position),
        **({"not_before": job.not_before} if job.not_before is not None else {}),
        "timings": {
            "created_at": job.created_at,
            "started_at": started,
            "finished_at": finished,
            "queue_s": round((started or finished or job.created_at) - job.created_at, 6) if started else None,
            "run_s": round(finished - started, 6) if started and finished else None,
        },
    }
