"""What the command line can do; one module for each command, the rest is what they share."""
