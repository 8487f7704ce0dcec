"""Ahead-of-time compiled code for the CPU: built once in a process of its own, kept in a cache, loaded in milliseconds.

The UNet is compiled without weights, for any batch size: each weight set is bound to the same code by reference. Text
encoders and decoder never change, so theirs stay inside.
Where no C++ compiler is found, or the cache cannot be written, everything runs as it is. A GPU has models/gpu/.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package

from models import weights
from models.aoti import Broken, Library
from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.modules import UNetFunction, WeightSet
from models.pipeline import Pipeline
from models.registry import Registry
from models.vectorised import fold_upsamplers, vectorise

LARGEST_BATCH = 32  # rows; the code is right for any batch up to here (diffusers branches at 64)
DIGEST_BYTES = 32  # SHA-256, at the end of each file
PARTS = ("unet", "text", "decoder")
MADE_BY = ("compiled", "modules", "vectorised")  # modules of ours whose code ends up in what is compiled
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Recipe:
    """What compiled code depends on besides the machine: the family, its files, the dtype and the thread count."""

    store: weights.WeightStore
    dtype: torch.dtype
    cache: Path

    def library(self, part: str) -> Path:
        """Where the compiled part is or will be. A change of anything it was made from changes the name."""
        made_from: list[object] = [
            *(torch.__version__, diffusers.__version__, transformers.__version__, str(self.dtype)),
            *(platform.machine(), _cpu_flags(), torch.get_num_threads()),
            *(_digest(Path(__file__).with_name(f"{name}.py")) for name in MADE_BY),
            self.store.family.size.default,
            self.store.config("unet"),
        ]
        for component in {"unet": (), "text": ("text_encoder", "text_encoder_2"), "decoder": ("vae",)}[part]:
            made_from += [self.store.config(component), _digest(self.store.component_file(component))]
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{self.store.family.name}-{part}-{key}.so"

    def is_built(self) -> bool:
        """Whether every part is in the cache."""
        return all(os.access(self.library(part), os.R_OK) for part in PARTS)


def can_build(cache: Path) -> bool:
    """Whether this machine has the C++ compiler that torch calls, and the cache can be written."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return shutil.which(os.environ.get("CXX", "g++")) is not None and os.access(there, os.W_OK)


def start_build(recipe: Recipe) -> subprocess.Popen[bytes]:
    """Begin to build the missing parts in a process of its own, at low priority, so that service goes on."""
    command = [sys.executable, "-m", "models.compiled", recipe.store.family.name, str(recipe.cache)]
    command += [str(recipe.dtype).removeprefix("torch."), str(recipe.store.directory or "")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=_behind_the_engine
    )


def _behind_the_engine() -> None:
    """In the new process: give way to the service, and end when the engine does."""
    os.nice(15)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load_text(recipe: Recipe) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The compiled text encoders; called as models.modules.TextEncoders, by one thread. Raises models.aoti.Broken."""
    library = Library(_undamaged(recipe.library("text")))

    def encode(ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        embeds, pooled = library(ids, ids_2)
        return embeds, pooled

    return encode


def load_decoder(recipe: Recipe, callers: int = 1) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The compiled decoder; called as models.modules.Decoder. callers: threads that will call it at a time."""
    library = Library(_undamaged(recipe.library("decoder")), callers)

    def decode(latents: Tensor) -> tuple[Tensor, Tensor]:
        pixels, valid = library(latents)
        return pixels, valid

    return decode


def load_unet(recipe: Recipe, callers: int = 1) -> Callable[[WeightSet], UNetFunction]:
    """A function that binds the compiled UNet to a weight set, which is used where it lies, not copied.
    callers: threads that will call it at a time. Raises models.aoti.Broken, and so does what it returns."""
    path = _undamaged(recipe.library("unet"))

    def bind(weight_set: WeightSet) -> UNetFunction:
        library = Library(path, callers, {f"unet.{key}": tensor for key, tensor in weight_set.items()})
        return lambda *inputs: library(*inputs)[0]

    return bind


def _undamaged(path: Path) -> Path:
    """The path of a library that is as it was written: a damaged one would take the process with it, not raise."""
    try:
        written = path.read_bytes()
    except OSError as error:  # another server has just deleted it
        raise Broken(str(error)) from error
    if hashlib.sha256(written[:-DIGEST_BYTES]).digest() != written[-DIGEST_BYTES:]:
        raise Broken(f"{path.name} is damaged")
    return path


def forget(recipe: Recipe) -> None:
    """Delete the libraries, so that they are built again; where the cache cannot be written they stay, unused."""
    for part in PARTS:
        with contextlib.suppress(OSError):
            recipe.library(part).unlink(missing_ok=True)


def build(recipe: Recipe) -> None:
    """Compile what is not in the cache: about 80 s for the embedded model on one core."""
    recipe.cache.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(recipe.store, Device(), recipe.dtype)
    if not recipe.library("text").is_file():
        assert isinstance(pipeline.text, nn.Module)
        length = pipeline.tokenizers[0].model_max_length
        ids = torch.zeros(2, length, dtype=torch.int64)
        _compile(pipeline.text, (ids, ids.clone()), recipe.library("text"), with_weights=True)
    if not recipe.library("decoder").is_file():
        assert isinstance(pipeline.decoder, nn.Module)
        fold_upsamplers(pipeline.decoder)
        vectorise(pipeline.decoder)
        side = recipe.store.family.size.default // pipeline.vae_scale
        latents = torch.zeros(2, pipeline.latent_channels, side, side)
        _compile(pipeline.decoder, (latents,), recipe.library("decoder"), with_weights=True)
    if not recipe.library("unet").is_file():
        registry = Registry(recipe.store, Device(), recipe.dtype, [Tier("cpu", 1 << 62)])
        weight_set = Weights(next(iter(recipe.store.variants_here())))
        registry.load(weight_set)
        registry.use(weight_set)
        vectorise(registry.unet)
        # Written out, softmax(q k) v fuses with its neighbours: 0.85 of the time of torch's own kernel at batch 16.
        registry.unet.unet.set_attn_processor(AttnProcessor())
        example = _unet_example(pipeline, recipe.store.family.size.default)
        _compile(registry.unet, example, recipe.library("unet"), with_weights=False)


def _unet_example(pipeline: Pipeline, pixels: int) -> tuple[Tensor, ...]:
    side, row = pixels // pipeline.vae_scale, pipeline.encode([""])[0]
    batch = 2  # not 1: export would take a batch of one for a constant
    latents = torch.zeros(batch, pipeline.latent_channels, side, side, dtype=pipeline.dtype)
    return (
        latents.contiguous(memory_format=torch.channels_last),
        torch.zeros(batch),
        row.prompt_embeds.repeat(batch, 1, 1),
        row.pooled.repeat(batch, 1),
        torch.zeros(batch, 6, dtype=pipeline.dtype),
    )


def _compile(module: nn.Module, example: tuple[Tensor, ...], path: Path, with_weights: bool) -> None:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), example, dynamic_shapes=tuple({0: batch} for _ in example))
        options = {"aot_inductor.package_constants_in_so": with_weights, "always_keep_tensor_constants": True}
        mine = secrets.token_hex(4)  # containers that share a cache may share process ids, too
        package, unfinished = (path.with_suffix(f".{mine}.{kind}") for kind in ("pt2", "tmp"))
        aoti_compile_and_package(exported, package_path=str(package), inductor_configs=options)
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        code = archive.read(name)
    unfinished.write_bytes(code + hashlib.sha256(code).digest())  # the loader reads past it
    package.unlink()
    unfinished.replace(path)


def _cpu_flags() -> str:
    """What the compiler was told with -march=native: code for one CPU may be an illegal instruction on another."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Build one family's libraries; run as `python -m models.compiled FAMILY CACHE DTYPE [DIRECTORY]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("family", choices=CATALOG)
    parser.add_argument("cache", type=Path)
    parser.add_argument("dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("directory", nargs="?", default="")
    options = parser.parse_args()
    store = weights.WeightStore(CATALOG[options.family], Path(options.directory) if options.directory else None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    build(Recipe(store, getattr(torch, options.dtype), options.cache))


if __name__ == "__main__":
    main()
