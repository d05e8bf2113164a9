"""Files that only their owner can read: they hold passwords and keys."""

import os
from pathlib import Path


def write_private(file: Path, text: str) -> None:
    """Write a file with mode 0600, also where it existed with another one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as output:
        os.fchmod(descriptor, 0o600)
        output.write(text)
