"""The only rooms that know models."""
