"""Transformer stacks of torch.nn on their plain path, so that the modules inside are called and seen.

In eval mode torch takes short cuts: a layer hands its raw weights to one fused kernel, an encoder packs padded batches
into nested tensors, and both stacks look into a mask to find out whether it is causal, which no exporter can follow.
The results are the same without.
"""

from __future__ import annotations

from torch import Tensor, nn


class PlainEncoder(nn.TransformerEncoder):
    """An encoder that takes a mask as it is."""

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """As `nn.TransformerEncoder`; a mask counts as causal only where the caller says so."""
        return super().forward(src, mask, src_key_padding_mask, bool(is_causal))


class PlainDecoder(nn.TransformerDecoder):
    """A decoder that takes a mask as it is."""

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `nn.TransformerDecoder`; a mask counts as causal only where the caller says so."""
        paddings = tgt_key_padding_mask, memory_key_padding_mask
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, *paddings, bool(tgt_is_causal), memory_is_causal
        )


def take_plain_paths(root: nn.Module) -> None:
    """Turn the short cuts off in a clone of the user's model; its parameters and their names stay."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # asked for nowhere but before the fused kernel
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if type(module) is nn.TransformerEncoder:
            module.__class__ = PlainEncoder
        elif type(module) is nn.TransformerDecoder:
            module.__class__ = PlainDecoder
