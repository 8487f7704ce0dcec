"""The API of AUTOMATIC1111's web UI, /sdapi/v1, as its clients use it; `info` says what was not used of a request."""

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from app import errors, images
from app.api.a1111_requests import SAMPLER, SCHEDULER, UNUSED, Img2Img, Settings, Txt2Img
from app.api.compat import CompatRoute, as_base64, as_json, variant_of
from app.api.deps import Parts, PartsDep, owner_of
from app.api.draw import Drawn, Picture, draw, parameters
from app.api.problems import declare, named
from app.errors import Problem
from app.http.limits import LimitedRoute, PictureRoute
from app.settings import ANY_STEPS
from models.catalog import CATALOG

router = APIRouter(tags=["A1111"])
drawing = APIRouter(prefix="/sdapi/v1", route_class=CompatRoute, tags=["A1111"])
over = APIRouter(prefix="/sdapi/v1", route_class=PictureRoute, tags=["A1111"])
setting = APIRouter(prefix="/sdapi/v1", route_class=LimitedRoute, tags=["A1111"])

NAMES = {
    "guidance_scale": "cfg_scale",
    "variant": "override_settings",
    "model": "override_settings",
    "loras": "prompt",
    "image": "init_images",
    "strength": "denoising_strength",
}
FIXED: dict[str, Any] = {
    "samplers": [{"name": SAMPLER, "aliases": [], "options": {}}],
    "schedulers": [
        {"name": "sgm_uniform", "label": SCHEDULER, "aliases": [], "default_rho": -1, "need_inner_model": False}
    ],
    "progress": {  # of all clients together: a figure would make each wait for the others
        "progress": 0.0,
        "eta_relative": 0.0,
        "state": {
            "job_count": 0,
            "job": "",
            "job_no": 0,
            "sampling_step": 0,
            "sampling_steps": 0,
            "skipped": False,
            "interrupted": False,
        },
        "current_image": None,
        "textinfo": None,
    },
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "memory": {"ram": {}, "cuda": {}},
    "cmd-flags": {},
    **{name: [] for name in ("upscalers", "latent-upscale-modes", "sd-vae", "loras", "face-restorers")},
    **{name: [] for name in ("prompt-styles", "hypernetworks")},
}


REFUSALS = declare(404, 408, 413, 415, 422, 429, 500, 503, 504)


@drawing.post("/txt2img", response_model=None, responses=REFUSALS)
async def txt2img(body: Txt2Img, request: Request, parts: PartsDep) -> Response:
    """Draw pictures. `info` holds JSON in a string: what was drawn, and what was not used of the request."""
    return await _answer(body, request, parts)


@over.post("/img2img", response_model=None, responses=REFUSALS)
async def img2img(body: Img2Img, request: Request, parts: PartsDep) -> Response:
    """Draw over a picture."""
    return await _answer(body, request, parts)


async def _answer(body: Txt2Img, request: Request, parts: Parts) -> Response:
    with named(**NAMES):
        drawn = await draw(await body.order(owner_of(request), parts), "png", 100, request, parts)
    files = [picture.file for picture in drawn.pictures] if body.send_images else []
    answer = {
        "images": await as_base64(files),
        "parameters": body.model_dump(include={*Txt2Img.model_fields, *UNUSED, "denoising_strength"}),
        "info": json.dumps(_info(body, drawn)),
    }
    return as_json(answer)


@router.get("/sdapi/v1/options")
async def get_options(parts: PartsDep) -> dict[str, str]:
    """What clients ask to see whether there is a web UI."""
    checkpoint = parts.chosen.get("checkpoint", ANY_STEPS)
    return {"sd_model_checkpoint": checkpoint, "sd_vae": "Automatic", "samples_format": "png"}


@setting.post("/options", responses=declare(404, 413, 415, 422))
async def set_options(body: Settings, parts: PartsDep) -> None:
    """Choose the checkpoint of requests to /sdapi/v1 that name none; other options are taken and not used."""
    if (checkpoint := body.sd_model_checkpoint) is not None:
        parts.chosen["checkpoint"] = variant_of(checkpoint, parts) or ANY_STEPS


@router.get("/sdapi/v1/sd-models", responses=declare(503))
async def sd_models(parts: PartsDep) -> list[dict[str, str | None]]:
    """The model as a whole, whose variant follows from the steps, and every variant."""
    names = (ANY_STEPS, *CATALOG[parts.fleet.require_ready().family].variants)
    nothing = dict.fromkeys(("hash", "sha256", "config"))
    return [{"title": name, "model_name": name, "filename": f"{name}.safetensors", **nothing} for name in names]


@router.post("/sdapi/v1/interrupt")
@router.post("/sdapi/v1/skip", operation_id="skip")
async def interrupt() -> dict[str, str]:
    """Nothing: it would end other clients' work. Who closes the connection takes back a request."""
    return {}


@router.get("/queue/status")
async def queue_status() -> dict[str, str]:
    """What Krita's plugin asks to see whether there is a server."""
    return {}


@router.get("/sdapi/v1/{listing}", responses=declare(404))
async def listing(listing: str) -> Any:
    """What else clients ask for before they draw."""
    if listing not in FIXED:
        raise Problem(errors.NOT_FOUND, f"of /sdapi/v1 there are txt2img, options, sd-models, {', '.join(FIXED)}")
    return FIXED[listing]


for each in (drawing, over, setting):
    router.include_router(each)


def _info(body: Txt2Img, drawn: Drawn) -> dict[str, Any]:
    """What was drawn, as the web UI tells it."""
    jobs, first = [picture.job for picture in drawn.pictures], drawn.pictures[0]
    unused = body.unused(first.job)
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(jobs),
        "negative_prompt": body.negative_prompt,
        "seed": first.job.seed,
        "all_seeds": [job.seed for job in jobs],
        "width": first.done.width,
        "height": first.done.height,
        "sampler_name": SAMPLER,
        "cfg_scale": first.job.guidance if first.job.guidance > 1 else 0,
        "steps": first.job.steps,
        "denoising_strength": first.job.strength,
        "batch_size": len(jobs),
        "sd_model_name": first.job.weights.variant,
        "infotexts": [_infotext(body, picture) for picture in drawn.pictures],
        "index_of_first_image": 0,
        "prompt_truncated": drawn.prompt_truncated,
        "extra_generation_params": {"Ignored": ", ".join(unused)} if unused else {},
    }


def _infotext(body: Txt2Img, picture: Picture) -> str:
    """A picture's parameters as the web UI writes them, and reads them back."""
    away = f"Negative prompt: {body.negative_prompt}\n" if picture.job.negative_prompt else ""
    return f"{body.prompt}\n{away}{images.line(parameters(picture.job, picture.done))}"
