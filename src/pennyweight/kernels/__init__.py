"""The opaque torch ops `pennyweight::*` that converted modules call; `torch.export` keeps each as one node."""

from pennyweight.kernels import fake, ops

__all__ = ["fake", "ops"]
