"""The file of llama.cpp. A scheme decides the type of each weight, exactly: codes are carried over, never made anew.

int4[32]^fp16       Q4_0      uint4[32]+z^fp16   Q4_1 (its minimum is `-z s`, rounded to float16)
int5[32]^fp16       Q5_0      uint5[32]+z^fp16   Q5_1
int8[32]^fp16       Q8_0      int6[16]^(int8[16]^fp16)   Q6_K
uint4[32]+zf^(uint6[8]^fp16)  Q4_K,  uint5[32]+zf^(uint6[8]^fp16)  Q5_K, see `superblock`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import FormatError, InputError
from pennyweight.llm.directory import Directory, read_json
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.skeleton import configuration
from pennyweight.llm.superblock import multiples
from pennyweight.llm.targets import Quantized, targets
from pennyweight.qtensor import QTensor

KINDS = {  # text of a spec to a type
    "int4[32]^fp16": "Q4_0", "uint4[32]+z^fp16": "Q4_1", "int5[32]^fp16": "Q5_0", "uint5[32]+z^fp16": "Q5_1",
    "int8[32]^fp16": "Q8_0", "int8n[32]^fp16": "Q8_0", "int6[16]^(int8[16]^fp16)": "Q6_K",
    "uint4[32]+zf^(uint6[8]^fp16)": "Q4_K", "uint5[32]+zf^(uint6[8]^fp16)": "Q5_K",
}  # fmt: skip
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
HALVES = frozenset({"llama"})  # whose rotary pairs are neighbours there, halves of a head in transformers
WHY_K = "Q4_K and Q5_K keep scales and minima of 6 bits each: schemes q4_k and q5_k"


def package() -> Any:
    """The package `gguf`.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF files need pip install 'pennyweight[llm]' ({error})") from None
    return gguf


def _nibbles(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[n, 32] below 16 to [n, 16]: element i and i + 16 in a byte."""
    low, high = codes[:, :16], codes[:, 16:]
    packed: np.ndarray[Any, Any] = (low | (high << 4)).astype(np.uint8)
    return packed


def _halves(x: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = x.to(torch.float16).reshape(-1, 1).contiguous().numpy().view(np.uint8)
    return found


def _blocks(q: QTensor, size: int, lift: int) -> np.ndarray[Any, Any]:
    places: np.ndarray[Any, Any] = (q.codes.to(torch.int16) + lift).to(torch.uint8).reshape(-1, size).numpy()
    return places


def _minima(q: QTensor) -> Tensor:
    assert q.zero is not None
    return -(q.zero * q.scales())


def _fifth(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The fifth bits of [n, 32], as 4 bytes."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _q4_0(q: QTensor) -> np.ndarray[Any, Any]:
    return np.concatenate([_halves(q.scales()), _nibbles(_blocks(q, 32, 8))], 1)


def _q4_1(q: QTensor) -> np.ndarray[Any, Any]:
    return np.concatenate([_halves(q.scales()), _halves(_minima(q)), _nibbles(_blocks(q, 32, 0))], 1)


def _q5_0(q: QTensor) -> np.ndarray[Any, Any]:
    codes = _blocks(q, 32, 16)
    return np.concatenate([_halves(q.scales()), _fifth(codes), _nibbles(codes & 15)], 1)


def _q5_1(q: QTensor) -> np.ndarray[Any, Any]:
    codes = _blocks(q, 32, 0)
    return np.concatenate([_halves(q.scales()), _halves(_minima(q)), _fifth(codes), _nibbles(codes & 15)], 1)


def _q8_0(q: QTensor) -> np.ndarray[Any, Any]:
    codes = q.codes.reshape(-1, 32).contiguous().numpy().view(np.uint8)
    return np.concatenate([_halves(q.scales()), codes], 1)


def _q6_k(q: QTensor) -> np.ndarray[Any, Any]:
    assert isinstance(q.scale, QTensor)
    codes = _blocks(q, 256, 32).reshape(-1, 2, 4, 32)  # two halves of four rows
    low = (codes[:, :, :2] & 15) | ((codes[:, :, 2:] & 15) << 4)
    high = sum((codes[:, :, j] >> 4) << (2 * j) for j in range(4))
    scales = q.scale.codes.reshape(-1, 16).contiguous().numpy().view(np.uint8)
    parts = [
        low.reshape(len(codes), 128),
        np.asarray(high).reshape(len(codes), 64),
        scales,
        _halves(q.scale.scales()),
    ]
    return np.concatenate([p.astype(np.uint8) for p in parts], 1)


def _ranges(q: QTensor) -> list[np.ndarray[Any, Any]]:
    """d [n, 2], e [n, 2] and the 6-bit multiples [n, 12] of superblocks: the first four whole, the others in two."""
    d, e, scales, minima = multiples(q)
    a, b = scales.numpy(), minima.numpy()
    parts = [
        a[:, :4] | (a[:, 4:] >> 4 << 6),
        b[:, :4] | (b[:, 4:] >> 4 << 6),
        (a[:, 4:] & 15) | ((b[:, 4:] & 15) << 4),
    ]
    return [_halves(d), _halves(e), np.concatenate(parts, 1)]


def _pairs(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[n, 4, 2, 32] below 16 to [n, 128]: 32 in the low halves of bytes, the next 32 in the high ones."""
    packed: np.ndarray[Any, Any] = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(len(codes), 128)
    return packed


def _q4_k(q: QTensor) -> np.ndarray[Any, Any]:
    codes = _blocks(q, 256, 0).reshape(-1, 4, 2, 32)
    return np.concatenate([*_ranges(q), _pairs(codes)], 1)


def _q5_k(q: QTensor) -> np.ndarray[Any, Any]:
    codes = _blocks(q, 256, 0).reshape(-1, 4, 2, 32)
    fifth = (codes >> 4).reshape(-1, 8, 32)
    high = np.packbits(fifth, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([*_ranges(q), high, _pairs(codes & 15)], 1)


WRITERS: dict[str, Callable[[QTensor], np.ndarray[Any, Any]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q6_K": _q6_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k,
}  # fmt: skip


def raw_blocks(q: QTensor) -> tuple[str, np.ndarray[Any, Any]]:
    """The type of a quantized matrix and its blocks, uint8 [out, bytes of a row]."""
    kind = KINDS[str(q.spec)]
    return kind, WRITERS[kind](q).reshape(len(q.codes), -1)


def neighbours(rows: int, heads: int) -> Tensor:
    """Where the rows of a projection of queries or keys come from, where rotary pairs are to be neighbours. [rows]."""
    width = rows // heads
    return torch.arange(rows).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)


class Gguf:
    """See the module."""

    turned = False
    hadamard = False

    def check(self, directory: Directory, schemes: dict[str, Scheme]) -> None:
        """Refuse what the file cannot hold.

        Raises:
            InputError: with the reason.
            ImportError: without the package `gguf`.
        """
        package()
        kind = str(directory.config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise InputError(f"GGUF names of a {kind!r} are not known here", site=directory.path.name,
                             hint=f"Known: {', '.join(ARCHITECTURES)}.")  # fmt: skip
        for name, scheme in schemes.items():
            spec = str(scheme.weight)
            if spec not in KINDS:
                reason = (
                    WHY_K if scheme.weight.zero != "none" else f"its types are those of {', '.join(KINDS)}"
                )
                raise InputError(f"GGUF has no type for this: {reason}", site=name, spec=spec,
                                 hint="Use --scheme w4a16 --group 32 or w8a16 --group 32.")  # fmt: skip
            if scheme.static:
                raise InputError(
                    "GGUF keeps no calibrated activations", site=name, spec=str(scheme), hint="Use w8a16."
                )

    def write(self, model: Quantized, path: Path) -> None:
        """One file."""
        gguf, config = package(), configuration(model.directory)
        name = ARCHITECTURES[config.model_type]
        arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
        names = gguf.get_tensor_name_map(arch, len(model.skeleton.blocks))
        writer = gguf.GGUFWriter(str(path), name)
        _describe(writer, config, name)
        _tokenizer(writer, model.directory, int(config.vocab_size))

        def called(own: str) -> str:
            found = names.get_name(own, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise FormatError("GGUF has no name for a tensor", site=own)
            return str(found)

        def order(own: str, rows: int) -> Tensor:
            layer = own.rpartition(".")[0].rpartition(".")[2] if own.endswith((".weight", ".bias")) else ""
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
            if heads is None or name not in HALVES:
                return torch.arange(rows)
            return neighbours(rows, heads)

        for layers, floats in model.parts():
            for layer, solved in layers.items():
                own = f"{layer}.weight"
                q = solved.weight
                kind, raw = raw_blocks(_rows(q, order(own, len(q.codes))))
                writer.add_tensor(called(own), raw, raw_dtype=gguf.GGMLQuantizationType[kind])
            for own, tensor in floats.items():
                writer.add_tensor(called(own), _plain(tensor[order(own, len(tensor))]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _rows(q: QTensor, order: Tensor) -> QTensor:
    scale = q.scale
    picked = _rows(scale, order) if isinstance(scale, QTensor) else scale[order]
    return QTensor(q.codes[order], picked, None if q.zero is None else q.zero[order], q.spec)


def _plain(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Vectors in float32, matrices in float16 where they came so, else float32."""
    half = tensor.ndim > 1 and tensor.dtype == torch.float16
    found: np.ndarray[Any, Any] = tensor.contiguous().to(torch.float16 if half else torch.float32).numpy()
    return found


def _describe(writer: Any, config: Any, name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or {}
    if (rope.get("rope_type") or scaling.get("rope_type") or "default") != "default":
        raise InputError(
            "this kind of rotary scaling has no place in our GGUF files", site=name, spec=str(rope or scaling)
        )
    writer.add_rope_freq_base(float(rope.get("rope_theta") or getattr(config, "rope_theta", 0.0) or 10000.0))


def _tokenizer(writer: Any, directory: Directory, size: int) -> None:
    """The tokenizer, where it is one of byte pairs; else none, and callers give ids."""
    file = directory.path / "tokenizer.json"
    kind: dict[str, Any] = read_json(file) if file.is_file() else {}
    inner = kind.get("model") or {}
    if inner.get("type") != "BPE" or inner.get("byte_fallback"):
        writer.add_tokenizer_model("none")
        return
    tokens: list[str] = [f"[unused{i}]" for i in range(size)]
    types = [5] * size  # unused
    for token, i in inner["vocab"].items():
        if i < size:
            tokens[i], types[i] = token, 1
    for added in kind.get("added_tokens") or []:
        if added["id"] < size:
            tokens[added["id"]], types[added["id"]] = added["content"], 3 if added.get("special") else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in inner["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    settings = directory.path / "generation_config.json"
    ends = json.loads(settings.read_text("utf8")) if settings.is_file() else {}
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        value = ends.get(key, directory.config.get(key))
        if isinstance(value, int):
            add(value)


def read(path: Path, directory: Directory, tied: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a file as float32, under the names of `transformers`, as the package `gguf` decodes it.

    Args:
        path: of the file.
        directory: of the float model it was made from.
        tied: names that the directory has no tensor of, and the file may: a head quantized apart from its table.

    Raises:
        FormatError: if the file cannot be read, or lacks a tensor.
    """
    gguf, config = package(), configuration(directory)
    name = ARCHITECTURES[config.model_type]
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    try:
        stored = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    except (ValueError, OSError) as error:
        raise FormatError(f"the file cannot be read: {error}", site=path.name) from None
    found: dict[str, Tensor] = {}
    for own in [*directory.names, *tied]:
        entry = stored.get(names.get_name(own, try_suffixes=(".weight", ".bias")) or "")
        if entry is None:
            continue
        values = gguf.quants.dequantize(entry.data, entry.tensor_type)
        tensor = torch.from_numpy(np.array(values, np.float32))
        layer = own.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
        if heads is not None and name in HALVES:
            tensor = tensor[torch.argsort(neighbours(len(tensor), heads))]
        found[own] = tensor
    return found


targets.add("gguf", Gguf())
