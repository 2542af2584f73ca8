"""Formats that a quantized language model is written in, one file each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pennyweight.llm.directory import SIDE_FILES, Directory
from pennyweight.llm.job import Part
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.store import Solved
from pennyweight.registry import Registry


class Quantized:
    """A quantized model as its parts on disk, and the directory that has all the rest.

    Attributes:
        directory: of the float model.
        files: parts, in the order of the model.
        request: how it was made.
    """

    def __init__(
        self, directory: Directory, skeleton: Skeleton, files: list[Path], request: dict[str, Any]
    ) -> None:
        self.directory, self.skeleton, self.files, self.request = directory, skeleton, files, request

    def parts(self) -> Iterator[tuple[dict[str, Solved], dict[str, Tensor]]]:
        """Quantized layers by path, and float tensors by name, part by part: everything the model has.

        Floats are as the directory stores them, or as passes left them.
        """
        wanted = {n for n, _ in self.skeleton.model.named_parameters()}
        wanted |= set(self.skeleton.ties) | {n for n, b in self._buffers()}
        for file in self.files:
            part = Part.load(file)
            outer = file == self.files[-1]
            lead = self.skeleton.blocks[self.files.index(file)] + "." if not outer else ""
            mine = {n for n in wanted if (not self.skeleton.inside(n) if outer else n.startswith(lead))}
            mine -= {f"{name}.weight" for name in part.layers}
            for name, source in self.skeleton.ties.items():
                if name not in part.floats and source in mine:
                    mine.discard(name)  # stored once, under the name it is tied to
            names = {n: self.skeleton.stored(n) for n in sorted(mine - set(part.floats))}
            loaded = self.directory.load(set(names.values()))
            yield part.layers, {n: loaded[s] for n, s in names.items()} | part.floats

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self.skeleton.model.named_modules():
            for key, tensor in module._buffers.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    yield f"{path}.{key}".lstrip("."), tensor

    def untied(self) -> bool:
        """Whether names that shared a tensor no longer do."""
        for name, source in self.skeleton.ties.items():
            layers = {path for file in self.files[-1:] for path in Part.load(file).layers}
            floats = {path for file in self.files[-1:] for path in Part.load(file).floats}
            paths = {name.removesuffix(".weight"), source.removesuffix(".weight")}
            if layers & paths or name in floats:
                return True
        return False

    def copy_text_files(self, folder: Path) -> None:
        """Tokenizer and generation settings, as they are."""
        for name in SIDE_FILES:
            if (self.directory.path / name).is_file():
                shutil.copyfile(self.directory.path / name, folder / name)


class Target(Protocol):
    """A format.

    Attributes:
        turned: whether it has a place for layers whose family keeps their weights as [in, out].
        hadamard: whether it has one for layers whose inputs are turned, see `online`.
    """

    turned: bool
    hadamard: bool

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """Refuse what the format cannot hold, before any work is done.

        Raises:
            InputError: with the reason.
        """
        ...

    def write(self, model: Quantized, path: Path) -> None:
        """Write the model: a folder or a file at `path`, which does not exist yet."""
        ...


Reader = Callable[[Directory], tuple[dict[str, Solved], set[str]]]
readers: Registry[Reader] = Registry("kinds of quantized directories", "pennyweight.llm.targets")
"""By `quant_method`: quantized layers by path, and the names of the tensors that they are made of."""

targets: Registry[Target] = Registry("formats", "pennyweight.llm.targets")
