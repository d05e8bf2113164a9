"""Operations of the model loop: one folder each, a plain-torch reference beside every faster implementation."""

KERNEL_VERSION = "4"
"""Part of the model fingerprint: raise it when an operation writes other KV bytes than before."""
