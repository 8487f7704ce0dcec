"""Call AOTInductor's compiled libraries through their C interface, without the interpreter's lock.

torch's own loader holds the lock for the whole of a call (pytorch issue 197516), so that two threads never compute at
the same time. ctypes lets go of it. The interface is torch/csrc/inductor/aoti_runtime/interface.h and
torch/csrc/inductor/aoti_torch/c/shim.h: plain C, kept stable by torch for libraries that were compiled before.
"""

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

_TORCH = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
_DTYPES: dict[int, torch.dtype] = {
    getattr(_TORCH, f"aoti_torch_dtype_{name}")(): getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "int64", "uint8", "bool")
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_CPU = _TORCH.aoti_torch_device_type_cpu()


class Broken(RuntimeError):
    """A library that cannot be loaded, bound to these weights, or run on these tensors."""


class _Constant(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("handle", c_void_p))


class Library:
    """One compiled function. May be called from `callers` threads at a time.

    constants: the weights by name, used where they lie and never copied; None if they are inside the library.
    """

    def __init__(self, path: Path, callers: int = 1, constants: Mapping[str, Tensor] | None = None) -> None:
        self._container = c_void_p()
        self._handles: list[int | None] = []  # on the weights; the container does not own them
        try:
            self._code = ctypes.CDLL(str(path))
        except OSError as error:
            raise Broken(str(error)) from error
        self._call("AOTInductorModelContainerCreateWithDevice", byref(self._container), c_size_t(callers), b"cpu", None)
        self._outputs = c_size_t()
        self._call("AOTInductorModelContainerGetNumOutputs", self._container, byref(self._outputs))
        if constants is not None:
            self._bind(constants)

    def __del__(self) -> None:
        if self._container:
            self._code.AOTInductorModelContainerDelete(self._container)
        for handle in self._handles:
            _TORCH.aoti_torch_delete_tensor_object(c_void_p(handle))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """inputs: laid out as the examples that the library was compiled with. Raises Broken."""
        handles = (c_void_p * len(inputs))(*map(_borrowed, inputs))  # the call takes these over
        results = (c_void_p * self._outputs.value)()
        count, many = c_size_t(len(inputs)), self._outputs
        self._call("AOTInductorModelContainerRun", self._container, handles, count, results, many, None, None)
        return [_owned(handle or 0) for handle in results]

    def _bind(self, constants: Mapping[str, Tensor]) -> None:
        count, name = c_size_t(), c_char_p()
        self._call("AOTInductorModelContainerGetNumConstants", self._container, byref(count))
        self._weights = []  # the library reads them for as long as it lives
        pairs = (_Constant * count.value)()
        for index in range(count.value):
            self._call("AOTInductorModelContainerGetConstantName", self._container, c_size_t(index), byref(name))
            internal = name.value
            self._call("AOTInductorModelContainerGetConstantOriginalFQN", self._container, c_size_t(index), byref(name))
            wanted = (name.value or b"").decode()
            if wanted not in constants:
                raise Broken(f"no weights for {wanted}")
            tensor = constants[wanted]
            self._weights.append(tensor)
            self._handles.append(_borrowed(tensor))
            pairs[index] = _Constant(internal, self._handles[-1])
        update = "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs"
        self._call(update, self._container, pairs, count, c_bool(False), c_bool(True))

    def _call(self, function: str, *arguments: object) -> None:
        if getattr(self._code, function)(*arguments):
            reason = c_char_p()
            self._code.AOTInductorGetLastError(byref(reason))
            raise Broken(f"{function}: {(reason.value or b'no reason given').decode(errors='replace')}")


def _borrowed(tensor: Tensor) -> int | None:
    """A handle on a tensor's memory, which must outlive it."""
    handle, dims = c_void_p(), tensor.dim()
    sizes, strides = (c_int64 * dims)(*tensor.shape), (c_int64 * dims)(*tensor.stride())
    failed = _TORCH.aoti_torch_create_tensor_from_blob(
        c_void_p(tensor.data_ptr()),
        c_int64(dims),
        sizes,
        strides,
        c_int64(0),
        c_int32(_NUMBERS[tensor.dtype]),
        c_int32(_CPU),
        c_int32(0),
        byref(handle),
    )
    if failed:
        raise Broken(f"no handle on a tensor of shape {tuple(tensor.shape)}")
    return handle.value


def _owned(address: int) -> Tensor:
    """A copy of what a handle holds; the handle is given back. What these functions return is small."""
    handle, dims, dtype, data = c_void_p(address), c_int64(), c_int32(), c_void_p()
    sizes, strides = POINTER(c_int64)(), POINTER(c_int64)()
    _TORCH.aoti_torch_get_dim(handle, byref(dims))
    _TORCH.aoti_torch_get_dtype(handle, byref(dtype))
    _TORCH.aoti_torch_get_data_ptr(handle, byref(data))
    _TORCH.aoti_torch_get_sizes(handle, byref(sizes))
    _TORCH.aoti_torch_get_strides(handle, byref(strides))
    shape, steps = sizes[: dims.value], strides[: dims.value]
    kind = _DTYPES[dtype.value]
    length = 1 + sum((side - 1) * step for side, step in zip(shape, steps, strict=True))
    memory = (ctypes.c_char * (length * kind.itemsize)).from_address(data.value or 0)
    result = torch.frombuffer(memory, dtype=kind).as_strided(shape, steps).clone()
    _TORCH.aoti_torch_delete_tensor_object(handle)
    return result
