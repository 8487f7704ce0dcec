"""Weights that are asked for and not there: one set at a time is loaded in a thread, while others are served."""

import threading
import time
from collections.abc import Callable, Collection

from app.errors import UNAVAILABLE
from app.logs import say
from models.catalog import Weights
from models.registry import Registry


class Loading:
    """Which weight set is being loaded now. post: runs a function under the loop's lock. loaded: is told there of a set
    that has come, and of those that left for it. failed: of one that cannot be loaded, and why."""

    def __init__(
        self,
        registry: Registry,
        post: Callable[[Callable[[], None]], None],
        loaded: Callable[[Weights, list[Weights]], None],
        failed: Callable[[Weights, Exception], None],
    ) -> None:
        self.registry, self._post, self._loaded, self._failed = registry, post, loaded, failed
        self._thread: threading.Thread | None = None
        self._backing_off: dict[
            Weights, tuple[float, Exception]
        ] = {}  # when each may be tried again, and why it failed

    def ask(self, weights: Weights, keep: Collection[Weights]) -> None:
        """Begin to load a set, unless another is being loaded, or has no room beside those to keep. One that failed
        lately fails again at once. Under the lock, the most urgent first."""
        now = time.monotonic()
        if weights in self._backing_off and now < self._backing_off[weights][0]:
            self._failed(weights, self._backing_off[weights][1])
        elif self._thread is None and self.registry.can_load(keep):
            self._backing_off = {each: found for each, found in self._backing_off.items() if now < found[0]}
            name = f"load {weights.variant}"
            self._thread = threading.Thread(target=self._load, args=(weights, set(keep)), daemon=True, name=name)
            self._thread.start()

    def join(self) -> None:
        """Wait for the load that has begun."""
        if (thread := self._thread) is not None:
            thread.join()

    def _load(self, weights: Weights, keep: Collection[Weights]) -> None:
        try:
            left = self.registry.load(weights, keep)
        except Exception as error:
            failure = error
            say("weights cannot be loaded", level="error", weights=str(weights), reason=str(error)[:300])
            self._post(lambda: self._fail(weights, failure))
        else:
            self._post(lambda: self._succeed(weights, left))

    def _succeed(self, weights: Weights, left: list[Weights]) -> None:
        self._thread = None
        self._loaded(weights, left)

    def _fail(self, weights: Weights, error: Exception) -> None:
        self._thread = None
        self._backing_off[weights] = time.monotonic() + (UNAVAILABLE.retry_after or 0), error
        self._failed(weights, error)
