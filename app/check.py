"""A check of pictures, by a function of the operator's: it sees each one before its client does."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module

from app import errors
from app.errors import Problem
from app.metrics import Metrics

VERDICTS = (None, "flag", "refuse")
AT_A_TIME = os.cpu_count() or 1

Function = Callable[[bytes, int, int, str], str | None]

log = logging.getLogger("app.check")


def load(name: str) -> Function:
    """The function that `module:function` names. Raises ValueError with a sentence."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:
        raise ValueError(f"there is no such function: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError("it names no function")
    checked: Function = found
    return checked


class Check:
    """The function is called as f(pixels, width, height, prompt), with height x width x 3 bytes, in a thread. Its
    answer is None, "flag" or "refuse". fails_open: whether a picture is sent when it fails, or takes too long."""

    def __init__(self, function: Function, timeout_s: float, fails_open: bool, metrics: Metrics) -> None:
        self._function, self._timeout_s, self._fails_open = function, timeout_s, fails_open
        self._metrics = metrics
        self._free = asyncio.Semaphore(AT_A_TIME)

    async def is_flagged(self, pixels: bytes, width: int, height: int, prompt: str) -> bool:
        """Whether the picture is sent with a flag. Raises Problem where it is not sent."""
        try:
            async with asyncio.timeout(self._timeout_s):
                verdict = await self._call(partial(self._function, pixels, width, height, prompt))
            if verdict not in VERDICTS:
                raise ValueError(f"the check returned {verdict!r:.100}, not None, 'flag' or 'refuse'")
        except Exception as error:
            self._metrics.checks.labels("failed").inc()
            log.error("the check of a picture failed", exc_info=None if isinstance(error, TimeoutError) else error)
            if not self._fails_open:
                raise Problem(errors.CHECK_FAILED) from error
            return False
        self._metrics.checks.labels(verdict or "pass").inc()
        if verdict == "refuse":
            raise Problem(errors.PICTURE_REFUSED)
        return verdict == "flag"

    async def _call(self, look: Callable[[], str | None]) -> str | None:
        """In a daemon thread, so that the server can end while one hangs; which keeps its place until it ends."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()

        def settle(verdict: str | None, error: Exception | None) -> None:
            self._free.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(verdict)
            else:
                answer.set_exception(error)

        def run() -> None:
            verdict, error = None, None
            try:
                verdict = look()
            except BaseException as raised:  # also SystemExit, which would end the server
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
                error.__cause__ = raised
            loop.call_soon_threadsafe(settle, verdict, error)

        threading.Thread(target=run, daemon=True, name="check").start()
        return await answer
