"""The UNet: SDXL's shape (down block, two cross-attention blocks, text_time conditioning) at 3.1 M parameters."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from distill.text import WIDTHS

CHANNELS = (48, 64, 96)
HEADS = (3, 4, 6)


def build_unet(channels: tuple[int, ...], heads: tuple[int, ...]) -> UNet2DConditionModel:
    time_width = 32  # each of the six size numbers becomes this many; SDXL's is 256
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=heads,  # diffusers' name for the number of heads, as in SDXL's own config
        norm_num_groups=16,
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + WIDTHS[1],
    )
