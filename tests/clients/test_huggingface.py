"""Hugging Face's Python client, unchanged, pointed at the server."""

import io

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from app.main import create_app
from app.settings import Settings
from tests.conftest import APPLE

PROMPT = APPLE["prompt"]


def test_the_client_draws(server):
    client = InferenceClient(base_url=server.url)
    assert client.text_to_image(PROMPT).size == (128, 128)
    picture = client.text_to_image(PROMPT, num_inference_steps=2, seed=7, width=1024, height=1024, negative_prompt=None)
    assert "Steps: 2, " in picture.info["parameters"]
    assert "Seed: 7, " in picture.info["parameters"]


def test_the_client_is_told_what_is_wrong(server):
    with pytest.raises(HfHubHTTPError, match="not 50") as refused:
        InferenceClient(model=server.url).text_to_image(PROMPT, num_inference_steps=50)
    assert refused.value.response.json()["field"] == "num_inference_steps"


def test_bytes_come_whatever_is_accepted(server):
    for accept, kind in (("*/*", "PNG"), ("image/jpeg", "JPEG"), ("image/png", "PNG"), ("text/html", "PNG")):
        answer = httpx.post(server.url, json={"inputs": PROMPT, "parameters": None}, headers={"accept": accept})
        assert Image.open(io.BytesIO(answer.content)).format == kind


async def test_no_503_reaches_a_client_that_repeats_it_at_once():
    app = create_app(Settings())  # whose engine is not started
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        busy = await client.post("/", json={"inputs": PROMPT})
        theirs = await client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT})
        openai = await client.post("/v1/images/generations", json={"prompt": PROMPT})
    assert (busy.status_code, busy.json()["status"], busy.headers["retry-after"]) == (429, 429, "5")
    assert (theirs.status_code, theirs.json()["detail"]) == (503, busy.json()["detail"])
    assert (openai.status_code, openai.json()["error"]["type"]) == (503, "server_error")
    assert "x-should-retry" not in openai.headers
