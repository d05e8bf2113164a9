"""Compute prompts and push their KV into blocks that a decode worker reserved."""
