"""A GPU's runtime, stood in for on a CPU, so that each line written for a GPU runs in the tests: what is to lie on CUDA
lies in host memory, streams are in order anyway, and a graph is a list of operators that a replay calls again on the
tensors they had when it was recorded. It shows mistakes in Python, in devices' names and in what a recording freezes;
nothing of speed, concurrency or memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

TOKENS = 64  # of the attention that is timed at start-up: SDXL's 4,096 would take a CPU minutes


class Stream:
    """Everything is done when the call returns."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Generator(torch.Generator):
    """Of random numbers; on the CPU."""

    def __new__(cls, device: str | torch.device = "cpu") -> "Generator":
        """Wherever it is asked for."""
        return super().__new__(cls, "cpu")


class OnTheHost(TorchFunctionMode):
    """Whatever names CUDA as a device means the CPU; pinned memory is memory."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch comes through here."""
        if function is torch.Tensor.cuda or function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.randn and len(args) == 5:
            args = (*args[:2], TOKENS, *args[3:])
        kwargs = {key: _host(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return function(*map(_host, args), **kwargs)


class Recording(TorchDispatchMode):
    """The operators that are called in it, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator comes through here."""
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")  # the host would wait for a number
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Graph:
    """What torch.cuda.CUDAGraph does: computes the outputs anew, in place, from what the inputs hold now."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Call all again; what came out of a call the first time is written over."""
        with torch.inference_mode():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_iter(out), tree_iter(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _host(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


@contextlib.contextmanager
def _record(graph: Graph, **options: Any) -> Iterator[None]:
    with Recording() as recording:
        yield
    graph.calls = recording.calls


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    yield


def _in_every_thread(mode: Callable[[], TorchFunctionMode]) -> None:
    """A mode is of one thread; let each thread that is started from now on enter its own."""
    import threading

    run = threading.Thread.run

    def run_in_mode(self: threading.Thread) -> None:
        with mode():
            run(self)

    threading.Thread.run = run_in_mode  # type: ignore[method-assign]
    mode().__enter__()


def install() -> None:
    """Stand in for CUDA in this process, until it ends."""
    default, load = Stream(), safetensors.torch.load_file
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *device: (9, 0)
    cuda.mem_get_info = lambda *device: (60 << 30, 80 << 30)
    cuda.memory_allocated = lambda *device: 1 << 30
    cuda.graph_pool_handle = lambda: (0, 1)
    cuda.current_device = lambda: 0
    torch.Generator = Generator  # type: ignore[misc]
    cuda.Stream, cuda.CUDAGraph, cuda.graph, cuda.stream = Stream, Graph, _record, _stream
    cuda.current_stream = cuda.default_stream = lambda *device: default
    torch._C._cudnn_set_conv_benchmark_empty_cache = lambda value: None  # type: ignore[attr-defined]
    cuda.get_rng_state = lambda *device: None
    cuda.set_rng_state = lambda *state: None
    cuda.set_stream = cuda.set_sync_debug_mode = lambda value: None
    cuda.synchronize = cuda.empty_cache = lambda *device: None
    safetensors.torch.load_file = lambda path, device="cpu": load(path, "cpu")
    torch.compile = lambda function, **options: function  # it works in no mode; traced in tests/models/test_graphs.py
    _in_every_thread(OnTheHost)
