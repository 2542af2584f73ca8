"""The one intermediate representation: about forty ops of our own over typed tensors, made from the integer model.

Only `pennyweight.program.lower` knows torch; everything else here needs numpy alone.
"""

from pennyweight.program.ir import Op, Program, TensorType

__all__ = ["Op", "Program", "TensorType"]
