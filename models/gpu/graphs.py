"""Functions of batches as CUDA graphs: one a bucket of rows and a shape, over static buffers, sharing a memory pool.

A graph replays some two thousand launches by one, and the host is free meanwhile. On a CPU nothing is recorded, and the
functions are called as they are (models.pipeline); the tests record by calling.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8)  # rows
FULL = 0.75  # above this share a bucket is padded; else the rows are split: 7 run as 8, but 6 as 4 + 2 and 3 as 2 + 1
GRAPHS_KEPT = 16  # of one function: four sizes of pictures. The least recently used goes.
COMPILE_MODE = "quick"  # of our own, minutes faster than torch's max-autotune: it tunes matrix products alone
TRIALS = 4  # of its ways to compute a convolution that cuDNN times, the most promising first; 10 by default

Rows = tuple[Tensor, ...]  # tensors (B, ...) of one B
Key = tuple[int, tuple[torch.Size, ...]]  # bucket, and the shape of a row in each input
Recorder = Callable[[Callable[[], Rows]], tuple[Callable[[], object], Rows]]

_one_capture = threading.Lock()  # CUDA allows one at a time in a process


@dataclass(frozen=True)
class Graph:
    """replay() computes outputs from inputs; all of them stay where they are."""

    inputs: Rows
    outputs: Rows
    replay: Callable[[], object]


class Graphed:
    """A function of tensors (B, ...) that returns a tensor or several (B, ...), whose rows do not depend on each other.
    Called like the function, from any thread; any B is padded or split into buckets.

    often: which call of a shape records it; those before run the function as it is.
    """

    def __init__(self, function: Callable[..., Any], record: Recorder, buckets: tuple[int, ...] = BUCKETS) -> None:
        self.function, self.record, self.buckets = function, record, buckets
        self.often = 1
        self._seen: Counter[Key] = Counter()
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._lock = threading.Lock()  # the buffers hold one call at a time

    @torch.inference_mode()
    def __call__(self, *rows: Tensor) -> Any:
        """What the function returns. Where a shape is to be recorded, that takes a few calls' time."""
        parts, start = [], 0
        for bucket in split(len(rows[0]), self.buckets):
            parts.append(self._run(bucket, tuple(each[start : start + bucket] for each in rows)))
            start += bucket
        joined = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
        return joined if len(joined) > 1 else joined[0]

    @torch.inference_mode()
    def capture(self, rows: Rows, bucket: int, function: Callable[..., Any] | None = None) -> None:
        """Record a graph for `bucket` rows like these, and use it from now on. function: one that does the same,
        faster; its first call may take its time, calls of this go on meanwhile."""
        call = self.function if function is None else function  # a compiled module has no truth: it would ask its len()
        inputs = tuple(each[:1].repeat(bucket, *[1] * (each.ndim - 1)) for each in rows)

        def over_the_inputs() -> Rows:
            return _several(call(*inputs))

        try:
            replay, outputs = self.record(over_the_inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if function is not None:
                raise  # the graph there is stays: faster than a call of this
            log.warning("%d rows cannot be recorded and will be called: %s", bucket, error)
            replay, outputs = by_calling(over_the_inputs)
        with _one_capture, self._lock:
            _synchronize(inputs)  # what this displaces may still run
            self._graphs[self._key(bucket, rows)] = Graph(inputs, outputs, replay)
            while len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)

    def improve(self, function: Callable[..., Any], only: Callable[[Key], bool] = lambda key: True) -> None:
        """Replace the graphs there are, one after another, by those of a function that does the same, faster."""
        for key, graph in list(self._graphs.items()):
            if only(key):
                self.capture(graph.inputs, key[0], function)

    def _run(self, bucket: int, rows: Rows) -> Rows:
        if (key := self._key(bucket, rows)) not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] < self.often:
                return _several(self.function(*rows))
            self.capture(rows, bucket)
        with self._lock:
            graph, count = self._graphs[key], len(rows[0])
            self._graphs.move_to_end(key)
            for buffer, each in zip(graph.inputs, rows, strict=True):
                buffer[:count].copy_(each, non_blocking=True)  # rows above keep what they held
            graph.replay()
            return tuple(each[:count].clone() for each in graph.outputs)

    @staticmethod
    def _key(bucket: int, rows: Rows) -> Key:
        return bucket, tuple(each.shape[1:] for each in rows)


def split(rows: int, buckets: tuple[int, ...] = BUCKETS) -> list[int]:
    """The buckets that `rows` rows run in, the largest first; only the last may have rows to spare."""
    taken = []
    while rows > 0:
        below = [bucket for bucket in buckets if bucket <= rows]
        above = [bucket for bucket in buckets if bucket >= rows]
        pads = above and (not below or rows > FULL * above[0])
        taken.append(above[0] if pads else below[-1])
        rows -= taken[-1]
    return taken


def by_calling(call: Callable[[], Rows]) -> tuple[Callable[[], object], Rows]:
    """A recorder without CUDA, or where CUDA refuses: a replay calls the function, and writes into the same outputs."""
    outputs = call()

    def replay() -> None:
        for buffer, each in zip(outputs, call(), strict=True):
            buffer.copy_(each)

    return replay, outputs


def on_gpu(priority: int) -> Recorder:
    """A recorder of CUDA graphs, on a stream of its own, with a memory pool of its own for all of them: they must not
    run at the same time. priority: of the kernels in the graphs; -1 goes before 0."""
    stream, pool = torch.cuda.Stream(priority=priority), torch.cuda.graph_pool_handle()

    def record(call: Callable[[], Rows]) -> tuple[Callable[[], object], Rows]:
        nonlocal pool
        with _one_capture:  # to synchronize the device during a capture would be an error
            torch.cuda.synchronize()  # the inputs were made on another stream
        torch.backends.cudnn.benchmark = True  # only here: elsewhere each new shape would wait for it
        torch.backends.cudnn.benchmark_limit = TRIALS
        torch._C._cudnn_set_conv_benchmark_empty_cache(False)  # else the memory's cache is given back for each new one
        try:
            # In two calls libraries choose their algorithms, and torch.compile compiles: that not at our priority.
            for each in (torch.cuda.Stream(), stream):
                with torch.cuda.stream(each):
                    call()
                each.synchronize()
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads load weights and decode meanwhile, with allocations that a capture forbids.
            with _one_capture, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = call()
        except RuntimeError:
            if _was_abandoned(pool):
                pool = torch.cuda.graph_pool_handle()  # that of pinned memory still takes the old one for busy
            raise
        finally:
            torch.backends.cudnn.benchmark = False
        return graph.replay, outputs

    def in_a_fresh_thread(call: Callable[[], Rows]) -> tuple[Callable[[], object], Rows]:
        # cuDNN remembers by thread how it computed a convolution; what it did untuned it does not tune any more.
        with ThreadPoolExecutor(1, "record") as thread:
            return thread.submit(torch.inference_mode()(record), call).result()

    return in_a_fresh_thread


def _was_abandoned(pool: tuple[int, int]) -> bool:
    """Whether a capture into this pool failed in CUDAGraph.capture_end. Before torch 2.12 that leaves allocator and
    random generator as if it went on: each later capture, empty_cache() and random number would fail. Cures it."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return False  # it has ended in good order, or never began
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # a clone is not capturing
    return True


def release_cached_memory() -> None:
    """torch.cuda.empty_cache(), but not while another thread records: there it is an error that ends the process."""
    with _one_capture:
        torch.cuda.empty_cache()


def compiled(function: Callable[..., Any], mode: str = COMPILE_MODE) -> Callable[..., Any]:
    """The function through torch.compile, which works at the first call of each shape: minutes, or seconds where
    TORCHINDUCTOR_CACHE_DIR has the result. mode: ours, or one of torch's; the graphs are ours in any."""
    from torch._inductor import list_mode_options  # a second of imports

    options: dict[str, Any] = {"max_autotune_gemm": True} if mode == COMPILE_MODE else list_mode_options(mode)
    # Convolutions stay cuDNN's, which a search among 17 of Triton's for each shape would hardly ever leave.
    options |= {"max_autotune_conv_backends": "ATEN", "triton.cudagraphs": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def _several(out: Any) -> Rows:
    return out if isinstance(out, tuple) else (out,)


def _synchronize(inputs: Rows) -> None:
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
