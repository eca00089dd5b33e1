"""When a job may begin, as clients write it."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, StrictFloat, ValidationInfo, WithJsonSchema, field_validator

WHEN = "seconds since the epoch, or a date and time with its zone such as 2030-01-31T09:00:00Z"


def moment(value: Any) -> Any:
    """Seconds since the epoch. Raises ValueError for what is neither a number nor a time with a zone."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected {WHEN}")
        return float(value)
    try:
        when = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected {WHEN}") from None
    if when.tzinfo is None:
        raise ValueError(f"the time zone is missing; expected {WHEN}")
    return when.timestamp()


Moment = Annotated[
    float,
    BeforeValidator(moment),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "format": "date-time"}]}),
]


class Later(BaseModel):
    """Extension: the job is accepted now and begins later."""

    not_before: Moment | None = None
    """Not before this time, by the store's clock: seconds since the epoch, or ISO 8601 with its zone."""
    delay_s: Annotated[StrictFloat, Field(ge=0)] | None = None
    """The same, in seconds from now."""

    @property
    def scheduled(self) -> bool:
        return self.not_before is not None or bool(self.delay_s)

    @field_validator("delay_s")
    @classmethod
    def _one_time(cls, delay_s: float | None, info: ValidationInfo) -> float | None:
        if delay_s is not None and info.data.get("not_before") is not None:
            raise ValueError("give either 'not_before' (a time) or 'delay_s' (seconds from now)")
        return delay_s
