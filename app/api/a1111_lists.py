"""What clients of the A1111 API ask for before they draw, where the answer is the same for all of them."""

from typing import Any

SAMPLER, SCHEDULER = "Euler", "SGM Uniform"

FIXED: dict[str, Any] = {
    "samplers": [{"name": SAMPLER, "aliases": [], "options": {}}],
    "schedulers": [
        {"name": "sgm_uniform", "label": SCHEDULER, "aliases": [], "default_rho": -1, "need_inner_model": False}
    ],
    "progress": {  # of all clients together: a figure would make each wait for the others
        "progress": 0.0,
        "eta_relative": 0.0,
        "state": {
            "job_count": 0,
            "job": "",
            "job_no": 0,
            "sampling_step": 0,
            "sampling_steps": 0,
            "skipped": False,
            "interrupted": False,
        },
        "current_image": None,
        "textinfo": None,
    },
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "memory": {"ram": {}, "cuda": {}},
    "cmd-flags": {},
    **{name: [] for name in ("upscalers", "latent-upscale-modes", "sd-vae", "face-restorers")},
    **{name: [] for name in ("prompt-styles", "hypernetworks")},
}
