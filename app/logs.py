"""Logs as JSON lines on stderr. Prompts are never logged."""

import json
import logging
import sys
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as JSON; an exception's traceback goes into one field."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def say(event: str, **fields: object) -> None:
    """One line from the engine process, which has no logging set up: stderr is the HTTP process's own."""
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


def set_up(level: str) -> None:
    """Send everything from `level` up to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
