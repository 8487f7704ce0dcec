"""Weights that are asked for and not there: each set is loaded in a thread of its own, while others are served."""

import threading
from collections.abc import Callable

from models.catalog import Weights
from models.registry import Registry


class Loading:
    """Which weight sets are being loaded now. post: runs a function under the loop's lock. failed: is told there of a
    set that cannot be loaded, and why."""

    def __init__(
        self,
        registry: Registry,
        post: Callable[[Callable[[], None]], None],
        failed: Callable[[Weights, str], None],
    ) -> None:
        self.registry, self._post, self._failed = registry, post, failed
        self._threads: dict[Weights, threading.Thread] = {}

    def ask(self, weights: Weights) -> None:
        """Begin to load a set, unless that has begun. Under the lock."""
        if weights not in self._threads:
            self._threads[weights] = threading.Thread(
                target=self._load, args=(weights,), daemon=True, name=f"load {weights.variant}"
            )
            self._threads[weights].start()

    def join(self) -> None:
        """Wait for the loads that have begun."""
        for thread in list(self._threads.values()):
            thread.join()

    def _load(self, weights: Weights) -> None:
        try:
            self.registry.load(weights)
        except Exception as error:
            reason = str(error)
            self._post(lambda: self._failed(weights, reason))
        self._post(lambda: self._done(weights))

    def _done(self, weights: Weights) -> None:
        self._threads.pop(weights, None)
