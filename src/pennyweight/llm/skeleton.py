"""The network of a directory without its weights, its repeated blocks, and parts of it brought to life and let go.

Blocks are found from the module tree: the longest `ModuleList` whose children are all of one class. Nothing here knows
a model family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.errors import FormatError, GraphError, InputError, nearest
from pennyweight.llm.directory import Directory


def transformers() -> Any:
    """The package `transformers`.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import transformers as package
    except ImportError as error:
        raise ImportError(f"language models need pip install 'pennyweight[llm]' ({error})") from None
    return package


class _Hollow(TorchFunctionMode):
    """`torch.empty` makes tensors without storage; constants of the model, made otherwise, are real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See the class."""
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


class Skeleton:
    """A model whose parameters have no storage until they are asked for.

    Attributes:
        model: of the class that the configuration names, in eval mode, float32.
        path: of the list of blocks.
        blocks: paths of the blocks in order.
        turned: names of weights that are stored [in, out], of layers that are linear ones here.

    Raises:
        InputError: on a configuration that no class of `transformers` takes.
        GraphError: if the model has no list of equal blocks.
        FormatError: if tensors of the model are not in the directory.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        config = configuration(directory)
        try:
            with _Hollow(), torch.no_grad():
                model = _class_of(directory)(config)
        except (ValueError, KeyError, TypeError) as error:
            line = str(error).splitlines()[0][:200]
            raise InputError(
                f"transformers makes no model of this {config.model_type!r}: {line}", site=directory.path.name
            ) from None
        model = model.float()
        self.model: nn.Module = model.eval()
        self.turned = _made_linear(self.model)
        _hollow_out(self.model)
        self.path, self.blocks = find_blocks(self.model)
        self.ties = _ties(self.model)
        self._stored = _stored_names(self.model, directory, self.ties)

    def block(self, index: int) -> nn.Module:
        """Block `index`, with or without weights."""
        return self.model.get_submodule(self.blocks[index])

    @property
    def width(self) -> int:
        """Of the hidden states: that of the widest table."""
        return max((m.embedding_dim for m in self.model.modules() if isinstance(m, nn.Embedding)), default=0)

    def inside(self, path: str) -> bool:
        """Whether a module or tensor belongs to a block."""
        return any(path == b or path.startswith(b + ".") for b in self._near(path))

    def _near(self, path: str) -> Iterator[str]:
        lead = self.path + "."
        if path.startswith(lead):
            yield lead + path[len(lead) :].split(".")[0]

    def stored(self, name: str) -> str:
        """What the directory calls a tensor of the model."""
        return self._stored[name]

    def fill(self, path: str, *, recurse: bool = True) -> None:
        """Give the module at `path` its weights, float32; what is there already stays.

        Raises:
            FormatError, NonFinite: see `Directory.floats`.
        """
        module = self.model.get_submodule(path)
        wanted = {
            name: f"{path}.{name}".lstrip(".")
            for name, tensor in [*module.named_parameters(recurse=recurse), *_persistent(module, recurse)]
            if tensor.is_meta
        }
        loaded = self.directory.floats({self._stored[full] for full in wanted.values()})
        for name, full in wanted.items():
            put(module, name, self._as_here(full, loaded[self._stored[full]]), self._stored[full])

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model, float32, as the model holds it.

        Raises:
            FormatError, NonFinite: see `Directory.floats`.
        """
        stored = self._stored[name]
        return self._as_here(name, self.directory.floats([stored])[stored])

    def _as_here(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.T.contiguous() if name in self.turned else tensor

    def empty(self, path: str, *, recurse: bool = True) -> None:
        """Let the weights of the module at `path` go."""
        module = self.model.get_submodule(path)
        for name, tensor in [*module.named_parameters(recurse=recurse), *_persistent(module, recurse)]:
            put(module, name, tensor.to("meta"), name)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Modules outside of the blocks get their weights when they are first called, and lose them at the end."""
        filled: list[str] = []
        handles = []

        def hook(path: str) -> Callable[..., None]:
            def fill(module: nn.Module, args: Any) -> None:
                if any(p.is_meta for p in module.parameters(recurse=False)):
                    self.fill(path, recurse=False)
                    filled.append(path)

            return fill

        for path, module in self.model.named_modules():
            if not self.inside(path) and any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(hook(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for path in filled:
                self.empty(path, recurse=False)


def configuration(directory: Directory) -> Any:
    """The configuration as `transformers` reads it, without what it says of quantization.

    Raises:
        InputError: if no class takes it.
    """
    package = transformers()
    known = {k: v for k, v in directory.config.items() if k != "quantization_config"}
    kind = str(known.pop("model_type", ""))
    try:
        config = package.AutoConfig.for_model(kind, **known)
    except (ValueError, KeyError, TypeError) as error:
        choices = list(package.CONFIG_MAPPING)
        hint = nearest(kind, choices, "known").split(" known:")[0] if kind not in choices else ""
        raise InputError(
            f"model_type {kind!r} is unknown to transformers {package.__version__}"
            if kind not in choices
            else f"the configuration does not fit: {str(error).splitlines()[0][:200]}",
            site=f"{directory.path.name}, config.json",
            hint=hint if hint.startswith("Did") else "",
        ) from None
    config.use_cache = False
    return config


def _class_of(directory: Directory) -> Callable[[Any], Any]:
    """What makes the model: the class that the configuration names, else that of causal language models."""
    package = transformers()
    named = directory.config.get("architectures") or []
    found = getattr(package, str(named[0]), None) if named else None
    if isinstance(found, type) and issubclass(found, nn.Module):
        make: Callable[[Any], Any] = found
        return make
    return lambda config: package.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def find_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """The path of the longest list of modules of one class, and the paths of these modules.

    Raises:
        GraphError: if there is none of two or more that holds weights.
    """
    best, size = "", 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        weights = sum(p.numel() for p in module.parameters())
        if (len(module), weights) > (size, 0) and weights:
            best, size = path, len(module)
    if size < 1:
        raise GraphError(
            "the model has no list of equal blocks",
            site=type(model).__name__,
            hint="Its ModuleLists hold modules of different classes, or there are none.",
        )
    return best, [f"{best}.{i}" for i in range(size)]


def put(module: nn.Module, name: str, tensor: Tensor, site: str) -> None:
    """Make `tensor` the parameter or buffer `name` of a module.

    Raises:
        FormatError: if the shapes differ.
    """
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    table: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    old = table[key]
    if tuple(old.shape) != tuple(tensor.shape):
        raise FormatError(
            "a weight does not fit the configuration", site=site,
            shapes=f"{tuple(tensor.shape)} stored, {tuple(old.shape)} wanted",
        )  # fmt: skip
    table[key] = nn.Parameter(tensor, requires_grad=False) if key in owner._parameters else tensor


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at `path`."""
    parent, _, key = path.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def _persistent(module: nn.Module, recurse: bool) -> Iterable[tuple[str, Tensor]]:
    for path, inner in module.named_modules() if recurse else [("", module)]:
        for key, tensor in inner._buffers.items():
            if tensor is not None and key not in inner._non_persistent_buffers_set:
                yield f"{path}.{key}".lstrip("."), tensor


def _hollow_out(model: nn.Module) -> None:
    """Take the storage of what is stored with a model and was made by other means than `torch.empty`."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                made = hollow.setdefault(id(p), nn.Parameter(p.detach().to("meta"), requires_grad=False))
                module._parameters[key] = made
        for key, b in module._buffers.items():
            if b is not None and key not in module._non_persistent_buffers_set:
                module._buffers[key] = b.to("meta")


def _made_linear(model: nn.Module) -> frozenset[str]:
    """Put linear layers in the place of those that keep their weight as [in, out]; returns the weights' names."""
    from transformers.pytorch_utils import Conv1D

    found = [(path, m) for path, m in model.named_modules() if isinstance(m, Conv1D)]
    for path, module in found:
        inputs, outputs = module.weight.shape
        put_module(model, path, nn.Linear(inputs, outputs, module.bias is not None, device="meta").eval())
    return frozenset(f"{path}.weight" for path, _ in found)


def _ties(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are the parameter of another name."""
    first: dict[int, str] = {}
    return {
        name: first[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(p), name) != name
    }


def _stored_names(model: nn.Module, directory: Directory, ties: dict[str, str]) -> dict[str, str]:
    """The directory's name of each tensor: the same, without the prefix of the base model, or the tied one."""
    lead = str(getattr(model, "base_model_prefix", "")) + "."
    known = set(directory.names)
    found: dict[str, str] = {}
    wanted = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    missing = []
    for name in [*wanted, *(n for n, _ in _persistent(model, True))]:
        tied = ties.get(name, "")
        alike = [other for other, source in ties.items() if source == name]
        for choice in (name, name.removeprefix(lead), tied, tied.removeprefix(lead), *alike):
            if choice and choice in known:
                found[name] = choice
                break
        else:
            missing.append(name)
    if missing:
        raise FormatError(
            f"{len(missing)} tensors of the model are not in the directory, {missing[0]!r} the first",
            site=directory.path.name,
            hint=nearest(missing[0], directory.names[:400], "tensors").split(" tensors:")[0][:200],
        )
    return found
