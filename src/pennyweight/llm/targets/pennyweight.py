"""Our own directory: codes as dense bits, any scheme; `docs/llm.md` describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pennyweight.errors import FormatError
from pennyweight.llm.directory import INDEX, Directory
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.store import Solved, pack, unpack
from pennyweight.llm.targets import Quantized, readers, targets

METHOD = "pennyweight"


def write_shards(model: Quantized, folder: Path, packed: Any) -> dict[str, Any]:
    """Write one file for each part and their index; `packed(layers)` gives tensors and notes of quantized layers.

    Returns:
        The notes of all parts.
    """
    notes: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for i, (layers, floats) in enumerate(model.parts()):
        tensors, found = packed(layers)
        tensors |= floats
        notes |= found
        file = f"model-{i + 1:05}-of-{len(model.files):05}.safetensors"
        ordered: dict[str, Tensor] = {k: tensors[k].contiguous() for k in sorted(tensors)}
        save_file(ordered, str(folder / file), {"format": "pt"})
        weight_map |= dict.fromkeys(ordered, file)
        total += sum(t.numel() * t.element_size() for t in ordered.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf8")
    return notes


def write_config(model: Quantized, folder: Path, quantization: dict[str, Any]) -> None:
    """The directory's configuration with what was done to it."""
    config = dict(model.directory.config)
    if model.untied():
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf8")


def read(directory: Directory) -> tuple[dict[str, Solved], set[str]]:
    """Quantized layers of one of our directories, and the names of the tensors they are made of.

    Raises:
        FormatError: on a version that is unknown, or broken promises.
    """
    settings = directory.scheme
    schemes = settings.get("layers")
    if settings.get("version") != 1 or not isinstance(schemes, dict):
        raise FormatError("the directory's quantization is of an unknown version", site=directory.path.name)
    tails = (".weight.codes", ".weight.scale", ".weight.zero", ".input")
    own_names = {
        n for n in directory.names for path in schemes if n.startswith(tuple(path + t for t in tails))
    }
    return unpack(directory.load(own_names), schemes), own_names


class Pennyweight:
    """See the module."""

    turned = True
    hadamard = True

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """It holds everything."""

    def write(self, model: Quantized, path: Path) -> None:
        """A folder."""
        path.mkdir()
        notes = write_shards(model, path, pack)
        quantization = {"quant_method": METHOD, "version": 1, "made": model.request, "layers": notes}
        if model.request.get("cache"):
            quantization["cache"] = model.request["cache"]
        write_config(model, path, quantization)
        model.copy_text_files(path)


readers.add(METHOD, read)
targets.add(METHOD, Pennyweight())
