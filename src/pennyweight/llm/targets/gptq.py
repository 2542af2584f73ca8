"""The layout of AutoGPTQ and GPTQModel: codes along the inputs in int32 words, one column for each output.

qweight  int32 [in * bits / 32, out]: the codes of a column as a stream of bits, the first in the lowest
qzeros   int32 [groups, out * bits / 32]: zero points less one (`gptq`), or as they are (`gptq_v2`)
scales   float16 [groups, out];  g_idx  int32 [in]: the group of each input
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import FormatError, InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.schemes import Scheme, bits_of, is_integer
from pennyweight.llm.store import Solved
from pennyweight.llm.targets import Quantized, readers, targets
from pennyweight.llm.targets.compressed_tensors import lift_of, pack_words, refuse_tables, unpack_words
from pennyweight.llm.targets.pennyweight import write_config, write_shards
from pennyweight.qtensor import QTensor
from pennyweight.spec import QuantSpec

METHOD = "gptq"


def packed(layers: dict[str, Solved]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of quantized layers; no notes."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        q, spec = layer.weight, layer.scheme.weight
        bits = bits_of(spec)
        half, lift = 1 << (bits - 1), lift_of(spec)
        rows, n = q.codes.shape
        groups = spec.scale_shape((rows, n))[1]
        zeros = torch.full((rows, groups), half) if q.zero is None else (q.zero + lift).long()
        zeros = zeros - 1 if q.zero is None else zeros
        found[f"{name}.qweight"] = pack_words(q.codes.to(torch.int16) + lift, bits).T
        found[f"{name}.qzeros"] = pack_words(zeros.T, bits)
        found[f"{name}.scales"] = q.scales().to(torch.float16).T
        found[f"{name}.g_idx"] = (torch.arange(n) // (n // groups)).to(torch.int32)
    return found, {}


class Gptq:
    """See the module."""

    turned = False
    hadamard = False

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """Refuse what the layout has no place for.

        Raises:
            InputError: with the reason.
        """
        refuse_tables(directory, schemes, "the GPTQ layout")
        if len({str(s) for s in schemes.values()}) > 1:
            raise InputError(
                "the GPTQ layout has one scheme for all layers", hint="Leave --head out, or --head same."
            )
        for name, scheme in schemes.items():
            spec = scheme.weight
            if scheme.input is not None:
                raise InputError("the GPTQ layout holds weights alone, no scheme of activations", site=name,
                                 spec=str(scheme), hint="Use w4a16, or --to compressed-tensors.")  # fmt: skip
            fits = is_integer(spec) and bits_of(spec) in (2, 3, 4, 8) and spec.zero != "float"
            if not fits or spec.per_tensor or spec.scale not in ("fp16", "fp32"):
                raise InputError("the GPTQ layout holds integers of 2, 3, 4 or 8 bits in groups", site=name,
                                 spec=str(spec), hint="Use w4a16 --group 128.")  # fmt: skip
            if spec.scale == "fp32" and bits_of(spec) != 8:
                raise InputError("the GPTQ layout has float16 scales", site=name, spec=str(spec),
                                 hint=f"{spec}^fp16")  # fmt: skip
            shape = _shape(directory, name)
            if any(size * bits_of(spec) % 32 for size in shape):
                raise InputError("the GPTQ layout packs whole words of 32 bits", site=name, shapes=str(shape))

    def write(self, model: Quantized, path: Path) -> None:
        """A folder."""
        path.mkdir()
        write_shards(model, path, packed)
        layers = [layer for part, _ in model.parts() for layer in part.values()]
        spec = layers[0].scheme.weight
        symmetric = spec.zero == "none"
        size = spec.block[-1] if spec.block[-1] is not None else -1
        write_config(model, path, {
            "quant_method": METHOD, "bits": bits_of(spec), "group_size": size, "sym": symmetric, "desc_act": False,
            "static_groups": False, "true_sequential": True, "damp_percent": 0.01,
            "checkpoint_format": METHOD if symmetric else "gptq_v2",
            "lm_head": any(not model.skeleton.inside(n) for part, _ in model.parts() for n in part),
        })  # fmt: skip
        model.copy_text_files(path)


def _shape(directory: Directory, name: str) -> tuple[int, ...]:
    from safetensors import safe_open

    stored = next((n for n in directory.names if f"{name}.weight".endswith(n) or n == f"{name}.weight"), None)
    if stored is None:
        return (32, 32)  # tied to a table; checked when it is packed
    with safe_open(str(directory.path / directory.files[stored]), framework="pt") as opened:
        return tuple(opened.get_slice(stored).get_shape())


def read(directory: Directory) -> tuple[dict[str, Solved], set[str]]:
    """Quantized layers of such a directory, and the names of their tensors.

    Raises:
        FormatError: if groups are out of order, which no kernel here takes.
    """
    settings = directory.scheme
    bits = int(settings["bits"])
    half = 1 << (bits - 1)
    later = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, Solved] = {}
    used: set[str] = set()
    for name in sorted(n.removesuffix(".qweight") for n in directory.names if n.endswith(".qweight")):
        own = [f"{name}.{t}" for t in ("qweight", "qzeros", "scales", "g_idx")]
        tensors = directory.load(own)
        used |= set(own)
        order, scales = tensors[f"{name}.g_idx"], tensors[f"{name}.scales"]
        n, rows = len(order), scales.shape[1]
        size = n // len(scales)
        if not torch.equal(order.long(), torch.arange(n) // size):
            raise FormatError(
                "groups are out of order (desc_act)", site=name, hint="Quantize with static groups."
            )
        codes = unpack_words(tensors[f"{name}.qweight"].T, bits, n).to(torch.int16) - half
        zeros = unpack_words(tensors[f"{name}.qzeros"], bits, rows).to(torch.int16).T + later - half
        block = (1, None) if size == n else (size,)
        zero = None if settings.get("sym") else zeros.float().contiguous()
        if zero is None and bool((zeros != 0).any()):
            raise FormatError("a symmetric layer has zero points", site=name)
        spec = QuantSpec(f"int{bits}", block, "none" if zero is None else "int", "fp16")
        q = QTensor(codes.to(torch.int8), scales.T.contiguous(), zero, spec)
        found[name] = Solved(Scheme(spec), q)
    return found, used


readers.add(METHOD, read)
targets.add(METHOD, Gptq())
