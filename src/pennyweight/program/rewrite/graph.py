"""A program as a graph: who makes and who reads each value."""

from __future__ import annotations

import numpy as np

from pennyweight.errors import VerifyError
from pennyweight.program.ir import Array, Constant, Op, Program, TensorType, replace
from pennyweight.program.verify import infer


class View:
    """Producers, readers and types of a program that is being read; not updated when it changes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.types: dict[str, TensorType] = infer(program)
        self._other: dict[str, TensorType] | None = self.types
        if program.symbols:
            try:
                self._other = infer(program, {k: v + 1 for k, v in program.symbols.items()})
            except VerifyError:  # not every size fits this program: then no size is known to be fixed
                self._other = None
        self.maker: dict[str, Op] = {n: op for op in program.ops for n in op.outputs}
        self.readers: dict[str, list[Op]] = {}
        for op in program.ops:
            for n in op.inputs:
                if n:
                    self.readers.setdefault(n, []).append(op)

    def made_by(self, name: str, *kinds: str) -> Op | None:
        """The op that makes a value, if it is of one of these kinds."""
        op = self.maker.get(name)
        return op if op is not None and op.kind in kinds else None

    def uses(self, name: str) -> int:
        """How often a value is read, as an output of the program too."""
        return len(self.readers.get(name, [])) + self.program.outputs.count(name)

    def array(self, name: str) -> Array | None:
        """Data of an f32 constant, else None."""
        constant = self.program.constants.get(name)
        return constant.data if constant is not None and constant.dtype == "f32" else None

    def fixed(self, name: str, axes: list[int]) -> bool:
        """Whether these sizes of a value do not depend on a symbol."""
        if self._other is None:
            return False
        a, b = self.types[name].shape, self._other[name].shape
        return all(a[i] == b[i] for i in axes)


class Names:
    """Makes value names that a program does not use yet."""

    def __init__(self, program: Program) -> None:
        self._taken = (
            {n for op in program.ops for n in op.outputs} | set(program.constants) | set(program.inputs)
        )
        self._counter = 0

    def __call__(self, hint: str) -> str:
        """A new name that begins with `hint`."""
        hint = hint.partition("~")[0]
        while (name := f"{hint}~{self._counter}") in self._taken:
            self._counter += 1
        self._taken.add(name)
        return name


def add_constant(program: Program, hint: str, data: Array) -> str:
    """Store an array and return its name."""
    dtype = {"float32": "f32", "uint8": "u8", "int32": "i32", "int64": "i64", "int8": "i8", "bool": "bool"}[
        str(data.dtype)
    ]
    name = hint
    i = 0
    while name in program.constants:
        if program.constants[name].dtype == dtype and np.array_equal(program.constants[name].data, data):
            return name
        i += 1
        name = f"{hint}:{i}"
    program.constants[name] = Constant(dtype, np.ascontiguousarray(data).reshape(data.shape))
    return name


def rebuilt(program: Program, ops: list[Op], alias: dict[str, str]) -> Program:
    """The program with these ops, and aliased values replaced everywhere."""

    def look(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    done = [replace(op, inputs=tuple(look(n) if n else "" for n in op.inputs)) for op in ops]
    return replace(program, ops=done, outputs=[look(n) for n in program.outputs])
