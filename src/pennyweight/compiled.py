"""`compile`: a model whose ordinary `forward` runs its planned program, for those who stay in PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pennyweight.errors import InputError, LowerError
from pennyweight.graph.record import call
from pennyweight.pipeline import State
from pennyweight.program.ir import Program
from pennyweight.program.lower import lower
from pennyweight.program.lower.export import Dynamic
from pennyweight.runtime.session import Session

DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8, "i8": torch.int8,
    "i32": torch.int32, "i64": torch.int64, "bool": torch.bool,
}  # fmt: skip


class Compiled(nn.Module):
    """A module that calls the engine once: tensors go in and come out without copies.

    Attributes:
        module: what was compiled; its weights are in the program once more.
        program, session: what runs. `session.engine.plans_made` counts the plans that were made.

    It computes what the module does in eval mode, whatever `train()` says, and follows no later change of its weights.
    It can be called from many threads at once, copied and pickled.
    """

    def __init__(self, module: nn.Module, example: Any, program: Program, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.program, self._options = program, dict(options)
        args, kwargs = _arguments(example)
        bound = _bound(inspect.signature(module.forward), args, kwargs)
        leaves, spec = tree_flatten(bound)
        self._takes = tree_unflatten(
            range(len(leaves)), spec
        )  # structures of arguments and result; torch's own
        # description of a structure cannot be pickled without a warning
        self._fixed = [None if isinstance(x, Tensor) else x for x in leaves]
        self._where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        # where every argument is a tensor, a call need not be taken apart
        self._keywords = tuple(bound) if all(isinstance(x, Tensor) for x in bound.values()) else None
        self._positional = (
            self._keywords is not None
            and list(bound) == list(inspect.signature(module.forward).parameters)[: len(bound)]
        )
        with torch.no_grad():
            result, spec = tree_flatten(call(module, example))
        self._gives = tree_unflatten(range(len(result)), spec)
        self._result = [None if isinstance(x, Tensor) else x for x in result]
        given = [
            i for i, x in enumerate(result) if x is not None
        ]  # a program gives numbers as tensors; here they stay
        self._places = [(k, i) for k, i in enumerate(given) if isinstance(result[i], Tensor)]
        if len(self._where) != len(program.inputs) or len(given) != len(program.outputs):
            raise LowerError(
                f"the program takes {len(program.inputs)} tensors and gives {len(program.outputs)}, the model takes "
                f"{len(self._where)} and gives {len(given)}",
                site=type(module).__name__,
            )
        self._start()

    def _start(self) -> None:
        self.session = Session(self.program, **self._options)
        self._signature = inspect.signature(self.module.forward)
        self._spec, self._result_spec = tree_flatten(self._takes)[1], tree_flatten(self._gives)[1]
        self._single = self._gives == 0
        self._names = list(self.program.inputs)
        self._dtypes = [DTYPES[t.dtype] for t in self.program.inputs.values()]
        self._native = self.session.backend == "native"

    @property
    def uncompiled(self) -> nn.Module:
        """What was compiled."""
        return self.module

    # -- calling ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, in the same structure.

        Raises:
            InputError: on tensors of another dtype, device or size than the program takes, on tensors that require a
                gradient while gradients are on, and on other arguments than those that it was compiled with.
        """
        if kwargs or not self._positional or len(args) != len(self._names):
            args = self._tensors(args, kwargs)
        results = self._run(args)
        if self._single:
            return results[0]
        leaves = list(self._result)
        for k, i in self._places:
            leaves[i] = results[k]
        return tree_unflatten(leaves, self._result_spec)

    def _run(self, tensors: tuple[Any, ...]) -> list[Tensor]:
        gradients = torch.is_grad_enabled()
        given = []
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or x.dtype is not self._dtypes[i] or not x.is_cpu:
                self._refuse(i, x)
            if gradients and x.requires_grad:
                raise InputError(
                    f"input {self._names[i]!r} requires a gradient, and a planned program has none",
                    hint="Call it under torch.no_grad(), or pass x.detach(). What was compiled is `.module`.",
                )
            given.append(x if x.is_contiguous() else x.contiguous())
        shapes = tuple([x.shape for x in given])
        self.session.check_shapes(shapes)
        if not self._native:
            arrays = {n: x.detach().numpy() for n, x in zip(self._names, given, strict=True)}
            return [torch.from_numpy(np.array(v)) for v in self.session.engine.run(arrays).values()]
        plan = self.session.engine.plan_for(shapes)
        results = [torch.empty(shape, dtype=DTYPES[kind]) for _, shape, kind in plan.results]
        plan.call([x.data_ptr() for x in given], [y.data_ptr() for y in results])
        return results

    def _refuse(self, i: int, x: Any) -> None:
        name, wanted = self._names[i], self._dtypes[i]
        if not isinstance(x, Tensor):
            raise InputError(f"input {name!r} is a {type(x).__name__}, not a tensor")
        if x.dtype is not wanted:
            raise InputError(
                f"input {name!r} is {x.dtype}, not {wanted}",
                shapes=str(tuple(x.shape)),
                hint=f"Pass {name}.to({wanted}).",
            )
        raise InputError(
            f"input {name!r} lies on {x.device}; the engine runs on the CPU", hint=f"{name}.cpu()"
        )

    def _tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The tensors of a call, in the program's order, after checking that all else is as it was."""
        if not args and self._keywords is not None and kwargs.keys() == set(self._keywords):
            return tuple([kwargs[name] for name in self._keywords])
        leaves, spec = tree_flatten(_bound(self._signature, args, kwargs))
        if spec != self._spec:
            raise InputError(
                "the arguments are others than those it was compiled with",
                hint=f"forward{self._signature} was given {', '.join(self._names)}. Compile another for that.",
            )
        for i, (value, fixed) in enumerate(zip(leaves, self._fixed, strict=True)):
            if i not in self._where and (isinstance(value, Tensor) or value != fixed):
                raise InputError(f"an argument was {fixed!r} when it was compiled, and is {value!r}")
        return tuple(leaves[i] for i in self._where)

    # -- being a module -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        left = {"session", "_signature", "_spec", "_result_spec", "_single", "_names", "_dtypes", "_native"}
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._start()

    def extra_repr(self) -> str:
        """Inputs, outputs and what runs them, for printing."""
        return repr(self.session)


def compile(  # noqa: A001 (the name that torch gives it)
    model: nn.Module,
    example: Any = None,
    *,
    dynamic: Dynamic = True,
    backend: str = "auto",
    threads: int = 0,
    plans: int = 64,
) -> Compiled:
    """Lower a model and put the planned program behind an ordinary `forward`.

    Args:
        model: from `quantize` or `convert`, or a float module; put into eval mode.
        example: one batch to lower with; that of the preparation otherwise.
        dynamic: which sizes may vary, see `lower`. Each set of sizes is planned once; the weights are packed once.
        backend: see `Session`.
        threads: of the engine; 0 for as many as torch uses now (`torch.get_num_threads()`).
        plans: sets of sizes to keep planned; the least recently used goes first.

    Returns:
        A module that takes and returns what `model` does, and holds it as `module`.

    Raises:
        LowerError: if there is no example, or the model has no whole-graph form.

    >>> fast = pw.compile(quantized)                           # doctest: +SKIP
    >>> fast(images)                                           # doctest: +SKIP
    """
    remembered = getattr(model, "_pennyweight", None)
    if example is None and isinstance(remembered, State):
        example = remembered.example
    if example is None:
        raise LowerError(
            "there is no example batch to compile with",
            site=type(model).__name__,
            hint="pw.compile(model, example).",
        )
    example = _in_order(model, example)
    options = {"backend": backend, "threads": threads or torch.get_num_threads(), "plans": plans}
    compiled = Compiled(model.eval(), example, lower(model, example, dynamic=dynamic), options)
    if isinstance(remembered, State):  # the journal can be asked for here too
        setattr(compiled, "_pennyweight", remembered)  # noqa: B010
    return compiled.eval()


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by parameter, those left out aside."""
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"the arguments do not fit: {error}", hint=f"forward{signature}") from error


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _in_order(model: nn.Module, example: Any) -> Any:
    """Keyword arguments in the order in which forward names them."""
    if not isinstance(example, Mapping):
        return example
    order = list(inspect.signature(model.forward).parameters)
    return dict(
        sorted(example.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    )
