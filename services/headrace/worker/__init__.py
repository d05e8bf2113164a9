"""The worker program: one engine, one block pool, one transfer agent. Roles differ by configuration."""
