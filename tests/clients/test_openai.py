"""OpenAI's own SDK, unchanged, and recorded requests of clients that follow it."""

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from starlette.requests import Request

from app import errors
from app.api import problems
from app.errors import Problem
from tests.conftest import APPLE

PROMPT = APPLE["prompt"]


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def assert_same(*pictures: str) -> None:
    first, second = (np.asarray(opened(picture)) for picture in pictures)
    assert np.array_equal(first, second)


def post(server, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=fields, timeout=60)


def test_the_sdk_draws_in_its_defaults(client):
    answer = client.images.generate(prompt=PROMPT)
    assert (answer.size, answer.output_format, answer.quality) == ("128x128", "png", "medium")
    assert opened(answer.data[0].b64_json).size == (128, 128)
    assert answer.data[0].url is None


def test_a_seed_gives_the_picture_of_generate(client, server):
    extra = {"seed": 7, "num_inference_steps": 2}
    answer = client.images.generate(prompt=PROMPT, n=2, extra_body=extra)
    ours = server.generate(steps=2, n=2).json()
    assert [each.seed for each in answer.data] == [7, 8]
    for theirs, mine in zip(answer.data, ours["images"], strict=True):
        assert_same(theirs.b64_json, mine["b64_json"])


def test_what_sdks_send_as_a_matter_of_course_is_taken(client):
    answer = client.images.generate(
        prompt="red apple " * 3200,
        model="gpt-image-1",
        n=10,
        size="1024x1024",
        quality="low",
        background="auto",
        moderation="auto",
        output_format="jpeg",
        output_compression=0,
        style="vivid",
        user="somebody",
        safety_identifier=None,
        partial_images=None,
        stream=None,
    )
    assert len(answer.data) == 10
    assert (answer.model, answer.quality, answer.prompt_truncated) == ("2step-unet", "low", True)
    assert opened(answer.data[9].b64_json).format == "JPEG"


def test_a_long_prompt_is_drawn_as_its_beginning_is(server):
    short, long = (post(server, prompt=text, seed=1).json() for text in ("a cat" + " " * 1995, "a cat" + " " * 31_995))
    assert [each["prompt_truncated"] for each in (short, long)] == [False, True]
    assert_same(long["data"][0]["b64_json"], short["data"][0]["b64_json"])


def test_url_is_a_data_url_and_comes_only_if_asked_for(client):
    (picture,) = client.images.generate(prompt=PROMPT, response_format="url", output_format="webp").data
    head, data = picture.url.split(",")
    assert (head, picture.b64_json) == ("data:image/webp;base64", None)
    assert opened(data).format == "WEBP"


def test_a_stream_has_one_completed_event_for_each_picture(client):
    events = list(client.images.generate(prompt=PROMPT, n=2, stream=True, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    whole = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7})
    for event, picture in zip(sorted(events, key=lambda event: event.seed), whole.data, strict=True):
        assert_same(event.b64_json, picture.b64_json)
    assert events[0].usage.input_tokens > 0
    assert {(event.size, event.output_format, event.background) for event in events} == {("128x128", "png", "opaque")}


@pytest.mark.parametrize(("steps", "wanted", "made"), [(4, 1, 1), (8, 3, 3), (2, 3, 1), (1, 2, 0)])
def test_partial_images_come_before_the_picture(client, steps, wanted, made):
    extra = {"seed": 7, "num_inference_steps": steps}
    *partial, last = client.images.generate(prompt=PROMPT, stream=True, partial_images=wanted, extra_body=extra)
    assert {event.type for event in partial} <= {"image_generation.partial_image"}
    indices = [event.partial_image_index for event in partial]  # who reads slowly misses some
    assert sorted(set(indices) & set(range(made))) == indices
    assert {opened(event.b64_json).size for event in partial} == ({(16, 16)} if indices else set())
    assert last.type == "image_generation.completed"


def test_models_are_listed_and_found_by_alias(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "sdxl-lightning"
    assert "4step-unet" in names
    assert client.models.retrieve("4step-lora").steps == [4]
    assert client.models.retrieve("dall-e-3").id == "sdxl-lightning"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 11}, "n"),
        ({"size": "big"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"svg": {}, "mask": "x"}, "mask"),
        ({"partial_images": 4}, "partial_images"),
        ({"num_inference_steps": 50}, "num_inference_steps"),
        ({"model": "4step-unet", "num_inference_steps": 1}, "num_inference_steps"),
        ({"seed": 2**32 - 1, "n": 2}, "seed"),
        ({"guidance_scale": 7.5}, "guidance_scale"),
        ({"negative_prompt": "ugly"}, "negative_prompt"),
        ({"loras": [{"name": "x"}]}, "loras"),
        ({"stream": True, "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", extra_body=fields)
    error = refused.value
    assert (error.param, error.type, error.code) == (param, "invalid_request_error", "invalid_request")
    assert error.request_id
    assert error.response.headers["x-request-id"] == error.request_id


@pytest.mark.parametrize(
    ("problem", "seeded", "should_retry"),
    [
        (Problem(errors.EXPIRED), False, "false"),
        (Problem(errors.FAILED), False, None),
        (Problem(errors.FAILED), True, "false"),
        (Problem(errors.OVERLOADED, retry_after=60), True, None),
        (Problem(errors.OVERLOADED, retry_after=61), True, "false"),
        (Problem(errors.ENGINE_DIED), True, None),
    ],
)
def test_the_sdk_is_told_where_it_is_of_no_use_to_repeat(problem, seeded, should_retry):
    scope = {"type": "http", "path": "/v1/images/generations", "headers": [], "state": {"seeded": seeded}}
    assert problems.respond(Request(scope), problem).headers.get("x-should-retry") == should_retry


def test_an_unknown_model_and_an_unknown_route_are_404s(client, server):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="x", model="flux")
    assert unknown.value.code == "model_not_found"
    assert "4step-unet" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("flux")
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = httpx.post(
        f"{server.url}/v1/images/generations", content=b"{", headers={"content-type": "application/json"}
    )
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, None)


@pytest.mark.parametrize(
    "recorded",
    [  # Open WebUI, LibreChat's two tools, SGLang's benchmark (its warm-up), AIPerf; as their sources send it
        {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "512x512", "response_format": "b64_json"},
        {
            "model": "gpt-image-1",
            "prompt": PROMPT,
            "n": 1,
            "background": "auto",
            "output_format": "png",
            "quality": "auto",
            "size": "auto",
        },
        {"model": "dall-e-3", "prompt": PROMPT, "quality": "standard", "style": "vivid", "size": "1024x1024", "n": 1},
        {
            "model": "default",
            "prompt": PROMPT,
            "n": 1,
            "response_format": "b64_json",
            "size": "128x128",
            "num_inference_steps": 1,
        },
        {"prompt": PROMPT, "model": "4step-unet", "response_format": "b64_json", "n": 1, "size": "128x128"},
    ],
)
def test_recorded_requests_are_served(server, recorded):
    answer = post(server, **recorded)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["data"][0]["b64_json"]).size == (128, 128)


def test_the_size_policy_may_be_strict_and_an_alias_may_be_bound(start_server):
    strict = start_server(
        SIZE_POLICY="strict", MODEL_ALIASES="mine=1step-unet", PRELOAD="1step-unet"
    ).wait_until_ready()
    assert post(strict, prompt=PROMPT, model="mine").json()["model"] == "1step-unet"
    refused = post(strict, prompt=PROMPT, size="512x512").json()["error"]
    assert refused["param"] == "size"
    assert post(strict, prompt=PROMPT, model="dall-e-3").status_code == 404
