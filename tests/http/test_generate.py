"""POST /generate through a real server: pictures, seeds, formats, headers, and neighbours in a batch."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from app.api.models import _card
from app.engine.messages import VariantReport
from tests.conftest import APPLE, PLAIN, eventually
from tests.models import oracle

VARIANTS = tuple(oracle.FAMILY.variants)
IMAGE = {"accept": "image/png"}


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def images(response: httpx.Response) -> list[np.ndarray]:
    assert response.status_code == 200, response.text
    return [pixels(base64.b64decode(image["b64_json"])) for image in response.json()["images"]]


def theirs(variant: str, prompt: str, seed: int) -> np.ndarray:
    return (oracle.draw(variant, prompt, seed, "np") * 255).round().int().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_served_picture_is_diffusers_picture(server, variant):
    body = {"prompt": APPLE["prompt"], "seed": 7, "variant": variant}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert abs(images(response)[0] - theirs(variant, APPLE["prompt"], 7)).max() <= 1


def test_forty_clients_at_once_each_get_their_own_picture(server):
    """Mixed variants, prompts and seeds in flight together: image k belongs to request k, as if it were alone."""
    server.wait_for_batches()
    prompts = [f"a red apple on a {colour} background" for colour in ("blue", "green", "white", "black")]
    asked = [(VARIANTS[k % 7], prompts[k % 4], k % 5) for k in range(40)]

    def ask(request):
        variant, prompt, seed = request
        body = {"prompt": prompt, "seed": seed, "variant": variant, "timeout": 120}
        return httpx.post(f"{server.url}/generate", json=body, timeout=120, verify=PLAIN)

    with ThreadPoolExecutor(40) as pool:
        with server.stopped_engine():
            answers = [pool.submit(ask, request) for request in asked]
            assert eventually(lambda: server.in_engine() == 40, 15)
        responses = [answer.result() for answer in answers]
    for response, (variant, prompt, seed) in zip(responses, asked, strict=True):
        assert abs(images(response)[0] - theirs(variant, prompt, seed)).max() <= 1
    assert max(max(response.json()["batch_sizes"]) for response in responses) > 1


def test_n_pictures_have_consecutive_seeds_and_equal_those_drawn_alone(server):
    together = server.generate(n=3, seed=41)
    assert [image["seed"] for image in together.json()["images"]] == [41, 42, 43]
    assert (images(together)[2] == images(server.generate(seed=43))[0]).mean() > 0.99


def test_the_json_answer_tells_what_was_done(server):
    answer = server.generate(n=2, steps=2).json()
    assert answer["variant"] == "2step-unet"
    assert (answer["width"], answer["height"], answer["prompt_truncated"]) == (128, 128, False)
    assert set(answer["timings_ms"]) == {"queue", "encode", "denoise", "decode", "image", "total"}
    assert len(answer["batch_sizes"]) == 2
    assert answer["created"] > 1_700_000_000


def test_a_seed_is_drawn_and_told_where_none_is_given(server):
    body = {"prompt": APPLE["prompt"], "steps": 1}
    first, second = (httpx.post(f"{server.url}/generate", json=body, timeout=60) for _ in range(2))
    seeds = [response.json()["images"][0]["seed"] for response in (first, second)]
    assert seeds[0] != seeds[1]
    again = httpx.post(f"{server.url}/generate", json={**body, "seed": seeds[0]}, timeout=60)
    assert abs(images(again)[0] - images(first)[0]).max() <= 1


def test_the_steps_alias_and_the_model_alias_are_understood(server):
    body = {"prompt": APPLE["prompt"], "num_inference_steps": 8, "model": "8step-lora", "size": "128x128", "seed": 1}
    assert httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["variant"] == "8step-lora"


@pytest.mark.parametrize(
    ("accept", "output_format", "kind"),
    [
        ("image/png", "png", "PNG"),
        ("image/*", "jpeg", "JPEG"),
        ("image/webp", None, "WEBP"),
        ("image/avif,image/webp,image/*;q=0.8", None, "WEBP"),
        ("image/jpeg, application/json;q=0.5", None, "JPEG"),
    ],
)
def test_accept_image_gives_the_bare_picture(server, accept, output_format, kind):
    body = {**APPLE, "steps": 1, **({"output_format": output_format} if output_format else {})}
    response = httpx.post(f"{server.url}/generate", json=body, headers={"accept": accept}, timeout=60)
    assert Image.open(io.BytesIO(response.content)).format == kind
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-variant"] == "1step-unet"
    assert "denoise;dur=" in response.headers["server-timing"]


@pytest.mark.parametrize(
    ("accept", "fields"),
    [
        ("application/json, image/png", {"n": 2}),
        ("image/png, */*;q=0.1", {"n": 2}),
        ("application/json, image/png", {"output_format": "jpeg"}),
    ],
)
def test_accept_that_allows_json_gets_it_where_a_bare_picture_is_impossible(server, accept, fields):
    response = httpx.post(f"{server.url}/generate", json={**APPLE, **fields}, headers={"accept": accept}, timeout=60)
    assert len(response.json()["images"]) == fields.get("n", 1)


@pytest.mark.parametrize(
    ("accept", "fields"),
    [("image/png", {"n": 2}), ("text/html", {}), ("image/png", {"output_format": "jpeg"})],
)
def test_what_accept_cannot_get_is_a_406(server, accept, fields):
    response = httpx.post(f"{server.url}/generate", json={**APPLE, **fields}, headers={"accept": accept}, timeout=60)
    assert response.status_code == 406


def test_the_formats_show_the_same_picture(server):
    png, jpeg, webp = (images(server.generate(output_format=kind, quality=95))[0] for kind in ("png", "jpeg", "webp"))
    assert abs(png - jpeg).mean() < 6
    assert abs(png - webp).mean() < 6


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_format_carries_the_ai_generated_mark(server, kind):
    file = base64.b64decode(server.generate(output_format=kind).json()["images"][0]["b64_json"])
    assert b"trainedAlgorithmicMedia" in file
    assert APPLE["prompt"].encode() not in file


def test_a_png_carries_its_parameters(server):
    file = base64.b64decode(server.generate(seed=9).json()["images"][0]["b64_json"])
    text = Image.open(io.BytesIO(file)).text["parameters"]
    assert "Steps: 4" in text
    assert "Seed: 9" in text


def test_a_sane_request_id_is_echoed_and_another_is_replaced(server):
    def ids(given):
        return httpx.get(f"{server.url}/live", headers={"x-request-id": given}).headers["x-request-id"]

    assert ids("my-id.42") == "my-id.42"
    assert ids("not sane!") != "not sane!"


def test_a_prompt_cut_by_the_tokenizer_is_reported(server):
    long, short = (server.generate(prompt="red apple " * words).json() for words in (100, 20))
    assert (long["prompt_truncated"], long["prompt_tokens"]) == (True, 200)
    assert (short["prompt_truncated"], short["prompt_tokens"]) == (False, 40)


@pytest.mark.parametrize(
    "prompt", ["🍎", "‮שלום", "ا" * 2000, "a\u0301" * 500, "\x00a", " " * 50 + "a", "<|endoftext|>"]
)
def test_any_text_is_a_prompt(server, prompt):
    assert server.generate(prompt=prompt, steps=1).status_code == 200


def test_models_are_listed_in_openais_shape(server):
    models = httpx.get(f"{server.url}/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["sdxl-lightning", *VARIANTS]
    assert {model["state"] for model in models["data"]} == {"resident"}
    assert httpx.get(f"{server.url}/v1/models/4step-lora").json()["steps"] == [4]
    assert httpx.get(f"{server.url}/v1/models/nothing").status_code == 404


def test_models_say_why_a_variant_failed_and_not_where_its_file_is():
    report = VariantReport("8step-unet", "failed", reason="</srv/my x.safetensors> in directory=/srv/my weights")
    assert "srv" not in str(_card(report, oracle.FAMILY).reason)


def test_ready_says_that_all_seven_are_resident(server):
    assert httpx.get(f"{server.url}/ready").json()["resident"] == list(VARIANTS)


def test_several_accept_lines_are_one_list_and_an_invisible_prompt_is_refused(server):
    headers = [("accept", "text/plain"), ("accept", "image/png")]
    answer = httpx.post(f"{server.url}/generate", json=APPLE, headers=headers, timeout=60)
    assert answer.headers["content-type"] == "image/png"
    for prompt in (" ", "\u200b\u2060", "\u3164", "\x00", "\u180b\u2065", "\ufe0f\U000e0100", "\U000e0041", "\u2800"):
        refused = server.generate(prompt=prompt)
        assert (refused.status_code, refused.json()["field"]) == (422, "prompt")
