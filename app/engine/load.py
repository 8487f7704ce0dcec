"""From a configuration to a model in memory: the one assembly, of the server, the command line and the benchmarks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from app.engine.cores import usable_cores
from app.engine.costs import Costs
from app.engine.messages import EngineConfig
from app.engine.warmup import measure
from app.logs import say
from models.catalog import Family, Weights, families
from models.device import Device, NoDevice
from models.gpu.device import Gpu
from models.pipeline import Pipeline
from models.registry import OverBudget, Registry
from models.styles import folder_of
from models.weights import BadWeights, MissingWeights, WeightStore

WORKERS = 2  # calls at a time. CPU: of half the threads each. GPU: one steps, one decodes


class BadPart(Exception):
    """A part of the model cannot be opened, for a cause that nobody foresaw; the text names both."""


CANNOT_OPEN = (MissingWeights, BadWeights, OverBudget, NoDevice, BadPart, torch.OutOfMemoryError)  # say why, in words


@dataclass(frozen=True)
class Model:
    """What serves. workers: threads that make calls. batches: the sizes that are worth measuring, 1, 2, 4, ..."""

    pipeline: Pipeline
    registry: Registry
    workers: int
    batches: tuple[int, ...]

    @property
    def device(self) -> Device:
        """Where it computes."""
        return self.pipeline.device

    @property
    def dtype(self) -> str:
        """As torch names it."""
        return str(self.pipeline.dtype).removeprefix("torch.")

    @property
    def store(self) -> WeightStore:
        """Its files."""
        return self.registry.store

    @property
    def family(self) -> Family:
        """What can be drawn."""
        return self.store.family

    def measure(self, batches: Sequence[int]) -> Costs:
        """What a step and a decode of these sizes take now."""
        with _part("tokenizer or text_encoder"):
            if not all(each.prompt_embeds.isfinite().all() for each in self.pipeline.prompts.encode(["a warm-up"])):
                raise BadWeights("text_encoder: what it makes of a prompt is NaN or Inf")
        with _part("unet or vae"):
            return measure(self.pipeline, self.registry, batches, self.workers)


def open_model(config: EngineConfig, workers: int = WORKERS) -> Model:
    """Load everything that is there before the first request. Raises one of CANNOT_OPEN."""
    with _part("the device or the model's files"):
        return _open_model(config, workers)


def _open_model(config: EngineConfig, workers: int) -> Model:
    # The only place that asks what kind of device there is.
    on_gpu = torch.cuda.is_available() if config.device is None else config.device == "cuda"
    threads = config.threads or usable_cores()
    workers = workers if on_gpu else min(workers, threads)
    per_call = max(1, threads // workers)
    torch.set_num_threads(per_call)
    if on_gpu:
        device: Device = Gpu(Path(config.cache) if config.compile else None)
    else:
        device = _cpu(workers, per_call) if config.compile else Device()
    dtype: torch.dtype = device.default_dtype if config.dtype is None else getattr(torch, config.dtype)
    store = _find_store(config, device)
    preload = choose_preload(store) if config.preload is None else config.preload
    if unknown := set(preload) - set(store.family.variants):
        raise MissingWeights(f"no such variant: {', '.join(unknown)}; there are {', '.join(store.family.variants)}")
    with _part("tokenizer, text_encoder or vae"):
        pipeline = Pipeline(store, device, dtype)
    with _part("unet"):
        styles = folder_of(store.family, Path(config.styles) if config.styles else None)
        unet = device.make_unet(store.config("unet"), dtype, config.fp8)
        registry = Registry(store, device, dtype, device.tiers(config.host_budget, config.device_budget), unet, styles)
    _load_first(registry, preload, store.variants_here() if config.preload is None else [])
    say("weights loaded", variants=_resident(registry))
    with _part("the networks as this device computes them"):
        attention = device.prepare(pipeline, registry)
    if attention:
        say("attention measured", milliseconds_per_step=attention)
    if not on_gpu and registry.bind is None:  # one module, which takes one call at a time, and all threads
        workers = 1
        torch.set_num_threads(threads)
    largest = config.max_batch or device.max_batch
    return Model(pipeline, registry, workers, tuple(1 << power for power in range(largest.bit_length())))


def _load_first(registry: Registry, wanted: Sequence[str], others: Sequence[str]) -> None:
    """Load what is wanted. What cannot be loaded is failed, with its reason, and the rest is served; where nothing is
    left, the first of the others that can be loaded. Raises the first reason if there is none."""
    errors: dict[str, Exception] = {}
    for name in dict.fromkeys((*wanted, *others)):
        if name in wanted or not _resident(registry):
            try:
                with _part(name):
                    registry.load(Weights(name))
            except CANNOT_OPEN as error:
                errors[name] = error
    if errors and not _resident(registry):
        raise next(iter(errors.values()))
    for name, reason in errors.items():
        say("a variant cannot be loaded", level="error", variant=name, reason=str(reason)[:300])


def _resident(registry: Registry) -> list[str]:
    return [row.name for row in registry.status() if row.state == "resident"]


@contextmanager
def _part(name: str) -> Iterator[None]:
    try:
        yield
    except CANNOT_OPEN:
        raise
    except Exception as error:
        raise BadPart(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _cpu(workers: int, threads: int) -> Device:
    """With OpenVINO where that is installed, which it need not be on a machine with a GPU."""
    try:
        from models.cpu.device import Cpu
    except ImportError:
        say(
            "OpenVINO is not installed, so this CPU is several times slower: pip install 'sdxl-lightning-server[cpu]'",
            level="warning",
        )
        return Device()
    return Cpu(workers, threads)


def choose_preload(store: WeightStore) -> list[str]:
    """What is loaded before the first request: all that is here of a small model; of SDXL one variant, the default if
    it is here, or if none is and it must be fetched."""
    here, default = store.variants_here(), store.family.default
    if store.family.is_small and here:
        return here
    return [default] if default in here or not here else here[:1]


def _find_store(config: EngineConfig, device: Device) -> WeightStore:
    """The files of the family asked for; else SDXL's where the device is fast and they are here, or the embedded
    model's."""
    directory, known = Path(config.directory) if config.directory else None, families(config.catalogs)
    if config.model is not None:
        return WeightStore(known[config.model], directory)
    sdxl = WeightStore(known["sdxl"], directory)
    return sdxl if device.is_fast and sdxl.is_complete() else WeightStore(known["embedded"], directory)
