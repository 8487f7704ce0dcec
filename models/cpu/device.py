"""A CPU that computes through OpenVINO: the family's networks, compiled for one row at first, for more beside the
service."""

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from models.cpu import networks
from models.cpu.graphs import Compiler, Graph
from models.cpu.layers import Node
from models.device import Device
from models.modules import UNetFunction, WeightSet
from models.pipeline import Pipeline
from models.registry import Registry

log = logging.getLogger(__name__)

LARGER = 4  # rows of one call; 2 and 8 gain next to nothing per row, and each graph takes memory (docs/decisions.md)
NICE = 15  # of threads that compile beside the service
LARGEST = 256 << 20  # bytes of a weight set: to compile SDXL takes half a minute and three times its memory


class Cpu(Device):
    """workers: calls at a time, each with `threads` threads."""

    max_batch = 8
    first_batches = 1
    most_bound = 8  # weight sets with graphs, of 0.15 GB each for one row, and as much for more

    def __init__(self, workers: int, threads: int) -> None:
        self._compiler = Compiler(workers, threads)
        self._wanted: queue.PriorityQueue[tuple[int, int, Graph]] = queue.PriorityQueue()
        self._order = itertools.count()

    def prepare(self, pipeline: Pipeline, registry: Registry) -> dict[str, float]:
        """Give the pipeline and the registry graphs in place of their modules, where the family's networks are of the
        kind that these can be."""
        store, dtype, make = registry.store, pipeline.dtype, self._graph
        unet, vae, *text = (store.config(part) for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
        has_one_size = store.family.size.minimum == store.family.size.maximum
        if not has_one_size or registry.bytes_of_a_set > LARGEST or not networks.can_be_built(unet, vae, text):
            return {}
        side = store.family.size.default // pipeline.vae_scale
        length = text[0]["max_position_embeddings"]
        weights = [store.read(part) for part in ("vae", "text_encoder", "text_encoder_2")]
        decode = make(partial(networks.decoder, weights[0], vae, dtype, side), gains=False)
        look = make(partial(networks.encoder, weights[0], vae, dtype, store.family.size.default), gains=False)
        first = make(lambda batch: networks.text_encoder(weights[1], text[0], dtype, batch, pooled=False))
        second = make(lambda batch: networks.text_encoder(weights[2], text[1], dtype, batch, pooled=True))
        end_id = text[1]["eos_token_id"]

        def encode(ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
            # 2 is what CLIP's configurations said before their token had its number; the number is the largest then.
            end = (ids_2 if end_id == 2 else (ids_2 == end_id).int()).argmax(dim=1, keepdim=True)
            (one,), (two, pooled) = first(ids), second(ids_2, end)
            return torch.cat([one, two], dim=-1), pooled

        def picture(latents: Tensor) -> tuple[Tensor, Tensor]:
            pixels, valid = decode(latents)
            return pixels, valid != 0

        def moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = look(pictures)
            return mean, std

        def bind(weight_set: WeightSet) -> UNetFunction:
            def graph(chunks: int) -> Graph:
                return make(partial(networks.unet, weight_set, unet, dtype, side, chunks * length))

            return _unet(graph, length, unet)

        pipeline.text, pipeline.encoder, pipeline.decoder = encode, moments, picture
        registry.use_compiled(bind)
        self.first_call_is_typical = False  # it compiles
        return {}

    def later(self, registry: Registry, done: Callable[[], None]) -> None:
        """Compile one row of every weight set, and more rows of what was called, in threads that give way to others."""
        if registry.bind is None:
            return
        registry.bind_all()
        for number in range(os.cpu_count() or 1):
            threading.Thread(target=self._compile, args=(done,), daemon=True, name=f"compile {number}").start()

    def finish(self, registry: Registry) -> None:
        """Compile the same now."""
        if registry.bind is not None:
            registry.bind_all()
        while not self._wanted.empty():
            self._compile_next()

    def _graph(self, make: Callable[[int], Node], gains: bool = True) -> Graph:
        """gains: whether a row takes less time in a larger batch."""
        graph = Graph(make, self._compiler, self._want_more if gains else lambda graph: None)
        self._wanted.put((1, next(self._order), graph))
        return graph

    def _want_more(self, graph: Graph) -> None:
        self._wanted.put((LARGER, next(self._order), graph))

    def _compile_next(self) -> None:
        size, _, graph = self._wanted.get()  # small sizes first
        if not graph.add(size):
            log.warning("%d rows are not computed as one, bit for bit: that batch size is not used", size)
        self._wanted.task_done()

    def _compile(self, done: Callable[[], None]) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread alone, on Linux
        while True:
            self._compile_next()
            if self._wanted.unfinished_tasks == 0:
                done()


def _unet(make: Callable[[int], Graph], length: int, config: networks.Config) -> UNetFunction:
    """Graphs for prompts of 1, 2, ... chunks of `length`, with the plain arguments of models.modules.UNet."""
    graphs = {1: make(1)}
    channels, added = config["block_out_channels"][0], config["addition_time_embed_dim"]
    is_flipped, shift = config["flip_sin_to_cos"], config["freq_shift"]

    @lru_cache(maxsize=1024)
    def features(numbers: tuple[float, ...], width: int) -> Tensor:
        embedded: Tensor = get_timestep_embedding(torch.tensor(numbers), width, is_flipped, shift)
        return embedded.flatten()

    def unet(latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        times = torch.stack([features((time,), channels) for time in timestep.tolist()])
        sizes = torch.stack([features(tuple(row), added) for row in time_ids.tolist()])
        chunks = embeds.shape[1] // length
        if chunks not in graphs:
            graphs[chunks] = make(chunks)
        (out,) = graphs[chunks](latents, times, embeds, torch.cat([pooled.float(), sizes], dim=-1))
        return out

    return unet
