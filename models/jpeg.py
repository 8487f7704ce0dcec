"""JPEG files made on a GPU, by nvJPEG, so that 0.2 MB of a picture leave it instead of 3.1."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

JpegEncoder = Callable[[Tensor, int], bytes]  # of pixels (H, W, 3) uint8 on the device, and a quality of 1 to 100


def on_gpu() -> JpegEncoder | None:
    """An encoder through torchvision, which is no dependency: None where it is not installed, or without nvJPEG."""
    try:
        from torchvision.io import encode_jpeg
    except (ImportError, RuntimeError):  # the second: built for another torch
        return None

    def encode(pixels: Tensor, quality: int) -> bytes:
        planes = pixels.permute(2, 0, 1).contiguous()
        # torchvision 0.26 reads on a stream of its own and writes on the default one, and waits for neither
        # (its encode_jpegs_cuda.cpp): so what it reads must be there, and what it writes is copied in that order.
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(torch.cuda.default_stream()):
            return encode_jpeg(planes, quality).cpu().numpy().tobytes()

    try:
        encode(torch.zeros(16, 16, 3, dtype=torch.uint8, device="cuda"), 90)
    except RuntimeError as error:
        log.warning("no JPEG on the GPU: %s", str(error)[:200])
        return None
    return encode
