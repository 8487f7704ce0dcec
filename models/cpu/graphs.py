"""Networks compiled for a few batch sizes, called like the modules they stand for, from several threads at a time."""

import queue
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
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
        """About half a second for the embedded UNet, and half as much for each worker more, on one core."""
        first = self._core.compile_model(model, "CPU", self._options)
        blob = first.export_model().getvalue() if self._workers > 1 else b""
        calls = [Call(first)]
        rows = calls[0].example(0)
        expected = calls[0](rows)
        for _ in range(1, self._workers):
            other = Call(self._core.import_model(BytesIO(blob), "CPU", self._options))
            if not is_same(other(rows), expected):  # an import may lay out float32 otherwise, and add in another order
                other = Call(self._core.compile_model(model, "CPU", self._options))
            calls.append(other)
        return Compiled(calls)


class Compiled:
    """One network at one batch size. calls: as many as there may be at a time."""

    def __init__(self, calls: list["Call"]) -> None:
        self._free: queue.SimpleQueue[Call] = queue.SimpleQueue()
        for call in calls:
            self._free.put(call)
        self.example = calls[0].example

    def __call__(self, rows: Rows) -> Rows:
        """rows: at most the batch size. What comes back are copies."""
        call = self._free.get()
        try:
            return call(rows)
        finally:
            self._free.put(call)


class Call:
    """A request of OpenVINO's with its buffers."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs, self._outputs = (
            [_empty(port) for port in ports] for ports in (compiled.inputs, compiled.outputs)
        )
        for index, tensor in enumerate(self._inputs):
            self._request.set_input_tensor(index, as_ov(tensor))
        for index, tensor in enumerate(self._outputs):
            self._request.set_output_tensor(index, as_ov(tensor))

    def example(self, seed: int) -> Rows:
        """Inputs unlike each other."""
        random = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randint(0, 16, each.shape, generator=random)
            if each.dtype is torch.int64
            else torch.randn(each.shape, generator=random).to(each.dtype)
            for each in self._inputs
        )

    def __call__(self, rows: Rows) -> Rows:
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
        self._lock = threading.Lock()  # of compiling

    @torch.inference_mode()
    def __call__(self, *rows: Tensor) -> Rows:
        """What the network computes from rows (B, ...) of any B, row for row the same bytes as alone."""
        if 1 not in self._sizes:
            self.add(1)
        if self._is_new:
            self._is_new = False
            self._called(self)
        parts, start = [], 0
        for size in split(len(rows[0]), list(self._sizes)):
            parts.append(self._sizes[size](tuple(each[start : start + size] for each in rows)))
            start += size
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    @torch.inference_mode()
    def add(self, size: int) -> bool:
        """Compile for a batch size, and use it where each of its rows is computed as alone, bit for bit."""
        with self._lock:
            if size in self._sizes:
                return True
            compiled = self._compiler(self._make(size))
            if size > 1 and not is_row_by_row(compiled, self._sizes[1], size):
                return False
            self._sizes[size] = compiled
            return True


def is_row_by_row(compiled: Compiled, alone: Compiled, size: int) -> bool:
    """Whether each of `size` rows comes out as from `alone`, bit for bit, in every place of the batch."""
    rows = compiled.example(size)
    single = [alone(tuple(each[row : row + 1] for each in rows)) for row in range(size)]
    expected = [torch.cat(each) for each in zip(*single, strict=True)]
    return is_same(compiled(rows), expected)


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


def _empty(port: Any) -> Tensor:
    return torch.zeros([int(side) for side in port.get_shape()], dtype=DTYPES[port.get_element_type()])
