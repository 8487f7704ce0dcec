"""The load: clients of every API who draw, leave, send nonsense or send slowly, each on a connection of its own; and
their ledger: what each of them sent, and the one thing that came of it."""

import asyncio
import base64
import hashlib
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from app.errors import CAUSES
from bench.load import arrivals
from bench.work import prompts

HOST = "127.0.0.1"
STEPS = (1, 2, 4, 8)
TIMEOUTS_S = (3.0, 5.0, 10.0)
KINDS = {"draw": 70, "leave": 15, "wrong": 8, "slow": 7}
GRACE_S = 1.0  # past its deadline, for an answer to arrive
LOST_S = 30.0  # past its deadline: whoever was not answered by then never is
REPEATED = 60  # requests that are sent again and again: each must always bring the same bytes
OUTCOMES = {cause.code: cause.outcome for cause in CAUSES.values()} | {"model_not_found": "invalid"}
WRONG = (b"{", b'{"prompt": ""}', b'{"prompt": "x", "steps": 3}', b'{"prompt": "x", "size": "1x1"}', b"[]", b"\xff")
BOUNDARY = b"x91d2"
UNCOUNTED = "too_many_connections"  # refused before it is known what is asked


@dataclass(frozen=True)
class Attempt:
    """One request. begin, end: monotonic. outcome: as the server's metrics name it; "left", or "none" where no answer
    came. told: it was refused with a Retry-After. is_sure: the server must have got it whole."""

    kind: str
    begin: float
    end: float
    timeout: float
    status: int
    outcome: str
    code: str = ""
    told: bool = False
    is_sure: bool = True

    @property
    def lateness(self) -> float:
        """Seconds between its deadline and its answer."""
        return self.end - self.begin - self.timeout


class Crowd:
    """Everybody who sends, and what came of it."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.rng = port, random.Random(seed)
        self.attempts: list[Attempt] = []
        self.in_flight = 0
        self.blank = 0
        self.changed = 0
        self._seen: dict[bytes, str] = {}
        self._repeated = [self._picture() for _ in range(REPEATED)]

    async def run(self, rate: float, seconds: float) -> None:
        """Requests at `rate` a second, each at a random moment (Poisson)."""
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for due in arrivals(rate, seconds, self.rng.randrange(1 << 30)):
                await asyncio.sleep(begin + due - time.monotonic())
                group.create_task(self.one())

    async def one(self) -> None:
        """One client: it asks, and half of those who are told to come back do so once."""
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        timeout = self.rng.choice(TIMEOUTS_S)
        path, body, is_repeated = self._request(kind, timeout)
        for _ in range(2):
            attempt, wait = await self._attempt(kind, timeout if path == "/generate" else 30.0, path, body, is_repeated)
            self.attempts.append(attempt)
            if wait is None or wait > timeout or self.rng.random() < 0.5:
                return
            await asyncio.sleep(wait)

    async def draw(self) -> Attempt:
        """One client that only draws."""
        body = _json(**self._picture(), timeout=30.0, n=4, output_format="jpeg")
        attempt, _ = await self._attempt("draw", 30.0, "/generate", body, False)
        return attempt

    def _picture(self) -> dict[str, object]:
        return {
            "prompt": self.rng.choice(prompts()),
            "steps": self.rng.choice(STEPS),
            "seed": self.rng.randrange(1 << 32),
        }

    def _request(self, kind: str, timeout: float) -> tuple[str, bytes, bool]:
        """Where to, what, and whether it is one of those that always bring the same bytes."""
        if kind == "wrong":
            return self.rng.choice(("/generate", "/v1/images/generations")), self.rng.choice(WRONG), False
        if self.rng.random() < 0.3:
            return "/generate", _json(**self.rng.choice(self._repeated), timeout=30.0), True
        picture = self._picture()
        many = self.rng.choice((1, 1, 1, 2, 4, 8))
        openai = {"prompt": picture["prompt"], "num_inference_steps": picture["steps"], "n": many, "stream": many == 2}
        parameters = {"num_inference_steps": picture["steps"], "seed": picture["seed"]}
        over = {"steps": 4, "seed": picture["seed"], "timeout": timeout}
        choices = (
            ("/generate", _json(**picture, timeout=timeout)),
            ("/generate", _json(**picture, timeout=timeout, n=many, output_format=self.rng.choice(("jpeg", "webp")))),
            ("/generate", _json(**picture, timeout=timeout, n=many, stream=True)),
            ("/generate", _json(**over, prompt=picture["prompt"], image=base64.b64encode(IMAGE).decode(), n=1)),
            ("/generate", _form(**over, prompt=picture["prompt"], image=IMAGE)),
            ("/v1/images/generations", _json(**openai)),
            ("/sdapi/v1/txt2img", _json(**picture, batch_size=many)),
            ("/", _json(inputs=picture["prompt"], parameters=parameters)),
        )
        return *self.rng.choice(choices), False

    async def _attempt(
        self, kind: str, within: float, path: str, body: bytes, is_repeated: bool
    ) -> tuple[Attempt, float | None]:
        """The attempt, and in how many seconds it may come again, where it was told so."""
        self.in_flight += 1
        begin = time.monotonic()

        def attempt(status: int, outcome: str, **more: object) -> Attempt:
            return Attempt(kind, begin, time.monotonic(), within, status, outcome, **more)  # type: ignore[arg-type]

        try:
            async with asyncio.timeout(within + LOST_S):
                reader, writer = await asyncio.open_connection(HOST, self.port)
                try:
                    await _send(writer, path, body, kind == "slow")
                    if kind == "leave":
                        await asyncio.sleep(self.rng.choice((0.02, 0.1, 0.5)))
                        return attempt(0, "left", is_sure=False), None
                    reply = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return attempt(0, "none"), None
        finally:
            self.in_flight -= 1
        head, _, answer = reply.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            return attempt(0, "none"), None
        status = int(head[9:12])
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if status == 200:
            code = _code(answer) if b"event: error" in answer else ""
            if not code:
                self._look_at(headers, answer, body if is_repeated else None)
            return attempt(status, OUTCOMES.get(code, "ok"), code=code), None
        code, told = _code(answer), headers.get(b"retry-after")
        wait = None if told is None else float(told)
        return attempt(status, OUTCOMES.get(code, "failed"), code=code, told=told is not None), wait

    def _look_at(self, headers: dict[bytes, bytes], answer: bytes, request: bytes | None) -> None:
        if not headers[b"content-type"].startswith(b"image/"):
            return
        with Image.open(io.BytesIO(answer)) as picture:
            self.blank += bool(np.asarray(picture, float).std(axis=(0, 1)).max() < 1)
        if request is not None:
            digest = hashlib.sha256(answer).hexdigest()
            self.changed += self._seen.setdefault(request, digest) != digest


@dataclass(frozen=True)
class Books:
    """The clients' ledger and the server's, side by side. difference: the sum over all outcomes of what neither side's
    leeway explains: a client that left may have been counted as anything, or not at all."""

    ours: Counter[str]
    theirs: Counter[str]
    received: int
    difference: int


def balance(attempts: list[Attempt], before: dict[str, float], after: dict[str, float]) -> Books:
    """Compare what clients saw with what the server counted between two scrapes."""

    def grew(wanted: Callable[[str], bool]) -> int:
        return round(sum(value - before.get(name, 0) for name, value in after.items() if wanted(name)))

    counted = [each for each in attempts if each.code != UNCOUNTED]
    ours = Counter(each.outcome for each in counted)
    outcomes = {"ok", "invalid", "refused", "expired", "failed", "dropped"}
    theirs = Counter(
        {
            each: grew(lambda name: name.startswith("sdxl_requests_total") and f'outcome="{each}"' in name)  # noqa: B023
            for each in outcomes
        }
    )
    received = grew(lambda name: name == "sdxl_requests_received_total")
    leeway = ours["left"] + ours["none"]  # each of them is at most once somewhere on the other side
    surplus = sum(max(0, theirs[each] - ours[each]) for each in outcomes)
    missing = sum(max(0, ours[each] - theirs[each]) for each in outcomes)
    difference = missing + max(0, surplus - leeway) + abs(received - theirs.total())
    return Books(ours, theirs, received, difference)


def _png() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


IMAGE = _png()  # which some draw over


def _form(**fields: object) -> bytes:
    parts = []
    for name, value in fields.items():
        content = value if isinstance(value, bytes) else str(value).encode()
        file = b'; filename="x.png"' if isinstance(value, bytes) else b""
        parts.append(
            b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
            % (BOUNDARY, name.encode(), file, content)
        )
    return b"".join(parts) + b"--%b--\r\n" % BOUNDARY


def _json(**fields: object) -> bytes:
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


async def _send(writer: asyncio.StreamWriter, path: str, body: bytes, is_slow: bool) -> None:
    accept = "*/*" if b'"n":' in body else "image/*"
    content_type = "application/json"
    if body.startswith(b"--"):
        content_type = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\naccept: {accept}\r\n"
    request = f"{head}content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    parts = [request[:40], request[40:-5], request[-5:]] if is_slow else [request]
    for number, part in enumerate(parts):
        if number:
            await asyncio.sleep(0.5)
        writer.write(part)
        await writer.drain()


def _code(answer: bytes) -> str:
    """The problem's code, in whatever shape an API tells it."""
    text = answer.partition(b"event: error")[2].partition(b"data: ")[2].split(b"\n")[0] or answer
    try:
        told = json.loads(text)
    except ValueError:
        return "unreadable"
    return str(told.get("code") or (told.get("error") or {}).get("code") or "unreadable")
