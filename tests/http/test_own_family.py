"""A family of a user's catalog, served: what may be asked of it, and rows of different step counts in one batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from tests.conftest import APPLE, PLAIN, ROOT, ServerProcess, eventually
from tests.http.test_generate import images
from tests.models.test_samplers import EXAMPLE, FAMILY, oracle


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("own") / "log"
    with ServerProcess(log, CATALOG=str(EXAMPLE.relative_to(ROOT)), MODEL="example") as server:
        yield server


def ask(server: ServerProcess, **fields: object) -> httpx.Response:
    body = {"prompt": APPLE["prompt"], "seed": 7, "timeout": 120, **fields}
    return httpx.post(f"{server.url}/generate", json=body, timeout=120, verify=PLAIN)


@pytest.mark.parametrize("variant", ["merge", "ancestral"])
def test_step_counts_share_a_batch_and_each_picture_is_diffusers(own, variant):
    asked = [(steps, seed) for steps in FAMILY.variants[variant].steps for seed in (1, 2)]
    with ThreadPoolExecutor(len(asked)) as pool:
        with own.stopped_engine():
            answers = [pool.submit(ask, own, variant=variant, steps=steps, seed=seed) for steps, seed in asked]
            assert eventually(lambda: own.in_engine() == len(asked), 15)
        responses = [answer.result() for answer in answers]
    assert max(max(response.json()["batch_sizes"]) for response in responses) == len(asked)
    for response, (steps, seed) in zip(responses, asked, strict=True):
        assert len(response.json()["batch_sizes"]) == steps
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = oracle(variant)(
            APPLE["prompt"], num_inference_steps=steps, guidance_scale=0, generator=generator, output_type="np"
        )
        assert abs(images(response)[0] - (drawn.images[0] * 255).round()).max() <= 1


@pytest.mark.parametrize(
    ("fields", "variant", "steps"),
    [
        ({}, "merge", 4),
        ({"steps": 5}, "merge", 5),
        ({"steps": 8}, "ancestral", 8),  # the first that declares them
        ({"steps": 7}, "karras", 7),
        ({"variant": "ancestral"}, "ancestral", 8),
        ({"variant": "karras", "steps": 8}, "karras", 8),
    ],
)
def test_what_a_request_leaves_out_follows_from_the_catalog(own, fields, variant, steps):
    answer = ask(own, **fields).json()
    assert (answer["variant"], len(answer["batch_sizes"])) == (variant, steps)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"steps": 1}, "steps", "draws in 4, 5, 6, 7 or 8 steps, not 1"),
        ({"steps": 10**9}, "steps", "draws in 4, 5, 6, 7 or 8 steps"),
        ({"variant": "merge", "steps": 8}, "steps", "merge draws in 4, 5 or 6 steps, not 8"),
        ({"variant": "lora", "steps": 5}, "steps", "lora draws in 4 steps, not 5"),
        ({"variant": "4step-unet"}, "variant", "must be one of merge, ancestral, karras, lora"),
    ],
)
def test_what_is_not_declared_is_refused_with_what_is(own, fields, field, said):
    refused = ask(own, **fields)
    assert (refused.status_code, refused.json()["field"]) == (422, field)
    assert said in refused.json()["detail"]


def test_models_tell_what_may_be_asked_for(own):
    cards = {card["id"]: card for card in httpx.get(f"{own.url}/v1/models", verify=PLAIN).json()["data"]}
    assert list(cards) == ["sdxl-lightning", *FAMILY.variants]
    assert (cards["merge"]["steps"], cards["merge"]["sampler"]) == ([4, 5, 6], "euler")
    assert cards["merge"]["guidance"] == {"default": 1.0, "minimum": 1.0, "maximum": 3.0}
    assert (cards["ancestral"]["sampler"], cards["ancestral"]["guidance"]) == ("euler_ancestral", None)
    assert cards["merge"]["sizes"] == {"default": 128, "minimum": 128, "maximum": 128, "multiple": 8}
    assert cards["merge"]["owned_by"] == "example"
