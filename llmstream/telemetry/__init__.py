"""What is seen of the service from outside: logs, metrics, traces, behind one small observer."""

from llmstream.telemetry.logs import redact, setup_logging

__all__ = ["redact", "setup_logging"]
