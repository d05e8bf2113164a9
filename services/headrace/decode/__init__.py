"""Reserve blocks, wait for KV, generate tokens."""
