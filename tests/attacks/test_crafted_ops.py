"""Ops that no writer of ours makes: operands too many, stored weights whose shape depends on an input."""

import numpy as np
import pytest

from pennyweight.errors import KernelError, VerifyError
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.ops import definitions
from pennyweight.program.verify import verify
from pennyweight.runtime.widen import widened


@pytest.mark.parametrize(("kind", "most"), [("past_attention", 5), ("past_attention_q", 10)])
def test_operands_too_many(kind, most):
    with pytest.raises(VerifyError, match=f"{most} operands, not {most + 1}"):
        definitions[kind].infer([TensorType("f32", (1,))] * (most + 1), {"block": 0, "factor": 1.0})


def test_a_stored_weight_of_the_size_of_an_input():
    constants = {
        "c": Constant("u8", np.ones((2, 3), np.uint8)),
        "l": Constant("f32", np.arange(256, dtype=np.float32)),
        "s": Constant("f32", np.ones((1, 1), np.float32)),
    }
    decode = Op("decode_levels", ("c", "l", "s"), ("w",), {"bits": 8, "shape": ["batch", 3]}, "layer")
    add = Op("binary", ("x", "w"), ("y",), {"fn": "add"}, "layer")
    program = Program({"x": TensorType("f32", ("batch", 3))}, ["y"], [decode, add], constants, {"batch": 2})
    verify(program)
    np.testing.assert_array_equal(interpret(program, {"x": np.zeros((2, 3), np.float32)})["y"], 1)
    with pytest.raises(KernelError, match="depends on the inputs"):
        widened(program)
