"""Batch normalisation that trains beside the convolution it will be folded into."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class LiveNorm(_BatchNorm):
    """The float module's parameters, statistics and settings; `frozen`, it uses its running statistics in train mode.

    A frozen norm neither reads nor writes the statistics of a batch. eps and momentum are those of the float module.
    """

    def __init__(self, module: _BatchNorm) -> None:
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer)
        self.frozen = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the class this is a twin of)
        """[N, C, *space] -> the same."""
        if not (self.frozen and self.training):
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class LiveNorm1d(LiveNorm, nn.BatchNorm1d):
    """See `LiveNorm`."""


class LiveNorm2d(LiveNorm, nn.BatchNorm2d):
    """See `LiveNorm`."""


class LiveNorm3d(LiveNorm, nn.BatchNorm3d):
    """See `LiveNorm`."""


_BY_RANK: dict[type[nn.Module], type[LiveNorm]] = {
    nn.BatchNorm1d: LiveNorm1d,
    nn.BatchNorm2d: LiveNorm2d,
    nn.BatchNorm3d: LiveNorm3d,
}


def live(module: nn.Module) -> LiveNorm | None:
    """The live form of a batch norm; None for modules of other classes."""
    kind = next((k for base, k in _BY_RANK.items() if isinstance(module, base)), None)
    return None if kind is None else kind(module)  # type: ignore[arg-type]
