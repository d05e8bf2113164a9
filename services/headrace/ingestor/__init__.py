"""Ingestor: contexts that still arrive, as text."""
