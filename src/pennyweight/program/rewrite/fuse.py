"""Join what stands between codes and codes into one integer op."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, Op, Program, replace
from pennyweight.program.ops.functions import UNARY
from pennyweight.program.rewrite.graph import Names, View, add_constant, rebuilt

F32, F64 = np.float32, np.float64


def ratio(a: Any, b: Any) -> Any:
    """`float32(float64(a) / float64(b))`."""
    return (np.asarray(a, F64) / np.asarray(b, F64)).astype(F32)


def channels_at(shape: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """Shape of what differs along one axis of a tensor only."""
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


class _Fuser:
    def __init__(self, program: Program) -> None:
        self.program = replace(program, constants=dict(program.constants))
        self.view = View(program)
        self.ops: list[Op] = []
        self.alias: dict[str, str] = {}
        self.name = Names(program)

    def run(self) -> Program:
        for op in self.program.ops:
            new = self.quantized(op) if op.kind == "quantize" else self.other(op)
            self.ops += [op] if new is None else new
        return rebuilt(self.program, self.ops, self.alias)

    # -- rules that end in a quantize -----------------------------------------------------------------------------

    def quantized(self, op: Op) -> list[Op] | None:
        """Replacement of a quantize and what leads to it, or None."""
        for rule in (
            self.same_codes,
            self.as_table,
            self.as_requant,
            self.as_sum,
            self.as_product,
            self.as_affine,
        ):
            new = rule(op)
            if new is not None:
                return new
        return None

    def same_codes(self, op: Op) -> list[Op] | None:
        source = self.view.made_by(op.inputs[0], "dequantize")
        if source is None:
            return None
        a = op.attrs
        same = source.attrs["scale"] == a["scale"] and source.attrs["zero"] == a["zero"]
        if same and (a["lo"], a["hi"]) == (0, 255):
            self.alias[op.outputs[0]] = source.inputs[0]
            return []
        return None

    def as_table(self, op: Op) -> list[Op] | None:
        """`quantize(f(g(dequantize(q))))`, all functions of one tensor: 256 entries."""
        chain: list[Op] = []
        name = op.inputs[0]
        while (step := self.view.made_by(name, "unary")) is not None:
            chain.append(step)
            name = step.inputs[0]
        source = self.view.made_by(name, "dequantize")
        if source is None:
            return None
        values = (np.arange(256, dtype=F32) - F32(source.attrs["zero"])) * F32(source.attrs["scale"])
        with np.errstate(all="ignore"):
            for step in reversed(chain):
                values = np.asarray(UNARY[step.attrs["fn"]][0](values, step.attrs["p"], step.attrs["q"]), F32)
        a = op.attrs
        t = np.rint(values * (F32(1) / F32(a["scale"]))) + F32(a["zero"])
        lut = np.fmin(np.fmax(t, F32(a["lo"])), F32(a["hi"])).astype(np.uint8)
        table = add_constant(self.program, f"{op.site}.table", lut)
        return [Op("table", (source.inputs[0], table), op.outputs, {}, (chain[0] if chain else op).site)]

    def accumulator(self, name: str) -> tuple[Op, Array] | None:
        """A rescale that only this reader needs, with its constant multiplier."""
        step = self.view.made_by(name, "rescale")
        if (
            step is None
            or self.view.uses(name) > 1
            or any(len(step.inputs) > i and step.inputs[i] for i in (2, 3))
        ):
            return None
        multiplier = self.view.array(step.inputs[1])
        return None if multiplier is None else (step, multiplier)

    def as_requant(self, op: Op) -> list[Op] | None:
        found = self.accumulator(op.inputs[0])
        if found is None:
            return None
        step, multiplier = found
        a = op.attrs
        m = add_constant(self.program, f"{step.site}.requant", ratio(multiplier, F32(a["scale"])))
        attrs = {"zero": a["zero"], "lo": a["lo"], "hi": a["hi"]}
        return [Op("requant", (step.inputs[0], m), op.outputs, attrs, step.site)]

    def as_sum(self, op: Op) -> list[Op] | None:
        step = self.view.made_by(op.inputs[0], "binary")
        if step is None or step.attrs["fn"] != "add":
            return None
        a = op.attrs
        bounds = {"zero": a["zero"], "lo": a["lo"], "hi": a["hi"]}
        scale = F32(a["scale"])
        left, right = (self.view.made_by(n, "dequantize") for n in step.inputs)
        if left is not None and right is not None:
            attrs = {
                "a_zero": left.attrs["zero"], "a_multiplier": float(ratio(left.attrs["scale"], scale)),
                "b_zero": right.attrs["zero"], "b_multiplier": float(ratio(right.attrs["scale"], scale)), **bounds,
            }  # fmt: skip
            return [Op("add_q", (left.inputs[0], right.inputs[0]), op.outputs, attrs, step.site)]
        codes, other = (left, step.inputs[1]) if left is not None else (right, step.inputs[0])
        found = self.accumulator(other)
        if codes is None or found is None or self.view.uses(op.inputs[0]) > 1:
            return None
        product, multiplier = found
        if self.view.types[codes.inputs[0]].shape != self.view.types[product.inputs[0]].shape:
            return None
        m = add_constant(self.program, f"{product.site}.requant", ratio(multiplier, scale))
        attrs = {
            "r_zero": codes.attrs["zero"],
            "r_multiplier": float(ratio(codes.attrs["scale"], scale)),
            **bounds,
        }
        return [Op("requant_add", (product.inputs[0], m, codes.inputs[0]), op.outputs, attrs, step.site)]

    def as_product(self, op: Op) -> list[Op] | None:
        step = self.view.made_by(op.inputs[0], "binary")
        if step is None or step.attrs["fn"] != "mul":
            return None
        left, right = (self.view.made_by(n, "dequantize") for n in step.inputs)
        if left is None or right is None:
            return None
        a = op.attrs
        m = ratio(F64(left.attrs["scale"]) * F64(right.attrs["scale"]), F32(a["scale"]))
        attrs = {
            "a_zero": left.attrs["zero"], "b_zero": right.attrs["zero"], "multiplier": float(m),
            "zero": a["zero"], "lo": a["lo"], "hi": a["hi"],
        }  # fmt: skip
        return [Op("mul_q", (left.inputs[0], right.inputs[0]), op.outputs, attrs, step.site)]

    def as_affine(self, op: Op) -> list[Op] | None:
        """`quantize(dequantize(q) * gain + shift)`, both constant along all axes but the last."""
        return self.affine(op, len(self.view.types[op.inputs[0]].shape) - 1, None)

    def affine(self, op: Op, axis: int, transpose: Op | None) -> list[Op] | None:
        """One map per entry of an axis, which is the last, or which a transpose of the codes makes the last."""
        add = self.view.made_by(op.inputs[0], "binary")
        mul = None if add is None or add.attrs["fn"] != "add" else self.view.made_by(add.inputs[0], "binary")
        if add is None or mul is None or mul.attrs["fn"] != "mul":
            return None
        source = self.view.made_by(mul.inputs[0], "dequantize")
        gain, shift = self.view.array(mul.inputs[1]), self.view.array(add.inputs[1])
        if source is None or gain is None or shift is None:
            return None
        shape = self.view.types[op.inputs[0]].shape
        if any((1,) * (len(shape) - v.ndim) + v.shape != channels_at(shape, axis) for v in (gain, shift)):
            return None
        a = op.attrs
        m = ratio(gain.astype(F64).reshape(-1) * F64(source.attrs["scale"]), F32(a["scale"]))
        offset = ratio(shift.reshape(-1), F32(a["scale"]))
        names = (
            add_constant(self.program, f"{mul.site}.gain", m),
            add_constant(self.program, f"{mul.site}.shift", offset),
        )
        attrs = {"in_zero": source.attrs["zero"], "zero": a["zero"], "lo": a["lo"], "hi": a["hi"]}
        if transpose is None:
            return [Op("affine_q", (source.inputs[0], *names), op.outputs, attrs, mul.site)]
        turned = self.name("transpose")
        return [
            replace(transpose, inputs=source.inputs, outputs=(turned,)),
            Op("affine_q", (turned, *names), transpose.outputs, attrs, mul.site),
        ]

    # -- rules that start from codes and end in floats --------------------------------------------------------------

    def other(self, op: Op) -> list[Op] | None:
        """Replacement of another op, or None."""
        if op.kind == "reduce" and op.attrs["fn"] == "mean":
            return self.mean(op)
        if op.kind == "avg_pool":
            return self.average(op)
        if op.kind == "conv":
            return self.padded(op)
        if op.kind == "transpose":
            return self.raised(op)
        return None

    def raised(self, op: Op) -> list[Op] | None:
        """`transpose(pad(x))` is `pad(transpose(x))`, which a convolution can take in; likewise a map per channel."""
        pad, perm = self.view.made_by(op.inputs[0], "pad"), op.attrs["perm"]
        codes = self.view.made_by(op.inputs[0], "quantize")
        if codes is not None and self.view.uses(op.inputs[0]) == 1:
            return self.affine(codes, perm[-1], op)
        if pad is None or self.view.uses(op.inputs[0]) > 1:
            return None
        n, inner = len(perm), self.name("transpose")
        pads = [pad.attrs["pads"][half + p] for half in (0, n) for p in perm]
        return [
            replace(op, inputs=pad.inputs, outputs=(inner,)),
            replace(pad, inputs=(inner,), outputs=op.outputs, attrs={**pad.attrs, "pads": pads}),
        ]

    def mean(self, op: Op) -> list[Op] | None:
        """The mean of codes is an integer sum and one multiplier."""
        source = self.view.made_by(op.inputs[0], "dequantize")
        axes = op.attrs["axes"]
        if source is None or not self.view.fixed(op.inputs[0], axes):
            return None
        count = int(np.prod([self.view.types[op.inputs[0]].ints[i] for i in axes]))
        attrs = {"zero": source.attrs["zero"], "axes": axes, "keepdims": op.attrs["keepdims"]}
        return self.summed("sum_q", source, attrs, count, op)

    def average(self, op: Op) -> list[Op] | None:
        source = self.view.made_by(op.inputs[0], "dequantize")
        if source is None or not (op.attrs["count_pads"] or not any(op.attrs["pads"])):
            return None
        attrs = {k: op.attrs[k] for k in ("kernel", "stride", "pads")}
        count = int(np.prod(op.attrs["kernel"]))
        return self.summed("sum_pool", source, {"zero": source.attrs["zero"], **attrs}, count, op)

    def summed(self, kind: str, source: Op, attrs: dict[str, Any], count: int, op: Op) -> list[Op]:
        acc = self.name("acc")
        m = np.asarray([F64(source.attrs["scale"]) / count], F32)
        constant = add_constant(self.program, f"{op.site}.mean", m)
        return [
            Op(kind, source.inputs, (acc,), attrs, op.site),
            Op("rescale", (acc, constant), op.outputs, {}, op.site),
        ]

    def padded(self, op: Op) -> list[Op] | None:
        """Padding with the zero point belongs to the convolution."""
        pad = self.view.made_by(op.inputs[0], "pad")
        if pad is None or pad.attrs["value"] != op.attrs["zero"] or (len(op.inputs) > 3 and op.inputs[3]):
            return None
        n = len(pad.attrs["pads"]) // 2
        begin, end = pad.attrs["pads"][:n], pad.attrs["pads"][n:]
        if any((begin[0], end[0], begin[-1], end[-1])):
            return None
        extra = [*begin[1:-1], *end[1:-1]]
        pads = [p + e for p, e in zip(op.attrs["pads"], extra, strict=True)]
        return [replace(op, inputs=(pad.inputs[0], *op.inputs[1:]), attrs={**op.attrs, "pads": pads})]


def fuse(program: Program) -> Program:
    """Apply every rule once, everywhere it fits."""
    return _Fuser(program).run()
