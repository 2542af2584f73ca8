"""The reference: run a program op by op in numpy. What the engine does must equal this, bit for bit where `exact`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

import numpy as np

from pennyweight.errors import InputError
from pennyweight.program.ir import Array, Op, Program, evaluate, numpy_dtype, resolve
from pennyweight.program.ops import definitions


def interpret(
    program: Program,
    inputs: Mapping[str, Array],
    *,
    keep: bool = False,
    watch: Callable[[Op, int], None] | None = None,
) -> dict[str, Array]:
    """Run `program` on named inputs and return its outputs by name (all values, if `keep`).

    `watch`, if given, is called after each op with its nanoseconds.

    Raises:
        InputError: if an input does not fit its type.
    """
    arrays = check_inputs(program, inputs)
    symbols = program.bind({n: a.shape for n, a in arrays.items()})
    values: dict[str, Any] = dict(program.constants)
    values.update(arrays)
    last = {n: i for i, op in enumerate(program.ops) for n in op.inputs}
    for i, op in enumerate(program.ops):
        operands = [values[n] if n else None for n in op.inputs]
        start = perf_counter_ns()
        results = definitions[op.kind].run(operands, resolve(op.attrs, symbols))
        if watch is not None:
            watch(op, perf_counter_ns() - start)
        values.update(zip(op.outputs, results, strict=True))
        if not keep:
            for n in set(op.inputs):
                if n and last[n] == i and n not in program.outputs and n not in program.constants:
                    del values[n]
    if keep:
        return {n: v for n, v in values.items() if isinstance(v, np.ndarray)}
    return {n: values[n] if isinstance(values[n], np.ndarray) else values[n].data for n in program.outputs}


def check_inputs(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs as contiguous arrays of the declared types.

    Raises:
        InputError: on a name, dtype or shape that does not fit.
    """
    arrays: dict[str, Array] = {}
    for name in inputs:
        if name not in program.inputs:
            raise InputError(f"there is no input {name!r}", hint=f"Inputs: {', '.join(program.inputs)}.")
    for name, kind in program.inputs.items():
        if name not in inputs:
            raise InputError(f"input {name!r} is missing", hint=f"Inputs: {', '.join(program.inputs)}.")
        array = np.asarray(inputs[name])
        if array.dtype != numpy_dtype(kind.dtype):
            raise InputError(
                f"input {name!r} is {array.dtype}, not {numpy_dtype(kind.dtype)}", shapes=str(array.shape)
            )
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
    symbols = program.bind({n: a.shape for n, a in arrays.items()})
    for name, kind in program.inputs.items():
        if arrays[name].shape != tuple(evaluate(d, symbols) for d in kind.shape):
            raise InputError(
                f"input {name!r} has the wrong shape", shapes=f"{arrays[name].shape}, wanted {kind}"
            )
    return arrays
