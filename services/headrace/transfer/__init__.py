"""Move KV blocks between the pools of processes."""
