"""The directory layout of compressed-tensors, which `transformers` and vLLM load.

Weights of 8 bits that meet integer activations are stored as bytes (`int-quantized`), others as a stream of bits in
int32 words (`pack-quantized`), codes counted from `-2^(bits - 1)`, the first in the lowest bits. Widths that do not
divide 32 need compressed-tensors 0.15 or newer to read; older versions padded words.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import FormatError, InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.schemes import Scheme, bits_of, is_integer
from pennyweight.llm.store import Solved, pack_bits, unpack_bits
from pennyweight.llm.targets import Quantized, readers, targets
from pennyweight.llm.targets.pennyweight import write_config, write_shards
from pennyweight.qtensor import QTensor
from pennyweight.spec import QuantSpec

METHOD, PACKED, BYTES = "compressed-tensors", "pack-quantized", "int-quantized"
SCALES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1, [rows, n], as a stream of bits in int32 words, the first in the lowest bits.

    Shape: [rows, ceil(n * bits / 32)].
    """
    raw = pack_bits(codes, bits).numpy()
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(raw).view("<i4").astype(np.int32))


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_words`, uint8 [rows, n]."""
    raw = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    return unpack_bits(torch.from_numpy(raw), bits, n)


def layout(scheme: Scheme) -> str:
    """Which of the two forms a scheme is stored in."""
    return BYTES if bits_of(scheme.weight) == 8 and scheme.input is not None else PACKED


def _strategy(spec: QuantSpec) -> dict[str, Any]:
    if spec.block == (1, None):
        return {"strategy": "channel", "group_size": None}
    if spec.per_tensor:
        return {"strategy": "tensor", "group_size": None}
    return {"strategy": "group", "group_size": spec.block[-1]}


def arguments(scheme: Scheme) -> dict[str, Any]:
    """The `config_groups` entry of a scheme, without its targets."""
    weight = scheme.weight
    inputs = None
    if scheme.input is not None:
        inputs = {"num_bits": bits_of(scheme.input), "type": "int", "symmetric": False, "dynamic": not scheme.static,
                  "strategy": "tensor" if scheme.input.per_tensor else "token"}  # fmt: skip
    return {
        "weights": {"num_bits": bits_of(weight), "type": "int", "symmetric": weight.zero == "none", "dynamic": False,
                    **_strategy(weight)},
        "input_activations": inputs, "output_activations": None, "format": layout(scheme),
    }  # fmt: skip


def lift_of(spec: QuantSpec) -> int:
    """From our codes to codes from 0."""
    return 0 if spec.grid.startswith("u") else 1 << (bits_of(spec) - 1)


def packed(layers: dict[str, Solved]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of quantized layers, and the scheme of each."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        q, spec = layer.weight, layer.scheme.weight
        bits = bits_of(spec)
        half, lift = 1 << (bits - 1), lift_of(spec)
        places = q.codes.to(torch.int64) + lift
        scale = q.scale
        assert isinstance(scale, Tensor)
        if layout(layer.scheme) == BYTES:
            found[f"{name}.weight"] = (places - half).to(torch.int8)
            if q.zero is not None:
                found[f"{name}.weight_zero_point"] = (q.zero + lift - half).to(torch.int8)
        else:
            found[f"{name}.weight_packed"] = pack_words(places, bits)
            found[f"{name}.weight_shape"] = torch.tensor(q.codes.shape)
            if q.zero is not None:
                zeros = (q.zero + lift).to(torch.int64)
                found[f"{name}.weight_zero_point"] = pack_words(zeros.T.contiguous(), bits).T
        found[f"{name}.weight_scale"] = scale
        if layer.input is not None:
            found[f"{name}.input_scale"] = layer.input[:1]
            found[f"{name}.input_zero_point"] = (layer.input[1:] - 128).to(torch.int8)
    return found, {name: layer.scheme for name, layer in layers.items()}


class CompressedTensors:
    """See the module."""

    turned = False
    hadamard = False

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """Refuse what the layout has no place for.

        Raises:
            InputError: with the reason.
        """
        refuse_tables(directory, schemes, METHOD)
        for name, scheme in schemes.items():
            spec = scheme.weight
            if not is_integer(spec) or spec.zero == "float" or isinstance(spec.scale, QuantSpec):
                raise InputError(
                    f"{METHOD} holds integers with plain scales and whole zero points", site=name, spec=str(spec),
                    hint="Use a scheme such as w4a16, or --to pennyweight.",
                )  # fmt: skip
            if scheme.input is not None and bits_of(scheme.input) != 8:
                raise InputError(
                    f"{METHOD} has int8 activations", site=name, spec=str(scheme), hint="Use w4a8."
                )

    def write(self, model: Quantized, path: Path) -> None:
        """A folder."""
        path.mkdir()
        schemes: dict[str, Scheme] = write_shards(model, path, packed)
        kinds = list(dict.fromkeys(str(s) for s in schemes.values()))
        groups = {}
        for i, kind in enumerate(kinds):
            names = sorted(n for n, s in schemes.items() if str(s) == kind)
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                **arguments(schemes[names[0]]),
            }
        formats = {str(g["format"]) for g in groups.values()}
        write_config(model, path, {
            "quant_method": METHOD, "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "config_groups": groups, "kv_cache_scheme": None,
            "global_compression_ratio": None, "ignore": left_out(model, schemes),
        })  # fmt: skip
        model.copy_text_files(path)


def left_out(model: Quantized, schemes: Iterable[str]) -> list[str]:
    """Linear layers that stay in float."""
    known = set(schemes)
    modules = model.skeleton.model.named_modules()
    return [n for n, m in modules if isinstance(m, torch.nn.Linear) and n not in known]


def refuse_tables(directory: Directory, schemes: dict[str, Scheme], what: str) -> None:
    """Refuse quantized tables in layouts of linear layers.

    Raises:
        InputError: if there is one.
    """
    for name in schemes:
        if "embed" in name and f"{name}.weight" in directory.files:
            raise InputError(
                f"{what} holds linear layers, no tables", site=name, hint="Leave --embeddings out."
            )


def read(directory: Directory) -> tuple[dict[str, Solved], set[str]]:
    """Quantized layers of such a directory, and the names of their tensors.

    Raises:
        FormatError: on forms that we do not write.
    """
    found: dict[str, Solved] = {}
    used: set[str] = set()
    tails = (
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "input_scale",
        "input_zero_point",
    )
    for entry in directory.scheme.get("config_groups", {}).values():
        names = entry.get("targets") or []
        if names == ["Linear"]:
            names = sorted(
                {n.removesuffix(".weight_scale") for n in directory.names if n.endswith(".weight_scale")}
            )
        weights, inputs = entry["weights"], entry.get("input_activations")
        if weights.get("type") != "int" or entry.get("format", directory.scheme.get("format")) not in (
            PACKED,
            BYTES,
        ):
            raise FormatError("this form of compressed-tensors cannot be read", site=directory.path.name)
        for name in names:
            own = [f"{name}.{t}" for t in tails if f"{name}.{t}" in directory.files]
            if f"{name}.weight_packed" not in own:
                own.append(f"{name}.weight")
            used |= set(own)
            tensors = {n.removeprefix(f"{name}."): t for n, t in directory.load(own).items()}
            found[name] = _solved(tensors, weights, inputs)
    return found, used


def _solved(tensors: dict[str, Tensor], weights: dict[str, Any], inputs: dict[str, Any] | None) -> Solved:
    bits = int(weights["num_bits"])
    half = 1 << (bits - 1)
    if "weight_packed" in tensors:
        rows, n = tensors["weight_shape"].tolist()
        codes = unpack_words(tensors["weight_packed"], bits, n).to(torch.int64) - half
    else:
        rows, n = tensors["weight"].shape
        codes = tensors["weight"].to(torch.int64)
    scale = tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    if zero is not None and "weight_packed" in tensors:
        zero = unpack_words(zero.T.contiguous(), bits, rows).to(torch.int64).T - half
    size = weights.get("group_size")
    blocks: dict[str, tuple[int | None, ...]] = {"group": (size,), "channel": (1, None), "tensor": ()}
    block = blocks[weights["strategy"]]
    spec = QuantSpec(f"int{bits}", block, "none" if zero is None else "int", SCALES[scale.dtype])  # type: ignore[arg-type]
    q = QTensor(codes.to(torch.int8), scale, None if zero is None else zero.float().contiguous(), spec)
    given, static = None, False
    tokens: QuantSpec | None = None
    if inputs is not None:
        static = not inputs["dynamic"]
        tokens = QuantSpec("uint8", () if inputs["strategy"] == "tensor" else (1, None), "int")
        if static:
            given = torch.cat([tensors["input_scale"].float(), tensors["input_zero_point"].float() + 128])
    return Solved(Scheme(spec, tokens, static), q, given)


readers.add(METHOD, read)
targets.add(METHOD, CompressedTensors())
