"""Networks as the functions that distill/diffusion.py walks with."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill.diffusion import Predictor
from distill.text import Text


def of(unet: UNet2DConditionModel, exact: bool = False) -> Predictor:
    """(x_t, t, text) to the UNet's output in float32; bf16 inside, unless it has to be exact."""

    def predict(x: Tensor, t: Tensor, text: Text) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=not exact):
            out: Tensor = unet(x, t, encoder_hidden_states=text.context, added_cond_kwargs=text.added).sample
        return out.float()

    return predict


def guided(predict: Predictor, empty: Text, scale: float) -> Predictor:
    """Classifier-free guidance: away from what the empty prompt gives. empty: one row."""

    def both(x: Tensor, t: Tensor, text: Text) -> Tensor:
        nothing = Text(empty.context.expand_as(text.context), empty.pooled.expand_as(text.pooled), text.time_ids)
        without, with_ = predict(x, t, nothing), predict(x, t, text)
        return without + scale * (with_ - without)

    return both
