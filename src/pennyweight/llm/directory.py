"""A Hugging Face model directory: its configuration, and its tensors one by one, never all of them at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pennyweight.errors import FormatError, InputError, NonFinite, nearest

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SIDE_FILES = (  # what belongs to the text side of a model and is carried over as it is
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "vocab.txt",
)  # fmt: skip


class Directory:
    """The configuration and the tensors of a model on disk.

    Args:
        path: folder with `config.json` and `model.safetensors`, or an index of several such files.

    Raises:
        InputError: if there is no such folder.
        FormatError: if it holds no configuration or no weights, or a file of weights is broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = self.path.name
        if not self.path.is_dir():
            raise InputError("there is no such folder", site=str(path), hint="Give a Hugging Face directory.")
        if not (self.path / "config.json").is_file():
            raise FormatError(
                "the folder has no config.json", site=where, hint=f"It holds {_listing(self.path)}."
            )
        self.config = read_json(self.path / "config.json")
        if (self.path / INDEX).is_file():
            found = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise FormatError(f"{INDEX} has no weight_map", site=where)
            self.files: dict[str, str] = {str(k): str(v) for k, v in found.items()}
        elif (self.path / SINGLE).is_file():
            self.files = dict.fromkeys(_names(self.path / SINGLE), SINGLE)
        else:
            raise FormatError(
                "the folder has no weights: neither model.safetensors nor its index",
                site=where,
                hint=f"It holds {_listing(self.path)}. Weights of other kinds must be saved as safetensors first.",
            )
        missing = sorted({f for f in self.files.values() if not (self.path / f).is_file()})
        if missing:
            raise FormatError(
                f"{len(missing)} files of the index are not there", site=where, hint=f"{missing[:4]}"
            )

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.files)

    @property
    def scheme(self) -> dict[str, Any]:
        """The `quantization_config` of a directory that is quantized already, else empty."""
        found = self.config.get("quantization_config") or {}
        return found if isinstance(found, dict) else {}

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored.

        Raises:
            FormatError: if one is missing, or a file is broken.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                hint = nearest(name, self.names[:400], "tensors")
                raise FormatError(f"tensor {name!r} is not in the directory", site=self.path.name, hint=hint)
            wanted.setdefault(self.files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            try:
                with safe_open(str(self.path / file), framework="pt") as opened:
                    found |= {name: opened.get_tensor(name) for name in inside}
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file} cannot be read: {error}", site=self.path.name) from None
        return found

    def floats(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of a float model by name, as float32 where they are of another float type.

        Raises:
            FormatError: see `load`.
            NonFinite: if a weight is NaN or infinite.
        """
        found = self.load(names)
        for name, tensor in found.items():
            if tensor.is_floating_point():
                bad = int((~torch.isfinite(tensor)).sum())
                if bad:
                    raise NonFinite(
                        f"{bad} of {tensor.numel()} weights are NaN or infinite", site=name,
                        shapes=str(tuple(tensor.shape)), hint="The model itself is broken.",
                    )  # fmt: skip
                found[name] = tensor.float()
        return found

    def fingerprint(self) -> str:
        """A digest of the configuration, and of each file's size, header and last bytes; weights are not read whole."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(set(self.files.values())):
            size = (self.path / file).stat().st_size
            digest.update(f"{file} {size} ".encode())
            with (self.path / file).open("rb") as opened:
                digest.update(opened.read(1 << 20))
                opened.seek(max(0, size - (1 << 20)))
                digest.update(opened.read())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum((self.path / f).stat().st_size for f in set(self.files.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: if it is none.
    """
    try:
        found = json.loads(path.read_text("utf8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{path.name} is no JSON: {error}", site=path.parent.name) from None
    if not isinstance(found, dict):
        raise FormatError(f"{path.name} is no JSON object", site=path.parent.name)
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(str(path), framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} cannot be read: {error}", site=path.parent.name) from None


def _listing(path: Path) -> str:
    return ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
