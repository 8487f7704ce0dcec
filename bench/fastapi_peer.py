"""Peer (a): a plain FastAPI app; diffusers' pipeline under a lock, in one long-lived thread.

Run as `python -m bench.fastapi_peer PORT THREADS`.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response

from bench.painter import Painter
from bench.work import Work


def create_app(threads: int) -> FastAPI:
    """POST /generate draws; a body with "settings" changes the dtype instead, for the tuning."""
    app = FastAPI()
    lock, inference = asyncio.Lock(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
    painter = inference.submit(Painter, "float32").result()

    @app.get("/ready")
    async def ready() -> str:
        return "ok"

    @app.post("/generate")
    async def generate(body: dict[str, Any]) -> Response:
        nonlocal painter
        loop = asyncio.get_running_loop()
        async with lock:
            if "settings" in body:
                painter = await loop.run_in_executor(inference, Painter, body["settings"]["dtype"])
                return Response(status_code=204)
            work = Work(body["prompt"], body["steps"], body["seed"])
            (png,) = await loop.run_in_executor(inference, painter.draw, [work])
        return Response(png, media_type="image/png")

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(threads=int(sys.argv[2])), port=int(sys.argv[1]), log_level="warning")
