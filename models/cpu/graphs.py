"""Networks compiled for a few batch sizes, called like the modules they stand for, from several threads at a time."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from models.cpu.layers import Node, as_ov

Rows = tuple[Tensor, ...]  # tensors (B, ...) of one B
DTYPES = {ov.Type.f32: torch.float32, ov.Type.bf16: torch.bfloat16, ov.Type.i64: torch.int64, ov.Type.u8: torch.uint8}


class Compiler:
    """Compiles for this CPU. workers: calls at a time; each takes `threads` threads, always, so that the same input
    gives the same bytes."""

    def __init__(self, workers: int, threads: int) -> None:
        self._workers, self._core = workers, ov.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": "f32",  # the graphs say themselves what is bfloat16
            "NUM_STREAMS": "1",  # then a call is made by the thread that asks for it; of two streams each has a thread
            "INFERENCE_NUM_THREADS": str(threads),
            "ENABLE_CPU_PINNING": "NO",  # two servers on one machine would share the same cores
        }

    def __call__(self, model: Node) -> "Compiled":
        """About 0.7 s for the embedded UNet and each worker, on one core."""
        # Not imported from the first one's blob: that is laid out otherwise, and adds in another order now and then.
        return Compiled([Call(self._core.compile_model(model, "CPU", self._options)) for _ in range(self._workers)])


class Compiled:
    """One network at one batch size. calls: as many as there may be at a time."""

    def __init__(self, calls: list["Call"]) -> None:
        self._free: queue.SimpleQueue[Call] = queue.SimpleQueue()
        for call in calls:
            self._free.put(call)
        self.example = calls[0].example

    def __call__(self, rows: Rows, bound: "Bound | None" = None) -> Rows:
        """rows: at most the batch size. bound: the weights, where those are inputs. What comes back are copies."""
        call = self._free.get()
        try:
            return call(rows, bound)
        finally:
            self._free.put(call)


class Bound:
    """A weight set for graphs whose weights are inputs; they are read where they lie."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        self.inputs = {name: as_ov(tensor) for name, tensor in self._tensors.items()}


class Call:
    """A request of OpenVINO's with its buffers."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = [_empty(port) for port in compiled.inputs if not _weight(port)]
        self._outputs = [_empty(port) for port in compiled.outputs]
        self._weights = [(_weight(port), port) for port in compiled.inputs[len(self._inputs) :]]
        self._bound: Bound | None = None
        for index, tensor in enumerate(self._inputs):
            self._request.set_input_tensor(index, as_ov(tensor))
        for index, tensor in enumerate(self._outputs):
            self._request.set_output_tensor(index, as_ov(tensor))

    def example(self, seed: int) -> tuple[Rows, "Bound | None"]:
        """Inputs unlike each other, and weights, where those are inputs."""
        random = torch.Generator().manual_seed(seed)
        rows = tuple(
            torch.randint(0, 16, each.shape, generator=random)
            if each.dtype is torch.int64
            else torch.randn(each.shape, generator=random).to(each.dtype)
            for each in self._inputs
        )
        empty = {name: _empty(port) for name, port in self._weights}
        weights = {name: torch.randn(each.shape, generator=random).to(each.dtype) for name, each in empty.items()}
        return rows, Bound(weights) if weights else None

    def __call__(self, rows: Rows, bound: "Bound | None") -> Rows:
        if bound is not None and bound is not self._bound:
            for index, (name, _) in enumerate(self._weights, len(self._inputs)):
                self._request.set_input_tensor(index, bound.inputs[name])
            self._bound = bound
        count = len(rows[0])
        for buffer, tensor in zip(self._inputs, rows, strict=True):
            buffer[:count].copy_(tensor)  # rows above keep what they held
        self._request.infer()
        return tuple(buffer[:count].clone() for buffer in self._outputs)


class Graph:
    """A network and its weights, at the batch sizes it has so far; rows are split into those. One row is compiled when
    it is first called, or by add(1). called: is told of the first call, to add larger sizes."""

    def __init__(self, make: Callable[[int], Node], compiler: Compiler, called: Callable[["Graph"], None]) -> None:
        self._make, self._compiler, self._called = make, compiler, called
        self._sizes: dict[int, Compiled] = {}
        self._is_new = True
        self._bound: Bound | None = None  # the first, to compare sizes by
        self._lock = threading.Lock()  # of compiling

    @torch.inference_mode()
    def __call__(self, *rows: Tensor, bound: Bound | None = None) -> Rows:
        """What the network computes from rows (B, ...) of any B, row for row the same bytes as alone. bound: the
        weights, where those are inputs."""
        if 1 not in self._sizes:
            self.add(1)
        if self._is_new:
            self._is_new, self._bound = False, bound
            self._called(self)
        parts, start = [], 0
        for size in split(len(rows[0]), list(self._sizes)):
            parts.append(self._sizes[size](tuple(each[start : start + size] for each in rows), bound))
            start += size
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    @torch.inference_mode()
    def add(self, size: int) -> bool:
        """Compile for a batch size, and use it where each of its rows is computed as alone, bit for bit."""
        with self._lock:
            if size in self._sizes:
                return True
            compiled = self._compiler(self._make(size))
            if size > 1 and not is_row_by_row(compiled, self._sizes[1], size, self._bound):
                return False
            self._sizes[size] = compiled
            return True


def is_row_by_row(compiled: Compiled, alone: Compiled, size: int, bound: Bound | None) -> bool:
    """Whether each of `size` rows comes out as from `alone`, bit for bit, in every place of the batch."""
    rows, _ = compiled.example(size)
    single = [alone(tuple(each[row : row + 1] for each in rows), bound) for row in range(size)]
    expected = [torch.cat(each) for each in zip(*single, strict=True)]
    return is_same(compiled(rows, bound), expected)


def is_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether these outputs are the same, bit for bit."""
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(ours, theirs, strict=True)
    )


def split(rows: int, sizes: list[int]) -> list[int]:
    """The sizes that so many rows run in, the largest first. None is padded: 3 rows as 2 + 1 take less than 4 do."""
    taken: list[int] = []
    for size in sorted(sizes, reverse=True):
        taken += [size] * ((rows - sum(taken)) // size)
    return taken


def _weight(port: Any) -> str:
    """The name of the weight that an input is; "" for rows."""
    name = str(port.get_any_name())
    return name if name.endswith((".weight", ".bias")) else ""


def _empty(port: Any) -> Tensor:
    return torch.zeros([int(side) for side in port.get_shape()], dtype=DTYPES[port.get_element_type()])
