"""What clients of AUTOMATIC1111's web UI send, as far as it is understood.

They send 20 steps, a guidance scale and a sampler without their user having chosen them. What a distilled model cannot
honour is taken and not used (UNUSED); what would make another picture is refused (IMPOSSIBLE).
"""

import re
from typing import Any, ClassVar, Self

from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, model_validator

from app import errors
from app.api.compat import LONGEST_PROMPT, MOST_PICTURES, Prompt, Seed, Tolerant, read_images, refusal, variant_of
from app.api.deps import Parts
from app.engine.jobs import Job
from app.errors import Problem
from app.order import DEFAULT_STEPS, Order
from models.catalog import CATALOG

LORA = re.compile(r"<lora:([^<:>]{1,128})(?::([^<>]{0,64}))?>")  # bounded, so that no prompt takes long
SAMPLER, SCHEDULER = "Euler", "SGM Uniform"
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
    steps: int = DEFAULT_STEPS
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
        variants = CATALOG[parts.fleet.require_ready().family].variants
        has_weights = self.steps in {each.steps for each in variants.values()}
        steps = None if name else self.steps if has_weights else DEFAULT_STEPS
        declared = variants[name or f"{steps}step-unet"].guidance
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
            "steps": self.steps != job.steps,
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
