"""POST /generate with stream: true: previews, the place in the queue, and what becomes of those who leave or lag."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.images import SOURCE
from tests.conftest import APPLE, PLAIN, eventually

OWN = {"id", "created", "timings_ms"}  # each answer's

Events = Iterator[tuple[str, dict[str, Any]]]


@contextmanager
def streamed(server, **fields: object) -> Iterator[tuple[httpx.Response, Events]]:
    """An answer that is read as it comes, and its events: (name, data)."""
    body = {**APPLE, "stream": True, **fields}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120, verify=PLAIN) as response:
        yield response, _events(response)


def _events(response: httpx.Response) -> Events:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def all_of(server, **fields: object) -> list[tuple[str, dict[str, Any]]]:
    with streamed(server, **fields) as (response, events):
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events)


def picture(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def test_each_step_but_the_last_has_a_preview(server):
    events = all_of(server, n=3, seed=41)
    previews = [data for name, data in events if name == "preview"]
    assert [name for name, _ in events] == ["queued", *["preview"] * len(previews), "result"]
    newest = {(data["index"], data["seed"], data["step"]) for data in previews}
    assert (
        {(index, 41 + index, 3) for index in range(3)}
        <= newest
        <= {(index, 41 + index, step) for index in range(3) for step in (1, 2, 3)}
    )
    assert [image["seed"] for image in events[-1][1]["images"]] == [41, 42, 43]


def test_the_result_is_the_answer_without_a_stream(server):
    result, plain = all_of(server, steps=8)[-1][1], server.generate(steps=8).json()
    drawn, same = (np.asarray(picture(answer.pop("images")[0])) for answer in (result, plain))
    assert (drawn == same).all()
    assert {key: result[key] for key in result.keys() - OWN} == {key: plain[key] for key in plain.keys() - OWN}


def test_a_preview_shows_the_picture(server):
    """Its colours are near those of the picture, with an eighth of the sides."""
    events = all_of(server, steps=8)
    preview = [data for name, data in events if name == "preview"][-1]
    seen = np.asarray(picture(preview).convert("RGB")).astype(int)
    final = picture(events[-1][1]["images"][0]).convert("RGB").resize((16, 16), Image.Resampling.BOX)
    assert (preview["width"], preview["height"], preview["steps"]) == (16, 16, 8)
    assert abs(seen - np.asarray(final).astype(int)).mean() < 30
    assert seen[0, 0].argmax() == 2  # the blue background


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_previews_carry_the_mark(server, output_format):
    previews = [data for name, data in all_of(server, output_format=output_format) if name == "preview"]
    for preview in previews:
        file = base64.b64decode(preview["b64_json"])
        assert Image.open(io.BytesIO(file)).format == output_format.upper()
        assert SOURCE.encode() in file


def test_one_step_has_no_preview(server):
    assert [name for name, _ in all_of(server, steps=1)] == ["queued", "result"]


def test_what_is_refused_is_refused_without_a_stream(server):
    for fields, field in (({"width": 100}, "width"), ({"timeout": 1e-4}, "timeout"), ({"stream": 1}, "stream")):
        answer = server.generate(**{"stream": True, **fields})
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    body = {**APPLE, "stream": True}
    answer = httpx.post(f"{server.url}/generate", json=body, headers={"accept": "image/png"}, verify=PLAIN)
    assert (answer.status_code, answer.json()["field"]) == (406, "stream")


def test_who_waits_is_told_for_how_long_and_a_fault_is_the_last_event(server):
    expired = 'sdxl_requests_total{outcome="expired",variant="4step-unet"}'
    before = server.metrics().get(expired, 0)
    with (
        server.stopped_engine(),
        streamed(server, n=2, timeout=60) as (_, first),
        streamed(server, timeout=61, steps=2) as (_, second),
        streamed(server, timeout=6) as (_, third),
    ):
        assert next(first) == ("queued", {"ahead": 0, "starts_in_s": 0.0})
        name, queued = next(second)
        assert (name, queued["ahead"]) == ("queued", 2)
        assert queued["starts_in_s"] > 0
        events = list(third)
    assert [name for name, _ in events] == ["queued", "queued", "error"]
    assert events[-1][1].items() >= {"code": "deadline_exceeded", "status": 504, "field": "timeout"}.items()
    assert events[-1][1].keys() >= {"detail", "retry_after"}
    assert server.metrics()[expired] == before + 1


def test_who_leaves_takes_the_pictures_along(server):
    name = 'sdxl_requests_total{outcome="dropped",variant="8step-unet"}'
    before = server.metrics().get(name, 0)
    with server.stopped_engine():
        with streamed(server, n=8, steps=8) as (_, events):
            assert next(events)[0] == "queued"
            assert server.in_engine() == 8
        assert eventually(lambda: server.in_engine() == 0, 10)
    assert server.metrics()[name] == before + 1


def test_who_does_not_read_delays_nobody_and_still_gets_the_result(server):
    with streamed(server, n=8, steps=8) as (_, events):
        assert next(events)[0] == "queued"
        assert server.generate().status_code == 200
        assert eventually(lambda: server.in_engine() == 0)
        assert len(list(events)[-1][1]["images"]) == 8
