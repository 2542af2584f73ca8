"""The product of signs by exclusive or and count, at any length."""

from __future__ import annotations

import numpy as np
import pytest

from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine

LENGTHS = [*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 257, 511, 1000]
ISAS = library.supported_isas()


@pytest.mark.parametrize("isa", ISAS)
def test_count_of_differences_is_the_dot_product(isa):
    """n - 2 popcount(a xor b) = sum of products of -1 and 1, with bits behind the n-th that count for nothing."""
    rng = np.random.default_rng(3)
    for n in [*LENGTHS, *(int(k) for k in rng.integers(34, 1000, 8))]:
        a, b = (rng.choice(np.array([-1.0, 1.0], np.float32), (rows, n)) for rows in (5, 19))
        weights = np.packbits(b > 0, axis=1, bitorder="little")
        program = Program(
            {"x": TensorType("f32", a.shape)},
            ["y"],
            [
                Op("sign", ("x", "t"), ("bits",), {"groups": 1}),
                Op("linear_binary", ("bits", "w"), ("y",), {"n": n}),
            ],
            {"w": Constant("u8", weights), "t": Constant("f32", np.zeros(1, np.float32))},
            {},
            0,
        )
        want = (a @ b.T).astype(np.int32)
        assert np.array_equal(interpret(program, {"x": a})["y"], want), n
        assert np.array_equal(Engine(program, threads=1, isa=isa).run({"x": a})["y"], want), n
