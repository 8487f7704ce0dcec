"""Bad input gets a 4xx problem with one clear sentence and the field's name, and never reaches the engine."""

import socket

import httpx
import pytest

from tests.conftest import APPLE

BAD_FIELDS = [
    ("prompt", '""'),
    ("prompt", "null"),
    ("prompt", "7"),
    ("prompt", '"' + "x" * 2001 + '"'),
    ("prompt", r'"\ud800"'),
    ("steps", "3"),
    ("steps", "0"),
    ("steps", "true"),
    ("steps", "4.0"),
    ("steps", '"4"'),
    ("variant", '"4step-lora/../x"'),
    ("variant", '"16step-unet"'),
    ("n", "0"),
    ("n", "9"),
    ("n", "true"),
    ("seed", "-1"),
    ("seed", "4294967296"),
    ("seed", "1e3"),
    ("seed", "true"),
    ("width", "512"),
    ("width", "0"),
    ("height", "99999999999999999999"),
    ("size", '"128"'),
    ("size", '"512x512"'),
    ("size", '"0x0"'),
    ("guidance_scale", "7.5"),
    ("guidance_scale", "NaN"),
    ("guidance_scale", "true"),
    ("guidance_scale", "1e999"),
    ("negative_prompt", '"ugly"'),
    ("output_format", '"gif"'),
    ("quality", "0"),
    ("timeout", "0"),
    ("timeout", "-1"),
    ("timeout", "NaN"),
    ("timeout", "1000000"),
    ("cfg", "1"),
]


def post(server, body: bytes, content_type: str = "application/json") -> httpx.Response:
    return httpx.post(f"{server.url}/generate", content=body, headers={"content-type": content_type}, timeout=60)


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_field_is_a_422_that_names_it(server, field, value):
    body = f'{{"prompt": "x", "{field}": {value}}}' if field != "prompt" else f'{{"prompt": {value}}}'
    response = post(server, body.encode())
    problem = response.json()
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["field"] == field
    assert problem["status"] == 422
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"\xff\xfe", 422),
        (b'{"prompt": "' + b"x" * (21 << 20) + b'"}', 413),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', 422),
        (b"[" * 60_000, 422),
        (b'{"prompt": "x", "steps": 4, "num_inference_steps": 8}', 422),
        (b'{"prompt": "x", "steps": 8, "variant": "4step-lora"}', 422),
        (b'{"prompt": "x", "size": "128x128", "width": 128}', 422),
        (b'{"prompt": "x", "seed": 4294967295, "n": 2}', 422),
        (b'{"prompt": "x", "\\ud800": null}', 422),
    ],
)
def test_a_bad_body_is_a_4xx(server, body, status):
    assert post(server, body).status_code == status


def test_null_means_the_same_as_absent(server):
    fields = (
        "steps",
        "variant",
        "n",
        "seed",
        "width",
        "size",
        "guidance_scale",
        "negative_prompt",
        "quality",
        "timeout",
    )
    response = httpx.post(f"{server.url}/generate", json={"prompt": "a robot", **dict.fromkeys(fields)}, timeout=60)
    assert (response.status_code, response.json()["variant"]) == (200, "4step-unet")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "text/xml", "multipart/mixed", "application/x-www-form-urlencoded"]
)
def test_anything_but_json_is_a_415(server, content_type):
    assert post(server, b'{"prompt": "x"}', content_type).status_code == 415


def test_unknown_paths_and_methods_are_problems_too(server):
    missing, method = httpx.get(f"{server.url}/nothing"), httpx.get(f"{server.url}/generate")
    assert (missing.status_code, method.status_code) == (404, 405)
    assert missing.headers["content-type"] == method.headers["content-type"] == "application/problem+json"


def test_nothing_is_loaded_or_unloaded_over_the_public_port(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    writing = {(path, method) for path, item in paths.items() for method in item if method != "get"}
    assert writing == {
        ("/generate", "post"),
        ("/v1/images/generations", "post"),
        ("/sdapi/v1/txt2img", "post"),
        ("/sdapi/v1/options", "post"),  # which of the variants a request means that names none
        ("/sdapi/v1/interrupt", "post"),
        ("/sdapi/v1/skip", "post"),
        ("/", "post"),
    }


def test_neither_logs_nor_refusals_repeat_a_prompt(server):
    canary = "canary-7f3a"
    refusal = post(server, f'{{"prompt": "{canary}", "steps": 3, "x{canary}": 1}}'.encode())
    server.generate(prompt=canary, steps=1)
    assert canary not in refusal.json()["detail"].replace(f"x{canary}", "")
    assert canary not in server.log.read_text()


def test_a_raw_broken_request_harms_nobody(server):
    for garbage in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /generate HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            sock.sendall(garbage)
            assert sock.recv(100)[:12] in (b"", b"HTTP/1.1 400")
    assert httpx.post(f"{server.url}/generate", json={**APPLE, "steps": 1}, timeout=60).status_code == 200
