"""The engine that prefill and decode share: plan, run, commit."""
