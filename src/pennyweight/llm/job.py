"""The folder of an unfinished run: what was asked, which blocks are done, the hidden states behind the last of them.

It stands beside the result under a hidden name. Every file in it appears whole or not at all, so that the same command
goes on from the last finished block, and ends with the bytes it would have ended with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError, InputError
from pennyweight.llm.directory import read_json
from pennyweight.llm.store import Solved, pack, unpack
from pennyweight.llm.stream import load_states, save_states

SCHEMES, LOSSES = "schemes", "losses"


class Part:
    """A block, or what is outside of the blocks, quantized.

    Attributes:
        layers: quantized layers by module path.
        floats: float tensors that are no longer those of the directory, by their names in the model.
        losses: by module path.
    """

    def __init__(
        self, layers: dict[str, Solved], floats: dict[str, Tensor], losses: dict[str, float] | None = None
    ) -> None:
        self.layers, self.floats, self.losses = layers, floats, losses or {}

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        tensors, schemes = pack(self.layers)
        tensors |= {k: v.contiguous() for k, v in self.floats.items()}
        meta = {SCHEMES: json.dumps(schemes, sort_keys=True), LOSSES: json.dumps(self.losses, sort_keys=True)}
        with atomic_write(path) as file:
            file.write(save(dict(sorted(tensors.items())), meta))

    @classmethod
    def load(cls, path: Path) -> Part:
        """Read it.

        Raises:
            FormatError: if the file is broken.
        """
        try:
            with safe_open(str(path), framework="pt") as opened:
                tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
                meta = opened.metadata() or {}
        except Exception as error:  # whatever the reader makes of a broken file
            raise FormatError(f"a finished part cannot be read: {error}", site=path.name) from error
        layers = unpack(tensors, json.loads(meta.get(SCHEMES, "{}")))
        own = tuple(
            f"{name}{tail}" for name in layers for tail in (".weight.codes", ".weight.zero", ".input")
        )
        own += tuple(f"{name}.weight.scale" for name in layers)
        floats = {k: v for k, v in tensors.items() if not k.startswith(own)}
        return cls(layers, floats, json.loads(meta.get(LOSSES, "{}")))


class Job:
    """See the module.

    Args:
        out: where the result will stand.
        request: what was asked, as plain JSON; another request in the folder is an error.

    Raises:
        InputError: if `out` exists already, its folder does not, or another request is unfinished there.
    """

    def __init__(self, out: Path, request: dict[str, Any]) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.partial"
        if out.exists():
            raise InputError(
                "the target exists already", site=out.name, hint="Remove it, or choose another name."
            )
        if not out.parent.is_dir():
            raise InputError("there is no folder to write into", site=str(out.parent))
        if self.folder.is_dir() and (self.folder / "job.json").is_file():
            kept = read_json(self.folder / "job.json")
            if kept != json.loads(json.dumps(request)):
                changed = sorted(k for k in {*kept, *request} if kept.get(k) != request.get(k))
                raise InputError(
                    "an unfinished run with other settings stands here", site=self.folder.name,
                    spec=", ".join(changed),
                    hint="Repeat its settings to go on with it, or remove that folder to begin anew.",
                )  # fmt: skip
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self.folder / "job.json") as file:
            file.write(json.dumps(request, indent=1, sort_keys=True).encode())

    def block(self, index: int) -> Path:
        """File of a finished block."""
        return self.folder / f"block-{index:05}.safetensors"

    @property
    def outer(self) -> Path:
        """File of what is outside of the blocks."""
        return self.folder / "outer.safetensors"

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """How many blocks are done, and the hidden states behind them; 0 and nothing at the beginning."""
        path = self.folder / "states.safetensors"
        if not path.is_file():
            return 0, {}
        step, states = load_states(path)
        lost = [i for i in range(step) if not self.block(i).is_file()]
        if lost:
            raise FormatError(f"block {lost[0]} of an unfinished run is gone", site=self.folder.name,
                              hint="Remove the folder to begin anew.")  # fmt: skip
        return step, states

    def keep(self, step: int, states: dict[str, Tensor]) -> None:
        """Blocks before `step` are done; `states` enter block `step`."""
        save_states(self.folder / "states.safetensors", step, states)

    def finish(self, made: Path) -> None:
        """Put the result in its place and forget the run."""
        made.replace(self.out)
        self.discard()

    def discard(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder)
