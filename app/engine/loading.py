"""Weights that are asked for and not there: one set at a time is loaded in a thread, while others are served."""

import threading
import time
from collections.abc import Callable, Collection, Sequence

from app.engine.messages import FromEngine, Held, Loaded, VariantReport
from app.errors import UNAVAILABLE
from app.logs import say
from models.catalog import Weights
from models.registry import Registry
from models.weightset import BadStyle, StyleGone


class Loading:
    """Which weight set is being loaded now. post: runs a function under the loop's lock. send: puts a message on the
    wire. failed: is told, under the lock, of a set that cannot be loaded, the cause and the reason."""

    def __init__(
        self,
        registry: Registry,
        post: Callable[[Callable[[], None]], None],
        send: Callable[[FromEngine], None],
        failed: Callable[[Weights, str, str], None],
    ) -> None:
        self.registry, self._post, self._send, self._failed = registry, post, send, failed
        self._thread: threading.Thread | None = None
        self._backing_off: dict[Weights, tuple[float, str, str]] = {}  # when each may be tried again; cause and reason

    def ask(self, missing: Collection[Weights], needed: Sequence[Weights]) -> None:
        """Begin to load the most urgent of the missing sets, unless one is being loaded, or there is no room for it
        beside those that are more urgent. One that failed lately fails again at once. needed: all that are waited for,
        the most urgent first. Under the lock."""
        now = time.monotonic()
        self._backing_off = {each: found for each, found in self._backing_off.items() if now < found[0]}
        for index, weights in enumerate(needed):
            if weights in self._backing_off:
                self._failed(weights, *self._backing_off[weights][1:])
            elif weights in missing:
                if self._thread is None and self.registry.has_room(needed[:index]):
                    arguments, name = (weights, needed), f"load {weights.variant}"
                    self._thread = threading.Thread(target=self._load, args=arguments, daemon=True, name=name)
                    self._thread.start()
                return

    def variants(self) -> list[VariantReport]:
        """Each variant and where its weights are."""
        return [VariantReport(row.name, row.state, row.resident_bytes, row.reason) for row in self.registry.status()]

    def held(self) -> list[Held]:
        """The weight sets that are there."""
        return [Held(weights, seconds) for weights, seconds in self.registry.held().items()]

    def join(self) -> None:
        """Wait for the load that has begun."""
        if (thread := self._thread) is not None:
            thread.join()

    def _load(self, weights: Weights, needed: Sequence[Weights]) -> None:
        try:
            left = self.registry.load(weights, needed)
        except Exception as error:
            cause = {BadStyle: "BAD_STYLE", StyleGone: "STYLE_GONE"}.get(type(error), "UNAVAILABLE")
            failure = cause, str(error)
            say("weights cannot be loaded", level="error", weights=str(weights), reason=str(error)[:300])
            self._post(lambda: self._fail(weights, *failure))
        else:
            seconds = self.registry.style_seconds if weights.is_styled else self.registry.load_seconds
            self._send(Loaded(weights, seconds, left))
            self._post(self._end)

    def _fail(self, weights: Weights, cause: str, reason: str) -> None:
        self._end()
        self._backing_off[weights] = time.monotonic() + (UNAVAILABLE.retry_after or 0), cause, reason
        self._failed(weights, cause, reason)

    def _end(self) -> None:
        self._thread = None
