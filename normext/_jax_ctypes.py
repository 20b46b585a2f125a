"""The norms as XLA calls them, where `normext._jax` was not built: handlers in Python, for `normext.jax` to register.

They compute with normext's functions for NumPy arrays, on the memory that XLA hands over. `jax.pure_callback` would
need no such handlers, but on a CPU with few cores it may wait for ever when arrays are large
(https://github.com/jax-ml/jax/issues/25861), and it copies.

The structures are those of xla/ffi/api/c_api.h, of versions 0.x of XLA's foreign function interface, whose structures
only grow at their ends. XLA is told the version when a handler is registered, and refuses what it does not serve.
Arrays are as in _jax.pyx.
"""

import ctypes
import re
from collections.abc import Callable
from ctypes import POINTER, c_char, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_dtypes import bfloat16

_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
_DTYPES = {5: np.int64, 8: np.uint32, 10: np.float16, 11: np.float32, 12: np.float64, 16: bfloat16}  # XLA_FFI_DataType

_HEAD = [("struct_size", c_size_t), ("extension", c_void_p)]


class _Version(ctypes.Structure):
    _fields_ = [*_HEAD, ("major", c_int), ("minor", c_int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32)]


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata))]


class _Error(ctypes.Structure):
    _fields_ = [*_HEAD, ("message", c_char_p), ("code", c_int)]


class _Api(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", ctypes.PYFUNCTYPE(c_void_p, POINTER(_Error))),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [*_HEAD, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("value", c_void_p)]


class _Buffers(ctypes.Structure):  # arguments and results alike
    _fields_ = [*_HEAD, ("size", c_int64), ("types", c_void_p), ("buffers", POINTER(POINTER(_Buffer)))]


class _Attributes(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", c_void_p),
        ("values", POINTER(POINTER(_Scalar))),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


def _minor_version() -> int:
    """That of the header in jaxlib, which XLA asks for; at most the last that these structures are known for."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    return min(3, int(re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)[1]))


def _memory(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, (c_char * size).from_address(address)) if size else np.empty(shape, dtype)


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    found = (buffers.buffers[i].contents for i in range(buffers.size))
    return [_memory(b.data, _DTYPES[b.dtype], tuple(b.dims[: b.rank])) for b in found]


def _scalars(attributes: _Attributes) -> list[Any]:
    """The attributes, all of them numbers, sorted by their names."""
    found = (attributes.values[i].contents for i in range(attributes.size))
    return [_memory(s.value, _DTYPES[s.dtype], ())[()] for s in found]


_kept: list[Any] = []  # XLA has only the addresses of handlers
_closed = False


def handler(function: Callable[..., None]) -> Any:
    """A capsule with a handler that calls ``function(arguments, results, *attributes)``, which fills in the results."""

    def handle(address: int) -> int | None:
        frame = _Frame.from_address(address)
        if frame.extension and frame.extension.contents.type == _METADATA:
            metadata = frame.extension.contents.metadata.contents
            metadata.version = _Version(ctypes.sizeof(_Version), None, 0, _minor_version())
            metadata.traits = 0
            return None
        try:
            if _closed:
                raise RuntimeError("the program ends")
            function(_arrays(frame.arguments), _arrays(frame.results), *_scalars(frame.attributes))
        except BaseException as error:  # nothing may go on into XLA
            message = f"normext: {type(error).__name__}: {error}".encode()
            create = frame.api.contents.create_error
            return create(ctypes.byref(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL)))
        return None

    foreign = ctypes.CFUNCTYPE(c_void_p, c_void_p)(handle)
    _kept.append(foreign)
    return jax.ffi.pycapsule(ctypes.cast(foreign, c_void_p))


def close() -> None:
    """Let no more calls begin, and those that run come to their end."""
    global _closed
    _closed = True
    for array in jax.live_arrays():
        try:
            array.block_until_ready()
        except Exception:  # it was still to be computed
            pass
