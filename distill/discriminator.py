"""The discriminator (section 3.3): the UNet's own encoder and mid block, in latent space, with a small head."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.text import Text


class Discriminator(nn.Module):
    """Logits, (B,). Conditional: D(x_t, x_end, t, t_end, c). Relaxed: D'(x_end, t_end, c), with a head of its own.

    The paper's head sees the mid block alone. Ours sees every resolution of the encoder too: of latents of 16 x 16 the
    mid block keeps 4 x 4, and in the hundreds of iterations that we have it learned next to nothing there (told 74 %
    of pairs of a teacher's and a student's landing apart; with all resolutions 87 %; docs/distillation.md).
    """

    def __init__(self, unet: UNet2DConditionModel, conditional: bool) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(True)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, None
        self.conditional = conditional
        inputs, channels = (2 if conditional else 1), unet.config.block_out_channels
        self.heads = nn.ModuleList(head(inputs * width) for width in (*channels, channels[-1]))

    def relaxed(self) -> Discriminator:
        """D' with this encoder, and with the half of the heads that sees the landing: it need not begin anew."""
        one = Discriminator(self.unet, conditional=False).to(self.unet.device)
        one.unet = self.unet
        for mine, its in zip(self.heads, one.heads, strict=True):
            halves = mine.state_dict()
            first = halves["0.weight"]
            its.load_state_dict(halves | {"0.weight": first[:, : first.shape[1] // 2]})
        return one

    def features(self, x: Tensor, t: Tensor, text: Text) -> list[Tensor]:
        """(B, C, H, W) of each resolution, then of the mid block. t: (B,); the clean end is read as timestep 0."""
        unet, t = self.unet, t.clamp(min=0)
        time = unet.time_embedding(unet.get_time_embed(x, t))
        time = time + unet.get_aug_embed(time, text.context, text.added)
        x, seen = unet.conv_in(x), []
        for block in unet.down_blocks:
            cross = {"encoder_hidden_states": text.context} if block.__class__.__name__.startswith("Cross") else {}
            x, layers = block(x, time, **cross)
            seen.append(layers[0])
        return [*seen, unet.mid_block(x, time, encoder_hidden_states=text.context)]

    def forward(self, x_end: Tensor, t_end: Tensor, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        with torch.autocast(x_end.device.type, torch.bfloat16):
            seen = self.features(x_end, t_end, text)
            if self.conditional:
                before = self.features(x_t, t, text)
                seen = [torch.cat(pair, dim=1) for pair in zip(seen, before, strict=True)]
            said = [judge(part).float().flatten(1).mean(1) for judge, part in zip(self.heads, seen, strict=True)]
            return torch.stack(said).mean(0)


def head(channels: int, width: int = 64) -> nn.Sequential:
    """One value at every place, to be averaged. (The paper's strides would leave one place of 16 x 16 latents.)"""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(16, width), nn.SiLU(), nn.Conv2d(width, 1, 1)
    )
