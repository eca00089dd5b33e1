"""Telling others that a job has ended: signed, retried, and only where that is allowed."""
