"""The global prefix index: an ordered log of who holds which blocks, and what is made of it in memory."""
