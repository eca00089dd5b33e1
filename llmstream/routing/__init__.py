"""Which model answers: names to targets."""
