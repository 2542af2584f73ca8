"""The names of torchao over the core verbs: only the root of an import changes."""

from pennyweight.compat.torchao import quantization

__all__ = ["quantization"]
