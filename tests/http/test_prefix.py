"""Under a prefix, as a proxy or Ray Serve mounts the app, requests are limited, counted and named as at the root."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from app.main import create_app
from app.settings import Settings


@pytest.fixture
def mounted() -> httpx.AsyncClient:
    """The real application under /sdxl, with no engine started."""
    app = Starlette(routes=[Mount("/sdxl", create_app(Settings()))])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost/sdxl")


@pytest.mark.parametrize(
    ("content_type", "body", "status", "outcome"),
    [
        ("application/json", b'{"prompt": "a robot"}', 503, "refused"),
        ("text/plain", b"a robot", 415, "invalid"),
        ("application/json", b" " * (21 << 20), 413, "invalid"),
        ("application/json", b"not read", 503, "refused"),
    ],
)
async def test_every_request_that_draws_is_limited_and_counted_once(mounted, content_type, body, status, outcome):
    answer = await mounted.post("/generate", content=body, headers={"content-type": content_type})
    metrics = (await mounted.get("/metrics")).text
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert "sdxl_requests_received_total 1.0" in metrics
    assert f'sdxl_requests_total{{outcome="{outcome}",variant=""}} 1.0' in metrics


async def test_each_api_has_its_own_errors_there(mounted):
    theirs = await mounted.post("/v1/images/generations", json={"prompt": "a robot"})
    assert theirs.json()["error"]["code"] == "not_ready"
    assert (await mounted.get("/v1/nothing")).json()["error"]["code"] == "not_found"
    assert (await mounted.post("/", json={"inputs": "a robot"})).status_code == 429


async def test_what_does_not_draw_is_not_counted(mounted):
    assert (await mounted.get("/generate")).status_code == 405
    assert (await mounted.get("/nothing")).status_code == 404
    assert "sdxl_requests_received_total 0.0" in (await mounted.get("/metrics")).text
