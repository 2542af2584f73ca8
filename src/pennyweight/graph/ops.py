"""What the planner knows of operations: which move values, which clip them, which have integer kernels."""

from __future__ import annotations

CONVS = frozenset({"Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"})
NORMS = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"})

# Values leave as they came, one for one: rounding before equals rounding after.
MOVES = frozenset(
    """reshape view flatten permute transpose t mt contiguous squeeze unsqueeze movedim swapaxes flip roll
    pixel_shuffle pixel_unshuffle channel_shuffle expand expand_as repeat repeat_interleave tile clone detach
    unflatten max_pool1d max_pool2d max_pool3d dropout dropout1d dropout2d adaptive_max_pool2d pad
    upsample_nearest interpolate_nearest identity to float type_as ravel view_as reshape_as""".split()
)
# Some of the values leave: whether both sides share a range depends on where they came from.
SLICES = frozenset("getitem chunk split tensor_split select narrow unbind slice index_select".split())
JOINS = frozenset("cat stack hstack vstack dstack".split())
# Monotone and zero-preserving clips: they become bounds of the rounding that follows.
CLIPS = frozenset("relu relu6 hardtanh clamp clip clamp_min clamp_max threshold".split())
# Elementwise functions of one tensor: a table of 256 entries.
UNARY = frozenset(
    """gelu silu sigmoid tanh hardswish hardsigmoid elu celu selu leaky_relu softplus mish hardshrink softsign
    logsigmoid exp erf sqrt abs square""".split()
)
BINARY = frozenset("add sub mul".split())
POOLS = frozenset(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean".split()
)
MATMULS = frozenset("matmul bmm rmatmul".split())
ATTENTION = frozenset({"scaled_dot_product_attention"})
FUNCTIONAL_LAYERS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
