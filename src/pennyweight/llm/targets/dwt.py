"""Our file of one program, see `llm.decoder`: runs without torch, on the engine."""

from __future__ import annotations

import shutil
from pathlib import Path

from pennyweight.errors import InputError
from pennyweight.exporters.dwt import write_dwt
from pennyweight.llm.directory import Directory
from pennyweight.llm.schemes import Scheme, bits_of, is_integer
from pennyweight.llm.targets import Quantized, targets
from pennyweight.llm.targets.pennyweight import Pennyweight


class Dwt:
    """See the module."""

    turned = True
    hadamard = True

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """Refuse what has no kernels.

        Raises:
            InputError: with the reason.
        """
        for name, scheme in schemes.items():
            if scheme.input is not None and (bits_of(scheme.input) != 8 or not is_integer(scheme.weight)):
                raise InputError("the engine multiplies integers by activations of 8 bits", site=name,
                                 spec=str(scheme), hint="Use w4a8 or w8a8.")  # fmt: skip

    def write(self, model: Quantized, path: Path) -> None:
        """One file."""
        from pennyweight.llm.decoder import lower_decoder
        from pennyweight.llm.load import load

        folder = path.with_name(path.name + ".parts")
        shutil.rmtree(folder, ignore_errors=True)
        plain = {k: v for k, v in model.request.items() if k != "cache"}  # the program rounds by itself
        Pennyweight().write(Quantized(model.directory, model.skeleton, model.files, plain), folder)
        reader = folder / "tokenizer.json"
        text = reader.read_text("utf8") if reader.is_file() else ""
        program = lower_decoder(load(folder), text, str(model.request.get("cache") or ""))
        program.meta["model"] = str(model.directory.config.get("model_type"))
        write_dwt(program, path)
        shutil.rmtree(folder)


targets.add("dwt", Dwt())
