"""A check of pictures, as an operator would write one: `CHECK=tests.hook:look`."""

import threading

import numpy as np


def look(pixels: bytes, width: int, height: int, prompt: str) -> str | None:
    """Judges by the prompt, and flags what is not a picture of the size that it is said to be."""
    if "hang" in prompt:
        threading.Event().wait()
    if "raise" in prompt:
        raise RuntimeError("no model")
    if "leave" in prompt:
        raise SystemExit
    if "nonsense" in prompt:
        return "perhaps"
    picture = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    if "no red" in prompt and (picture == (255, 0, 0)).all(-1).mean() > 0.9:
        return "refuse"
    if picture.std() == 0 or "refuse" in prompt:
        return "refuse"
    return "flag" if "flag" in prompt else None
