"""Loops that run for a test and leave with it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.engine.loop import Loop


@contextmanager
def running(loop: Loop) -> Iterator[Loop]:
    """A loop at work with all its worker threads, until the block ends."""
    thread = threading.Thread(target=loop.run, name="worker 0")
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join()


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    """Each test ends with the threads it began with."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith(("worker", "load"))]
    assert left == []
