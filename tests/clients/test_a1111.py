"""The A1111 API: webuiapi unchanged, and recorded requests of the clients that were read."""

import base64
import io
import json

import httpx
import pytest
import webuiapi
from PIL import Image, ImageChops

from tests.conftest import APPLE

PROMPT = APPLE["prompt"]
PIXELS = webuiapi.raw_b64_img(Image.new("RGB", (8, 8)))


@pytest.fixture(scope="module")
def api(server):
    api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    yield api
    api.session.close()


def post(server, path: str, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/sdapi/v1/{path}", json=fields, timeout=60)


def test_webuiapi_draws_in_its_defaults_and_is_told_what_was_not_used(api):
    drawn = api.txt2img(prompt=PROMPT, negative_prompt="ugly")
    assert drawn.image.size == (128, 128)
    assert (drawn.info["width"], drawn.info["height"], drawn.info["steps"]) == (128, 128, 4)
    assert (drawn.info["sampler_name"], drawn.info["cfg_scale"], drawn.info["all_seeds"]) == (
        *("Euler", 0),
        [drawn.info["seed"]],
    )
    unused = drawn.info["extra_generation_params"]["Ignored"].split(", ")
    assert unused == ["negative_prompt", "cfg_scale", "steps", "eta", "sampler_name"]
    assert drawn.info["extra_generation_params"]["Resized"] == "512x512 to 128x128"
    assert drawn.parameters["steps"] == 20
    assert "Negative prompt" not in drawn.info["infotexts"][0]


def test_what_is_used_is_not_called_unused(api):
    drawn = api.txt2img(
        prompt=PROMPT,
        steps=2,
        cfg_scale=1,
        eta=0,
        sampler_name="Euler",
        seed=5,
        batch_size=2,
        n_iter=2,
        width=128,
        height=128,
    )
    assert drawn.info["extra_generation_params"] == {}
    assert drawn.info["all_seeds"] == [5, 6, 7, 8]
    assert len(drawn.images) == len(drawn.info["infotexts"]) == 4
    assert "Steps: 2, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 0, Seed: 8" in drawn.info["infotexts"][3]


def test_webuiapi_draws_over_a_picture_where_the_mask_is_white(api):
    apple = api.txt2img(prompt=PROMPT, seed=7).image
    over = api.img2img([apple.resize((512, 512))], prompt=PROMPT, seed=8)
    assert (over.image.size, over.info["denoising_strength"]) == ((128, 128), 0.75)
    notes = over.info["extra_generation_params"]
    assert ("mask_blur" in notes["Ignored"], notes["Resized"]) == (True, "512x512 to 128x128")
    half = Image.new("L", apple.size, 0)
    half.paste(255, (0, 0, 64, 128))
    for invert in (0, 1):
        drawn = api.img2img(
            [apple], mask_image=half, inpainting_mask_invert=invert, denoising_strength=1, prompt=PROMPT, seed=9
        )
        kept = (64, 0, 128, 128) if not invert else (0, 0, 64, 128)
        new = (0, 0, 64, 128) if not invert else (64, 0, 128, 128)
        assert drawn.image.crop(kept).tobytes() == apple.crop(kept).tobytes()
        assert drawn.image.crop(new).tobytes() != apple.crop(new).tobytes()


def test_webuiapis_lists_and_waits_work(api):
    assert api.util_get_model_names()[0] == "1step-unet"  # it sorts them
    assert api.util_get_sampler_names() == ["Euler"]
    assert api.util_get_scheduler_names() == ["sgm_uniform"]
    api.util_wait_for_ready()
    assert [each["name"] for each in api.get_loras()] == ["line"]
    assert (api.get_sd_vae(), api.get_upscalers(), api.get_embeddings()["loaded"]) == ([], [], {})
    assert (api.interrupt(), api.skip(), api.get_cmd_flags(), api.get_memory()["ram"]) == ({}, {}, {}, {})


def test_a_style_is_named_in_the_prompt(api):
    plain = api.txt2img(prompt=PROMPT, seed=7).image
    styled = api.txt2img(prompt=f"{PROMPT} <lora:line:0.8>", seed=7)
    assert ImageChops.difference(plain, styled.image).getextrema() != ImageChops.difference(plain, plain).getextrema()
    assert "Styles: line:0.8" in styled.info["infotexts"][0]


def test_a_checkpoint_is_chosen_for_all_requests_or_for_one(api, server):
    assert api.util_get_current_model() == "sdxl-lightning"
    whole = {**api.get_options(), "sd_model_checkpoint": "8step-lora"}
    assert api.set_options(whole) is None
    try:
        assert api.txt2img(prompt=PROMPT, steps=20).info["sd_model_name"] == "8step-lora"
        one = api.txt2img(prompt=PROMPT, override_settings={"sd_model_checkpoint": "1step-unet"})
        assert (one.info["sd_model_name"], one.info["steps"]) == ("1step-unet", 1)
        assert "variant" in server.generate().json()  # nobody else is touched
        assert server.generate(steps=None).json()["variant"] == "4step-unet"
    finally:
        api.set_options({"sd_model_checkpoint": "sdxl-lightning"})
    assert post(server, "options", sd_model_checkpoint="flux").status_code == 404
    refused = post(server, "txt2img", prompt="x", override_settings={"sd_model_checkpoint": "flux"})
    assert (refused.status_code, "4step-unet" in refused.json()["detail"]) == (404, True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"init_images": ["x"]}, "init_images"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"module": "canny"}]}}}, "alwayson_scripts"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "x"}]}}}, "alwayson_scripts"),
        ({"prompt": "a cat <lora:pixel:0.8>"}, "prompt"),
        ({"prompt": "a cat <lora:pixel:much>"}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"batch_size": 4, "n_iter": 4}, "n_iter"),
        ({"seed": 2**32}, "seed"),
        ({"width": 5000}, "width"),
    ],
)
def test_what_would_be_another_picture_is_a_422_with_a_sentence(server, fields, field):
    refused = post(server, "txt2img", **{"prompt": "x", **fields})
    assert (refused.status_code, refused.json()["field"]) == (422, field)
    assert isinstance(refused.json()["detail"], str)
    assert "images" not in refused.json()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "init_images"),
        ({"init_images": ["no picture"]}, "init_images"),
        ({"init_images": [PIXELS], "denoising_strength": 0}, "denoising_strength"),
        ({"init_images": [PIXELS], "mask": "bm8gcGljdHVyZQ=="}, "mask"),
    ],
)
def test_what_cannot_be_drawn_over_is_a_422(server, fields, field):
    refused = post(server, "img2img", prompt="x", **fields)
    assert (refused.status_code, refused.json()["field"]) == (422, field)


def test_scripts_that_are_off_and_nulls_are_taken(server):
    scripts = {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}, "Other": {"args": [{"enabled": False}]}}
    drawn = post(server, "txt2img", prompt="x", alwayson_scripts=scripts, seed=None, styles=None, send_images=False)
    assert (drawn.status_code, drawn.json()["images"]) == (200, [])


SILLY_TAVERN = {  # 1.12, its defaults; what it also tells its own server comes along
    "url": "http://127.0.0.1:8000",
    "auth": "user:secret",
    "prompt": PROMPT,
    "negative_prompt": "lowres, bad anatomy, bad hands, text, error, cropped, worst quality, low quality",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1,
    "hr_additional_steps": 0,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "clip_skip": 1,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": ""},
    "override_settings_restore_afterwards": True,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
LIBRE_CHAT = {
    "prompt": PROMPT,
    "negative_prompt": "bad quality",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
OPEN_WEBUI = {"prompt": PROMPT, "batch_size": 1, "width": 512, "height": 512, "steps": 50}
KRITA = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "sampler_name": "DPM++ 2M",
    "steps": 20,
    "cfg_scale": 7.5,
    "seed": -1,
    "batch_size": 1,
    "n_iter": 1,
    "width": 768,
    "height": 512,
    "alwayson_scripts": {},
    "override_settings": {"sd_model_checkpoint": "4step-unet"},
    "script_name": None,
    "script_args": [],
}


@pytest.mark.parametrize("recorded", [SILLY_TAVERN, LIBRE_CHAT, OPEN_WEBUI, KRITA])
def test_recorded_requests_are_served(server, recorded):
    answer = post(server, "txt2img", **recorded).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == (128, 128)
    assert json.loads(answer["info"])["infotexts"][0].startswith(PROMPT)
    assert "auth" not in answer["parameters"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"sdapi/v1/{name}") for name in ("options", "samplers", "schedulers", "sd-models", "sd-vae", "progress")]
    + [("GET", f"sdapi/v1/{name}") for name in ("upscalers", "latent-upscale-modes", "scripts", "embeddings")]
    + [("GET", "queue/status"), ("POST", "sdapi/v1/interrupt"), ("POST", "sdapi/v1/skip")],
)
def test_what_clients_ask_before_they_draw_is_answered(server, method, path):
    assert httpx.request(method, f"{server.url}/{path}").status_code == 200
    assert httpx.get(f"{server.url}/sdapi/v1/nothing").json()["detail"]
