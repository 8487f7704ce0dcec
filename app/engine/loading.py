"""Weights that are asked for and not there: each set is loaded in a thread of its own, while others are served."""

import threading
import time
from collections.abc import Callable

from app.engine.messages import Held, VariantReport
from app.errors import UNAVAILABLE
from app.logs import say
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
        self._backing_off: dict[Weights, tuple[float, str]] = {}  # when each may be tried again, and why it failed

    def ask(self, weights: Weights) -> None:
        """Begin to load a set, unless that has begun; one that failed lately fails again at once. Under the lock."""
        again, reason = self._backing_off.get(weights, (0.0, ""))
        if time.monotonic() < again:
            self._failed(weights, reason)
        elif weights not in self._threads:
            self._threads[weights] = threading.Thread(
                target=self._load, args=(weights,), daemon=True, name=f"load {weights.variant}"
            )
            self._threads[weights].start()

    def variants(self) -> list[VariantReport]:
        """Each variant and where its weights are."""
        return [VariantReport(row.name, row.state, row.resident_bytes, row.reason) for row in self.registry.status()]

    def held(self) -> list[Held]:
        """The weight sets that are there."""
        return [Held(weights, seconds) for weights, seconds in self.registry.held().items()]

    def join(self) -> None:
        """Wait for the loads that have begun."""
        for thread in list(self._threads.values()):
            thread.join()

    def _load(self, weights: Weights) -> None:
        reason = None
        try:
            self.registry.load(weights)
        except Exception as error:
            reason = str(error)
        self._post(lambda: self._done(weights, reason))
        if reason is not None:
            say("weights cannot be loaded", level="error", weights=str(weights), reason=reason[:300])

    def _done(self, weights: Weights, reason: str | None) -> None:
        self._threads.pop(weights, None)
        self._backing_off.pop(weights, None)
        if reason is not None:
            self._backing_off[weights] = time.monotonic() + (UNAVAILABLE.retry_after or 0), reason
            self._failed(weights, reason)
