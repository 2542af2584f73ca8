"""Sink transposes towards the outputs until they meet their inverse: what torch calls channels-first vanishes."""

from __future__ import annotations

from pennyweight.program.ir import Op, Program, replace
from pennyweight.program.rewrite.graph import Names, View, add_constant, rebuilt

Perm = tuple[int, ...]

ELEMENTWISE = frozenset({"unary", "quantize", "dequantize", "cast", "table"})
SPREAD = frozenset({"binary", "where", "add_q", "mul_q"})
PER_AXIS = {
    "pad": ("pads",),
    "slice": ("starts", "stops", "steps"),
    "upsample": ("repeats",),
    "stuff": ("factors",),
    "expand": ("shape",),
}


def inverse(perm: Perm) -> Perm:
    """The permutation that undoes one."""
    return tuple(perm.index(i) for i in range(len(perm)))


class _Sinker:
    def __init__(self, program: Program) -> None:
        self.program = replace(program, constants=dict(program.constants))
        self.view = View(program)
        self.ops: list[Op] = []
        self.alias: dict[str, str] = {}
        self.lazy: dict[str, tuple[str, Perm]] = {}  # value -> it is `transpose(base, perm)`, not emitted
        self.name = Names(program)

    def look(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def transpose(self, name: str, perm: Perm, site: str) -> str:
        """Emit a transpose and return its value."""
        if perm == tuple(range(len(perm))):
            return name
        out = self.name("transpose")
        self.ops.append(Op("transpose", (name,), (out,), {"perm": list(perm)}, site))
        return out

    def real(self, name: str, site: str) -> str:
        """A value that exists: emits the transpose that was put off."""
        name = self.look(name)
        if name not in self.lazy:
            return name
        base, perm = self.lazy.pop(name)
        sizes = self.view.types[name].shape if name in self.view.types else ()
        moved = [p for p in perm if sizes and sizes[perm.index(p)] != 1]
        if (
            sizes
            and moved == sorted(moved)
            and self.view.fixed(name, [i for i, s in enumerate(sizes) if s == 1])
        ):
            # only axes of size 1 move: the same bytes
            out = name
            shape = [s if self.view.fixed(name, [i]) else -1 for i, s in enumerate(sizes)]
            if shape.count(-1) <= 1:
                self.ops.append(Op("reshape", (base,), (out,), {"shape": shape}, site))
                return out
        self.ops.append(Op("transpose", (base,), (name,), {"perm": list(perm)}, site))
        return name

    def run(self) -> Program:
        for op in self.program.ops:
            self.visit(op)
        program = rebuilt(self.program, self.ops, self.alias)
        ops = list(program.ops)
        self.ops = ops
        outputs = [self.real(n, "") for n in program.outputs]
        return replace(program, ops=self.ops, outputs=outputs)

    def visit(self, op: Op) -> None:
        inputs = tuple(self.look(n) if n else "" for n in op.inputs)
        perms = [self.lazy[n][1] if n in self.lazy else None for n in inputs]
        if op.kind == "transpose":
            self.visit_transpose(op, inputs[0])
        elif all(p is None for p in perms):
            self.ops.append(replace(op, inputs=inputs))
        elif (op.kind in ELEMENTWISE or op.kind in PER_AXIS) and perms[0] is not None:
            self.visit_one(op, inputs, perms[0])
        elif op.kind == "dynamic_quantize" and not op.attrs["per_token"] and perms[0] is not None:
            base = self.lazy[inputs[0]][0]
            codes = self.name(op.kind)
            self.ops.append(replace(op, inputs=(base,), outputs=(codes, *op.outputs[1:])))
            self.lazy[op.outputs[0]] = (codes, perms[0])
        elif op.kind in SPREAD or op.kind == "concat":
            self.visit_many(op, inputs, next(p for p in perms if p is not None))
        elif op.kind in ("reduce", "sum_q") and perms[0] is not None:
            self.visit_reduce(op, inputs[0], perms[0])
        elif op.kind in ("matmul", "matmul_f32") and perms[1] is not None and self.swaps_last(perms[1]):
            first = self.real(inputs[0], op.site)
            attrs = {**op.attrs, "transpose_b": not op.attrs["transpose_b"]}
            self.ops.append(replace(op, inputs=(first, self.lazy[inputs[1]][0]), attrs=attrs))
        elif op.kind == "gather" and perms[0] is not None and len(self.view.types[inputs[1]].shape) == 1:
            out = self.name(op.kind)
            attrs = {"axis": perms[0][op.attrs["axis"]]}
            self.ops.append(
                replace(op, inputs=(self.lazy[inputs[0]][0], inputs[1]), outputs=(out,), attrs=attrs)
            )
            self.lazy[op.outputs[0]] = (out, perms[0])
        else:
            self.ops.append(replace(op, inputs=tuple(self.real(n, op.site) if n else "" for n in inputs)))

    @staticmethod
    def swaps_last(perm: Perm) -> bool:
        n = len(perm)
        return perm == (*range(n - 2), n - 1, n - 2)

    def visit_transpose(self, op: Op, source: str) -> None:
        perm: Perm = tuple(op.attrs["perm"])
        if source in self.lazy:
            source, before = self.lazy[source]
            perm = tuple(before[p] for p in perm)
        if perm == tuple(range(len(perm))):
            self.alias[op.outputs[0]] = source
        else:
            self.lazy[op.outputs[0]] = (source, perm)

    def visit_one(self, op: Op, inputs: tuple[str, ...], perm: Perm) -> None:
        attrs = dict(op.attrs)
        n = len(perm)
        for key in PER_AXIS.get(op.kind, ()):
            old = attrs[key]
            new = list(old)
            for start in range(0, len(old), n):  # pads: begin, then end
                for i, p in enumerate(perm):
                    new[start + p] = old[start + i]
            attrs[key] = new
        if op.kind == "expand" and len(self.view.types[op.inputs[0]].shape) != len(attrs["shape"]):
            self.ops.append(replace(op, inputs=(self.real(inputs[0], op.site),)))
            return
        out = self.name(op.kind)
        self.ops.append(
            replace(op, inputs=(self.lazy[inputs[0]][0], *inputs[1:]), outputs=(out,), attrs=attrs)
        )
        self.lazy[op.outputs[0]] = (out, perm)

    def visit_many(self, op: Op, inputs: tuple[str, ...], perm: Perm) -> None:
        n = len(perm)
        if len(self.view.types[op.outputs[0]].shape) != n:
            self.ops.append(replace(op, inputs=tuple(self.real(x, op.site) for x in inputs)))
            return
        back = inverse(perm)
        bases: list[str] = []
        for x in inputs:
            rank = len(self.view.types[x].shape) if x in self.view.types else n
            if x in self.lazy and self.lazy[x][1] == perm:
                bases.append(self.lazy[x][0])
            elif x in self.program.constants:
                data = self.program.constants[x].data
                data = data.reshape((1,) * (n - data.ndim) + data.shape).transpose(back)
                bases.append(add_constant(self.program, f"{x}~", data))
            elif rank == n:
                bases.append(self.transpose(self.real(x, op.site), back, op.site))
            elif all(s == 1 for s in self.view.types[x].shape):
                bases.append(self.real(x, op.site))
            else:
                bases = []
                break
        if not bases:
            self.ops.append(replace(op, inputs=tuple(self.real(x, op.site) for x in inputs)))
            return
        attrs = {**op.attrs, "axis": perm[op.attrs["axis"]]} if op.kind == "concat" else op.attrs
        out = self.name(op.kind)
        self.ops.append(replace(op, inputs=tuple(bases), outputs=(out,), attrs=attrs))
        self.lazy[op.outputs[0]] = (out, perm)

    def visit_reduce(self, op: Op, source: str, perm: Perm) -> None:
        axes = [perm[a] for a in op.attrs["axes"]]
        out = self.name(op.kind)
        attrs = {**op.attrs, "axes": sorted(axes)}
        self.ops.append(replace(op, inputs=(self.lazy[source][0],), outputs=(out,), attrs=attrs))
        if op.attrs["keepdims"]:
            result = perm
        else:
            left = sorted(p for p in perm if p not in axes)
            result = tuple(left.index(p) for p in perm if p not in axes)
        if result == tuple(range(len(result))):
            self.alias[op.outputs[0]] = out
        else:
            self.lazy[op.outputs[0]] = (out, result)


def sink_transposes(program: Program) -> Program:
    """Move every transpose down through ops that do not care, and cancel pairs."""
    return _Sinker(program).run()
