"""Peer (b): LitServe with its own dynamic batching; one inference process.

Run as `python -m bench.litserve_peer PORT THREADS`.
"""

import sys
from typing import Any

import litserve
from fastapi import Response

from bench.work import Work


class DrawAPI(litserve.LitAPI):  # type: ignore[misc]  # litserve is not typed
    """Requests of one batch are grouped by step count; each group is one call of diffusers' pipeline.

    LitServe reads max_batch_size and batch_timeout anew for every batch, so a body with "settings" changes them and
    the dtype between two measurements, without a restart.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.005, api_path="/generate")
        self.threads = threads

    def setup(self, device: str) -> None:
        """Load the pipelines, in the inference process and in its main thread, where LitServe runs predict()."""
        import torch  # not in the HTTP process

        from bench.painter import Painter

        torch.set_num_threads(self.threads)
        self.make_painter = Painter
        self.painter, self.dtype = Painter("float32"), "float32"

    def decode_request(self, request: dict[str, Any]) -> Work | None:
        """None for a change of settings."""
        if "settings" not in request:
            return Work(request["prompt"], request["steps"], request["seed"])
        settings = request["settings"]
        self.max_batch_size, self.batch_timeout = settings["max_batch_size"], settings["batch_timeout_ms"] / 1e3
        if settings["dtype"] != self.dtype:
            self.painter, self.dtype = self.make_painter(settings["dtype"]), settings["dtype"]
        return None

    def predict(self, batch: list[Work | None]) -> list[bytes | None]:
        """PNGs in order."""
        pngs = iter(self.painter.draw([work for work in batch if work is not None]))
        return [None if work is None else next(pngs) for work in batch]

    def encode_response(self, png: bytes | None) -> Response:
        """The bare picture."""
        return Response(status_code=204) if png is None else Response(png, media_type="image/png")


if __name__ == "__main__":
    server = litserve.LitServer(DrawAPI(threads=int(sys.argv[2])), accelerator="cpu", devices=1, workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
