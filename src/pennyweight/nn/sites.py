"""Function calls as sites: a mode that is active only in models whose plan names such sites.

A call is addressed by the innermost module around it, its operation and how many such calls that module's forward
made before, exactly as the recorder counts. Modules that are leaves to the recorder are opaque here too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pennyweight.graph.record import op_name
from pennyweight.plan import LEAVES

CALLS = "_pw_calls"  # child of a module that owns sites: ModuleDict from "op/index" to a call twin

_state = threading.local()


class SiteMode(TorchFunctionMode):
    """Routes the calls that own a twin through it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[nn.Module | None, dict[str, int]]] = []
        self.busy = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        owner, counts = self.stack[-1] if self.stack else (None, {})
        if owner is None:
            return func(*args, **kwargs)
        name = op_name(func)
        index = counts.get(name, 0)
        calls = owner._modules.get(CALLS)
        twin = None
        if calls is not None and f"{name}/{index}" in calls._modules:
            twin = calls._modules[f"{name}/{index}"]
        if twin is None:
            result = func(*args, **kwargs)
        else:
            self.stack.append((None, {}))
            try:
                result = twin(func, args, kwargs)
            finally:
                self.stack.pop()
        produced = args[0] if name == "setitem" else result
        if any(isinstance(x, Tensor) for x in tree_flatten(produced)[0]):
            counts[name] = index + 1
        return result


class _EnterRoot:
    def __call__(self, module: nn.Module, args: Any) -> None:
        mode = SiteMode()
        mode.stack.append((module, {}))
        modes = _state.__dict__.setdefault("modes", [])
        modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]


class _LeaveRoot:
    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        _state.modes.pop().__exit__(None, None, None)


@contextmanager
def routed() -> Iterator[None]:
    """Within, parts of a prepared model that are run on their own find their twins of calls."""
    mode = SiteMode()
    modes = _state.__dict__.setdefault("modes", [])
    modes.append(mode)
    try:
        with mode:
            yield
    finally:
        modes.remove(mode)


@contextmanager
def aside() -> Iterator[None]:
    """Within, function calls are nobody's: for hooks that compute something of their own while a model runs."""
    modes = getattr(_state, "modes", None)
    if not modes:
        yield
        return
    stack = modes[-1].stack
    stack.append((None, {}))
    try:
        yield
    finally:
        stack.pop()


class _Enter:
    def __init__(self, opaque: bool) -> None:
        self.opaque = opaque

    def __call__(self, module: nn.Module, args: Any) -> None:
        if getattr(_state, "modes", None):
            _state.modes[-1].stack.append((None if self.opaque else module, {}))


class _Leave:
    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if getattr(_state, "modes", None):
            _state.modes[-1].stack.pop()


def install(root: nn.Module, types: dict[str, str]) -> None:
    """Add the hooks that keep track of the innermost module.

    Args:
        root: a prepared model.
        types: class name of every module of the float model, by path; leaves stay opaque after they became twins.
    """
    root.register_forward_pre_hook(_EnterRoot())
    root.register_forward_hook(_LeaveRoot(), always_call=True)
    for path, module in root.named_modules():
        if path and path in types:
            module.register_forward_pre_hook(_Enter(types[path] in LEAVES))
            module.register_forward_hook(_Leave(), always_call=True)
