"""How the small programs of the native tests are written down."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pennyweight.program.ir import Constant, Op, Program, TensorType

F32 = np.float32
NAMES = {
    "float32": "f32",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "bool": "bool",
}
CODES = {"zero": 7, "lo": 0, "hi": 255}
# rows, columns and inputs of products that divide nothing
RAGGED = [(1, 1, 1), (1, 16, 64), (2, 17, 3), (3, 64, 65), (5, 130, 4), (7, 48, 31)]


@dataclass
class Case:
    """A program being written, with values for its inputs."""

    name: str
    seed: int = 0
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.rng = np.random.default_rng([self.seed, *self.name.encode()])

    def input(self, array):
        name = f"x{len(self.inputs)}"
        self.inputs[name] = np.ascontiguousarray(array)
        return name

    def codes(self, *shape, extreme=False):
        if extreme:
            return self.input(self.rng.choice(np.array([0, 255], np.uint8), shape))
        return self.input(self.rng.integers(0, 256, shape, dtype=np.uint8))

    def floats(self, *shape, scale=3.0):
        return self.input((self.rng.standard_normal(shape) * scale).astype(F32))

    def constant(self, array, dtype=""):
        name = f"c{len(self.constants)}"
        array = np.ascontiguousarray(array)
        self.constants[name] = Constant(dtype or NAMES[str(array.dtype)], array)
        return name

    def weight(self, *shape, extreme=False):
        if extreme:
            return self.constant(self.rng.choice(np.array([-128, 127], np.int8), shape))
        return self.constant(self.rng.integers(-128, 128, shape, dtype=np.int8))

    def trained(self, *shape):
        """Weights as training leaves them: most small, here and there two of the largest side by side."""
        w = np.clip(np.rint(self.rng.standard_normal(shape) * 30), -128, 127).astype(np.int8)
        for place in self.rng.integers(0, w.size - 1, 1 + w.size // 300):
            w.reshape(-1)[place : place + 2] = self.rng.choice(np.array([-128, 127], np.int8))
        return self.constant(w)

    def wide(self, n, *rest, extreme=False):
        """Weights of 16 bits, powers of two or all of them, whose products with bytes add up to less than 2^31."""
        k = int(np.prod(rest))
        most = min(32767, (2**31 - 30000) // (255 * k))
        if extreme:
            w = self.rng.choice(np.array([-most, most]), (n, k))
        else:
            signs = self.rng.choice(np.array([-1, 0, 1]), (n, k))
            w = signs * np.minimum(np.exp2(self.rng.integers(0, 15, (n, k))), most)
            w[::2] = np.rint(self.rng.standard_normal((len(w[::2]), k)) * most / 4).clip(-most, most)
        return self.constant(w.astype(np.int16).reshape(n, *rest))

    def multiplier(self, n, k):
        """Multipliers that spread accumulators of depth k over the codes."""
        return self.constant((self.rng.uniform(0.2, 3.0, n) / (70.0 * 70.0 * np.sqrt(k))).astype(F32))

    def bias(self, n):
        return self.constant(self.rng.integers(-20000, 20000, n, dtype=np.int32))

    def op(self, kind, inputs, results=1, **attrs):
        outputs = tuple(f"v{len(self.ops)}_{i}" for i in range(results))
        self.ops.append(Op(kind, tuple(inputs), outputs, attrs, f"{kind}{len(self.ops)}"))
        return outputs[0] if results == 1 else outputs

    def program(self, *outputs):
        self.outputs = list(outputs)
        types = {n: TensorType(NAMES[str(a.dtype)], tuple(a.shape)) for n, a in self.inputs.items()}
        return Program(types, self.outputs, self.ops, self.constants, {}, list(range(len(outputs))))
