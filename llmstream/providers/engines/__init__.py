"""Local inference engines; each runs in a child process of its own, so native code can crash without harm."""
