"""The only rooms that know Redis."""
