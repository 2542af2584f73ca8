"""The value ranges that kernels rely on, which types do not show. Checked before any file reaches native code.

scales        finite, above 0, with a finite reciprocal in float32
codes         zero points and clamps 0 .. 255, lo <= hi
multipliers   finite in float32
accumulators  no integer product can leave int32, whatever its inputs
sizes         at most 8 axes, and fewer than 2^31 elements a value
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pennyweight.errors import VerifyError
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.ops import definitions

MAX_RANK = 8
MAX_ELEMENTS = 2**31 - 1
MAX_EXPRESSION = 500
INT32_MAX = 2**31 - 1
F32_MAX = 3.4028234663852886e38
_EXPRESSION = re.compile(r"[A-Za-z0-9_+\-*/%() ]+")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _real(v: Any) -> bool:
    return type(v) in (int, float) and -F32_MAX <= v <= F32_MAX


def _extended(v: Any) -> bool:
    """A number that may be infinite, but not NaN; or a truth value, to fill with."""
    return type(v) in (int, float, bool) and (math.isinf(v) or -(2**63) <= v < 2**63 or _real(v))


def _scale(v: Any) -> bool:
    return type(v) is float and 1e-38 <= v <= 1e38


def _epsilon(v: Any) -> bool:
    return _real(v) and v >= 0


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda v: type(v) is kind


def _all_whole(low: int, high: int) -> Callable[[Any], bool]:
    def check(v: Any) -> bool:
        if type(v) is not list or len(v) > 2 * MAX_RANK:
            return False
        for x in v:  # noqa: SIM110 (a generator takes twice the time, at every start)
            if type(x) is not int or not low <= x <= high:
                return False
        return True

    return check


_ranks = _all_whole(0, MAX_RANK)


def _distinct(v: Any) -> bool:
    """Different axes."""
    return _ranks(v) and len(set(v)) == len(v)


def _size(v: Any) -> bool:
    """A size: a whole number, or an expression of symbols."""
    if type(v) is str:
        return len(v) <= MAX_EXPRESSION and _EXPRESSION.fullmatch(v) is not None
    return type(v) is int and -1 <= v <= MAX_ELEMENTS


_numbers = _all_whole(-1, MAX_ELEMENTS)


def _sizes(v: Any) -> bool:
    """A list of sizes."""
    return type(v) is list and len(v) <= 2 * MAX_RANK and (_numbers(v) or all(map(_size, v)))


_CODE = (_whole(0, 255), "a code, 0 .. 255")
_MULTIPLIER = (_real, "a finite number")
_FLAG = (_is(bool), "true or false")
_NAME = (_is(str), "a name")
_STEPS = (_all_whole(1, MAX_ELEMENTS), "a list of whole numbers from 1")
_AXES = (_distinct, "a list of different axes")
_SIZES = (_sizes, "a list of sizes")
_ANY_INT = (_whole(-INT32_MAX, INT32_MAX), "a whole number of 32 bits")

# attribute -> (predicate, what it must be); one meaning for a name, whatever the op
ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("zero", "lo", "hi", "in_zero", "r_zero", "a_zero", "b_zero", "q_zero", "k_zero", "v_zero"), _CODE
    ),
    **dict.fromkeys(("multiplier", "r_multiplier", "a_multiplier", "b_multiplier", "factor"), _MULTIPLIER),
    **dict.fromkeys(
        ("per_token", "transpose_b", "causal", "keepdims", "count_pads", "reverse"), _FLAG
    ),
    **dict.fromkeys(("fn", "dtype"), _NAME),
    **dict.fromkeys(("stride", "dilation", "steps", "factors"), _STEPS),
    **dict.fromkeys(("perm", "axes"), _AXES),
    **dict.fromkeys(("shape", "starts", "stops", "pads", "kernel", "repeats"), _SIZES),
    **dict.fromkeys(("start", "step"), _ANY_INT),
    **dict.fromkeys(("shift", "r_shift"), (_whole(-8, 23), "a shift, -8 .. 23")),
    "scale": (_scale, "a number from 1e-38 to 1e38"),
    "eps": (_epsilon, "a finite number, 0 or above"),
    "p": (_extended, "a number"),
    "q": (_extended, "a number"),
    "value": (_extended, "a number"),
    "axis": (_whole(0, MAX_RANK), "an axis"),
    "groups": (_whole(1, MAX_ELEMENTS), "a whole number from 1"),
    "bits": (_whole(1, 8), "a whole number from 1 to 8"),
    "block": (_whole(0, MAX_ELEMENTS), "a whole number"),
    "n": (_whole(0, MAX_ELEMENTS), "a size"),
    "size": (_size, "a size"),
}  # fmt: skip

# op -> positions of the operands that hold scales, multipliers or offsets, which must be finite where they are stored
_FINITE: dict[str, tuple[int, ...]] = {
    "requant": (1,), "requant_add": (1,), "rescale": (1, 2, 3), "affine_q": (1, 2), "linear_w": (2, 3, 4),
    "linear_grouped": (2, 5), "decode": (1, 2), "decode_levels": (1, 2),
    "embedding": (2, 3), "lstm": (4, 6, 7, 8), "gru": (3, 5, 6, 7),
}  # fmt: skip


def check_attributes(program: Program) -> None:
    """Check every attribute against the one meaning of its name.

    Raises:
        VerifyError: on the first that is of another type or out of range.
    """
    for op in program.ops:
        for key, value in op.attrs.items():
            rule = ATTRIBUTES.get(key)
            if rule is not None and not rule[0](value):
                raise VerifyError(f"{op.kind}.{key} = {_short(value)} is not {rule[1]}", site=op.site)
            if rule is None and (type(value) not in (int, float, bool, str) or value != value):
                raise VerifyError(f"{op.kind}.{key} = {_short(value)} is no plain value", site=op.site)
        if "lo" in op.attrs and "hi" in op.attrs and op.attrs["lo"] > op.attrs["hi"]:
            raise VerifyError(f"{op.kind} clamps to {op.attrs['lo']} .. {op.attrs['hi']}", site=op.site)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_sizes(program: Program, types: Mapping[str, TensorType], *, again: bool = False) -> None:
    """Check the sizes of all values for one binding of the symbols, and that no accumulator can overflow.

    Args:
        program: verified.
        types: from `verify.infer`.
        again: this program has passed at other sizes: what depends on its constants alone is not computed anew.

    Raises:
        VerifyError: on a value of too many axes or elements, or a product whose sums can leave int32.
    """
    absurd = {s for s in {kind.shape for kind in types.values()} if _absurd(s)}  # few are different
    for name, kind in types.items() if absurd else ():
        if kind.shape in absurd:
            raise VerifyError(f"value {name!r} has an absurd size", shapes=str(kind))
    unpacked = {op.outputs[0]: op for op in program.ops if op.kind == "unpack"}
    loosest = INT32_MAX if again else _loosest(program.constants)
    for op in program.ops:
        terms = _TERMS.get(op.kind)
        if terms is None or (
            again and terms is _product and (op.inputs[1] in program.constants or op.inputs[1] in unpacked)
        ):
            continue
        if terms is _product and _reach(op, types) + loosest <= INT32_MAX:
            continue
        worst = terms(op, types, program.constants)
        if worst > INT32_MAX and terms is _product and op.inputs[1] in unpacked:
            worst = _product(op, types, {**program.constants, **_weight(program, unpacked[op.inputs[1]])})
        if worst > INT32_MAX:
            raise VerifyError(
                f"the sums of {op.kind} can reach {worst}, beyond int32",
                site=op.site,
                shapes=", ".join(str(types[n]) for n in op.inputs if n),
            )


def _absurd(shape: tuple[Any, ...]) -> bool:
    if str in map(type, shape):
        raise VerifyError("a size is still a symbol", shapes=str(shape))
    return len(shape) > MAX_RANK or math.prod(shape) > MAX_ELEMENTS or min(shape, default=0) < 0


def _weight(program: Program, unpack: Op) -> dict[str, Constant]:
    """A weight that an `unpack` op makes of constants, by its name."""
    found = [program.constants.get(n) for n in unpack.inputs]
    table = found[1]
    if table is None or None in found:
        return {}
    (codes,) = definitions["unpack"].run(found, unpack.attrs)
    return {unpack.outputs[0]: Constant(table.dtype, codes)}


def _largest(numbers: Constant) -> int:
    """Largest magnitude; of at least one number."""
    flat = numbers.data.reshape(-1)
    return max(-int(np.minimum.reduce(flat)), int(np.maximum.reduce(flat)))


def _loosest(constants: Mapping[str, Constant]) -> int:
    """A bound of all biases, found at once: with it, few need be looked at one by one."""
    flat = [c.data.reshape(-1) for c in constants.values() if c.dtype == "i32"]
    every = np.concatenate(flat) if flat else np.zeros(0, np.int32)
    return max(-int(every.min()), int(every.max())) if every.size else 0


def _reach(op: Op, types: Mapping[str, TensorType]) -> int:
    """Largest |accumulator| of conv and linear, whatever the weights are, without their bias."""
    weight = types[op.inputs[1]]
    return math.prod(weight.ints[1:]) * 255 * (1 << (15 if weight.dtype == "i16" else 7))


def _product(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    """Largest |accumulator| of conv and linear: `sum |q - z| |w| + |bias|` with |q - z| <= 255."""
    weight = types[op.inputs[1]].ints
    bias = constants.get(op.inputs[2]) if len(op.inputs) > 2 else None
    offset = 0
    if bias is not None and bias.data.size:
        offset = _largest(bias)
    worst = _reach(op, types) + offset
    stored = constants.get(op.inputs[1])
    if worst <= INT32_MAX or stored is None or not stored.data.size:
        return worst
    rows = np.abs(stored.data.astype(np.int64)).reshape(weight[0], -1).sum(1) * 255
    if bias is not None:
        rows = rows + np.abs(bias.data.astype(np.int64))
    return int(rows.max())


def _grouped(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    """Largest |accumulator| of one group."""
    length = int(op.attrs["n"]) // types[op.inputs[2]].ints[1]
    return length * 255 * (1 << (int(op.attrs["bits"]) - 1))


def _signs(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    """Largest |accumulator| of products of signs: one for each term, and the bias."""
    terms = math.prod(op.attrs["shape"][1:]) if "shape" in op.attrs else int(op.attrs["n"])
    bias = constants.get(op.inputs[2]) if len(op.inputs) > 2 else None
    if bias is None or not bias.data.size:
        return 2 * terms  # kernels count before they take in the sign
    return 2 * terms + _largest(bias)


def _matmul(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    return types[op.inputs[0]].ints[-1] * 255 * 255


def _attention(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    """Scores: D terms of 255^2. Values: probabilities round up by at most a half each, so they sum to 255 + S / 2."""
    width, length = types[op.inputs[0]].ints[-1], types[op.inputs[1]].ints[-2]
    return max(width * 255 * 255, (255 + (length + 1) // 2) * 255)


def _pooled(op: Op, types: Mapping[str, TensorType], constants: Mapping[str, Constant]) -> int:
    before, after = (math.prod(types[n].ints) for n in (op.inputs[0], op.outputs[0]))
    kernel = op.attrs.get("kernel")
    terms = math.prod(k for k in kernel if isinstance(k, int)) if kernel else before // max(after, 1)
    return terms * 255


_TERMS: dict[str, Callable[[Op, Mapping[str, TensorType], Mapping[str, Constant]], int]] = {
    "conv": _product,
    "linear": _product,
    "linear_grouped": _grouped,
    "conv_binary": _signs,
    "linear_binary": _signs,
    "matmul": _matmul,
    "attention": _attention,
    "sum_pool": _pooled,
    "sum_q": _pooled,
}


def check_constants(program: Program) -> None:
    """Check stored values: truth values are 0 or 1, scales and multipliers finite, fills of codes are codes.

    Raises:
        VerifyError: on the first that is not.
    """
    for name, constant in program.constants.items():
        if constant.dtype == "bool" and constant.data.size and int(constant.data.view(np.uint8).max()) > 1:
            raise VerifyError(f"constant {name!r} holds truth values other than 0 and 1")
    wanted: dict[str, Op] = {}
    for op in program.ops:
        for position in _FINITE.get(op.kind, ()):
            name = op.inputs[position] if position < len(op.inputs) else ""
            constant_ = program.constants.get(name)
            if constant_ is not None and constant_.dtype in ("f32", "f16", "bf16"):
                wanted.setdefault(name, op)
    small = {n: c for n in wanted if (c := program.constants[n]).dtype == "f32" and c.data.size < 4096}
    if small and np.isfinite(np.concatenate([c.data.reshape(-1) for c in small.values()])).all():
        wanted = {n: op for n, op in wanted.items() if n not in small}  # many in one go
    for name, op in wanted.items():
        if not finite(program.constants[name]):
            raise VerifyError(f"constant {name!r} of {op.kind} is not finite", site=op.site)


def finite(constant: Constant) -> bool:
    """Whether no entry of an f32, f16 or bf16 constant is NaN or infinite."""
    if constant.dtype == "bf16":
        return bool(((constant.data & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(constant.data).all())


def check_fills(program: Program, types: Mapping[str, TensorType]) -> None:
    """Check that the number an op fills with fits the dtype it fills.

    Raises:
        VerifyError: on the first that does not.
    """
    limits = {"u8": (0, 255), "i8": (-128, 127), "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}
    for op in program.ops:
        if "value" not in op.attrs:
            continue
        value, dtype = op.attrs["value"], types[op.outputs[0]].dtype
        if dtype in limits:
            low, high = limits[dtype]
            if math.isinf(value) or value != int(value) or not low <= value <= high:
                raise VerifyError(f"{op.kind} fills {dtype} with {value}", site=op.site)


def check(program: Program, types: Mapping[str, TensorType]) -> None:
    """All of the above, for a verified program and its types at the example's sizes.

    Raises:
        VerifyError: on the first broken promise.
    """
    check_sizes(program, types)
    check_constants(program)
    check_fills(program, types)
