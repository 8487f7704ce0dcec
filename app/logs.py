"""Logs as JSON lines on stderr, of both processes. A line that cannot be written is dropped and counted: nobody waits
for a log, and nothing fails for it. Prompts are never logged."""

import contextlib
import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime

LINES = 1000  # that may wait for a slow reader; what comes beyond them is dropped
FLUSH_S = 1.0  # how long a process that ends waits for its last lines to be written
MOST = {"path": 200, "exception": 20_000}  # characters of a field; a traceback of our own is whole
MOST_ELSE = 300
ALWAYS: dict[str, str] = {}  # in every line of this process


class Stderr(logging.Handler):
    """A queue, and a thread that empties it into a descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptor = 2
        self._lines: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._dropped = 0
        self._counting = threading.Lock()

    def start(self) -> None:
        """Begin to write."""
        threading.Thread(target=self._write, daemon=True, name="log").start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record. Never blocks, never raises."""
        try:
            if self._lines.qsize() >= LINES:
                raise queue.Full
            self._lines.put(_line(record))
        except Exception:
            self.count_dropped(1)

    def flush(self) -> None:
        """Wait for what was taken, but not for long. logging calls it when the process ends."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(FLUSH_S)

    def count_dropped(self, lines: int) -> None:
        """Some lines were lost, here or in the other process."""
        with self._counting:
            self._dropped += lines

    def take_dropped(self) -> int:
        """How many were lost since this was last asked."""
        with self._counting:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def _write(self) -> None:
        torn = b""  # a line that was written in part ends before the next one
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            rest = torn + line
            try:
                while rest:
                    rest = rest[os.write(self.descriptor, rest) :]
                torn = b""
            except OSError:
                torn = torn if rest == torn + line else b"\n"
                self.count_dropped(1)


STDERR = Stderr()


def set_up(level: str, libraries: str | None = None, device: str | None = None) -> None:
    """Send everything from `level` up to stderr as JSON; of libraries, where that is given, from theirs. device: whose
    lines they are, where there are several."""
    logging.raiseExceptions = False
    if device is not None:
        ALWAYS["device"] = device
    STDERR.start()
    logging.basicConfig(handlers=[STDERR], level=(libraries or level).upper(), force=True)
    for name in ("app", "models"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.captureWarnings(True)


def keep_descriptors() -> None:
    """Fill descriptors 0 to 2 where they are closed, else the next socket would be one of them. Writing still fails."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest number that is free
            os.set_inheritable(descriptor, True)


def take_prints() -> None:
    """From here on what anybody prints, in whatever language, is a line of the log."""
    STDERR.descriptor = os.dup(2)
    reading, writing = os.pipe()
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    threading.Thread(target=_log_prints, args=(reading,), daemon=True, name="prints").start()


def take_handlers() -> None:
    """Libraries that brought a handler of their own log through ours."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def say(event: str, level: str = "info", **fields: object) -> None:
    """One line from the engine."""
    logging.getLogger("app.engine").log(logging.getLevelNamesMapping()[level.upper()], event, extra={"fields": fields})


def leave(code: int) -> None:
    """End this process at once, from any thread, when its last lines are written."""
    with contextlib.suppress(Exception):
        STDERR.flush()
    os._exit(code)


def _log_prints(descriptor: int) -> None:
    with open(descriptor, errors="replace") as prints:
        while line := prints.readline(4096):
            if line.strip():
                logging.getLogger("app.prints").warning(line.strip())


def _line(record: logging.LogRecord) -> bytes:
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    members = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
    members |= ALWAYS | getattr(record, "fields", {})
    if record.exc_info:
        members["exception"] = logging.Formatter().formatException(record.exc_info)
    short = {
        name: value[: MOST.get(name, MOST_ELSE)] if isinstance(value, str) else value for name, value in members.items()
    }
    return json.dumps(short, default=str).encode() + b"\n"
