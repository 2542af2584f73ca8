"""`pennyweight doctor`: what this machine has, and what would run."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Json
from pennyweight.cli.output import emit, note
from pennyweight.errors import FormatError, KernelError

FLAGS = (
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_int8", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
PACKAGES = ("numpy", "torch", "safetensors", "transformers", "onnx", "gguf", "scipy")


def command(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's peaks, and keep them for reports.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="To spend on each rate of --calibrate, about.")
    ] = 0.3,
    json: Json = False,
) -> None:
    """Show what this machine has and what would run.

    CPU features, instruction sets, the native library, versions, and the peaks that --calibrate has measured.
    """
    import pennyweight
    from pennyweight.measure import cpu_name

    native = native_facts()
    peaks = peaks_facts(seconds if calibrate else None)
    result: dict[str, Any] = {
        "pennyweight": pennyweight.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "features": cpu_flags(),
        "native": native,
        "peaks": peaks,
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith("PENNYWEIGHT_") or k == "OMP_NUM_THREADS"
        },
    }
    rows = [
        {
            "": "pennyweight",
            "value": f"{result['pennyweight']}, Python {result['python']}, {result['system']}",
        },
        {"": "cpu", "value": f"{result['cpu']}, {result['cores']} cores"},
        {"": "features", "value": " ".join(cpu_flags()) or "unknown"},
        {"": "backend", "value": native["backend"]},
        {"": "library", "value": native["library"]},
        {"": "peaks", "value": peaks["note"]},
        {"": "packages", "value": ", ".join(f"{k} {v}" for k, v in result["packages"].items() if v)},
        {"": "missing", "value": ", ".join(k for k, v in result["packages"].items() if not v) or "nothing"},
        {
            "": "environment",
            "value": ", ".join(f"{k}={v}" for k, v in result["environment"].items()) or "nothing set",
        },
    ]
    tables = {"": rows, "instruction sets": native["isas"], "peaks, by number of threads": peaks["rows"]}
    emit(result, tables, json)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def cpu_flags() -> list[str]:
    """Vector features that the system reports, of those that kernels care about."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text("utf8").splitlines() if info.is_file() else ():
        if line.startswith(("flags", "Features")):
            have = set(line.partition(":")[2].split())
            return [flag for flag in FLAGS if flag in have]
    return []


def peaks_facts(seconds: float | None) -> dict[str, Any]:
    """The stored peaks of this machine, measured first if `seconds` says how long.

    Raises:
        KernelError: if they are to be measured and there is no library.
    """
    from pennyweight.runtime import peaks

    if seconds is not None:
        note(f"measuring; take other work off this machine (written to {peaks.cache_file()})")
        peaks.store(peaks.measure(seconds))
    try:
        found = peaks.stored()
    except FormatError as error:
        return {"note": " ".join(str(error).split()), "rows": [], "values": None}
    if found is None:
        return {"note": "not measured; run pennyweight doctor --calibrate", "rows": [], "values": None}
    return {"note": str(peaks.cache_file()), "rows": found.rows(), "values": found.to_dict()}


def native_facts() -> dict[str, Any]:
    """Where the library is, which instruction sets it has and would pick; or why there is none."""
    from pennyweight.runtime import library

    try:
        supported, default = library.supported_isas(), library.default_isa()
        isas = [
            {"name": name, "supported": name in supported, "picked": name == default}
            for name in library.isa_names()
        ]
    except (KernelError, OSError, AttributeError) as error:  # AttributeError: a library of another version
        return {"backend": "reference", "library": f"none: {' '.join(str(error).split())}", "isas": []}
    return {"backend": "native", "library": library.place(), "isas": isas}
