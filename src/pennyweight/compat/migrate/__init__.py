"""Rewrite code that imports torch's or torchao's quantization to the same names here."""

from pennyweight.compat.migrate.rewrite import Note, Result, rewrite

__all__ = ["Note", "Result", "rewrite"]
