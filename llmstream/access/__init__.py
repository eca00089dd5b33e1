"""Who asks: API keys, and signed URLs that stand for one."""
