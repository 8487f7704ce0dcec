"""The API of AUTOMATIC1111's web UI, /sdapi/v1, as its clients use it.

Those clients send 20 steps, a guidance scale and a sampler without their user having chosen them. What a distilled
model cannot honour is taken, not used, and named in `info`; what would make another picture is refused.
"""

import json
import re
from typing import Any, ClassVar, Self

from fastapi import APIRouter, Request, Response
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, model_validator
from starlette.concurrency import run_in_threadpool

from app import errors, images
from app.api.a1111_lists import FIXED, SAMPLER, SCHEDULER
from app.api.compat import (
    LONGEST_PROMPT,
    MOST_PICTURES,
    CompatRoute,
    Prompt,
    Seed,
    Tolerant,
    read_images,
    variant_of,
)
from app.api.deps import Parts, PartsDep
from app.api.draw import Drawn, Picture, as_base64, as_json, draw, parameters
from app.api.problems import declare, named
from app.api.schemas import refusal
from app.engine.jobs import Job
from app.engine.messages import Done
from app.errors import Problem
from app.http.ledger import owner_of
from app.http.limits import LimitedRoute, PictureRoute
from app.order import Order
from app.settings import ANY_STEPS

router = APIRouter(tags=["A1111"])
drawing = APIRouter(prefix="/sdapi/v1", route_class=CompatRoute, tags=["A1111"])
over = APIRouter(prefix="/sdapi/v1", route_class=PictureRoute, tags=["A1111"])
setting = APIRouter(prefix="/sdapi/v1", route_class=LimitedRoute, tags=["A1111"])

LORA = re.compile(r"<lora:([^<:>]{1,128})(?::([^<>]{0,64}))?>")  # bounded, so that no prompt takes long
UNUSED: dict[str, tuple[Any, ...]] = {  # by their values that change nothing
    "eta": (0,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (0, 1),
    "clip_skip": (0, 1),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "subseed": (-1,),
    "subseed_strength": (0,),
    "save_images": (False,),
    "resize_mode": (0,),
    "mask_blur": (0,),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False, 0),
    "sampler_name": ("", SAMPLER),
    "scheduler": ("", "automatic", "Automatic", "sgm_uniform", SCHEDULER),
}
IMPOSSIBLE = {
    "enable_hr": "there is no second pass here: ask for the size that you want",
    "script_name": "there are no scripts here",
}
NAMES = {
    "guidance_scale": "cfg_scale",
    "variant": "override_settings",
    "model": "override_settings",
    "loras": "prompt",
    "image": "init_images",
    "strength": "denoising_strength",
}


class Settings(Tolerant):
    """What of the web UI's options is understood."""

    sd_model_checkpoint: str | None = None


class Txt2Img(Tolerant):
    """What of a request is understood; the rest of UNUSED is named in the answer."""

    model_config = ConfigDict(extra="allow")
    impossible: ClassVar = {**IMPOSSIBLE, "init_images": "belongs to img2img"}

    prompt: Prompt
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    seed: Seed = Field(-1, description="below 0: random")
    steps: int | None = None
    cfg_scale: float = 0.0
    width: int = Field(512, ge=8, le=4096)
    height: int = Field(512, ge=8, le=4096)
    batch_size: int = Field(1, ge=1, le=MOST_PICTURES)
    n_iter: int = Field(1, ge=1, le=MOST_PICTURES)
    send_images: bool = True
    override_settings: Settings = Settings()
    alwayson_scripts: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        extra = self.model_extra or {}
        if field := next((name for name in self.impossible if extra.get(name)), None):
            raise refusal(field, self.impossible[field])
        if script := next((name for name, script in self.alwayson_scripts.items() if _acts(script)), None):
            raise refusal("alwayson_scripts", f"{script} is not here: the picture would be another one without it")
        if self.batch_size * self.n_iter > MOST_PICTURES:
            raise refusal("n_iter", f"batch_size x n_iter must be at most {MOST_PICTURES}")
        return self

    async def order(self, owner: str, parts: Parts) -> Order:
        """What is asked for. Raises Problem where there is no such checkpoint."""
        checkpoint = self.override_settings.sd_model_checkpoint or parts.chosen.get("checkpoint")
        name = variant_of(checkpoint, parts)
        variant = parts.family.choose(name, self.steps)
        steps = self.steps if variant else None
        if variant is None:
            variant = parts.family.variants[name or parts.family.default]
        declared = variant.guidance
        is_declared = declared is not None and declared.minimum <= self.cfg_scale <= declared.maximum
        guidance = self.cfg_scale if is_declared else declared.default if declared else None
        return Order(
            owner=owner,
            prompt=LORA.sub("", self.prompt),
            variant=name,
            styles=tuple((style, _lora_scale(scale)) for style, scale in LORA.findall(self.prompt)),
            negative_prompt=self.negative_prompt if guidance and guidance > 1 else None,
            guidance=guidance,
            steps=steps,
            seed=self.seed if self.seed >= 0 else None,
            n=self.batch_size * self.n_iter,
            width=self.width,
            height=self.height,
            fit=parts.settings.size_policy == "nearest",
            **await self.over(parts),
        )

    async def over(self, parts: Parts) -> dict[str, Any]:
        """What is drawn over, as fields of an Order."""
        return {}

    def unused(self, job: Job) -> list[str]:
        """The fields that would have changed the picture in the web UI, and did not."""
        extra = self.model_extra or {}
        names = [name for name, harmless in UNUSED.items() if name in extra and extra[name] not in harmless]
        ours = {
            "negative_prompt": self.negative_prompt and job.guidance <= 1,
            "cfg_scale": self.cfg_scale > 1 and self.cfg_scale != job.guidance,
            "steps": self.steps not in (None, job.steps),
        }
        return [name for name, is_unused in ours.items() if is_unused] + names


class Img2Img(Txt2Img):
    """A picture to draw over, in base64 or as a data: URL, where its mask is white, or all of it."""

    impossible: ClassVar = IMPOSSIBLE

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    inpainting_mask_invert: bool = False
    denoising_strength: float = Field(0.75, le=1)

    async def over(self, parts: Parts) -> dict[str, Any]:
        """The picture and its mask."""

        def prepare(mask: Image.Image) -> Image.Image:
            alpha = mask.convert("RGBA").getchannel("A")
            shape = mask.convert("L") if alpha.getextrema() == (255, 255) else alpha  # the web UI's: opaque is white
            return ImageOps.invert(shape) if self.inpainting_mask_invert else shape

        image, mask = await read_images(self.init_images[0], self.mask, (self.width, self.height), parts, prepare)
        return {"image": image, "mask": mask, "strength": self.denoising_strength}


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
    names = (ANY_STEPS, *parts.family.variants)
    nothing = dict.fromkeys(("hash", "sha256", "config"))
    return [{"title": name, "model_name": name, "filename": f"{name}.safetensors", **nothing} for name in names]


@router.post("/sdapi/v1/interrupt")
@router.post("/sdapi/v1/skip", operation_id="skip")
async def interrupt() -> dict[str, str]:
    """Nothing: it would end other clients' work. Who closes the connection takes back a request."""
    return {}


@router.get("/sdapi/v1/loras", responses=declare(503))
async def loras(parts: PartsDep) -> list[dict[str, Any]]:
    """The styles that a prompt may name as <lora:NAME:SCALE>."""
    names = [each.name for each in await run_in_threadpool(parts.styles.all, parts.family)]
    return [{"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in names]


@router.get("/queue/status")
async def queue_status() -> dict[str, str]:
    """What Krita's plugin asks to see whether there is a server."""
    return {}


@router.get("/sdapi/v1/{listing}", responses=declare(404))
async def listing(listing: str) -> Any:
    """What else clients ask for before they draw."""
    if listing not in FIXED:
        raise Problem(
            errors.NOT_FOUND, f"of /sdapi/v1 there are txt2img, options, sd-models, loras, {', '.join(FIXED)}"
        )
    return FIXED[listing]


for each in (drawing, over, setting):
    router.include_router(each)


def _acts(script: object) -> bool:
    """Whether an always-on script changes the picture: it has arguments, and they do not turn it off."""
    args = script.get("args") if isinstance(script, dict) else None
    args = args if isinstance(args, list) else [args] if args else []
    is_on = [arg.get("enabled", True) if isinstance(arg, dict) else arg for arg in args]
    return bool(is_on) and is_on[0] is not False and any(is_on)


def _lora_scale(text: str) -> float:
    try:
        return float(text.split(":")[0] or 1)
    except ValueError:
        raise Problem(errors.INVALID, f"the scale of a LoRA is a number, not {text!r}", "prompt") from None


def _info(body: Txt2Img, drawn: Drawn) -> dict[str, Any]:
    """What was drawn, as the web UI tells it."""
    jobs, first = [picture.job for picture in drawn.pictures], drawn.pictures[0]
    notes = {"Ignored": ", ".join(body.unused(first.job)), "Resized": _resized(body, first.done)}
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(jobs),
        "negative_prompt": body.negative_prompt,
        "seed": first.job.seed,
        "all_seeds": [job.seed for job in jobs],
        "width": first.done.width,
        "height": first.done.height,
        "sampler_name": images.SAMPLERS[first.variant.sampler],
        "cfg_scale": first.job.guidance if first.job.guidance > 1 else 0,
        "steps": first.job.steps,
        "denoising_strength": first.job.strength,
        "batch_size": len(jobs),
        "sd_model_name": first.job.weights.variant,
        "infotexts": [_infotext(body, picture) for picture in drawn.pictures],
        "index_of_first_image": 0,
        "prompt_truncated": drawn.prompt_truncated,
        "flagged": [index for index, picture in enumerate(drawn.pictures) if picture.done.flagged],
        "extra_generation_params": {name: note for name, note in notes.items() if note},
    }


def _resized(body: Txt2Img, done: Done) -> str:
    """What the size policy made of the size that was asked for."""
    asked, drawn = f"{body.width}x{body.height}", f"{done.width}x{done.height}"
    return "" if asked == drawn else f"{asked} to {drawn}"


def _infotext(body: Txt2Img, picture: Picture) -> str:
    """A picture's parameters as the web UI writes them, and reads them back."""
    away = f"Negative prompt: {body.negative_prompt}\n" if picture.job.negative_prompt else ""
    return f"{body.prompt}\n{away}{images.line(parameters(picture.variant, picture.job, picture.done))}"
