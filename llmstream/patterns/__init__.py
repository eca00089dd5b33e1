"""What a text is searched for, while it is still being written."""
