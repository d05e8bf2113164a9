"""Blocks that outlive a request, and where to find them."""
