"""The one ctypes loader of libpennyweight."""

from __future__ import annotations

import ctypes as c
import os
from functools import cache
from typing import Any

from pennyweight.errors import KernelError

ABI = 5
_NAME = "libpennyweight.so"


class Options(c.Structure):
    """Options of a plan; see pennyweight.h."""

    _fields_ = [("threads", c.c_int), ("isa", c.c_int), ("flags", c.c_int)]


class StepInfo(c.Structure):
    """What a step is; see pennyweight.h."""

    _fields_ = [
        ("op", c.c_char_p),
        ("site", c.c_char_p),
        ("kernel", c.c_char_p),
        ("macs", c.c_int64),
        ("bytes", c.c_int64),
        ("tasks", c.c_int),
    ]


class KernelRow(c.Structure):
    """One row of the kernel table; see pennyweight.h."""

    _fields_ = [("op", c.c_char_p), ("isa", c.c_int), ("symbol", c.c_char_p)]


_P = c.c_void_p
_DIMS = c.POINTER(c.c_int64)
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "pw_abi_version": (c.c_int, []),
    "pw_last_error": (c.c_char_p, []),
    "pw_isa_count": (c.c_int, []),
    "pw_isa_name": (c.c_char_p, [c.c_int]),
    "pw_isa_supported": (c.c_int, [c.c_int]),
    "pw_isa_default": (c.c_int, []),
    "pw_kernel_count": (c.c_int, []),
    "pw_kernel_get": (c.c_int, [c.c_int, c.POINTER(KernelRow)]),
    "pw_model_create": (_P, []),
    "pw_model_expect": (c.c_int, [_P, c.c_int64]),
    "pw_model_free": (None, [_P]),
    "pw_model_mapped": (None, [_P, _P, c.c_int64]),
    "pw_model_constants": (c.c_int, [_P, c.c_int, _P, c.c_int64, c.POINTER(_P)]),
    "pw_model_packed_bytes": (c.c_int64, [_P]),
    "pw_plan_begin": (_P, [_P, c.POINTER(Options)]),
    "pw_plan_make": (c.c_int, [_P, _P, c.c_int64, c.c_char_p, c.c_int64, _P, c.c_int64]),
    "pw_plan_finish": (c.c_int, [_P]),
    "pw_plan_free": (None, [_P]),
    "pw_plan_run": (c.c_int, [_P, c.POINTER(_P), c.POINTER(_P)]),
    "pw_plan_profile": (c.c_int, [_P, c.POINTER(_P), c.POINTER(_P), _DIMS]),
    "pw_plan_steps": (c.c_int, [_P]),
    "pw_plan_step": (c.c_int, [_P, c.c_int, c.POINTER(StepInfo)]),
    "pw_plan_arena_bytes": (c.c_int64, [_P]),
    "pw_measure_macs": (c.c_double, [c.c_int, c.c_int, c.c_int, c.c_double]),
    "pw_measure_reads": (c.c_double, [c.c_int, c.c_int64, c.c_int, c.c_double]),
    "pw_crc32": (c.c_uint32, [c.c_uint32, _P, c.c_int64]),
    "pw_crc32_begin": (_P, [c.c_uint32, _P, c.c_int64]),
    "pw_crc32_end": (c.c_uint32, [_P]),
    "pw_fake_quantize": (
        c.c_int,
        [c.c_int, _P, _P, c.c_int64, c.c_int64, _P, _P, c.c_float, c.c_float, c.c_int],
    ),
    "pw_fake_gradient": (
        c.c_int,
        [c.c_int, _P, _P, _P, c.c_int64, c.c_int64, _P, _P, c.c_float, c.c_float, c.c_float, _P, c.c_int],
    ),
}


def place() -> str | None:
    """Path of the library: `PENNYWEIGHT_LIBRARY`, or beside the installed package; None if there is none."""
    if named := os.environ.get("PENNYWEIGHT_LIBRARY"):
        return named
    import pennyweight

    for folder in pennyweight.__path__:
        path = f"{folder}/lib/{_NAME}"
        if os.path.exists(path):  # noqa: PTH110 (pathlib would cost three milliseconds of the start)
            return path
    return None


@cache
def load() -> Any:
    """The library, prototypes set.

    Raises:
        KernelError: if it is missing, cannot be loaded, or is of another version than this package.
    """
    path = place()
    if path is None:
        raise KernelError(
            "libpennyweight is not installed",
            hint="Install the package with a C++ compiler at hand (pip install .), or set PENNYWEIGHT_LIBRARY.",
        )
    try:
        library = c.CDLL(path)
    except OSError as error:
        raise KernelError(f"libpennyweight cannot be loaded: {error}", site=path) from error
    try:
        version = library.pw_abi_version()
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise KernelError(f"this is no libpennyweight of this package: {error}", site=path) from error
    if version != ABI:
        raise KernelError(
            f"libpennyweight has version {version} of its interface, this package wants {ABI}", site=path
        )
    return library


def last_error(library: Any) -> str:
    """Text of the last failure on this thread."""
    text: str = library.pw_last_error().decode()
    return text


def isa_names() -> list[str]:
    """All instruction sets the library knows, weakest first."""
    library = load()
    return [library.pw_isa_name(i).decode() for i in range(library.pw_isa_count())]


def supported_isas() -> list[str]:
    """Those that this machine has, weakest first."""
    library = load()
    return [name for i, name in enumerate(isa_names()) if library.pw_isa_supported(i)]


def default_isa() -> str:
    """The one in use: the strongest, or what `PENNYWEIGHT_ISA` names.

    Raises:
        KernelError: if `PENNYWEIGHT_ISA` names one that is unknown or not supported here.
    """
    isa: int = load().pw_isa_default()
    if isa < 0:
        raise KernelError(
            f"PENNYWEIGHT_ISA={os.environ.get('PENNYWEIGHT_ISA')!r} is unknown or not supported here",
            hint=f"One of {', '.join(supported_isas())}.",
        )
    return isa_names()[isa]


def kernels() -> list[tuple[str, str, str]]:
    """The kernel table: operation, instruction set, symbol."""
    library, names, row = load(), isa_names(), KernelRow()
    table = []
    for i in range(library.pw_kernel_count()):
        library.pw_kernel_get(i, c.byref(row))
        table.append((row.op.decode(), names[row.isa], row.symbol.decode()))
    return table
