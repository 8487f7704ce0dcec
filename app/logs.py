"""Logs as JSON lines on stderr. Prompts are never logged."""

import json
import logging
import sys
import time
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as JSON; an exception's traceback goes into one field."""
        fields = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return _line(record.created, record.levelname.lower(), record.getMessage(), fields)


def say(event: str, level: str = "info", **fields: object) -> None:
    """One line from the engine process, which has no logging set up: stderr is the HTTP process's own."""
    print(_line(time.time(), level, event, fields), file=sys.stderr, flush=True)


def _line(seconds: float, level: str, event: str, fields: dict[str, object]) -> str:
    when = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": when, "level": level, "event": event, **fields}, ensure_ascii=False)


def set_up(level: str) -> None:
    """Send everything from `level` up to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
