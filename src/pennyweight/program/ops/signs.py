"""Values of one bit: signs against thresholds, and products of signs; exact in int32.

Bits are packed along the last axis, the first value in the lowest bit, every group of channels in bytes of its own:
`groups * ceil(C / groups / 8)` bytes a row, unused bits 0. A bit 1 stands for 1, a bit 0 for -1.
"""

from __future__ import annotations

import math

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want
from pennyweight.program.ops.products import conv_type, convolve, pad_space

F64 = np.float64


def packed_size(channels: int, groups: int) -> int:
    """Bytes of a row of bits."""
    return groups * -(-(channels // groups) // 8)


def pack(bits: Array, groups: int = 1) -> Array:
    """[..., C] truth values to bytes [..., groups * ceil(C / groups / 8)]."""
    split = bits.reshape(*bits.shape[:-1], groups, bits.shape[-1] // groups)
    packed = np.packbits(split, axis=-1, bitorder="little")
    return packed.reshape(*bits.shape[:-1], -1)


def unpack(packed: Array, channels: int, groups: int = 1) -> Array:
    """The inverse, as -1.0 and 1.0, float64 [..., C]."""
    split = packed.reshape(*packed.shape[:-1], groups, -1)
    bits = np.unpackbits(split, axis=-1, count=channels // groups, bitorder="little")
    return bits.reshape(*packed.shape[:-1], channels).astype(F64) * 2.0 - 1.0


@define("sign", "groups")
class Sign:
    """`bit = (x >= t) xor flip`, packed; NaN is below every threshold.

    x f32, u8 or i32 [..., C], t of the same dtype [C] or [1], flip u8 [C] (0 or 1) or absent
    -> u8 [..., groups * ceil(C / groups / 8)].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Bytes in place of the last axis."""
        x, groups = want(types[0], "f32", "u8", "i32"), attrs["groups"]
        require(len(x) > 0 and x[-1] % groups == 0, f"{x} does not split into {groups} groups")
        require(want(types[1], types[0].dtype) in ((1,), (x[-1],)), "the thresholds do not fit the channels")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "u8") == (x[-1],), "the flips do not fit the channels")
        return [TensorType("u8", (*x[:-1], packed_size(x[-1], groups)))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        bits = array(x[0]) >= array(x[1])
        if len(x) > 2 and x[2] is not None:
            bits = bits ^ (array(x[2]) != 0)
        return [pack(bits, a["groups"])]


def _added(acc: Array, x: Operands) -> list[Array]:
    whole = acc.astype(np.int64)
    if len(x) > 2 and x[2] is not None:
        whole = whole + array(x[2])
    return [whole.astype(np.int32)]


@define("conv_binary", "shape stride pads dilation groups")
class ConvBinary:
    """`acc = sum x * w + bias` over values -1 and 1; what is padded adds nothing, as a zero would.

    x bits u8 [N, *space, groups * ceil(C / groups / 8)], w bits u8 [O, ceil(K / 8)], K = C / groups * prod(kernel) in
    the order of shape = [O, C / groups, *kernel], bias i32 [O] or absent -> i32 [N, *out, O]. pads: [begin..., end...].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, O]."""
        x, shape, groups = want(types[0], "u8"), tuple(attrs["shape"]), attrs["groups"]
        require(len(shape) >= 3 and all(s > 0 for s in shape), f"{shape} is no weight of a convolution")
        size = packed_size(shape[1] * groups, groups)
        require(len(x) > 0 and x[-1] == size, f"x {x} holds no {shape[1]} channels in {groups} groups")
        stored = (shape[0], -(-math.prod(shape[1:]) // 8))
        require(want(types[1], "u8") == stored, f"packed weights have shape {types[1].ints}, wanted {stored}")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "i32") == (shape[0],), "the bias does not fit the outputs")
        return [TensorType("i32", conv_type((*x[:-1], shape[1] * groups), shape, attrs))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        shape = tuple(a["shape"])
        weight = unpack(array(x[1]), math.prod(shape[1:])).reshape(shape)
        signs = unpack(array(x[0]), shape[1] * a["groups"], a["groups"])
        return _added(convolve(pad_space(signs, a["pads"], 0.0), weight, a), x)


@define("linear_binary", "n")
class LinearBinary:
    """`acc = sum x * w + bias` over values -1 and 1.

    x bits u8 [..., ceil(n / 8)], w bits u8 [O, ceil(n / 8)], bias i32 [O] or absent -> i32 [..., O].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., O]."""
        x, weight, n = want(types[0], "u8"), want(types[1], "u8"), attrs["n"]
        require(len(x) > 0 and n > 0 and x[-1] == -(-n // 8), f"x {x} does not hold {n} bits")
        require(len(weight) == 2 and weight[1] == x[-1], f"x {x} does not fit packed weights {weight}")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "i32") == (weight[0],), "the bias does not fit the outputs")
        return [TensorType("i32", (*x[:-1], weight[0]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return _added(unpack(array(x[0]), a["n"]) @ unpack(array(x[1]), a["n"]).T, x)
