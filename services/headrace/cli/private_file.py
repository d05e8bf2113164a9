"""Files that only their owner can read: they hold passwords and keys."""

import contextlib
import os
import secrets
from pathlib import Path

SECRET_BYTES = 32


def write_private(file: Path, text: str) -> None:
    """Write a file with mode 0600, also where an older one was open to all."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as output:
        os.fchmod(output.fileno(), 0o600)
        output.write(text)


def kept_secret(file: Path) -> str:
    """Return the secret of a file, as hex digits; the first call makes it, later ones find the same."""
    with contextlib.suppress(FileNotFoundError):
        kept = file.read_text(encoding="utf-8").strip()
        if kept:
            return kept
    fresh = secrets.token_hex(SECRET_BYTES)
    write_private(file, fresh)
    return fresh
