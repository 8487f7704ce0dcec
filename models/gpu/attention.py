"""How a UNet on a GPU attends: to its prompt, through keys and values made once; and by the kernel that is fastest."""

import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# SDXL's transformer blocks at 1024 px: how many, heads, tokens; every head has 64 channels (its config.json). Each
# block attends to itself and to the 77 tokens of the prompt.
BLOCKS = ((10, 10, 4096), (60, 20, 1024))
HEAD, PROMPT, COLUMNS = 64, 77, 166_400
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_in_force = ExitStack()  # sdpa_kernel sets flags of the whole process until it is left, which it never is


class TextAttention:
    """diffusers' attention processor for attn2 of SDXL, given all keys and values of the prompt, (B, L, columns), as
    encoder_hidden_states; it reads columns of its own."""

    def __init__(self, start: int, width: int) -> None:
        self.keys, self.values = slice(start, start + width), slice(start + width, start + 2 * width)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """As diffusers' AttnProcessor2_0, without the branches that SDXL does not take."""
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.to_q(hidden_states),
                encoder_hidden_states[..., self.keys],
                encoder_hidden_states[..., self.values],
            )
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def share_text_weights(unet: nn.Module) -> Tensor:
    """Lay the weights of all cross-attentions' to_k and to_v into one tensor (columns, channels), of which they become
    views, so that one product with a prompt's embeddings makes every key and value: 166,400 columns for SDXL, 25.6 MB a
    prompt in float16. The values of the weights are left undefined."""
    attentions: list[Any] = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    linears = [linear for attn in attentions for linear in (attn.to_k, attn.to_v)]
    assert all(linear.bias is None for linear in linears)
    like, columns = linears[0].weight, sum(linear.out_features for linear in linears)
    shared = torch.empty(columns, linears[0].in_features, dtype=like.dtype, device=like.device)
    start = 0
    for attn in attentions:
        width = attn.to_k.out_features
        attn.set_processor(TextAttention(start, width))
        for linear in (attn.to_k, attn.to_v):
            linear.weight = nn.Parameter(shared[start : start + width], requires_grad=False)
            start += width
    return shared


def without_masks(encoder: PreTrainedModel) -> None:
    """Let a text encoder be causal by torch's flag alone. While a CUDA graph is recorded transformers 5.17 takes a mask
    instead (masking_utils, is_tracing), so other kernels would be recorded than were warmed up; 5.23 does not."""
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)  # of this name, transformers has no masks
    encoder.set_attn_implementation("sdpa_without_mask")


def use_fastest_attention(dtype: torch.dtype) -> dict[str, float]:
    """Time each kernel of torch's on SDXL's attentions on this GPU, and prefer the fastest from now on, in the whole
    process. Returns milliseconds that a UNet step of a row at 1024 px spends in them, by kernel, the fastest first."""
    found = {}
    for backend in BACKENDS:
        try:
            found[backend] = sum(
                count * _milliseconds(backend, heads, tokens, dtype) for count, heads, tokens in BLOCKS
            )
        except RuntimeError:  # this GPU, dtype or build has no such kernel
            continue
    order = sorted(found, key=lambda backend: found[backend])
    _in_force.close()
    # The mathematical way out comes last: the VAE's single head of 512 channels is too wide for some kernels.
    _in_force.enter_context(sdpa_kernel([*order, SDPBackend.MATH], set_priority=True))
    return {backend.name.removesuffix("_ATTENTION").lower(): found[backend] for backend in order}


@torch.inference_mode()
def _milliseconds(backend: SDPBackend, heads: int, tokens: int, dtype: torch.dtype) -> float:
    query, key, value = torch.randn(3, 1, tokens, heads, HEAD, device="cuda", dtype=dtype).transpose(2, 3)
    prompt = torch.randn(1, PROMPT, COLUMNS, device="cuda", dtype=dtype)[..., : 2 * heads * HEAD]
    keys, values = prompt.unflatten(-1, (2, heads, HEAD)).permute(2, 0, 3, 1, 4)

    def attend(times: int) -> None:
        for _ in range(times):
            F.scaled_dot_product_attention(query, key, value)
            F.scaled_dot_product_attention(query, keys, values)

    graph = torch.cuda.CUDAGraph()  # as in service: called one by one, the launches would be what is timed
    with sdpa_kernel(backend):
        attend(3)
        with torch.cuda.graph(graph):
            attend(10)
    times = []
    for _ in range(5):  # the first ones may find the GPU's clocks low
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / 10)
    return min(times)
