"""Models from directories, float or quantized, as `transformers` models whose linear layers run on the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight import kernels as kernels  # the opaque ops that converted modules call
from pennyweight.errors import FormatError, InputError, PennyweightError
from pennyweight.llm.block import round_tokens
from pennyweight.llm.cache import round_cache
from pennyweight.llm.directory import Directory
from pennyweight.llm.online import Turned
from pennyweight.llm.schemes import Scheme, bits_of
from pennyweight.llm.skeleton import Skeleton, put, put_module
from pennyweight.llm.store import Solved
from pennyweight.llm.stream import calls_without_cache
from pennyweight.llm.targets import readers
from pennyweight.nn import twins
from pennyweight.nn.integer import bias_codes
from pennyweight.nn.linear import IntegerLinear
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


class SimulatedLinear(nn.Module):
    """`y = Q(x) W'^T + b` in floats, for schemes that have no kernels yet. x [..., in] -> [..., out]."""

    def __init__(self, solved: Solved, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = solved.scheme
        self.register_buffer("weight", solved.weight.dequantize())
        self.register_buffer("bias", bias)
        self.register_buffer("input", solved.input)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        weight, bias = self.get_buffer("weight"), self._buffers["bias"]
        return F.linear(round_tokens(x, self.scheme, self._buffers["input"]), weight, bias)


def integer_linear(name: str, solved: Solved, bias: Tensor | None) -> nn.Module:
    """The module that computes a quantized layer: on the engine where it has kernels, in floats elsewhere."""
    scheme = solved.scheme
    if scheme.input is not None and (bits_of(scheme.input) != 8 or scheme.weight.zero != "none"):
        return SimulatedLinear(solved, bias)
    q = solved.weight
    floats = nn.Linear(q.codes.shape[1], q.codes.shape[0], bias=bias is not None, device="meta")
    twin: Any = twins["Linear"].prepare(floats, scheme.layer(name))
    twin.solved["weight"] = q
    if not scheme.static:
        twin.bias = None
        made = twins["Linear"].convert(twin)
        made.register_buffer("bias", None if bias is None else bias.float())
        return made
    assert solved.input is not None
    layer = IntegerLinear(scheme.layer(name), q, tuple(q.codes.shape))
    layer.x_scale, layer.x_zero = solved.input[0].clone(), solved.input[1].clone()
    layer.register_buffer("bias", bias_codes(bias, layer.x_scale, layer.scale))
    return layer


def install(model: nn.Module, layers: dict[str, Solved]) -> None:
    """Put quantized layers and tables in place of float ones.

    Raises:
        FormatError: if a layer is not in the model, or has another shape there.
    """
    for name, solved in layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise FormatError("a quantized layer is not in the model", site=name) from None
        weight = old._parameters.get("weight")
        if weight is None or tuple(weight.shape) != tuple(solved.weight.codes.shape):
            shapes = (
                f"{tuple(solved.weight.codes.shape)} for {None if weight is None else tuple(weight.shape)}"
            )
            raise FormatError("a quantized layer does not fit the model", site=name, shapes=shapes)
        if isinstance(old, nn.Embedding):
            new = embedding(name, solved.scheme, solved.weight, old)
        else:
            new = integer_linear(name, solved, old._parameters.get("bias"))
            new = Turned(new, solved.hadamard) if solved.hadamard else new
        put_module(model, name, new)


def embedding(name: str, scheme: Scheme, q: QTensor, old: nn.Embedding) -> nn.Module:
    """A table that is decoded row by row."""
    twin: Any = twins["Embedding"].prepare(old, LayerPlan(name, "Embedding", scheme.weight))
    twin.solved["weight"] = q
    return twins["Embedding"].convert(twin)


def load(path: str | Path) -> nn.Module:
    """A model of a directory: float, ours, or of another kind that `readers` knows; float32, in eval mode.

    Raises:
        InputError: on a kind that is unknown, or an architecture that is.
        FormatError: on broken directories.
    """
    directory = Directory(path)
    layers: dict[str, Solved] = {}
    made_of: set[str] = set()
    if directory.scheme:
        kind = str(directory.scheme.get("quant_method"))
        if kind not in readers:
            raise InputError(f"directories quantized as {kind!r} cannot be read", site=directory.path.name,
                             hint=f"Known: {', '.join(readers)}.")  # fmt: skip
        layers, made_of = readers[kind](directory)
    model = assemble(directory, layers, made_of)
    cache = directory.scheme.get("cache")
    return round_cache(model, str(cache)) if cache else model


def assemble(directory: Directory, layers: dict[str, Solved], made_of: set[str] = frozenset()) -> nn.Module:  # type: ignore[assignment]
    """The model of a directory with these layers quantized; the rest in float."""
    view = _WithCodes(directory, {f"{name}.weight" for name in layers}, made_of)
    skeleton = Skeleton(view)
    model = skeleton.model
    for name, tensor in list(model.named_parameters()):
        if tensor.is_meta and name not in view.hidden:
            put(model, name, skeleton.tensor(name), name)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            put(model, name, skeleton.tensor(name), name)
    install(model, layers)
    for name, source in skeleton.ties.items():
        if name.removesuffix(".weight") not in layers and source.removesuffix(".weight") not in layers:
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._parameters[key] = model.get_parameter(source)
    lost = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if lost:
        raise FormatError(f"{len(lost)} tensors of the model have no values, {lost[0]!r} the first",
                          site=directory.path.name)  # fmt: skip
    _generation(model, directory)
    return model.eval()


def load_file(path: str | Path, directory: str | Path) -> nn.Module:
    """The model of a GGUF file, decoded to floats, to compare it with others.

    Args:
        path: of the file.
        directory: of the float model it was made from; it gives the structure, and no weight that the file has.

    Raises:
        FormatError: if the file cannot be read, or a weight does not fit.
    """
    from pennyweight.llm.targets.gguf import read

    source = Directory(directory)
    model = assemble(source, {})
    ties = Skeleton(source).ties
    found = read(Path(path), source, ties)
    for name, tensor in found.items():
        put(model, name, tensor, name)
    for name, tied in ties.items():
        if name not in found:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._parameters[key] = model.get_parameter(tied)
    return model


class _WithCodes(Directory):
    """A directory as if it still had the float weights that codes stand for."""

    def __init__(self, directory: Directory, weights: set[str], made_of: set[str]) -> None:
        self.path, self.config = directory.path, directory.config
        self.hidden = weights
        self.files = {n: f for n, f in directory.files.items() if n not in made_of}
        self.files |= dict.fromkeys(weights, "")


def _generation(model: Any, directory: Directory) -> None:
    model.config.use_cache = True
    settings = directory.path / "generation_config.json"
    if settings.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(directory.path))


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model is."""
    return any(hasattr(m, "codes") or isinstance(m, SimulatedLinear) for m in model.modules())


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits [..., vocabulary] of ids [windows, length].

    Raises:
        PennyweightError: if the model returns none.
    """
    with torch.no_grad():
        found = model(ids, **calls_without_cache(model))
    y = getattr(found, "logits", None)
    if not isinstance(y, Tensor):
        raise PennyweightError("the model returns no logits", site=type(model).__name__)
    return y
