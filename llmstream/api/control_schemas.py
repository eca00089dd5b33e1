"""What admins and owners send to pause, drain and cancel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationInfo, field_validator

from llmstream.api.schemas import Priority, SessionId
from llmstream.api.times import Moment
from llmstream.types import Lane

Pattern = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._:/@*?+ -]{1,128}$")]
"""A model's name; ``*`` stands for any characters, ``?`` for any one."""
PrincipalName = Annotated[StrictStr, Field(min_length=1, max_length=128)]


class Part(BaseModel):
    """A part of the queue: a lane, models, or the models in a lane; neither: everything."""

    model_config = ConfigDict(extra="forbid")

    lane: Lane | None = None
    model: Pattern | None = None


class Resumed(Part):
    """``POST /queues/resume``"""

    all: StrictBool = False
    """Ends every pause and drain, whatever it covers."""

    @field_validator("all")
    @classmethod
    def _alone(cls, everything: bool, info: ValidationInfo) -> bool:
        if everything and (info.data.get("lane") or info.data.get("model")):
            raise ValueError("it ends every pause and drain; leave it out, or 'lane' and 'model'")
        return everything


class CancelBody(BaseModel):
    """``POST /jobs/cancel``: those jobs for which everything holds that is said."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["queued", "scheduled", "in_progress"] | None = None
    lane: Lane | None = None
    min_priority: Priority | None = None
    max_priority: Priority | None = None
    model: Pattern | None = None
    session_id: SessionId | None = None
    principal: PrincipalName | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    all: StrictBool = False
    """Needed where nothing else is said."""
    limit: Annotated[StrictInt, Field(ge=1, le=1000)] = 1000
    """Cancels so many at most in one call."""
