"""The same even mix for people who use locust, over all APIs; each is reported by its name:

locust -f bench/locustfile.py --headless -u 16 -r 16 -t 20s -H http://127.0.0.1:8000
"""

import sys
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, constant, task

sys.path.insert(0, str(Path(__file__).parents[1]))  # locust is a script of its own: it does not look here

from bench.work import EVEN_MIX, stream

WORK = stream("locust", EVEN_MIX)  # all users draw from one stream


class Painter(FastHttpUser):  # type: ignore[misc]  # locust is not typed
    """Asks for a picture again as soon as the last one came; if refused, waits as told."""

    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]
    def generate(self) -> None:
        """One picture; reported by its step count."""
        ask = next(WORK)
        headers = {"content-type": "application/json", "accept": "image/png"}
        name = f"/generate, {ask.steps} steps"
        with self.client.post(
            "/generate", data=ask.body().decode(), headers=headers, name=name, catch_response=True
        ) as reply:
            if reply.status_code == 200 and not reply.content.startswith(b"\x89PNG"):
                reply.failure("no PNG")
        self._wait_if_told(reply)

    @task  # type: ignore[untyped-decorator]
    def openai(self) -> None:
        """One picture, as OpenAI's SDKs ask."""
        ask = next(WORK)
        body = {"prompt": ask.prompt, "num_inference_steps": ask.steps, "seed": ask.seed, "size": "1024x1024"}
        self._wait_if_told(self.client.post("/v1/images/generations", json=body))

    @task  # type: ignore[untyped-decorator]
    def a1111(self) -> None:
        """One picture, as clients of the web UI ask."""
        ask = next(WORK)
        body = {"prompt": ask.prompt, "steps": ask.steps, "seed": ask.seed, "cfg_scale": 7, "width": 512, "height": 512}
        self._wait_if_told(self.client.post("/sdapi/v1/txt2img", json=body))

    @task  # type: ignore[untyped-decorator]
    def huggingface(self) -> None:
        """One picture, as Hugging Face's clients ask."""
        ask = next(WORK)
        body = {"inputs": ask.prompt, "parameters": {"num_inference_steps": ask.steps, "seed": ask.seed}}
        self._wait_if_told(self.client.post("/", json=body))

    def _wait_if_told(self, reply: Any) -> None:
        if reply.status_code in (429, 503):
            gevent.sleep(float(reply.headers.get("retry-after", 1)))
