"""The discriminator (section 3.3): the UNet's own encoder and mid block, in latent space, with a small head."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.text import Text


class Discriminator(nn.Module):
    """Logits, (B,). Conditional: D(x_t, x_end, t, t_end, c). Relaxed: D'(x_end, t_end, c), with a head of its own."""

    def __init__(self, unet: UNet2DConditionModel, conditional: bool) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(True)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, None
        self.conditional = conditional
        width = unet.config.block_out_channels[-1]
        self.head = head(2 * width if conditional else width, width)

    def features(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """What comes out of the mid block, (B, C, h/4, w/4). t: (B,); the clean end is read as timestep 0."""
        unet, t = self.unet, t.clamp(min=0)
        time = unet.time_embedding(unet.get_time_embed(x, t))
        time = time + unet.get_aug_embed(time, text.context, text.added)
        x = unet.conv_in(x)
        for block in unet.down_blocks:
            cross = {"encoder_hidden_states": text.context} if block.__class__.__name__.startswith("Cross") else {}
            x, _ = block(x, time, **cross)
        return unet.mid_block(x, time, encoder_hidden_states=text.context)

    def forward(self, x_end: Tensor, t_end: Tensor, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        with torch.autocast(x_end.device.type, torch.bfloat16):
            seen = self.features(x_end, t_end, text)
            if self.conditional:
                seen = torch.cat([seen, self.features(x_t, t, text)], dim=1)
            return self.head(seen).float().flatten(1).mean(1)


def head(channels: int, width: int) -> nn.Sequential:
    """Blocks of 4 x 4 convolution of stride 2, GroupNorm and SiLU, then one value.

    The paper leaves count and width open: two blocks, 4 x 4 features to 1 x 1. Group norm over a single point of 3
    channels would flatten it, so the second block has none.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.GroupNorm(16, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, 1, 1),
    )
