"""What a 1024 px PNG costs one core, by encoder: `python -m bench.images`."""

import io
import time
from collections.abc import Callable

import fpng
import numpy as np
from PIL import Image

SIDE = 1024  # pixels
REPEATS = 5


def picture() -> Image.Image:
    """Smooth shapes with a little noise: compresses about as a drawn picture does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + rng.integers(-2, 3, (SIDE, SIDE, 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def by_pillow(image: Image.Image, level: int) -> bytes:
    """Pillow's encoder at a zlib level."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=level)
    return file.getvalue()


def main() -> None:
    """Print the best of a few runs for each, and the size."""
    image = picture()
    pixels = image.tobytes()
    encoders: dict[str, Callable[[], bytes]] = {
        "fpng": lambda: fpng.from_bytes(pixels, SIDE, SIDE, 3),
        "Pillow, level 1": lambda: by_pillow(image, 1),
        "Pillow, default": lambda: by_pillow(image, 6),
    }
    for name, encode in encoders.items():
        seconds, size = [], 0
        for _ in range(REPEATS):
            start = time.process_time()
            size = len(encode())
            seconds.append(time.process_time() - start)
        print(f"{name:16} {1e3 * min(seconds):7.1f} ms of a core  {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
