"""What can be configured about RabbitMQ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator

from llmstream.config_schema import Section, split_url


class BrokerSettings(Section):
    kind: Literal["redis", "rabbitmq"] = "redis"
    """Where accepted jobs wait: in the store, or in RabbitMQ (``pip install 'llmstream[rabbitmq]'``). ``BROKER`` sets
    it too; all below is for ``rabbitmq``."""
    url: SecretStr | None = None
    """``amqp://`` or ``amqps://`` URL; goes before host, port, login and password. ``RABBITMQ_URL`` sets it too."""
    host: str = "127.0.0.1"
    """``RABBIT_MQ_HOST`` sets it too."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5672
    """``RABBIT_MQ_PORT`` sets it too."""
    login: str = "guest"
    """``RABBIT_MQ_LOGIN`` sets it too."""
    password: SecretStr | None = None
    """None: ``guest``. ``RABBIT_MQ_PASSWORD`` sets it too."""
    queue: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:@/-]{1,200}$")] = "llmstream"
    """Queue of the lane ``default``, where anyone may post; ``.high``, ``.low`` and ``.dead`` stand beside it.
    ``QUEUE_NAME`` sets it too."""
    result_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] = "llm-api"
    """Results of what others post are stored under ``PREFIX:JOB_ID``. ``REDIS_PREFIX`` sets it too."""
    consume: bool = True
    """False: another core reads ``queue``, runs what ``/generate`` and ``/chat_completion`` post there, and stores its
    results in our Redis; other jobs do without RabbitMQ. ``INNER_LLM_URL`` makes it false, too."""
    result_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """How long a request waits for such a result; after that, whoever asks again posts again."""
    prefetch: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Unfinished jobs of each lane that one replica takes out of RabbitMQ; None: twice its slots, at least 64."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Deadline of connecting, and of the confirmation that a job is in the queue."""

    @field_validator("url")
    @classmethod
    def _amqp_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not _is_amqp_url(url.get_secret_value()):
            raise ValueError(
                "amqp:// or amqps:// with a host, for example amqp://user:password@host:5672/; special characters in a "
                "password are written as %XX"
            )
        return url


def _is_amqp_url(url: str) -> bool:
    parts = split_url(url)
    return parts is not None and parts.scheme in ("amqp", "amqps") and bool(parts.hostname)
