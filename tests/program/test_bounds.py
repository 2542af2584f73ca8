"""Sums of grouped products are bounded group by group."""

import numpy as np
import pytest

from pennyweight.errors import VerifyError
from pennyweight.program.bounds import check
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.verify import verify


def program(n, groups, bits):
    width = n if bits == 8 else n // 2
    constants = {
        "w": Constant("i8" if bits == 8 else "u4", np.zeros((1, width), np.int8 if bits == 8 else np.uint8)),
        "s": Constant("f32", np.ones((1, groups), np.float32)),
    }
    ops = [
        Op("dynamic_quantize", ("x",), ("q", "r", "z"), {"per_token": True}, "q"),
        Op("linear_grouped", ("q", "w", "s", "z", "r"), ("y",), {"bits": bits, "n": n}, "y"),
    ]
    return Program({"x": TensorType("f32", (2, n))}, ["y"], ops, constants, {}, [0])


@pytest.mark.parametrize(("groups", "bits"), [(1, 8), (2, 8), (1, 4)])
def test_groups_whose_sums_may_leave_int32_are_refused(groups, bits):
    longest = (2**31 - 1) // (255 << (bits - 1))  # inputs of one group
    fine = program(longest // 2 * 2 * groups, groups, bits)
    check(fine, verify(fine))
    long = program((longest + 2) // 2 * 2 * groups, groups, bits)
    with pytest.raises(VerifyError, match="the sums of linear_grouped can reach"):
        check(long, verify(long))
