"""Fused layers: plain sequences, which the dataflow fuses by itself."""

from __future__ import annotations

from torch import nn


class _Fused(nn.Sequential):
    """Layers one after another."""


class ConvReLU1d(_Fused):
    """Convolution, ReLU."""


class ConvReLU2d(_Fused):
    """Convolution, ReLU."""


class ConvReLU3d(_Fused):
    """Convolution, ReLU."""


class LinearReLU(_Fused):
    """Linear, ReLU."""


class ConvBn1d(_Fused):
    """Convolution, norm."""


class ConvBn2d(_Fused):
    """Convolution, norm."""


class ConvBn3d(_Fused):
    """Convolution, norm."""


class ConvBnReLU1d(_Fused):
    """Convolution, norm, ReLU."""


class ConvBnReLU2d(_Fused):
    """Convolution, norm, ReLU."""


class ConvBnReLU3d(_Fused):
    """Convolution, norm, ReLU."""


class BNReLU2d(_Fused):
    """Norm, ReLU."""


class BNReLU3d(_Fused):
    """Norm, ReLU."""


class LinearBn1d(_Fused):
    """Linear, norm."""
