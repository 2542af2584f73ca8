"""From a converted model to a program: one `torch.export` of the integer model, then op by op."""

from pennyweight.program.lower.driver import lower

__all__ = ["lower"]
