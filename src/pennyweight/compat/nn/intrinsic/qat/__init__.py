"""What was used of the fused layers of training."""

from pennyweight.compat.quantization.quantize import freeze_bn_stats, update_bn_stats

__all__ = ["freeze_bn_stats", "update_bn_stats"]
