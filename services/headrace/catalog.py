"""Techniques by name: one folder each under `techniques/`, imported when asked for."""

import importlib
import importlib.metadata
from pathlib import Path

from headrace import techniques
from headrace.errors import ConfigError
from headrace.seams.technique import Technique

ENTRY_POINTS = "headrace.techniques"
"""Group under which other distributions register techniques of their own."""


def names() -> tuple[str, ...]:
    """Return the techniques of this distribution: the folders, in order."""
    roots = [Path(path) for path in techniques.__path__]
    return tuple(sorted(path.parent.name for root in roots for path in root.glob("*/__init__.py")))


def load(name: str) -> Technique:
    """Return a technique's manifest; nothing heavier is imported.

    Raises:
        ConfigError: there is none of that name, or it calls itself something else.
    """
    module = f"{techniques.__name__}.{name}" if name in names() else _outside(name)
    found = getattr(importlib.import_module(module), "TECHNIQUE", None)
    if not isinstance(found, Technique):
        raise ConfigError(f"{module} has no TECHNIQUE of type Technique", field="technique")
    if found.name != name:
        raise ConfigError(f"the technique in {module} calls itself {found.name!r}", field="technique")
    return found


def _outside(name: str) -> str:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return entry.value
    raise ConfigError(f"no technique {name!r}; known are {', '.join(names())}", field="technique")
