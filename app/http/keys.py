"""Keys: who has one is served, and who has none reaches only what is open to everybody. A request of a key is named in
the log and the metrics, and the key's requests a minute are kept."""

import base64
import hmac
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors, keys
from app.errors import Problem
from app.keys import Key
from app.metrics import Metrics

LOOK_S = 1.0  # between two looks at the file
MINUTE = 60.0

log = logging.getLogger("app.http")


@dataclass
class Bucket:
    """A token bucket that holds the tokens of one minute (as GCRA: ITU-T I.371, annex A). Time is an argument, seconds.
    full_at: when it is full again."""

    rpm: int
    full_at: float = 0.0

    def take(self, now: float) -> float:
        """Take a token: 0, or the seconds until there is one."""
        full_at = max(self.full_at, now) + MINUTE / self.rpm
        if (wait := full_at - now - MINUTE) > 1e-6:
            return wait
        self.full_at = full_at
        return 0.0

    def headers(self, now: float) -> dict[str, str]:
        """Policy and state, as draft-ietf-httpapi-ratelimit-headers-10 has them. t: seconds until it is full."""
        empty = min(MINUTE, max(0.0, self.full_at - now))
        left = int((MINUTE - empty) * self.rpm / MINUTE + 1e-6)
        return {
            "RateLimit-Policy": f'"requests";q={self.rpm};w={MINUTE:.0f}',
            "RateLimit": f'"requests";r={left};t={math.ceil(empty)}',
        }


class Ring:
    """The keys as their file has them now. A file that cannot be read leaves them as they were."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._path, self._metrics = path, metrics
        self._stamp, self._keys = _stamp(path), keys.read(path)
        self._looked = time.monotonic()
        self._buckets: dict[str, Bucket] = {}

    def find(self, secret: str) -> Key | None:
        """The key that a client shows. It is compared with all of them, each in constant time."""
        self._look()
        digest, found = keys.digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def bucket(self, key: Key) -> Bucket | None:
        """What a key has left of its requests a minute; None where it has no such limit."""
        if key.rpm is None:
            return None
        bucket = self._buckets.setdefault(key.name, Bucket(key.rpm))
        bucket.rpm = key.rpm
        return bucket

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked, stamp = time.monotonic(), _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp, before = stamp, self._keys
        try:
            self._keys = keys.read(self._path)
        except ValueError as error:
            log.error("%s; the keys stay as they were", error)
            return
        for name in {key.name for key in before} - {key.name for key in self._keys}:
            self._buckets.pop(name, None)
            self._metrics.of_key.remove_by_labels({"key": name})
        log.info("read %d keys anew", len(self._keys))


class Guard:
    """Pure ASGI. The way to the whole application leads past a key; without one there is only `public`, an application
    of its own. So a route is closed unless somebody put it there, and no path has to be understood here.
    scope["state"]: key, and bucket where the key has a limit."""

    def __init__(self, app: ASGIApp, ring: Ring, public: ASGIApp, metrics: Metrics) -> None:
        self.app, self.ring, self.public, self.metrics = app, ring, public, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; a lifespan passes."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        secret = shown(Headers(scope=scope))
        key = self.ring.find(secret) if secret else None
        if key is None:
            self.metrics.without_key.inc()
            await self.public(scope, receive, send)
            return
        bucket = self.ring.bucket(key)
        scope.setdefault("state", {}).update(key=key, bucket=bucket)

        async def send_with_limit(message: Message) -> None:
            if message["type"] == "http.response.start" and bucket is not None:
                MutableHeaders(scope=message).update(bucket.headers(time.monotonic()))
            await send(message)

        await self.app(scope, receive, send_with_limit)


def refusal(headers: Headers) -> Problem:
    """Why a request without a valid key is not served."""
    return Problem(errors.UNKNOWN_KEY if "authorization" in headers else errors.NO_KEY)


def take(scope: Scope) -> None:
    """A request that draws takes one of its key's requests a minute. Raises Problem."""
    bucket: Bucket | None = scope["state"].get("bucket")
    if bucket is not None and (wait := bucket.take(time.monotonic())) > 0:
        seconds = math.ceil(wait)
        detail = f"this key may send {bucket.rpm} requests a minute; ask again in {seconds} s"
        raise Problem(errors.RATE_LIMITED, detail, retry_after=seconds)


def shown(headers: Headers) -> str | None:
    """The key in a request's one Authorization header: a bearer token, or the password of Basic."""
    given = headers.getlist("authorization")
    scheme, _, value = (given[0] if len(given) == 1 else "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
