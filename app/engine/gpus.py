"""Which GPUs this process may use, without torch."""

import os
import subprocess

from app.lists import listed


def visible_gpus() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES where that is set, as a container's runtime or Ray does; else all of this machine,
    by UUID. Raises ValueError, in words."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        try:
            named = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError("asks nvidia-smi, which does not answer here; name the GPUs") from error
    gpus = listed(named.replace("\n", ","))
    if not gpus:
        raise ValueError("finds no GPU here")
    return gpus
