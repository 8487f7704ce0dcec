"""What each API adds to /generate, for one client at one step: `python -m bench.faces`, on a quiet machine.

The APIs are asked in turns, the same pictures of each, so that what slows the machine slows all of them.
"""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from bench.client import Client
from bench.contenders import HOST, ours
from bench.load import percentile
from bench.progress import progress
from bench.start import start
from bench.work import Work, stream

ROUNDS = 1000
AIM_MS = 0.3

Body = Callable[[Work], dict[str, object]]
FACES: dict[str, tuple[str, Body]] = {
    "/generate": ("/generate", lambda ask: {"prompt": ask.prompt, "steps": 1, "seed": ask.seed}),
    "OpenAI": (
        "/v1/images/generations",
        lambda ask: {"prompt": ask.prompt, "num_inference_steps": 1, "seed": ask.seed, "size": "1024x1024"},
    ),
    "A1111": ("/sdapi/v1/txt2img", lambda ask: {"prompt": ask.prompt, "steps": 1, "seed": ask.seed, "cfg_scale": 7}),
    "Hugging Face": (
        "/",
        lambda ask: {"inputs": ask.prompt, "parameters": {"num_inference_steps": 1, "seed": ask.seed}},
    ),
}


async def measure(port: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by API. /generate answers JSON here, as most of the others do."""
    times: dict[str, list[float]] = {name: [] for name in FACES}
    work = stream("faces", (1,))
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(Client(HOST, port, path, accept="*/*"))
            for name, (path, _) in FACES.items()
        }
        for _ in progress(range(ROUNDS), "faces"):
            ask = next(work)
            for name, (_, body) in FACES.items():
                data, began = json.dumps(body(ask)).encode(), time.perf_counter()
                reply = await clients[name].post(data)
                times[name].append(1e3 * (time.perf_counter() - began))
                if reply.status != 200:
                    raise RuntimeError(f"{name} answered {reply.status}: {reply.body[:500]!r}")
    return times


def main() -> None:
    """Start a server, measure, and print a table."""
    server = ours()
    try:
        start([server])
        times = asyncio.run(measure(server.port))
    finally:
        server.end()
    base = percentile(times["/generate"], 50)
    print(f"| API | p50 ms | over /generate, ms (aim: {AIM_MS} or less) |\n|---|---|---|")
    for name, found in times.items():
        p50 = percentile(found, 50)
        print(f"| {name} | {p50:.2f} | {p50 - base:+.2f} |")


if __name__ == "__main__":
    main()
