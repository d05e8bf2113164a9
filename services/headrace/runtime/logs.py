"""Logs: one JSON object per line, constant text, values in fields."""

import json
import logging
import time
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Write a record as one line of JSON with its `extra` fields beside time, level, logger and event.

    Args:
        fields: Put into every line, for example the name and role of the process.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; values that JSON does not know are written as text."""
        line: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **self._fields,
        }
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def setup_logs(stream: TextIO, level: str = "INFO", **fields: str) -> None:
    """Send all logs of this process to `stream`.

    Args:
        stream: Where lines go.
        level: Least level that is written.
        **fields: Put into every line.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(fields))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
